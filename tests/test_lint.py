"""Lint: each rule with a plan that it doubts and one that it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from netapply.lint import RULES, lint
from netapply.lookups import Lookups
from netapply.planfile import examine_plan, load_plan, read_plan

HEAD = "apiVersion: netapply/v1\n"
PLANS = sorted(Path(__file__).parent.joinpath("plans").iterdir())
LOOKUPS = Lookups(lambda _: None, lambda _: None, lambda: ("10.0.0.53",), lambda path: 0 if "absent" in path else 7)

#: rule: [(plan, the paths that it doubts)], the last one without doubts
CASES = {
    "root_exempt": [
        ("proxy: {uids: [0], gids: [0, 5], allow_root: true}", ["proxy.uids", "proxy.gids"]),
        ("outbound: {owners: {exclude: {uids: [0-99]}}}", ["outbound.owners.exclude.uids"]),
        ("outbound: {owners: {exclude: {gids: [0]}}}", ["outbound.owners.exclude.gids"]),
        ("outbound: {owners: {include: {uids: [0]}, exclude: {uids: [1-99]}}}", []),
    ],
    "proxy_captured": [
        ("outbound: {owners: {include: {uids: [1000-2000]}}}", ["outbound.owners.include.uids"]),
        ("outbound: {owners: {include: {gids: [1337]}}}", ["outbound.owners.include.gids"]),
        ("outbound: {owners: {include: {uids: [1000]}}}", []),
    ],
    "nobody_captured": [
        ("outbound: {owners: {include: {}}}", ["outbound.owners.include"]),
        ("outbound: {owners: {include: {gids: [5]}}}", []),
    ],
    "exceptions_without_effect": [
        (
            "outbound: {exclude_for_owners: [{protocol: tcp, ports: '*', uids: [1337]}]}",
            ["outbound.exclude_for_owners[0]"],
        ),
        (
            "outbound: {owners: {exclude: {gids: [5]}}, exclude_for_owners: [{protocol: udp, ports: [1], gids: [5]}]}",
            ["outbound.exclude_for_owners[0]"],
        ),
        ("outbound: {exclude_for_owners: [{protocol: tcp, ports: '*', uids: [1336-1337], cgroups: [a]}]}", []),
    ],
    "self_calls_of_nobody": [
        ("{proxy: {uids: [], gids: []}, outbound: {cidrs: {include: []}}}", ["proxy.self_calls"]),
        ("{proxy: {uids: [], gids: [], self_calls: none}, outbound: {cidrs: {include: []}}}", []),
    ],
    "cgroups_absent": [
        ("outbound: {owners: {exclude: {cgroups: [absent, there]}}}", ["outbound.owners.exclude.cgroups"]),
        ("proxy: {self_calls: {cgroups: [absent]}}", ["proxy.self_calls.cgroups"]),
        ("outbound: {owners: {exclude: {cgroups: [there]}}}", []),
    ],
    "one_port_for_both": [
        ("proxy: {inbound_port: 15001}", ["proxy.inbound_port"]),
        ("{proxy: {inbound_port: 15001}, inbound: {mode: none}}", []),
    ],
    "dns_loop": [
        ("{proxy: {uids: [], gids: [], mark: 1}, dns: {capture: all}}", ["dns.capture"]),
        ("{proxy: {uids: [], mark: 1}, dns: {capture: all}}", []),
    ],
    "dns_server_on_loopback": [
        ("dns: {capture: servers, servers: [127.0.0.53, 10.0.0.1]}", ["dns.servers"]),
        ("dns: {capture: servers, servers: [10.0.0.1]}", []),
    ],
    "dns_to_captured_server": [
        ("dns: {capture: servers, servers: [10.0.0.0/24], addresses: [10.0.0.53]}", ["dns.addresses"]),
        ("dns: {capture: all, addresses: [127.0.0.1]}", ["dns.addresses"]),
        ("dns: {capture: servers, servers: [10.0.0.1], addresses: [10.0.0.53]}", []),
    ],
    "proxy_port_captured": [
        ("inbound: {ports: {include: [80, 15000-15010]}}", ["inbound.ports.include", "inbound.ports.include"]),
        ("outbound: {ports: {include: [15001]}}", ["outbound.ports.include"]),
        ("{inbound: {ports: {include: [80]}}, outbound: {ports: {include: [81]}}}", []),
    ],
    "marks_overlap": [
        ("{proxy: {mark: 0x1/0x1}, inbound: {mode: tproxy}}", ["inbound.tproxy.mark"]),
        ("{proxy: {mark: 0x1000/0xf000}, inbound: {mode: tproxy, tproxy: {mark: 0x539/0xfff}}}", []),
    ],
    "loopback_captured": [("outbound: {loopback: capture}", ["outbound.loopback"]), ("outbound: {}", [])],
    "loopback_without_family": [
        ("proxy: {loopback: [127.0.0.0/8]}", ["proxy.loopback"]),
        ("proxy: {loopback: []}", ["proxy.loopback", "proxy.loopback"]),
        ("{proxy: {loopback: [127.0.0.0/8]}, ipv6: block}", []),
    ],
    "dns_port_excluded": [
        ("{dns: {capture: all}, outbound: {ports: {exclude: [50-60]}}}", ["outbound.ports.exclude"]),
        ("{dns: {capture: none}, outbound: {ports: {exclude: [53]}}}", []),
    ],
    "dns_unused": [
        ("dns: {servers: [10.0.0.1], addresses: [10.0.0.2]}", ["dns.servers", "dns.addresses"]),
        ("dns: {capture: all, servers: [10.0.0.1]}", ["dns.servers"]),
        ("dns: {capture: servers, servers: [10.0.0.1], addresses: [10.0.0.2]}", []),
    ],
    "dns_family_uncaptured": [
        ("dns: {capture: all, addresses: [10.0.0.2]}", ["dns.addresses"]),
        ("{dns: {capture: all, addresses: [10.0.0.2]}, ipv6: block}", []),
    ],
    "dns_without_zones": [
        ("dns: {capture: all, zones: false}", ["dns.zones"]),
        ("dns: {capture: all, zones: false, addresses: [10.0.0.1]}", []),
    ],
    "inbound_ports_never_match": [
        ("inbound: {ports: {include: [80-90], exclude: [85, 443]}}", ["inbound.ports.exclude"]),
        ("inbound: {ports: {exclude: [15008]}}", ["inbound.ports.exclude"]),
        ("inbound: {ports: {include: [15008]}}", ["inbound.ports.include"]),
        ("inbound: {ports: {include: [80-90], exclude: [85, 89-99]}}", []),
    ],
    "inbound_unused": [
        ("inbound: {mode: none, ports: {exclude: [80]}}", ["inbound.ports.exclude"]),
        ("inbound: {mode: none, ports: {include: [80]}}", ["inbound.ports.include"]),
        ("inbound: {ports: {include: []}}", ["inbound.ports.include"]),
        ("inbound: {sources: {exclude: [0.0.0.0/1, 128.0.0.0/1]}}", ["inbound.sources.exclude"]),
        ("inbound: {sources: {exclude: [10.0.0.0/8]}}", []),
    ],
    "outbound_cidrs_never_match": [
        ("outbound: {cidrs: {include: [10.1.0.0/16, 9.0.0.0/8], exclude: [10.0.0.0/8]}}", ["outbound.cidrs.include"]),
        ("outbound: {cidrs: {exclude: [0.0.0.0/0]}}", ["outbound.cidrs.exclude"]),
        ("outbound: {cidrs: {include: [10.0.0.0/8], exclude: [10.1.0.0/16, 9.9.9.9]}}", ["outbound.cidrs.exclude"]),
        ("outbound: {cidrs: {include: [10.0.0.0/8], exclude: [9.9.9.9]}, ports: {include: [80]}}", []),
        ("outbound: {cidrs: {include: [10.0.0.0/8], exclude: [10.1.0.0/16]}}", []),
    ],
    "outbound_ports_never_match": [
        ("outbound: {ports: {include: [80]}}", ["outbound.ports.include"]),
        ("outbound: {cidrs: {include: []}, ports: {include: [80-90], exclude: [22, 85]}}", ["outbound.ports.exclude"]),
        ("outbound: {cidrs: {include: []}, ports: {include: [80-90], exclude: [85]}}", []),
    ],
    "ip6_bypasses": [
        ("ipv6: skip", ["ipv6"]),
        ("{ipv6: skip, outbound: {cidrs: {exclude: ['fd00::/8']}}}", ["ipv6", "outbound.cidrs.exclude"]),
        ("{ipv6: skip, dns: {capture: servers, servers: ['fd00::1', 10.0.0.1]}}", ["ipv6", "dns.servers"]),
        ("{ipv6: skip, dns: {capture: servers, servers: ['fd00::1']}}", ["ipv6", "dns.servers", "dns.servers"]),
        ("ipv6: block", []),
    ],
    "wide_interfaces": [
        ("interfaces: {exclude: [lo], reroute: [+]}", ["interfaces.exclude[0]", "interfaces.reroute[0].interface"]),
        ("interfaces: {exclude: [eth0], reroute: [br+]}", []),
    ],
    "rerouted_and_excluded": [
        ("interfaces: {exclude: [br+, eth0], reroute: [tap0, br0]}", ["interfaces.reroute[1].interface"]),
        ("interfaces: {exclude: [br0], reroute: [br+]}", []),
    ],
}


def _plan(text: str):
    document = text.replace("{", "{apiVersion: netapply/v1, ", 1) if text.startswith("{") else HEAD + text
    return load_plan(document, format="yaml", lookups=LOOKUPS)


@pytest.mark.parametrize(
    ("rule", "text", "paths"),
    [(rule, text, paths) for rule, cases in CASES.items() for text, paths in cases],
)
def test_each_rule_doubts_what_it_should_and_nothing_else(rule: str, text: str, paths: list[str]):
    plan = _plan(text)
    found = list(next(each for each in RULES if each.__name__ == rule)(plan))
    assert [warning.path for warning in found] == paths
    assert all(warning.message and warning.advice for warning in found)
    assert set(found) <= set(lint(plan))


def test_every_rule_is_tried_both_ways():
    assert set(CASES) == {rule.__name__ for rule in RULES}
    for cases in CASES.values():
        assert cases[0][1] != []
        assert cases[-1][1] == []


def test_the_default_plan_is_beyond_doubt():
    assert lint(_plan("")) == ()


def test_redundant_entries_of_a_file_are_doubts():
    loaded = examine_plan(HEAD + "inbound: {ports: {exclude: [80, 443, 80]}}", lookups=LOOKUPS)
    (warning,) = lint(loaded.plan, loaded.redundant)
    assert str(warning) == (
        "inbound.ports.exclude[2]: 80 changes nothing: other entries of the list say the same; leave it out"
    )


@pytest.mark.parametrize("path", [each for each in PLANS if each.suffix == ".yaml"], ids=lambda path: path.name)
def test_the_yaml_examples_are_beyond_doubt(path: Path):
    assert [str(warning) for warning in lint(read_plan(str(path), lookups=LOOKUPS))] == []
