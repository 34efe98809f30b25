"""Istio's settings give Istio's rules, and the rules do what the plan decides."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from netapply.backend import Dialect
from netapply.compiler import compile_plan
from netapply.decide import decide
from netapply.errors import UnsupportedError
from netapply.evaluate import evaluate
from netapply.flow import Flow
from netapply.importers.istio import Facts, Version, plan_from_settings
from netapply.importers.istio_settings import IstioSettings, parse_settings
from netapply.plan import CapturePlan
from netapply.ruleset import Ruleset
from netapply_wire.iptables_save import save_table
from tests.strategies import flows

DATA = Path(__file__).parent / "data"
#: Settings of Istio's own tests, and more, some of them random: with what the real istio-iptables left in the kernel.
CORPUS = json.loads((DATA / "istio.json").read_text())
MORE = json.loads((DATA / "istio_more.json").read_text())
SPLIT, INET = Dialect("split", 15, 0), Dialect("inet", 0, 2)
VERSIONS: tuple[Version, ...] = ("istio", "istio-1.11", "istio-1.4")


def packed(text: str) -> bytes:
    host = text.partition("/")[0]
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)


def facts_of(setup: dict[str, Any]) -> Facts:
    return Facts(
        tuple(map(packed, setup["addresses"])),
        tuple(setup.get("resolv", ())),
        {},
        {"ftp": 21, **setup.get("groups", {})},
    )


def rules_of(ruleset: Ruleset) -> dict[str, dict[str, dict[str, list[str]]]]:
    """What is not empty, by family, table and chain, in words of iptables-save."""
    found: dict[str, dict[str, dict[str, list[str]]]] = {"ip": {}, "ip6": {}}
    for table in ruleset.tables:
        chains = found[table.family].setdefault(table.name, {})
        for line in save_table(table, every_chain=False).splitlines():
            if line.startswith("-A "):
                _, chain, rule = line.split(" ", 2)
                chains.setdefault(chain, []).append(rule)
    return found


@pytest.mark.parametrize("case", [*CORPUS, *MORE], ids=lambda case: case["id"])
def test_settings_of_istio_give_the_rules_that_istio_leaves_in_the_kernel(case: dict[str, Any]) -> None:
    plan = plan_from_settings(parse_settings(case["argv"], case["env"]), case["layout"], facts_of(case["setup"]))
    assert rules_of(compile_plan(plan, SPLIT, case["layout"])) == case["expect"]


LISTING_1_4 = """
PREROUTING -p tcp -j ISTIO_INBOUND
OUTPUT -p tcp -j ISTIO_OUTPUT
ISTIO_INBOUND -p tcp -m tcp --dport 22 -j RETURN
ISTIO_INBOUND -p tcp -m tcp --dport 15020 -j RETURN
ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006
ISTIO_OUTPUT -s 127.0.0.6/32 -o lo -j RETURN
ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -j ISTIO_IN_REDIRECT
ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN
ISTIO_OUTPUT -m owner --gid-owner 1337 -j RETURN
ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN
ISTIO_OUTPUT -j ISTIO_REDIRECT
ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
"""
LISTING_1_11 = """
PREROUTING -p tcp -j ISTIO_INBOUND
OUTPUT -p tcp -j ISTIO_OUTPUT
ISTIO_INBOUND -p tcp -m tcp --dport 15008 -j RETURN
ISTIO_INBOUND -p tcp -m tcp --dport 22 -j RETURN
ISTIO_INBOUND -p tcp -m tcp --dport 15090 -j RETURN
ISTIO_INBOUND -p tcp -m tcp --dport 15021 -j RETURN
ISTIO_INBOUND -p tcp -m tcp --dport 15020 -j RETURN
ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006
ISTIO_OUTPUT -s 127.0.0.6/32 -o lo -j RETURN
ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT
ISTIO_OUTPUT -o lo -m owner ! --uid-owner 1337 -j RETURN
ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN
ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -m owner --gid-owner 1337 -j ISTIO_IN_REDIRECT
ISTIO_OUTPUT -o lo -m owner ! --gid-owner 1337 -j RETURN
ISTIO_OUTPUT -m owner --gid-owner 1337 -j RETURN
ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN
ISTIO_OUTPUT -j ISTIO_REDIRECT
ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
"""


@pytest.mark.parametrize(
    ("version", "excluded", "listing"),
    [("istio-1.4", "15020", LISTING_1_4), ("istio-1.11", "15090,15021,15020", LISTING_1_11)],
)
def test_the_rules_of_a_pod_are_those_that_the_versions_documents_list(
    version: Version, excluded: str, listing: str
) -> None:
    flags = ["-p", "15001", "-z", "15006", "-u", "1337", "-m", "REDIRECT", "-i", "*", "-x", "", "-b", "*"]
    plan = plan_from_settings(parse_settings([*flags, "-d", excluded], {}), version, Facts((packed("10.9.9.9"),)))
    rules = rules_of(compile_plan(plan, SPLIT, version))
    wanted: dict[str, list[str]] = {}
    for chain, _, rule in (line.partition(" ") for line in listing.strip().splitlines()):
        wanted.setdefault(chain, []).append(rule)
    assert rules == {"ip": {"nat": wanted}, "ip6": {}}


def test_a_tunnel_port_stands_after_that_of_dns_whatever_its_number() -> None:
    settings_of = IstioSettings(inbound_tunnel_port="22", redirect_dns=True, capture_all_dns=True)
    plan = plan_from_settings(settings_of, "istio", Facts((packed("10.9.9.9"),)))
    self_call = rules_of(compile_plan(plan, SPLIT, "istio"))["ip"]["nat"]["ISTIO_OUTPUT"][1]
    assert " -m multiport ! --dports 53,22 " in self_call


def some(*values: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(values), max_size=3, unique=True).map(",".join)


PORTS = some("22", "53", "80", "443", "15020", "15008", "15021")
CIDRS = some("10.0.0.0/24", "10.0.1.9/32", "192.168.0.0/16", "127.0.0.1/32", "fd00::/16", "fd00::5/128", "0.0.0.0/0")
every_setting = st.fixed_dictionaries(
    {
        "proxy_uid": st.sampled_from(["", "1337", "1337,2000", "2000,1337"]),
        "proxy_gid": st.sampled_from(["", "1337", "1000", "1000,2000"]),
        "istio_inbound_interception_mode": st.sampled_from(["", "REDIRECT", "TPROXY"]),
        "istio_inbound_ports": st.just("*") | PORTS,
        "istio_local_exclude_ports": PORTS,
        "istio_service_cidr": st.just("*") | CIDRS,
        "istio_service_exclude_cidr": CIDRS,
        "istio_outbound_ports": PORTS,
        "istio_local_outbound_ports_exclude": PORTS,
        "istio_exclude_interfaces": some("eth1"),
        "kube_virt_interfaces": some("docker0", "br+"),
        "redirect_dns": st.booleans(),
        "capture_all_dns": st.booleans(),
        "drop_invalid": st.booleans(),
        "dual_stack": st.booleans(),
        "istio_outbound_ipv4_loopback_cidr": st.sampled_from(["127.0.0.1/32", "127.0.0.0/8"]),
    }
)
groups = st.sampled_from([("*", ""), ("*", "1000"), ("*", "1000,2000"), ("1000", ""), ("1000,1337", "")])


@st.composite
def imported(draw: st.DrawFn, version: Version) -> CapturePlan:
    include, exclude = draw(groups)
    values = cast("dict[str, Any]", draw(every_setting))
    made = IstioSettings(
        **(values | {"redirect_dns": values["redirect_dns"] and version != "istio-1.4"}),
        istio_outbound_owner_groups=include,
        istio_outbound_owner_groups_exclude=exclude,
    )
    addresses = draw(
        st.sampled_from([(packed("10.9.9.9"),), (packed("fd99::2"),), (packed("10.9.9.9"), packed("fd99::2"))])
    )
    servers = draw(st.sampled_from([(), ("10.0.0.5",), ("127.0.0.6", "fd00::5"), ("fd00::5",)]))
    return plan_from_settings(made, version, Facts(addresses, servers))


@pytest.mark.parametrize("dialect", [SPLIT, INET], ids=["split", "inet"])
@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=300, deadline=None)
@given(data=st.data(), flow=flows())
def test_walking_the_rules_gives_what_the_imported_plan_decides(
    version: Version, dialect: Dialect, data: st.DataObject, flow: Flow
) -> None:
    plan = data.draw(imported(version))
    # Istio's TPROXY rule takes packets in state INVALID too, of which no connection comes.
    assume(plan.inbound.mode != "tproxy" or flow.state != "invalid")
    # Nor do its rules ask whether what is new to conntrack opens a connection.
    assume(flow.state != "picked-up")
    # There a call to oneself is marked, and taken by TPROXY when it comes in over lo; and the proxy's marked
    # connections to the application come back to it, unless it runs as root. Packets show both, one hook does not.
    assume(plan.inbound.mode != "tproxy" or dialect is INET or not (flow.iface == "lo" or flow.mark))
    trace, wanted = evaluate(compile_plan(plan, dialect, version), flow), decide(plan, flow)
    if dialect is SPLIT:
        # Istio tracks every query but the proxy's own as captured. Zones are no part of what becomes of a flow.
        wanted = wanted._replace(zone=trace.decision.zone)
    assert trace.decision.same_as(wanted), (trace.decision, wanted, trace.decided)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plan_that_istio_cannot_say_is_refused_with_the_fields(version: Version) -> None:
    with pytest.raises(UnsupportedError, match=r"inbound\.placement"):
        compile_plan(CapturePlan(), SPLIT, version)
