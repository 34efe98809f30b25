"""The independent reader: libnftables, and our own decoders held against it."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings

from netapply import core, inspection, reader
from netapply.backend import OURS, Owned, find_backend
from netapply.cli import main
from netapply.errors import ConflictError, KernelError, NetapplyError, UnsupportedError
from netapply.journal import Journal
from netapply.kernel import Kernel
from netapply.lookups import system_lookups
from netapply.namespace import Namespace
from netapply.plan import (
    CapturePlan,
    Dns,
    Inbound,
    InboundPorts,
    Interfaces,
    LogSettings,
    Mark,
    Outbound,
    OutboundCidrs,
    OutboundPorts,
    Proxy,
    Reroute,
)
from netapply.reader import deep_changes, library, list_ruleset, native
from netapply.reader.xtables import expected_lines
from netapply.results import Change
from netapply.ruleset import (
    AddressMatch,
    Base,
    CgroupMatch,
    Chain,
    Cidr,
    Jump,
    MarkMatch,
    PortMatch,
    PortRange,
    ProtocolMatch,
    Return,
    Rule,
    Ruleset,
    Table,
)
from tests import netns as namespaces
from tests.iptables_nft_rules import rulesets as split_rulesets
from tests.netns import Netns
from tests.nftables_rulesets import rulesets as inet_rulesets

SEEN = ("nftables", "iptables-nft")
NAT_OUTPUT = Base("nat", "output", -100)


def blocks(count: int) -> tuple[Cidr, ...]:
    v4 = tuple(Cidr(bytes([10, n, 0, 0]), 16) for n in range(count))
    return v4 + tuple(Cidr(bytes([0xFD, 0, n]) + bytes(13), 24) for n in range(count))


DNS = Dns("servers", (Cidr(bytes([10, 96, 0, 10]), 32), Cidr(b"\xfd" + bytes(14) + b"\x0a", 128)))
PORTS = InboundPorts((PortRange(80, 80), PortRange(8000, 8100)), (PortRange(8080, 8080),))
PLANS = {
    "redirect": CapturePlan(),
    "tproxy": CapturePlan(inbound=Inbound("tproxy", PORTS), proxy=Proxy(mark=Mark(0x1000, 0xF000)), invalid="drop"),
    "dns": CapturePlan(dns=DNS),
    "dns to an address": CapturePlan(dns=Dns("all", addresses=(bytes([10, 0, 0, 53]),), port=8600)),
    "5 blocks": CapturePlan(outbound=Outbound(OutboundCidrs(exclude=blocks(5)))),
    "200 blocks": CapturePlan(outbound=Outbound(OutboundCidrs(exclude=blocks(200)))),
    "comments and log": CapturePlan(comments=True, log=LogSettings("netapply: ", 30)),
    "block": CapturePlan(ipv6="block"),
    "interfaces": CapturePlan(interfaces=Interfaces(("mgmt0", "wg+"), (Reroute("virbr+"),))),
    "ports": CapturePlan(outbound=Outbound(ports=OutboundPorts((PortRange(5432, 5432),), (PortRange(22, 22),)))),
}


@pytest.fixture
def kernel(netns: Netns) -> Iterator[Namespace]:
    with Namespace.open(netns.path) as opened:
        yield opened


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(str(tmp_path))


def put(kernel: Kernel, name: str, ruleset: Ruleset) -> None:
    backend = find_backend(name)
    for step in backend.encode(backend.read(kernel), ruleset):
        backend.commit(kernel, step)


def inet(*rules: Rule) -> Ruleset:
    return Ruleset((Table("inet", "netapply", (Chain("nat-output", rules, NAT_OUTPUT),)),))


def split(*rules: Rule) -> Ruleset:
    ours = Chain("NETAPPLY_OUTPUT", rules)
    return Ruleset((Table("ip", "nat", (Chain("OUTPUT", (), NAT_OUTPUT, (Rule((), Jump(ours.name)),)), ours)),))


# --- agreement -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", SEEN)
def test_both_readers_agree_on_what_was_applied(
    kernel: Namespace, journal: Journal, name: str, plan: CapturePlan
) -> None:
    core.apply(kernel, plan, backend=name, journal=journal)
    assert deep_changes(kernel, name) == ()


@pytest.mark.parametrize("name", SEEN)
def test_they_agree_where_nothing_of_ours_is(kernel: Namespace, netns: Netns, name: str) -> None:
    netns.run("nft", "add table inet other; add chain inet other c; add rule inet other c counter accept")
    netns.run("iptables-nft", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-j", "RETURN")
    assert deep_changes(kernel, name) == ()


@pytest.mark.parametrize("name", SEEN)
def test_what_was_counted_is_no_difference(kernel: Namespace, journal: Journal, netns: Netns, name: str) -> None:
    core.apply(kernel, CapturePlan(), backend=name, journal=journal)

    def send() -> None:
        with socket.socket() as sock, pytest.raises(ConnectionRefusedError):
            sock.connect(("127.0.0.1", 9))

    netns.enter(send)
    assert any(each.packets for each in inspection.show(kernel, backend=name))
    assert deep_changes(kernel, name) == ()


@pytest.mark.parametrize("name", SEEN)
def test_rules_of_others_are_no_difference(kernel: Namespace, journal: Journal, netns: Netns, name: str) -> None:
    netns.run("iptables-nft", "-t", "nat", "-N", "DOCKER")
    netns.run("iptables-nft", "-t", "nat", "-A", "OUTPUT", "-p", "udp", "--dport", "9", "-j", "DOCKER")
    netns.run("nft", "add table inet other; add set inet other s { type ipv4_addr; }")
    core.apply(kernel, CapturePlan(), backend=name, journal=journal)
    netns.run("iptables-nft", "-t", "nat", "-I", "OUTPUT", "-p", "udp", "-j", "DOCKER")
    assert deep_changes(kernel, name) == ()


def test_rules_that_iptables_saved_and_restored_are_no_difference(
    kernel: Namespace, journal: Journal, netns: Netns
) -> None:
    plan = PLANS["tproxy"]._replace(dns=DNS, outbound=PLANS["ports"].outbound, log=LogSettings("x: ", 60))
    core.apply(kernel, plan, backend="iptables-nft", journal=journal)
    saved = netns.run("iptables-nft-save")
    netns.run("iptables-nft-restore", stdin=saved)
    assert "tcp dport" in netns.run("nft", "--json", "list", "ruleset").replace('"field": "dport"', "tcp dport")
    assert inspection.verify(kernel, plan, backend="iptables-nft").changes == ()
    assert deep_changes(kernel, "iptables-nft") == ()


slow = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@slow
@given(ruleset=inet_rulesets())
def test_any_native_rule_set_is_read_alike(ruleset: Ruleset) -> None:
    cgroups = {match for *_, rule in ruleset.walk() for match in rule.matches if isinstance(match, CgroupMatch)}
    assume(len({match.path for match in cgroups}) == len({(match.path, match.id) for match in cgroups}))
    _assert_agreement("nftables", ruleset)


@slow
@given(ruleset=split_rulesets())
def test_any_rule_set_of_iptables_nft_is_read_alike(ruleset: Ruleset) -> None:
    _assert_agreement("iptables-nft", ruleset)


def _assert_agreement(name: str, ruleset: Ruleset) -> None:
    made = namespaces.make()
    try:
        with Namespace.open(made.path) as kernel:
            put(kernel, name, ruleset)
            assert deep_changes(kernel, name) == ()
    finally:
        made.close()


def test_a_cgroup_is_the_same_by_path_and_by_number(kernel: Namespace) -> None:
    root = Path("/sys/fs/cgroup/unified")
    root = root if root.is_dir() else root.parent
    name = f"netapply-test-{os.getpid()}"
    try:
        (root / name).mkdir()
    except OSError:
        pytest.skip("no cgroup v2 to write to")
    try:
        there = CgroupMatch(name, system_lookups().cgroup(name))
        gone = CgroupMatch("system.slice/gone.service", 0x7FFFFFF1)
        put(kernel, "nftables", inet(Rule((there,), Return()), Rule((gone,), Return())))
        assert deep_changes(kernel, "nftables") == ()
    finally:
        (root / name).rmdir()
    assert deep_changes(kernel, "nftables") == ()


# --- difference ----------------------------------------------------------------------------------------------


def test_a_native_rule_that_only_libnftables_can_read_is_told(
    kernel: Namespace, journal: Journal, netns: Netns
) -> None:
    core.apply(kernel, CapturePlan(), backend="nftables", journal=journal)
    netns.run("nft", "insert rule inet netapply nat-output tcp flags syn counter return")
    added, removed = sorted(deep_changes(kernel, "nftables"))
    assert removed == Change("remove", "libnftables: inet netapply nat-output", "tcp flags syn counter return")
    assert added.what.startswith("counter jump <rule ")


def test_a_rule_of_iptables_nft_that_only_libnftables_can_read_is_told(
    kernel: Namespace, journal: Journal, netns: Netns
) -> None:
    core.apply(kernel, CapturePlan(), backend="iptables-nft", journal=journal)
    netns.run("nft", "insert rule ip nat NETAPPLY_OUTBOUND ip ttl 1 counter return")
    added, removed = sorted(deep_changes(kernel, "iptables-nft"))
    assert removed == Change("remove", "libnftables: ip nat NETAPPLY_OUTBOUND", "counter, ip ttl == 1, return")
    assert added.what.startswith("counter, jump <rule ")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("nftables", "add rule inet netapply nat-output counter return"),
        ("nftables", "add set inet netapply strange { type inet_service; }"),
        ("nftables", "add table inet netapply { flags dormant; }"),
        ("nftables", "add chain inet netapply nat-output { policy drop; }"),
        ("iptables-nft", "add rule ip6 nat NETAPPLY_OUTBOUND counter return"),
        ("iptables-nft", "flush chain ip nat NETAPPLY_OUTBOUND"),
        ("iptables-nft", "add rule ip nat OUTPUT tcp dport 7 counter goto NETAPPLY_OUTBOUND"),
    ],
)
def test_deep_verification_reports_what_nft_changed_behind_our_back(
    kernel: Namespace, journal: Journal, netns: Netns, name: str, change: str
) -> None:
    plan = CapturePlan()
    core.apply(kernel, plan, backend=name, journal=journal)
    netns.run("nft", change)
    assert inspection.verify(kernel, plan, backend=name).changes + deep_changes(kernel, name)


class Wrong:
    """A backend whose decoder takes every owner for 1 and loses the last block of a set: what there is to find."""

    def __init__(self, name: str) -> None:
        self.real = find_backend(name)
        self.render = self.real.render

    def read(self, kernel: Kernel, owned: Owned = OURS) -> Wrong:
        found = self.real.read(kernel, owned).ruleset
        assert found is not None
        sets = tuple(each._replace(elements=each.elements[:-1]) for each in found.sets)
        self.ruleset = Ruleset(tuple(map(_with_wrong_owners, found.tables)), sets)
        return self


def _with_wrong_owners(table: Table) -> Table:
    def wrong(rule: Rule) -> Rule:
        return rule._replace(
            matches=tuple(m._replace(first=1, last=1) if m.kind == "owner" else m for m in rule.matches)
        )

    return table._replace(chains=tuple(c._replace(rules=tuple(map(wrong, c.rules))) for c in table.chains))


def test_a_mistake_of_our_own_decoder_is_found(
    kernel: Namespace, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.apply(kernel, PLANS["5 blocks"], backend="nftables", journal=journal)
    monkeypatch.setattr(reader, "find_backend", Wrong)
    told = [(change.kind, change.what) for change in deep_changes(kernel, "nftables")]
    assert ("remove", "meta skuid 1337 counter return") in told
    assert ("add", "meta skuid 1 counter return") in told
    assert ("remove", "10.4.0.0/16") in told
    assert ("remove", "10.3.0.0/16") not in told


def test_rules_that_never_stand_still_are_a_conflict(kernel: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    put(kernel, "nftables", inet())
    real, count = library.list_commands, iter(range(100))

    def busy(namespace: Kernel, *commands: str, as_json: bool, numeric: bool = False) -> list[str]:
        put(kernel, "nftables", inet(Rule((MarkMatch(next(count)),), Return())))
        return real(namespace, *commands, as_json=as_json, numeric=numeric)

    monkeypatch.setattr(native, "list_commands", busy)
    with pytest.raises(ConflictError):
        deep_changes(kernel, "nftables")


def test_a_change_between_the_two_readings_is_no_difference(kernel: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    put(kernel, "nftables", inet())
    real, changes = library.list_commands, [inet(Rule((MarkMatch(1),), Return()))]

    def busy(namespace: Kernel, *commands: str, as_json: bool, numeric: bool = False) -> list[str]:
        if changes:
            put(kernel, "nftables", changes.pop())
        return real(namespace, *commands, as_json=as_json, numeric=numeric)

    monkeypatch.setattr(native, "list_commands", busy)
    assert deep_changes(kernel, "nftables") == ()


# --- spelling ------------------------------------------------------------------------------------------------

TCP = ProtocolMatch(6)
WEB = Rule((TCP, PortMatch("dst", (PortRange(80, 90),), negate=True), MarkMatch(1, 0xFF)), Return(), comment="x")


def test_a_rule_is_expected_as_we_write_it() -> None:
    assert expected_lines((WEB,), "ip") == [
        "counter, l4proto == 6, match comment, match mark, match tcp, return",
    ]


def test_a_rule_is_expected_as_iptables_restores_it_where_that_is_there() -> None:
    there = "counter, l4proto == 6, mark & 255 == 1, match comment, tcp dport != 80-90, return"
    assert expected_lines((WEB,), "ip", (there,)) == [there]


def test_leading_bits_of_a_mark_are_expected_though_nft_prints_them_as_a_prefix(
    kernel: Namespace, netns: Netns
) -> None:
    put(kernel, "iptables-nft", split(Rule((MarkMatch(0x12000000, 0xFF000000),), Return())))
    netns.run("iptables-nft-restore", stdin=netns.run("iptables-nft-save"))
    assert '"prefix"' in netns.run("nft", "--json", "list", "ruleset")
    assert deep_changes(kernel, "iptables-nft") == ()


@pytest.mark.parametrize(
    ("printed", "meant"),
    [
        ("counter packets 7 bytes 420 return", "counter return"),
        ("limit rate 60/minute burst 5 packets counter return", "limit rate 60/minute counter return"),
        ("limit rate 60/minute burst 50 packets", "limit rate 60/minute burst 50 packets"),
        ("tcp flags syn / fin,syn,rst,ack return", "tcp flags & (fin | syn | rst | ack) == syn return"),
        ("meta l4proto 6 return", "meta l4proto tcp return"),
        ("meta l4proto 17 return", "meta l4proto udp return"),
        ("meta l4proto 178 return", "meta l4proto 178 return"),
        ('socket cgroupv2 level 2 != "a/b" return', "socket cgroupv2 level 2 != 42 return"),
    ],
)
def test_versions_and_settings_of_nft_make_no_difference(printed: str, meant: str) -> None:
    assert native._line(printed, {"a/b": 42}.__getitem__) == meant


@pytest.mark.parametrize(
    ("family", "block", "word"),
    [
        ("ip", Cidr(bytes([10, 0, 0, 1]), 32), "ip daddr == 10.0.0.1"),
        ("ip", Cidr(bytes(4), 0), "ip daddr == 0.0.0.0/0"),
        ("ip6", Cidr(b"\xfd" + bytes(15), 8), "ip6 daddr == fd00::/8"),
    ],
)
def test_addresses_are_expected_as_libnftables_prints_them(
    kernel: Namespace, family: str, block: Cidr, word: str
) -> None:
    rule = Rule((AddressMatch("dst", block),), Return())
    assert expected_lines((rule,), family) == [f"counter, {word}, return"]
    put(kernel, "iptables-nft", Ruleset((Table(family, "nat", (Chain("NETAPPLY_X", (rule,)),)),)))
    assert deep_changes(kernel, "iptables-nft") == ()


# --- everybody's rules ---------------------------------------------------------------------------------------


def test_everybody_s_rules_are_listed_as_nft_lists_them(kernel: Namespace, journal: Journal, netns: Netns) -> None:
    core.apply(kernel, CapturePlan(), backend="nftables", journal=journal)
    netns.run("nft", "add table ip other; add chain ip other c; add rule ip other c tcp dport 22 counter accept")
    assert list_ruleset(kernel, as_json=False) == netns.run("nft", "list", "ruleset")
    assert "tcp dport 22 counter packets 0 bytes 0 accept" in list_ruleset(kernel, as_json=False)


def test_they_are_listed_as_json_too(kernel: Namespace, netns: Netns) -> None:
    netns.run("nft", "add table ip other")
    listed = json.loads(list_ruleset(kernel, as_json=True))
    assert listed == json.loads(netns.run("nft", "--json", "list", "ruleset"))
    assert "other" in [item["table"]["name"] for item in listed["nftables"] if "table" in item]


def test_bytes_that_are_no_text_are_listed_all_the_same(kernel: Namespace, netns: Netns) -> None:
    subprocess.run(
        ["nsenter", f"--net={netns.path}", "nft", "-f", "-"],
        input=b'table ip other { chain c { counter comment "\xff\xfe"; }; }\n',
        check=True,
        timeout=10,
    )
    assert "\ufffd\ufffd" in list_ruleset(kernel, as_json=False)


def test_the_rules_listed_are_those_of_the_namespace(kernel: Namespace, netns: Netns) -> None:
    netns.run("nft", "add table ip here")
    other = namespaces.make()
    try:
        with Namespace.open(other.path) as elsewhere:
            assert list_ruleset(elsewhere, as_json=False) == ""
    finally:
        other.close()
    assert list_ruleset(kernel, as_json=False) == "table ip here {\n}\n"


# --- where it cannot be used ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iptables-legacy", "somebody-s"])
def test_a_dialect_that_libnftables_cannot_see_is_refused(kernel: Namespace, name: str) -> None:
    with pytest.raises(UnsupportedError, match=name) as caught:
        deep_changes(kernel, name)
    assert "without --deep" in caught.value.next_step


def _without_binding(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "nftables", None)


def _without_library(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(library, "LIBRARY", "libnftables-that-is-not-there.so.1")


def _with_an_old_library(patch: pytest.MonkeyPatch) -> None:
    class Newer:
        def __init__(self) -> None:
            raise AttributeError("libnftables.so.1: undefined symbol: nft_ctx_input_get_flags")

    patch.setattr("nftables.Nftables", Newer)


@pytest.mark.parametrize(
    ("take_away", "said"),
    [
        (_without_binding, "`nftables` is missing"),
        (_without_library, "libnftables-that-is-not-there"),
        (_with_an_old_library, "undefined symbol"),
    ],
)
def test_a_missing_reader_is_named_with_its_packages(
    kernel: Namespace, monkeypatch: pytest.MonkeyPatch, take_away: object, said: str
) -> None:
    assert callable(take_away)
    take_away(monkeypatch)
    for ask in (lambda: list_ruleset(kernel, as_json=False), lambda: deep_changes(kernel, "nftables")):
        with pytest.raises(UnsupportedError, match=said) as caught:
            ask()
        assert "pip-nftables" in caught.value.next_step
        assert "libnftables1" in caught.value.next_step


def test_without_a_netlink_socket_it_is_an_error_and_not_the_end_of_the_process(
    kernel: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("socket.socket", refuse)
    with pytest.raises(KernelError, match="Too many open files"):
        list_ruleset(kernel, as_json=False)


def test_a_missing_reader_harms_nothing_else(
    kernel: Namespace, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    _without_binding(monkeypatch)
    _without_library(monkeypatch)
    assert core.apply(kernel, CapturePlan(), backend="nftables", journal=journal).changed
    assert inspection.verify(kernel, CapturePlan()).same
    assert core.clean(kernel, journal=journal).changed


def test_importing_it_loads_neither_the_binding_nor_the_library() -> None:
    code = (
        "import sys, netapply.reader; print('nftables' in sys.modules, 'libnftables' in open('/proc/self/maps').read())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout == "False False\n"


def test_what_libnftables_refuses_is_an_error_with_its_words(kernel: Namespace) -> None:
    with pytest.raises(NetapplyError, match="syntax error"):
        library.list_commands(kernel, "list nonsense", as_json=False)


# --- the command ---------------------------------------------------------------------------------------------


def test_verify_deep_ends_with_3_where_the_readers_disagree(
    netns: Netns, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"apiVersion": "netapply/v1"}')
    common = ["--netns", netns.path, "--state-dir", str(tmp_path / "state")]
    assert main(["apply", *common, "--backend", "iptables-nft", str(plan)]) == 0
    assert main(["verify", *common, "--deep", str(plan)]) == 0
    netns.run("nft", "insert rule ip nat NETAPPLY_OUTBOUND ip ttl 1 counter return")
    assert main(["verify", *common, "--deep", str(plan)]) == 3
    assert "ip ttl == 1" in capsys.readouterr().out
