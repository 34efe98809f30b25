"""The flags of `netapply istio-iptables` for --help and completion. The command itself reads them without argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from netapply.importers.istio_settings import SHORT, WITHOUT_EFFECT, IstioSettings, spelled

MEANING = {
    "envoy_port": "port to which outbound TCP is redirected",
    "inbound_capture_port": "port to which inbound TCP is redirected, or given by TPROXY",
    "inbound_tunnel_port": "the tunnel's port, which is never captured",
    "proxy_uid": "user ids of the proxy, which is left alone; by default that of $ENVOY_USER, or 1337",
    "proxy_gid": "group ids of the proxy; by default the same as the user ids",
    "istio_inbound_interception_mode": "REDIRECT or TPROXY",
    "istio_inbound_tproxy_mark": "packet mark of TPROXY",
    "istio_inbound_tproxy_route_table": "routing table of TPROXY",
    "istio_inbound_ports": "inbound ports to capture; * is all, nothing is none",
    "istio_local_exclude_ports": "inbound ports to leave alone, where all others are captured",
    "istio_service_cidr": "destinations to capture, as blocks; * is all, nothing is none",
    "istio_service_exclude_cidr": "destinations to leave alone, as blocks",
    "istio_outbound_ports": "outbound ports to capture whatever the destination",
    "istio_local_outbound_ports_exclude": "outbound ports to leave alone",
    "istio_exclude_interfaces": "interfaces whose traffic is left alone",
    "kube_virt_interfaces": "interfaces whose inbound traffic is captured as outbound",
    "redirect_dns": "capture queries to the servers of /etc/resolv.conf",
    "capture_all_dns": "with the former: capture queries to every server",
    "drop_invalid": "drop what connection tracking calls invalid",
    "dual_stack": "program IPv6 if any address is one, not just the first",
    "network_namespace": "the namespace to program: a path, or a name; that of the process by default",
    "cni_mode": "lock the namespace instead of the node's /run/xtables.lock",
    "dry_run": "print what would be applied, and touch nothing",
    "skip_rule_apply": "apply nothing",
    "run_validation": "prove that a connection is captured; exit code 126 if not",
    "iptables_probe_port": "the port that validation calls",
    "probe_timeout": "how long validation tries",
    "reconcile": "accepted: differences are always put right",
    "cleanup_only": "remove the rules and apply none",
    "force_apply": "accepted: what stands is always compared rule by rule",
    "native_nftables": "native nftables instead of a dialect of iptables",
    "force_iptables_binary": "legacy or nft: that dialect of iptables",
}
OWN = {
    "layout": "whose arrangement of the rules: istio (today's), istio-1.11, istio-1.4, netapply; default istio",
    "backend": "auto, iptables-legacy, iptables-nft, nftables; default auto, the dialect of iptables that is in use",
    "state_dir": "where the journal is; default /run/netapply",
    "lock_timeout": "seconds to wait for the xtables lock; default 30",
    "output": "text or json",
}
_LETTERS = {name: letter for letter, name in SHORT.items()}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Istio's flags and ours."""
    istio = parser.add_argument_group("flags of istio-iptables (each has a variable: upper-cased, - as _)")
    for name, meaning in MEANING.items():
        default = IstioSettings._field_defaults[name]
        text = f"{meaning} (default {default})" if default and default != "*" else meaning
        _add(istio.add_argument, name, text, boolean=isinstance(default, bool))
    own = parser.add_argument_group("flags of netapply (each has a variable: NETAPPLY_ and the name)")
    for name, meaning in OWN.items():
        _add(own.add_argument, name, meaning, boolean=False)
    for name, boolean in WITHOUT_EFFECT.items():
        _add(parser.add_argument, name, argparse.SUPPRESS, boolean=boolean)


def _add(add: Callable[..., argparse.Action], name: str, meaning: str, *, boolean: bool) -> None:
    names = [f"-{_LETTERS[name]}"] if name in _LETTERS else []
    if boolean:
        add(*names, spelled(name), action="store_true", help=meaning)
    else:
        add(*names, spelled(name), metavar=name.rpartition("_")[2].upper(), help=meaning)
