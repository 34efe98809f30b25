"""Istio's layouts: the plans of its settings, in the chains of each of its versions. Generated, with stable names.

A layout never changes a decision, so what must become of each flow is what `decide` says of the plan; whether by
redirect or by TPROXY is left open: over `lo` Istio's chains hand the proxy's self-calls to the same port by either.
"""

from __future__ import annotations

from collections.abc import Iterator

from netapply.conformance.case import Case, Level, Probe, Sender, Verdict
from netapply.conformance.cases.words import APP, BY_GROUP, DIRECT, PROXY, ROOT, hosts, into, out
from netapply.conformance.flows import flow_of, packed, verdict_of
from netapply.conformance.world import POD
from netapply.decide import decide
from netapply.importers.istio import Facts, Version, plan_from_settings
from netapply.importers.istio_settings import IstioSettings
from netapply.plan import CapturePlan
from netapply.planfile import dump_plan
from netapply.ruleset import FAMILIES

_VERSIONS: tuple[Version, ...] = ("istio", "istio-1.11", "istio-1.4")
_WIDE = IstioSettings(
    istio_inbound_ports="*",
    istio_service_cidr="*",
    istio_local_exclude_ports="15090,15021,15020",
    dual_stack=True,
)
_SETTINGS: dict[str, IstioSettings] = {
    "redirect": _WIDE,
    "TPROXY": _WIDE._replace(istio_inbound_interception_mode="TPROXY"),
    "DNS": _WIDE._replace(redirect_dns=True),
    "all DNS": _WIDE._replace(redirect_dns=True, capture_all_dns=True),
    "invalid packets": _WIDE._replace(drop_invalid=True),
    "port lists": _WIDE._replace(istio_inbound_ports="8080,15021", istio_local_outbound_ports_exclude="22,15012"),
    "CIDR lists": _WIDE._replace(
        istio_service_cidr="198.51.100.0/24,2001:db8:7::/48", istio_service_exclude_cidr="198.51.100.7/32"
    ),
    "included ports": _WIDE._replace(istio_service_cidr="", istio_outbound_ports="443"),
    "excluded owners": _WIDE._replace(istio_outbound_owner_groups_exclude="2000"),
    "included owners": _WIDE._replace(istio_outbound_owner_groups="2000,3000"),
    "excluded devices": _WIDE._replace(istio_exclude_interfaces="eth1"),
    "rerouted devices": _WIDE._replace(kube_virt_interfaces="docker0"),
    "TPROXY and DNS": _WIDE._replace(istio_inbound_interception_mode="TPROXY", redirect_dns=True),
    "IPv4 alone": _WIDE._replace(dual_stack=False),
}
_CORE = {"redirect", "TPROXY", "DNS", "port lists"}


def _flows() -> Iterator[Probe]:
    """Out, in, over lo and DNS, by everybody whom the rules tell apart; what must become of them is filled in."""
    for sender in (APP, PROXY, BY_GROUP, ROOT, Sender(1, 2000), Sender(1000, 1000, (1337,))):
        yield from (*out(DIRECT, sender=sender), *out(DIRECT, "elsewhere", 443, sender=sender))
        yield from (*out(DIRECT, "pod", 8080, sender=sender), *out(DIRECT, "loopback", 8080, sender=sender))
        yield from (*out(DIRECT, port=53, protocol="udp", sender=sender), *out(DIRECT, port=53, sender=sender))
    yield from (*out(DIRECT, "elsewhere"), *out(DIRECT, "198.51.100.8"), *out(DIRECT, "nearby"), *out(DIRECT, port=22))
    yield from out(DIRECT, "elsewhere", device="eth1")
    for port in (8080, 22, 15008, 15020, 15021, 15090):
        yield from into(DIRECT, port)
    yield from (*into(DIRECT, device="eth1"), *into(DIRECT, device="docker0"), *into(DIRECT, 8080, "udp"))


def _plan(version: Version, name: str) -> CapturePlan | None:
    """The plan of these settings; None where that version knows no such setting."""
    settings = _SETTINGS[name]
    if version == "istio-1.4" and (settings.redirect_dns or settings.drop_invalid):
        return None
    addresses = tuple(packed(POD[family]) for family in FAMILIES if settings.dual_stack or family == "ip")
    return plan_from_settings(settings, version, Facts(addresses, tuple(hosts("remote"))))


def _expected(plan: CapturePlan, probe: Probe) -> Verdict:
    verdict = verdict_of(decide(plan, flow_of(probe)))
    return verdict if verdict.address else verdict._replace(by="")


def _cases() -> Iterator[Case]:
    for version in _VERSIONS:
        for name in _SETTINGS:
            plan = _plan(version, name)
            if plan is None:
                continue
            probes = tuple(probe._replace(expect=_expected(plan, probe)) for probe in dict.fromkeys(_flows()))
            level: Level = "core" if version == "istio" and name in _CORE else "full"
            proxy = BY_GROUP if plan.inbound.mode == "tproxy" else PROXY
            yield Case(f"layout {version}: {name}", level, dump_plan(plan), probes, version, proxy=proxy)
    for name in ("redirect", "TPROXY and DNS"):
        plan = _plan("istio", name)
        if plan is not None:
            yield Case(
                f"drift: layout istio, {name}", "full", dump_plan(plan), out(DIRECT, sender=PROXY), "istio", "drift"
            )


CASES: tuple[Case, ...] = tuple(_cases())
