"""What istio-iptables itself may have left in a namespace, whichever version ran there."""

from __future__ import annotations

from collections.abc import Iterator

from netapply.errors import NetapplyError
from netapply.importers.istio import Facts, Version, plan_from_settings
from netapply.importers.istio_settings import IstioSettings
from netapply.ownership import Adopted, leftovers
from netapply.plan import CapturePlan

#: Each version with all that it can put straight into built-in chains: what it does without DNS or TPROXY is part of
#: that. Queries are captured to the servers of resolv.conf, or to all.
_VARIANTS: tuple[tuple[Version, bool, bool], ...] = (
    ("istio", False, False),
    ("istio-1.11", True, False),
    ("istio-1.11", True, True),
    ("istio-1.4", False, False),
)


def istio_leftovers(settings: IstioSettings, facts: Facts) -> Adopted:
    """Rules of Istio's in built-in chains, as its settings would make them, and its routing, in both families."""
    return leftovers(_plans(settings, facts))


def _plans(settings: IstioSettings, facts: Facts) -> Iterator[tuple[CapturePlan, str]]:
    widest = settings._replace(istio_inbound_interception_mode="TPROXY", istio_inbound_ports="*", dual_stack=True)
    for version, dns, every_server in _VARIANTS:
        try:
            plan = plan_from_settings(widest._replace(redirect_dns=dns, capture_all_dns=every_server), version, facts)
        except NetapplyError:
            continue  # settings that this version refuses have left nothing
        yield plan, version
