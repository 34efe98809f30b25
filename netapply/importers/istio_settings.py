"""The flags and environment variables of istio-iptables, as Istio reads them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from netapply.errors import Fault, PlanError


class IstioSettings(NamedTuple):
    """Every setting of istio-iptables by the name of its flag; lists stay comma-separated text, as given."""

    envoy_port: str = "15001"
    inbound_capture_port: str = "15006"
    inbound_tunnel_port: str = "15008"
    proxy_uid: str = ""
    proxy_gid: str = ""
    istio_inbound_interception_mode: str = ""
    istio_inbound_tproxy_mark: str = "1337"
    istio_inbound_tproxy_route_table: str = "133"
    istio_inbound_ports: str = ""
    istio_local_exclude_ports: str = ""
    istio_service_cidr: str = ""
    istio_service_exclude_cidr: str = ""
    istio_outbound_ports: str = ""
    istio_local_outbound_ports_exclude: str = ""
    istio_exclude_interfaces: str = ""
    kube_virt_interfaces: str = ""
    redirect_dns: bool = False
    capture_all_dns: bool = False
    drop_invalid: bool = False
    dual_stack: bool = False
    network_namespace: str = ""
    cni_mode: bool = False
    dry_run: bool = False
    skip_rule_apply: bool = False
    run_validation: bool = False
    iptables_probe_port: str = "15002"
    probe_timeout: str = "5s"
    reconcile: bool = False
    cleanup_only: bool = False
    force_apply: bool = False
    native_nftables: bool = False
    force_iptables_binary: str = ""
    #: From the environment alone.
    istio_outbound_ipv4_loopback_cidr: str = "127.0.0.1/32"
    istio_outbound_owner_groups: str = "*"
    istio_outbound_owner_groups_exclude: str = ""
    envoy_user: str = "istio-proxy"


ENVIRONMENT_ALONE = frozenset(IstioSettings._fields[-4:])
SHORT = {
    "p": "envoy_port", "z": "inbound_capture_port", "e": "inbound_tunnel_port", "u": "proxy_uid", "g": "proxy_gid",
    "m": "istio_inbound_interception_mode", "t": "istio_inbound_tproxy_mark", "r": "istio_inbound_tproxy_route_table",
    "b": "istio_inbound_ports", "d": "istio_local_exclude_ports", "i": "istio_service_cidr",
    "x": "istio_service_exclude_cidr", "q": "istio_outbound_ports", "o": "istio_local_outbound_ports_exclude",
    "c": "istio_exclude_interfaces", "k": "kube_virt_interfaces", "n": "dry_run",
}  # fmt: skip
#: Second names in the environment.
ALIASES = {"redirect_dns": "ISTIO_META_DNS_CAPTURE", "drop_invalid": "INVALID_DROP", "dual_stack": "ISTIO_DUAL_STACK"}
#: As Go's strconv.ParseBool.
WORDS = dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True) | dict.fromkeys(
    ("0", "f", "F", "false", "FALSE", "False"), False
)


def parse_settings(argv: Iterable[str], env: Mapping[str, str]) -> IstioSettings:
    """The settings of a command line and an environment; a flag beats the environment.

    Raises PlanError with every unknown flag, missing value and word that is no boolean.
    """
    faults: list[Fault] = []
    given = _environment(env) | _flags([*argv], faults)
    values: dict[str, str | bool] = {}
    for name, text in given.items():
        if not isinstance(IstioSettings._field_defaults[name], bool):
            values[name] = text
        elif text in WORDS:
            values[name] = WORDS[text]
        else:
            faults.append(Fault(_flag(name), text or "nothing", "write true or false"))
    if faults:
        raise PlanError(tuple(faults))
    return IstioSettings(**values)  # type: ignore[arg-type]  # each value has the type of its field's default


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    """Empty variables count as unset, as with Istio's viper."""
    names = [(field, field.upper()) for field in IstioSettings._fields]
    names += ALIASES.items()
    return {field: env[name] for field, name in names if env.get(name)}


def _flags(words: list[str], faults: list[Fault]) -> dict[str, str]:
    """As pflag reads them; a boolean takes a value after `=` only."""
    found: dict[str, str] = {}
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            text, given, value = word[2:].partition("=")
            name: str | None = text.replace("-", "_") if "_" not in text else None
            attached = value if given else None
        else:
            name = SHORT.get(word[1:2]) if word.startswith("-") else None
            attached = word[2:].removeprefix("=") if len(word) > 2 else None
        if name not in IstioSettings._fields or name in ENVIRONMENT_ALONE:
            faults.append(Fault("argument", word, "write a flag of istio-iptables"))
        elif attached is not None:
            found[name] = attached
        elif isinstance(IstioSettings._field_defaults[name], bool):
            found[name] = "true"
        elif words:
            found[name] = words.pop(0)
        else:
            faults.append(Fault(_flag(name), "nothing", "write a value"))
    return found
