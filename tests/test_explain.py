"""Why a packet goes where it goes: in words, by a plan and by what stands, and what would have to be otherwise."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

import netapply
from netapply.backend import BUILT_IN, Dialect, find_backend
from netapply.cli import main
from netapply.cli.arguments import LAYOUTS as LAYOUT_WORDS
from netapply.cli.demo import demo_plan
from netapply.cli.explain_text import show_way
from netapply.cli.flow_words import Asked, read_flow
from netapply.compiler import LAYOUTS, compile_plan
from netapply.decide import decide
from netapply.evaluate import evaluate
from netapply.explain import explain
from netapply.flow import TCP, Flow
from netapply.importers.istio import Facts, Version, plan_from_settings
from netapply.importers.istio_settings import IstioSettings, parse_settings
from netapply.lab.flows import traffic_types
from netapply.lookups import Lookups
from netapply.otherwise import otherwise
from netapply.plan import CapturePlan, Dns, Inbound, InboundPorts, Outbound, OutboundCidrs
from netapply.ruleset import Cidr, PortRange
from netapply.sights import outcome
from netapply.traffic import Cast, cast_of_plan, cast_of_rules, legs
from netapply.ways import way_to
from tests.netns import Netns
from tests.strategies import flows, plans
from tests.test_istio_layout import packed

DOC = Path(__file__).parent.parent / "docs" / "explain.md"
LOOKUPS = Lookups({"istio-proxy": 1337}.get, {"mesh": 2000}.get, tuple, len)
APP = Flow("outbound", TCP, packed("192.0.2.1"), packed("10.0.0.5"), 40000, 443, "eth0", 1000, 1000)
NFT = find_backend("nftables")


def run(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["explain", *shlex.split(words)]) == 0
    return capsys.readouterr().out


def run_json(words: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(f"{words} -o json", capsys))
    return found


@pytest.fixture
def plan_file(tmp_path: Path) -> str:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", DOC.read_text(), re.MULTILINE | re.DOTALL)
    path = tmp_path / "capture.yaml"
    path.write_text(block)
    return str(path)


# --- in words ------------------------------------------------------------------------------------------------


def test_explanations_are_printed_as_the_document_shows_them(
    plan_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console = r"^```console\n# netapply explain capture.yaml (.*)\n((?:.*\n)*?)```$"
    shown = re.findall(console, DOC.read_text(), re.MULTILINE)
    assert len(shown) == 2
    for words, text in shown:
        assert run(f"{plan_file} {words}", capsys) == text


def test_a_query_in_words_of_iptables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "dns.yaml"
    plan.write_text("apiVersion: netapply/v1\ndns: {capture: servers, servers: [10.0.0.53]}\nproxy: {gids: []}\n")
    assert run(f"{plan} --dns --from uid=1000 --backend iptables-legacy", capsys) == (
        """udp 192.0.2.1:40000 > 10.0.0.53:53, leaves by eth0, uid 1000, gid 1000
assumed: to port 53, iface=eth0, from 192.0.2.1, gid=1000 as the uid, from port 40000, a new connection

iptables-legacy: redirect to port 15053, the proxy's DNS port answers
decided by ip nat NETAPPLY_OUTBOUND 6, because of dns.servers

hook output, as it is sent
  ip raw OUTPUT
  +   1  on to NETAPPLY_OUTBOUND                             -A OUTPUT -p udp -j NETAPPLY_OUTBOUND  # dns.zones
  ip raw NETAPPLY_OUTBOUND
      1  no, -m udp --sport 15053: the source port is 40000  -A NETAPPLY_OUTBOUND -p udp -m udp --sport 15053 -m owner --uid-owner 1337 -j CT --zone 2  # dns.zones
  +   2  on to NETAPPLY_QUERY                                -A NETAPPLY_OUTBOUND -d 10.0.0.53/32 -p udp -m udp --dport 53 -j NETAPPLY_QUERY  # dns.zones
  ip raw NETAPPLY_QUERY
      1  no, -o lo: it leaves by eth0                        -A NETAPPLY_QUERY -s 127.0.0.6/32 -o lo -j CT --zone 1  # proxy.passthrough_sources
      2  no, -m owner --uid-owner 1337: the uid is 1000      -A NETAPPLY_QUERY -m owner --uid-owner 1337 -j CT --zone 1  # proxy.uids
  +   3  conntrack zone 2                                    -A NETAPPLY_QUERY -j CT --zone 2  # dns.zones
  ip raw NETAPPLY_OUTBOUND
      3  no, -o lo: it leaves by eth0                        -A NETAPPLY_OUTBOUND -s 10.0.0.53/32 -o lo -p udp -m udp --sport 53 -j CT --zone 1  # dns.zones
  ip nat OUTPUT
      1  no, -p tcp: the protocol is udp                     -A OUTPUT -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j NETAPPLY_OUTBOUND  # outbound
  +   2  on to NETAPPLY_OUTBOUND                             -A OUTPUT -p udp -j NETAPPLY_OUTBOUND  # outbound
  ip nat NETAPPLY_OUTBOUND
      1  no, -o lo: it leaves by eth0                        -A NETAPPLY_OUTBOUND -s 127.0.0.6/32 -o lo -j RETURN  # proxy.passthrough_sources
      2  no, -o lo: it leaves by eth0                        -A NETAPPLY_OUTBOUND ! -d 127.0.0.1/32 -o lo -p tcp -m multiport ! --dports 53,15008 -m owner --uid-owner 1337 -j REDIRECT --to-ports 15006  # proxy.self_calls
      3  no, -m owner --uid-owner 1337: the uid is 1000      -A NETAPPLY_OUTBOUND -m owner --uid-owner 1337 -j RETURN  # proxy.uids
      4  no, -o lo: it leaves by eth0                        -A NETAPPLY_OUTBOUND -o lo -p tcp -m tcp ! --dport 53 -j RETURN  # outbound.loopback
      5  no, -o lo: it leaves by eth0                        -A NETAPPLY_OUTBOUND -o lo -p udp -m udp ! --dport 53 -j RETURN  # outbound.loopback
  +   6  decides                                             -A NETAPPLY_OUTBOUND -d 10.0.0.53/32 -p udp -m udp --dport 53 -j REDIRECT --to-ports 15053  # dns.servers

hook prerouting, over lo, as it comes in to 127.0.0.1:15053
  ip raw PREROUTING
  +   1  on to NETAPPLY_INBOUND                        -A PREROUTING -p udp -j NETAPPLY_INBOUND  # dns.zones
  ip raw NETAPPLY_INBOUND
      1  no, -s 10.0.0.53/32: the source is 192.0.2.1  -A NETAPPLY_INBOUND -s 10.0.0.53/32 -p udp -m udp --sport 53 -j CT --zone 1  # dns.zones

would differ if
  to 198.51.100.1                           bypass                  by no rule: nothing takes it
  uid=1337                                  bypass                  by ip nat NETAPPLY_OUTBOUND 3
  to 127.0.0.1                              bypass                  by ip nat NETAPPLY_OUTBOUND 8
  iface=lo, from 127.0.0.6                  bypass                  by ip nat NETAPPLY_OUTBOUND 1
  iface=lo, to port 8080                    bypass                  by ip nat NETAPPLY_OUTBOUND 5
  by tcp, iface=lo, to port 8080            bypass                  by ip nat NETAPPLY_OUTBOUND 4
  by tcp, uid=1337, iface=lo, to port 8080  redirect to port 15006  by ip nat NETAPPLY_OUTBOUND 2
"""  # noqa: E501 - as it is printed
    )


def test_a_flow_passes_every_kind_of_match_with_its_reason() -> None:
    """Golden: each rule of Istio's TPROXY, for a call that comes in."""
    plan = istio_plan("istio", "-m TPROXY -b * -d 22 --drop-invalid -c eth9")
    backend = find_backend("iptables-nft")
    flow = Flow("inbound", TCP, packed("10.9.9.9"), packed("10.0.0.2"), 40000, 8080)
    (sight,) = explain(backend, compile_plan(plan, backend.dialect, "istio"), flow, plan).sights
    assert [f"{step.place}: {step.match or 'yes'}: {step.why}" for step in sight.steps] == [
        "ip mangle PREROUTING 1: -i eth9: it enters by eth0",
        "ip mangle PREROUTING 2: -m conntrack --ctstate INVALID: the connection is new",
        "ip mangle PREROUTING 3: yes: on to ISTIO_INBOUND",
        "ip mangle ISTIO_INBOUND 1: -m mark --mark 0x539: the mark is 0x0",
        "ip mangle ISTIO_INBOUND 2: -i lo: it enters by eth0",
        "ip mangle ISTIO_INBOUND 3: -i lo: it enters by eth0",
        "ip mangle ISTIO_INBOUND 4: -m tcp --dport 22: the port is 8080",
        "ip mangle ISTIO_INBOUND 5: -m conntrack --ctstate RELATED,ESTABLISHED: the connection is new",
        "ip mangle ISTIO_INBOUND 6: yes: on to ISTIO_TPROXY",
        "ip mangle ISTIO_TPROXY 1: yes: decides",
        "ip nat PREROUTING 1: -i eth9: it enters by eth0",
    ]


def istio_plan(version: Version, flags: str) -> CapturePlan:
    settings = parse_settings(["-i", "*", *flags.split()], {})
    return plan_from_settings(settings, version, Facts((packed("10.0.0.2"),)))


def test_long_runs_of_rules_that_did_not_match_are_shortened_in_text_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    excluded = [{"protocol": "tcp", "ports": [port], "uids": [5]} for port in range(1000, 1100)]
    plan.write_text(json.dumps({"apiVersion": "netapply/v1", "outbound": {"exclude_for_owners": excluded}}))
    words = f"{plan} --from uid=1000 --to 10.0.0.5:443"
    text = run(words, capsys)
    assert "more that did not match" in text
    assert text.count("tcp dport 10") < 25
    rules = run_json(words, capsys)["explanations"][0]["hooks"][0]["rules"]
    assert sum("tcp dport 10" in rule["rule"] for rule in rules) == 100


# --- what decides --------------------------------------------------------------------------------------------

#: As istio-iptables of 1.11 and the script of 1.4 number their rules, measured with packets and counters.
DECIDING = {
    ("istio-1.11", "-d 15090,15021,15020"): [
        "ISTIO_INBOUND 6 > ISTIO_IN_REDIRECT 1", "ISTIO_OUTPUT 1", "ISTIO_OUTPUT 1",
        "ISTIO_OUTPUT 9 > ISTIO_REDIRECT 1", "ISTIO_OUTPUT 4",
        "ISTIO_INBOUND 5", "ISTIO_INBOUND 3", "ISTIO_INBOUND 4",
        "ISTIO_OUTPUT 9 > ISTIO_REDIRECT 1", "ISTIO_OUTPUT 2 > ISTIO_IN_REDIRECT 1", "ISTIO_OUTPUT 3",
        "ISTIO_OUTPUT 3", "ISTIO_OUTPUT 3",
        "ISTIO_OUTPUT 4", "ISTIO_OUTPUT 3",
        "ISTIO_OUTPUT 4", "ISTIO_OUTPUT 7", "ISTIO_OUTPUT 9 > ISTIO_REDIRECT 1",
    ],
    ("istio-1.4", "-u 1337 -d 15020"): [
        "ISTIO_INBOUND 3 > ISTIO_IN_REDIRECT 1", "ISTIO_OUTPUT 1", "ISTIO_OUTPUT 1",
        "ISTIO_OUTPUT 6 > ISTIO_REDIRECT 1", "ISTIO_OUTPUT 3",
        "ISTIO_INBOUND 2", *["ISTIO_INBOUND 3 > ISTIO_IN_REDIRECT 1"] * 2,
        "ISTIO_OUTPUT 6 > ISTIO_REDIRECT 1", *["ISTIO_OUTPUT 2 > ISTIO_IN_REDIRECT 1"] * 2,
        "ISTIO_OUTPUT 2 > ISTIO_IN_REDIRECT 1", "ISTIO_OUTPUT 5",
        "ISTIO_OUTPUT 3", "ISTIO_OUTPUT 4",
        "ISTIO_OUTPUT 3", "ISTIO_OUTPUT 4", "ISTIO_OUTPUT 6 > ISTIO_REDIRECT 1",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("version", "flags"), DECIDING)
def test_the_traffic_types_are_decided_by_the_rules_that_istio_counts_them_on(version: Version, flags: str) -> None:
    plan = istio_plan(version, f"-b * {flags}")
    backend = find_backend("iptables-legacy")
    ruleset = compile_plan(plan, backend.dialect, version)
    found = [explain(backend, ruleset, leg.flow, plan) for leg in legs(cast_of_plan(plan)) if leg.flow.family == "ip"]
    assert [show_way(each.decided).removeprefix("ip nat ") for each in found] == DECIDING[version, flags]
    assert not [note for each in found for note in each.notes]


@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
def test_the_traffic_types_begin_as_those_that_the_lab_sends(mode: Any) -> None:
    """By the name of a type: where its first connection goes is the first proxy's port that must answer there."""
    plan = demo_plan(mode)
    ruleset = compile_plan(plan, NFT.dialect)
    ports = {
        (leg.number, leg.name, leg.flow.family): explain(NFT, ruleset, leg.flow, plan).decision.port
        for leg in legs(cast_of_plan(plan))
    }
    for traffic in traffic_types(mode):
        expected = traffic.expect.via[0] if traffic.expect.via else 0
        assert ports[traffic.number, traffic.name, traffic.family] == expected, traffic


@settings(max_examples=200, deadline=None)
@given(plan=plans, flow=flows())
def test_the_verdict_is_that_of_the_plan_and_the_deciding_rule_is_among_those_that_matched(
    plan: CapturePlan, flow: Flow
) -> None:
    for backend in map(find_backend, ("nftables", "iptables-nft")):
        said = explain(backend, compile_plan(plan, backend.dialect), flow, plan)
        assert not said.notes
        assert said.decision[:3] == decide(plan, flow)[:3] or said.path == "invalid"
        matched = [step.place for sight in said.sights for step in sight.steps if step.matched]
        assert set(said.decided) <= set(matched)
        assert all(step.match and step.why for sight in said.sights for step in sight.steps if step.matched is False)


def test_a_call_that_is_left_alone_as_it_is_sent_can_be_caught_as_it_comes_in() -> None:
    """Istio's TPROXY takes calls of the proxy's group to an address of its own over `lo`, by mark 1338."""
    plan = istio_plan("istio", "-m TPROXY -b *")
    backend = find_backend("iptables-nft")
    ruleset = compile_plan(plan, backend.dialect, "istio")
    flow = APP._replace(source=APP.destination, iface="lo", uid=0, gid=1337)
    assert evaluate(ruleset, flow).decision.verdict == "bypass"
    said = explain(backend, ruleset, flow)
    assert (said.decision.verdict, said.decision.port) == ("tproxy", 15006)
    assert said.sights[1].flow.mark == 1338
    assert "the mark is 0x53a" in [step.why for step in said.sights[1].steps]


def test_rules_that_do_otherwise_than_their_plan_are_noted() -> None:
    plan = CapturePlan()
    other = plan._replace(outbound=Outbound(OutboundCidrs(exclude=(Cidr(packed("10.0.0.0"), 8),))))
    said = explain(NFT, compile_plan(other, NFT.dialect), APP, plan)
    assert said.notes == ("the plan wants redirect to port 15001 (outbound.cidrs.include): these rules do otherwise",)


# --- what would have to be otherwise ---------------------------------------------------------------------------


def others(plan: CapturePlan, flow: Flow, dialect: Dialect = NFT.dialect) -> dict[str, tuple[str, int]]:
    found = otherwise(compile_plan(plan, dialect), flow)
    return {each.change: (each.decision.verdict, each.decision.port) for each in found}


def test_an_applications_call_would_go_elsewhere_if() -> None:
    plan = CapturePlan(dns=Dns("all"), ipv6="skip")
    assert others(plan, APP) == {
        "iface=lo": ("bypass", 0),
        "uid=1337": ("bypass", 0),
        "gid=1337": ("bypass", 0),
        "to port 53": ("redirect", 15053),
        "over IPv6": ("bypass", 0),
        "by udp, to port 53": ("redirect", 15053),
        "iface=lo, from 127.0.0.6": ("bypass", 0),
        "by udp, iface=lo": ("bypass", 0),
        "uid=1337, iface=lo": ("redirect", 15006),
        "gid=1337, iface=lo": ("redirect", 15006),
    }


def test_the_proxys_call_would_go_elsewhere_if_it_were_somebody_elses_or_to_itself() -> None:
    assert others(CapturePlan(), APP._replace(uid=1337, gid=1337)) == {
        "iface=lo": ("redirect", 15006),
        "uid=1000, gid=1000": ("redirect", 15001),
    }


def test_an_inbound_call_would_go_elsewhere_by_each_exclusion() -> None:
    plan = CapturePlan(inbound=Inbound(ports=InboundPorts(exclude=(PortRange(22, 22),))))
    flow = Flow("inbound", TCP, packed("10.9.9.9"), packed("10.0.0.2"), 40000, 8080)
    assert others(plan, flow) == {"by udp": ("bypass", 0), "to port 15008": ("bypass", 0), "to port 22": ("bypass", 0)}


@settings(max_examples=100, deadline=None)
@given(plan=plans, flow=flows())
def test_only_other_fates_are_told_and_each_deciding_rule_once(plan: CapturePlan, flow: Flow) -> None:
    ruleset = compile_plan(plan, NFT.dialect)
    given_fate = outcome(ruleset, flow).decision
    found = otherwise(ruleset, flow)
    assert all(each.change and each.decision[:3] != given_fate[:3] for each in found)
    assert len({(each.decision[:3], each.decided) for each in found}) == len(found) <= 12


def test_ten_thousand_exclusions_are_explained_in_moments() -> None:
    blocks = tuple(Cidr(bytes((11, at >> 8, at & 255, 0)), 24) for at in range(10_000))
    settings = IstioSettings(istio_service_cidr="*", istio_service_exclude_cidr=",".join(map(str, blocks)))
    plan = plan_from_settings(settings, "istio", Facts((packed("10.0.0.2"),)))
    ruleset = compile_plan(plan, Dialect("split", 15, 0), "istio")
    assert "to 11.0.0.0" in {each.change for each in otherwise(ruleset, APP)}


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
@pytest.mark.parametrize("extra", ["", "inbound: {mode: tproxy}", "ipv6: block"])
def test_a_connection_that_is_older_than_conntrack_is_left_alone_for_want_of_a_syn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: str, backend: str
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(f"apiVersion: netapply/v1\n{extra}\n")
    for words in ("--to 10.0.0.5:443", "--to [fd00::5]:443", "--inbound --to :8080", "--inbound --to [fd00::5]:8080"):
        said = run(f"{plan} --from state=picked-up {words} --backend {backend}", capsys)
        assert ": bypass, " in said
        assert "it opens no connection" in said


# --- the words of a flow ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "destination", "expected"),
    [
        ("uid=1000", "10.0.0.5:443", APP),
        ("uid=istio-proxy gid=mesh", "10.0.0.5:443", APP._replace(uid=1337, gid=2000)),
        ("uid=7 192.0.2.9:5", "10.0.0.5", APP._replace(uid=7, gid=7, source=packed("192.0.2.9"), sport=5, dport=80)),
        ("mark=0x539 state=invalid", "10.0.0.5:443", APP._replace(mark=1337, state="invalid")),
        ("", "10.0.0.5:443 iface=lo", APP._replace(source=packed("10.0.0.5"), iface="lo")),
        ("", "127.0.0.1:443", APP._replace(source=packed("127.0.0.1"), destination=packed("127.0.0.1"), iface="lo")),
        ("cgroup=a.slice/b", "10.0.0.5:443", APP._replace(cgroup="a.slice/b")),
        ("10.0.0.5", "10.0.0.5:443", APP._replace(source=packed("10.0.0.5"), iface="lo")),
        ("", "[fd00::5]:443", APP._replace(source=packed("2001:db8::1"), destination=packed("fd00::5"))),
        ("", "fd00::5", APP._replace(source=packed("2001:db8::1"), destination=packed("fd00::5"), dport=80)),
    ],
)
def test_words_make_a_flow(source: str, destination: str, expected: Flow) -> None:
    assert read_flow(Asked(source.split(), destination.split()), LOOKUPS).flow == expected


def test_what_was_not_said_is_told() -> None:
    assert read_flow(Asked((), ("10.0.0.5",)), LOOKUPS).assumed == (
        "to port 80", "iface=eth0", "from 192.0.2.1", "uid=1000", "gid=1000", "from port 40000", "a new connection",
    )  # fmt: skip


def test_every_fault_of_the_words_is_told_at_once(plan_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--from uid=no-such-user iface=br+ mark=1/3 state=odd color=blue uid=1 :0 --to fd00::1 gid=5 10.0.0.5:1 ''"
    assert main(["explain", plan_file, "--inbound", "--dns", *shlex.split(words)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("netapply: explain: 11 words are not understood\n")
    for fault in (
        "--from: uid=no-such-user is not accepted; write a user's id, or the name of a user that exists here",
        "--from: iface=br+ is not accepted; write the name of one interface",
        "--from: mark=1/3 is not accepted; write the packet's whole mark, such as 0x539",
        "--from: state=odd is not accepted; write new, established, related, invalid, untracked or picked-up",
        "--from: color=blue is not accepted; write uid=, gid=, cgroup=, iface=, mark= or state=, or an address",
        "--from: :0 is not accepted; a port is a number from 1 to 65535",
        "--to: gid=5 is not accepted; whose socket it is belongs to --from",
        "--to: 10.0.0.5:1 is not accepted; say one address and port",
        "--from: uid= of an inbound packet is not accepted; leave it out",
        "--dns: --inbound is not accepted; say one of them",
    ):
        assert f"  {fault}" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("PLAN --from uid=1", "write where the packet goes"),
        ("PLAN --from 10.0.0.1 --to fd00::1", "write two addresses of one family"),
        ("PLAN --inbound --to :80 iface=lo", "what comes in by lo was sent here"),
        ("PLAN --traffic-types --to :80", "--traffic-types has flows of its own"),
        ("PLAN --all --backend nftables --to :80", "--all is every backend"),
        ("--all --to :80", "--all compares dialects of a plan"),
        ("PLAN --tcp --udp --to :80", "not allowed with"),
        ("PLAN --udp --from state=picked-up --to :80", "of UDP each packet can be the first"),
        ("/nowhere.yaml --to :80", "name a plan file that can be read"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    words: str, said: str, plan_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", *words.replace("PLAN", plan_file).split()]) == 1
    assert said in capsys.readouterr().err


def test_the_command_line_knows_every_layout() -> None:
    assert set(LAYOUT_WORDS) == set(LAYOUTS)


# --- what stands -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BUILT_IN)
def test_live_rules_are_explained_in_their_dialect_with_the_paths_of_the_journal(
    backend: str, netns: Netns, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = CapturePlan(dns=Dns("all"))
    with netapply.open(netns.path) as capture:
        capture.apply(plan, backend=backend)
    (live,) = run_json(f"-N {netns.path} --from uid=1000 --to 10.0.0.5:443", capsys)["explanations"]
    found = find_backend(backend)
    said = explain(found, compile_plan(plan, found.dialect), APP)
    assert live["backend"] == backend
    assert live["path"] == "outbound.cidrs.include"
    shown = [(rule["place"], rule["path"], rule["why"]) for hook in live["hooks"] for rule in hook["rules"]]
    assert shown == [(str(s.place), s.place.path, s.why) for sight in said.sights for s in sight.steps]


def test_rules_that_istio_left_are_explained_too(netns: Netns, capsys: pytest.CaptureFixture[str]) -> None:
    backend = find_backend("iptables-nft")
    ruleset = compile_plan(istio_plan("istio", "-b *"), backend.dialect, "istio")
    netns.run("iptables-nft-restore", stdin=backend.render(ruleset))
    (live,) = run_json(f"-N {netns.path} --inbound --from 10.9.9.9 --to 10.0.0.2:8080", capsys)["explanations"]
    assert (live["backend"], live["verdict"], live["port"], live["path"]) == ("iptables-nft", "redirect", 15006, "")


def test_a_call_over_lo_would_go_elsewhere_if_it_went_to_another_address() -> None:
    flow = APP._replace(source=packed("127.0.0.1"), destination=packed("127.0.0.1"), iface="lo", uid=1337, gid=1337)
    assert others(CapturePlan(), flow) == {"iface=lo, to 198.51.100.1": ("redirect", 15006)}


def test_a_namespace_tells_the_way_to_an_address(netns: Netns, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        "link add veth7 type veth peer veth8",
        "link set veth7 up",
        "link set veth8 up",
        "addr add 10.5.0.2/16 dev veth7",
    ):
        netns.run("ip", *words.split())
    with netapply.open(netns.path) as capture:
        assert way_to(capture.namespace, packed("10.5.9.9")) == ("veth7", packed("10.5.0.2"))
        assert way_to(capture.namespace, packed("10.5.0.2")) == ("lo", packed("10.5.0.2"))
        assert way_to(capture.namespace, packed("10.9.0.1")) is None
        capture.apply(CapturePlan())
    flow = run_json(f"-N {netns.path} --from uid=1337 --to 10.5.0.2:80", capsys)["flow"]
    assert (flow["iface"], flow["source"]) == ("lo", "10.5.0.2")
    flow = run_json(f"-N {netns.path} --inbound --from 10.5.9.9 --to :80", capsys)["flow"]
    assert (flow["iface"], flow["destination"]) == ("veth7", "10.5.0.2")


def test_where_nothing_of_ours_stands_nothing_is_captured(netns: Netns, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(f"-N {netns.path} --from uid=1000 --to 10.0.0.5:443", capsys)
    assert "bypass, 10.0.0.5:443 answers itself" in text
    assert "decided by no rule: nothing takes it" in text


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
def test_rules_of_others_among_ours_are_told_and_not_guessed(
    backend: str, netns: Netns, capsys: pytest.CaptureFixture[str]
) -> None:
    with netapply.open(netns.path) as capture:
        capture.apply(CapturePlan(), backend=backend)
    if backend == "nftables":
        netns.run("nft", "insert", "rule", "inet", "netapply", "nat-outbound", "ip", "ttl", "7", "drop")
    else:
        netns.run("iptables-nft", "-t", "nat", "-I", "NETAPPLY_OUTBOUND", "-m", "ttl", "--ttl-eq", "7", "-j", "RETURN")
    (live,) = run_json(f"-N {netns.path} --from uid=1000 --to 10.0.0.5:443", capsys)["explanations"]
    (strange,) = [rule for hook in live["hooks"] for rule in hook["rules"] if rule["matched"] is None]
    assert (strange["position"], strange["why"]) == (1, "may match, and do anything")
    assert live["notes"] == ["a rule that is not ours stands among ours; what is done to the packet there is not known"]


def test_the_proxy_of_live_rules_is_known_by_the_owners_that_they_let_pass() -> None:
    for mode, mark in (("redirect", 0), ("tproxy", 1337)):
        plan = demo_plan(mode)  # type: ignore[arg-type]  # one of the two literals
        plan = plan._replace(proxy=plan.proxy._replace(uids=(77,), gids=(88,)))
        assert cast_of_rules(compile_plan(plan, NFT.dialect)) == cast_of_plan(plan) == Cast(77, 88, mark)
