"""Where each field of an imported plan comes from: the flag, variable or annotation, or Istio's own ways. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from netapply.fields import is_mapping
from netapply.importers.istio import Version
from netapply.importers.readings import Reading, Source
from netapply.plan import CapturePlan
from netapply.planfile import dump_plan
from netapply.values import NamedTuple


class Origin(NamedTuple):
    """What a field of the plan comes from.

    `setting` is the setting that the field is, "" if there is none; `also` are others that may decide it. `otherwise`
    is why it has its value where none of them was given.
    """

    setting: str = ""
    also: tuple[str, ...] = ()
    otherwise: str = "Istio's default"


_APPENDS = "Istio appends its rules"
ORIGINS: Mapping[str, Origin] = {
    "proxy.uids": Origin("proxy_uid", ("envoy_user",), "Istio's default: the uid of user istio-proxy"),
    "proxy.gids": Origin("proxy_gid", ("proxy_uid", "envoy_user"), "Istio's default: as the uid"),
    "proxy.allow_root": Origin("", ("proxy_uid", "proxy_gid"), "Istio lets root be exempt"),
    "proxy.outbound_port": Origin("envoy_port"),
    "proxy.inbound_port": Origin("inbound_capture_port", ("envoy_port",)),
    "proxy.tunnel_port": Origin("inbound_tunnel_port", (), "Istio 1.4 has no tunnel"),
    "proxy.tunnel_exempt": Origin("", (), "Istio: where the tunnel's port is left alone"),
    "proxy.loopback": Origin("istio_outbound_ipv4_loopback_cidr"),
    "proxy.self_calls": Origin("", (), "Istio: whose calls to their own address go back inbound"),
    "for_ipv6": Origin(
        "", (), "Istio 1.11: for IPv6 neither TPROXY nor DNS, and loopback and virtual machines otherwise"
    ),
    "inbound.mode": Origin("istio_inbound_interception_mode"),
    "inbound.ports.include": Origin("istio_inbound_ports", (), "Istio's default: none"),
    "inbound.ports.exclude": Origin("istio_local_exclude_ports"),
    "inbound.destinations.exclude": Origin("", (), "Istio: not to loopback by TPROXY"),
    "inbound.tproxy.mark": Origin("istio_inbound_tproxy_mark"),
    "inbound.tproxy.table": Origin("istio_inbound_tproxy_route_table"),
    "inbound.tproxy.port": Origin("", ("envoy_port",), "Istio 1.4: TPROXY goes to the outbound port"),
    "inbound.tproxy.before_reroute": Origin("", (), "Istio: TPROXY comes before virtual interfaces"),
    "inbound.placement": Origin("", (), _APPENDS),
    "outbound.cidrs.include": Origin("istio_service_cidr", (), "Istio's default: none"),
    "outbound.cidrs.exclude": Origin("istio_service_exclude_cidr"),
    "outbound.ports.include": Origin("istio_outbound_ports"),
    "outbound.ports.exclude": Origin("istio_local_outbound_ports_exclude"),
    "outbound.owners.include": Origin("istio_outbound_owner_groups"),
    "outbound.owners.exclude": Origin("istio_outbound_owner_groups_exclude"),
    "outbound.loopback": Origin("", ("istio_service_cidr",)),
    "outbound.placement": Origin("", (), _APPENDS),
    "interfaces.exclude": Origin("istio_exclude_interfaces"),
    "interfaces.reroute": Origin("kube_virt_interfaces"),
    "dns.capture": Origin("redirect_dns"),
    "dns.servers": Origin("", (), "from resolv.conf"),
    "dns.udp_exempt": Origin("", (), "Istio 1.11: what exempts queries over UDP"),
    "dns.self_calls": Origin("", (), "Istio: whose queries over TCP to their own address go back inbound"),
    "ipv6": Origin("dual_stack"),
    "invalid": Origin("drop_invalid"),
}


def explain_fields(plan: CapturePlan, version: Version, reading: Reading) -> dict[str, str]:
    """A comment for each field of the plan that was given, or that has another value than an empty plan file."""
    document, defaults = dump_plan(plan), dump_plan(CapturePlan())
    given, comments = reading.given, dict[str, str]()
    for path, origin in ORIGINS.items():
        if origin.setting in given:
            comments[path] = given[origin.setting].text
        elif _at(document, path) != _at(defaults, path):
            decided = [given[each].text for each in origin.also if each in given]
            reasons = (reading.otherwise.get(path), reading.otherwise.get(origin.setting), origin.otherwise)
            comments[path] = next(filter(None, (*decided, *reasons)))
    if known := reading.otherwise.get("ipv6"):  # always told: nobody should have to know it
        comments["ipv6"] = "; ".join([given["dual_stack"].text, known] if "dual_stack" in given else [known])
    remarks = _of_oldest(plan) if version == "istio-1.4" else {}
    return (
        comments
        | _remarks(plan, version, given, comments)
        | {path: text for path, text in remarks.items() if path in comments}
    )


def _at(document: object, path: str) -> object:
    for name in path.split("."):
        document = document[name] if is_mapping(document) else None
    return document


def _of_oldest(plan: CapturePlan) -> dict[str, str]:
    """What Istio 1.4 does whatever it is told."""
    remarks = {"proxy.tunnel_port": "Istio 1.4 has no tunnel", "ipv6": "Istio 1.4 leaves IPv6 alone"}
    if plan.inbound.ports.include != "*":
        remarks["proxy.inbound_port"] = "Istio 1.4: a list of inbound ports goes to the outbound port"
    return remarks


def _remarks(
    plan: CapturePlan, version: Version, given: Mapping[str, Source], comments: Mapping[str, str]
) -> dict[str, str]:
    """Comments that take more than a name."""
    found: dict[str, str] = {}
    excluded = given.get("istio_local_exclude_ports")
    if excluded and plan.inbound.ports.include != "*":
        found["inbound.ports.exclude"] = f"{excluded.text} has effect with all inbound ports (-b '*') alone"
    elif version != "istio" and plan.inbound.ports.exclude:
        before = f"{excluded.text}; " if excluded else ""
        found["inbound.ports.exclude"] = f"{before}Istio {version.removeprefix('istio-')} leaves port 22 alone"
    if plan.outbound.loopback == "capture":
        found["outbound.loopback"] = f"{comments['outbound.cidrs.include']} has a block of loopback"
    if "capture_all_dns" in given:
        both = [given[name].text for name in ("redirect_dns", "capture_all_dns") if name in given]
        idle = "" if plan.dns.capture != "none" else " has no effect without --redirect-dns"
        found["dns.capture"] = " ".join(both) + idle
        if plan.dns.capture == "servers":
            found["dns.servers"] = f"{given['capture_all_dns'].text}: Istio 1.11 captures DNS for IPv4 alone"
    elif "redirect_dns" in given and plan.dns.capture == "none":
        found["dns.capture"] = f"{given['redirect_dns'].text}, and no server is known"
    return found
