"""Istio's layouts mean the same in every dialect, by packets: the native table decides as Istio's own chains do."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest

import netapply
from netapply.backend import BUILT_IN
from netapply.importers.istio import Facts, Version, plan_from_settings
from netapply.importers.istio_settings import IstioSettings
from netapply.lab import ADDRESSES, Answer, Lab, traffic_types
from netapply.lab.actors import Identity
from netapply.plan import CapturePlan
from netapply.ruleset import FAMILIES

VERSIONS: tuple[Version, ...] = ("istio", "istio-1.11", "istio-1.4")
WIDE = IstioSettings(istio_inbound_ports="*", istio_service_cidr="*", istio_local_exclude_ports="15090,15021,15020")
TPROXY = WIDE._replace(istio_inbound_interception_mode="TPROXY")
SETTINGS = {
    "redirect": WIDE,
    "tproxy": TPROXY,
    "dns": WIDE._replace(redirect_dns=True),
    "all dns": WIDE._replace(redirect_dns=True, capture_all_dns=True),
    "drop invalid": WIDE._replace(drop_invalid=True),
    "lists": IstioSettings(
        istio_inbound_ports="8080,15021",
        istio_service_cidr=f"{ADDRESSES['ip'].elsewhere}/32,{ADDRESSES['ip6'].elsewhere}/128",
        istio_service_exclude_cidr=f"{ADDRESSES['ip'].virtual}/32",
        istio_outbound_ports="80",
        istio_local_outbound_ports_exclude="15012",
    ),
    "owner groups": WIDE._replace(istio_outbound_owner_groups_exclude="0"),
    "tproxy, lists": TPROXY._replace(istio_inbound_ports="8080", redirect_dns=True),
}

#: Seconds for an answer: those that never come must not take the minute.
PATIENCE = 0.4


def packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def imported(version: Version, settings: IstioSettings, *, ipv6: bool) -> CapturePlan | None:
    """The plan; None where that version knows no such setting."""
    if version == "istio-1.4" and (settings.redirect_dns or settings.drop_invalid):
        return None
    families = FAMILIES if ipv6 else ("ip",)
    given = settings._replace(dual_stack=ipv6)
    facts = Facts(
        tuple(packed(ADDRESSES[family].pod) for family in families),
        tuple(ADDRESSES[family].remote for family in families),
    )
    return plan_from_settings(given, version, facts)


@contextlib.contextmanager
def captured(lab: Lab, plan: CapturePlan, backend: str, layout: str) -> Iterator[None]:
    with netapply.open(lab.pod.path) as capture:
        capture.apply(plan, backend=backend, layout=layout)
        try:
            yield
        finally:
            capture.clean()


async def answers(lab: Lab) -> dict[str, tuple[object, ...]]:
    """What comes of every flow: who answered, by way of which ports, for which destination; or how it failed."""
    found: dict[str, tuple[object, ...]] = {}
    for traffic in traffic_types("redirect", lab.families):
        found[f"{traffic.name} {traffic.family}"] = _seen(await lab.send(traffic.send, timeout=PATIENCE))
    for family in lab.families:
        ours = ADDRESSES[family]
        for server in (ours.remote, ours.elsewhere):
            for actor in ("app", "proxy"):
                for over in ("udp", "tcp"):
                    answer = await lab.dns(actor, (server, 53), over=over, timeout=PATIENCE)  # type: ignore[arg-type]  # one of the two
                    found[f"dns {actor} {server} {over}"] = _seen(answer)
    return found


def _seen(answer: Answer) -> tuple[object, ...]:
    return answer.who, answer.via_ports, answer.original_dst, answer.error


@pytest.mark.parametrize("ipv6", [True, False], ids=["dual stack", "ipv4"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("version", VERSIONS)
async def test_every_dialect_gives_the_same_verdict_on_every_flow(
    version: Version, name: str, figure: Callable[[str], None], *, ipv6: bool
) -> None:
    plan = imported(version, SETTINGS[name], ipv6=ipv6)
    if plan is None:
        pytest.skip("Istio 1.4 captures no DNS and drops nothing")
    # In Istio's TPROXY mode the proxy runs as root with gid 1337, or its own connections come back to it.
    proxy = Identity(0, 1337) if plan.inbound.mode == "tproxy" else Identity(1337, 1337)
    async with Lab(proxy=proxy) as lab:
        seen: dict[str, dict[str, tuple[object, ...]]] = {}
        for backend in BUILT_IN:
            with captured(lab, plan, backend, version):
                seen[backend] = await answers(lab)
        if (version, plan.inbound.mode) == ("istio-1.4", "tproxy"):
            # There the proxy's own connections to the application come back to it for ever: not reproduced.
            for flows in seen.values():
                for flow in [each for each in flows if each.startswith(("remote to app", "app to own"))]:
                    del flows[flow]
        assert seen["nftables"] == seen["iptables-nft"] == seen["iptables-legacy"]
        figure(f"{len(seen['nftables'])} flows, the same in {len(seen)} dialects")
