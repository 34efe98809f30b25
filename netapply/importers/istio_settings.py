"""The flags and environment variables of istio-iptables, as Istio reads them. Pure.

Flags are read as by pflag, for which Istio's command line is made; values as by Go's strconv and time packages. Names
of variables are those of the flags, upper-cased, with an underscore for each dash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from netapply.errors import Fault, PlanError
from netapply.values import NamedTuple


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
    "c": "istio_exclude_interfaces", "k": "kube_virt_interfaces", "n": "dry_run", "f": "restore_format",
}  # fmt: skip
#: Flags that change no rule, with whether they are boolean: Istio's log (they stand in every injected init container),
#: and what istio-iptables of 1.5 to 1.20 had beside the others.
WITHOUT_EFFECT = {
    "log_output_level": False, "log_as_json": True, "log_caller": False, "log_stacktrace_level": False,
    "log_target": False, "vklog": False, "restore_format": True, "iptables_trace_logging": True, "output_paths": False,
}  # fmt: skip
#: Second names in the environment; they beat the first.
ALIASES = {"redirect_dns": "ISTIO_META_DNS_CAPTURE", "drop_invalid": "INVALID_DROP", "dual_stack": "ISTIO_DUAL_STACK"}
#: Variables in which an empty value is one: no group at all.
TELLING_EMPTY = "istio_outbound_owner_groups"
#: As Go's strconv.ParseBool.
_TRUE = ("1", "t", "T", "true", "TRUE", "True")
WORDS = {word: word in _TRUE for word in (*_TRUE, "0", "f", "F", "false", "FALSE", "False")}
#: As Go's time.ParseDuration, in seconds.
UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
PORT = "write a port of 1 to 65535"


def parse_settings(argv: Iterable[str], env: Mapping[str, str], notes: list[str] | None = None) -> IstioSettings:
    """The settings of a command line and an environment; a flag beats the environment.

    `notes` gets a line for each thing that Istio passes over in silence. Raises PlanError with every unknown flag,
    missing value, and value of a wrong kind.
    """
    faults: list[Fault] = []
    settings, _ = read_command(argv, env, {}, faults, [] if notes is None else notes)
    if faults:
        raise PlanError(tuple(faults))
    return settings


def read_command(
    argv: Iterable[str],
    env: Mapping[str, str],
    own: Mapping[str, Callable[[str], str]],
    faults: list[Fault],
    notes: list[str],
) -> tuple[IstioSettings, dict[str, str]]:
    """The settings, and the values of flags that are not Istio's; `faults` and `notes` get what there is to say.

    `own` are these flags by name, each with a function that says what it accepts of a value, "" if that. They take a
    value each, and have a variable each, NETAPPLY_ and the name.
    """
    flags = _Flags(frozenset(own), faults, notes)
    flags.read([*argv])
    given = _environment(env, notes) | {name: text for name in own if (text := env.get(f"NETAPPLY_{name.upper()}"))}
    values: dict[str, str | bool] = {}
    mine: dict[str, str] = {}
    for name, text in (given | flags.found).items():
        if name in own:
            mine[name] = text
            if accepted := own[name](text):
                faults.append(Fault(spelled(name), text or "nothing", accepted))
        elif name in IstioSettings._fields:
            values[name] = _value(name, text, faults)
    return IstioSettings(**values), mine  # type: ignore[arg-type]  # each has the type of its field's default


def spelled(name: str) -> str:
    """The flag of a field; the variable where there is no flag."""
    if name in ENVIRONMENT_ALONE:
        return name.upper()
    return "--" + (name if name.startswith("log_") else name.replace("_", "-"))


def seconds(text: str) -> float | None:
    """A duration as Go's time.ParseDuration reads it ("1m30s", "500ms"); None for anything else."""
    rest, total = text.lstrip("+-"), 0.0
    if rest == "0":
        return 0.0
    if not rest or len(text) - len(rest) > 1:
        return None
    while rest:
        number = _leading(rest, lambda c: c in "0123456789.")
        unit = _leading(rest[len(number) :], lambda c: c not in "0123456789.")
        if unit not in UNITS or number.count(".") > 1 or not number.strip("."):
            return None
        total += float(number) * UNITS[unit]
        rest = rest[len(number) + len(unit) :]
    return -total if text.startswith("-") else total


def _leading(text: str, belongs: Callable[[str], bool]) -> str:
    return text[: next((at for at, c in enumerate(text) if not belongs(c)), len(text))]


def _is_boolean(name: str) -> bool:
    return WITHOUT_EFFECT.get(name, isinstance(IstioSettings._field_defaults.get(name), bool))


def _value(name: str, text: str, faults: list[Fault]) -> str | bool:
    accepted = ""
    if _is_boolean(name):
        accepted = "" if text in WORDS else "write true or false"
    elif name == "iptables_probe_port":
        accepted = "" if text.isascii() and text.isdigit() and 0 < int(text) < 1 << 16 else PORT
    elif name == "probe_timeout":
        accepted = "write a duration as 5s or 1m30s" if seconds(text) is None else ""
    elif name == "force_iptables_binary":
        accepted = "" if text in ("", "legacy", "nft") else "write legacy or nft"
    if accepted:
        faults.append(Fault(spelled(name), text or "nothing", accepted))
    return WORDS.get(text, False) if _is_boolean(name) else text


def _environment(env: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    """Variables by field. Empty ones count as unset; a boolean that is none, or empty, is false, as Istio has it."""
    names = [(field, field.upper()) for field in IstioSettings._fields]
    names += ALIASES.items()
    found: dict[str, str] = {}
    for field, name in names:
        text = env.get(name, "")
        if name.endswith("_PORT") and "://" in text:
            # Kubernetes gives every container such variables of the services in its namespace: of one that is called
            # "envoy", ENVOY_PORT=tcp://10.96.0.7:80.
            notes.append(f"{name}={text} is not read: it speaks of a Kubernetes service")
        elif name in env and _is_boolean(field) and text not in WORDS:
            if text:
                notes.append(f"{name}={text} is neither true nor false, and counts as false")
            found[field] = "false"
        elif text or (name in env and field == TELLING_EMPTY):
            found[field] = text
    return found


class _Flags:
    """Words of a command line, by field, as pflag reads them: a boolean takes a value after `=` alone."""

    def __init__(self, own: frozenset[str], faults: list[Fault], notes: list[str]) -> None:
        self.found: dict[str, str] = {}
        self._known = (frozenset(IstioSettings._fields) - ENVIRONMENT_ALONE) | WITHOUT_EFFECT.keys() | own
        self._faults, self._notes = faults, notes

    def read(self, words: list[str]) -> None:
        words.reverse()
        while words:
            word = words.pop()
            if word == "--":
                self._pass_over(*reversed(words))
                return
            if word.startswith("--"):
                self._long(word, words)
            elif word.startswith("-") and word != "-":
                self._short(word, words)
            else:
                self._pass_over(word)

    def _pass_over(self, *words: str) -> None:
        self._notes.extend(f"{word!r} is not read: it belongs to no flag" for word in words)

    def _unknown(self, word: str) -> None:
        self._faults.append(Fault("argument", word, "write a flag of istio-iptables; --help lists them"))

    def _long(self, word: str, rest: list[str]) -> None:
        text, given, value = word[2:].partition("=")
        name = text.replace("-", "_")
        if name not in self._known or "--" + text != spelled(name):
            self._unknown(word)
        else:
            self._take(name, value if given else None, rest)

    def _short(self, word: str, rest: list[str]) -> None:
        """Letters of one word: booleans, and one that takes a value, which may follow it at once or after `=`."""
        letters = word[1:]
        while letters:
            name, letters = SHORT.get(letters[0]), letters[1:]
            if name is None:
                self._unknown(word)
                return
            if letters[:1] == "=" or (letters and not _is_boolean(name)):
                self._take(name, letters.removeprefix("="), rest)
                return
            self._take(name, None, rest)

    def _take(self, name: str, attached: str | None, rest: list[str]) -> None:
        if attached is not None:
            self.found[name] = attached
        elif _is_boolean(name):
            self.found[name] = "true"
        elif rest:
            self.found[name] = rest.pop()
        else:
            self._faults.append(Fault(spelled(name), "nothing", "write a value"))
