"""Extensions of xtables, held against the bytes that iptables-legacy puts into the kernel."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from netapply.errors import DecodeError
from netapply.namespace import Namespace
from netapply.ruleset import (
    Accept,
    AddressMatch,
    CgroupMatch,
    Cidr,
    ConnmarkMatch,
    Dnat,
    Drop,
    Family,
    IfaceMatch,
    Jump,
    LimitMatch,
    Log,
    MarkMatch,
    Match,
    NamedSet,
    OwnerMatch,
    PortMatch,
    PortRange,
    ProtocolMatch,
    Redirect,
    RestoreMark,
    Return,
    Rule,
    SaveMark,
    SetConnmark,
    SetMark,
    SetMatch,
    SetZone,
    SocketMatch,
    StateMatch,
    Statement,
    SynMatch,
    TProxy,
)
from netapply_iptables_legacy.rules import encode_rule
from netapply_iptables_legacy.snapshot import read_table
from netapply_wire import xtables
from netapply_wire.ipset import CreateSet, commit_set, set_index
from netapply_wire.xtables import Extension
from tests import netns as namespaces
from tests.netns import Netns
from tests.test_legacy_rules import CGROUPS, temporary_cgroup

TCP, UDP = ProtocolMatch(6), ProtocolMatch(17)
SET = "netapply-x-0011223344"
CGROUP = f"{CGROUPS}{os.getpid()}"
COMMAND: dict[Family, str] = {"ip": "iptables-legacy", "ip6": "ip6tables-legacy"}


def ports(side: str, *ranges: tuple[int, int], negate: bool = False) -> PortMatch:
    return PortMatch(side, tuple(PortRange(*each) for each in ranges), negate)


#: table, chain, what follows `-A CHAIN`, matches, statement
BOTH: list[tuple[str, str, str, tuple[Match, ...], Statement]] = [
    ("nat", "OUTPUT", "-p tcp --dport 80 -j REDIRECT --to-ports 15001", (TCP, ports("dst", (80, 80))), Redirect(15001)),
    ("nat", "OUTPUT", "-p tcp --syn -j RETURN", (TCP, SynMatch()), Return()),
    ("nat", "OUTPUT", "-p udp --sport 80:90 -j RETURN", (UDP, ports("src", (80, 90))), Return()),
    ("nat", "OUTPUT", "-p udp ! --dport 53 -j RETURN", (UDP, ports("dst", (53, 53), negate=True)), Return()),
    ("nat", "OUTPUT", "-p tcp ! --sport 80 -j RETURN", (TCP, ports("src", (80, 80), negate=True)), Return()),
    ("nat", "OUTPUT", "-p tcp -m multiport --dports 80,443,1000:2000 -j RETURN",
     (TCP, ports("dst", (80, 80), (443, 443), (1000, 2000))), Return()),
    ("nat", "OUTPUT", "-p udp -m multiport ! --sports 1:2,9 -j RETURN",
     (UDP, ports("src", (1, 2), (9, 9), negate=True)), Return()),
    ("nat", "OUTPUT", "-p tcp -m multiport --sports 0:65535 -j RETURN", (TCP, ports("src", (0, 65535))), Return()),
    ("nat", "OUTPUT", "-p tcp -m tcp --sport 7 -m tcp --dport 8 -j RETURN",
     (TCP, ports("src", (7, 7)), ports("dst", (8, 8))), Return()),
    ("nat", "OUTPUT", "-o lo -m owner --uid-owner 1337 -j RETURN",
     (IfaceMatch("out", "lo"), OwnerMatch("uid", 1337, 1337)), Return()),
    ("nat", "OUTPUT", "! -o eth+ -m owner ! --gid-owner 1337-1340 -j RETURN",
     (IfaceMatch("out", "eth+", negate=True), OwnerMatch("gid", 1337, 1340, negate=True)), Return()),
    ("nat", "OUTPUT", f"-m cgroup --path {CGROUP} -j RETURN", (CgroupMatch(CGROUP, 0),), Return()),
    ("nat", "OUTPUT", f"-m cgroup ! --path {CGROUP} -j RETURN", (CgroupMatch(CGROUP, 0, negate=True),), Return()),
    ("nat", "OUTPUT", "-m mark --mark 0x539 -j RETURN", (MarkMatch(0x539),), Return()),
    ("nat", "OUTPUT", "-m mark ! --mark 0x111/0xfff -j RETURN", (MarkMatch(0x111, 0xFFF, negate=True),), Return()),
    ("mangle", "OUTPUT", "-m connmark ! --mark 0x111/0xfff -j DROP",
     (ConnmarkMatch(0x111, 0xFFF, negate=True),), Drop()),
    ("filter", "INPUT", "-m conntrack --ctstate INVALID,NEW,RELATED,ESTABLISHED,UNTRACKED -j ACCEPT",
     (StateMatch(("established", "invalid", "new", "related", "untracked")),), Accept()),
    ("filter", "INPUT", "-i eth0 -m conntrack --ctstate INVALID -j DROP",
     (IfaceMatch("in", "eth0"), StateMatch(("invalid",))), Drop()),
    ("mangle", "PREROUTING", "-m socket --transparent -j ACCEPT", (SocketMatch(),), Accept()),
    ("filter", "INPUT", "-m limit --limit 6/minute --limit-burst 7 -j LOG --log-prefix 'cap: '",
     (LimitMatch(6, 7),), Log("cap: ")),
    ("filter", "INPUT", "-m limit --limit 7/minute -j RETURN", (LimitMatch(7),), Return()),
    ("nat", "OUTPUT", f"-m set --match-set {SET} dst -j RETURN", (SetMatch("dst", SET),), Return()),
    ("nat", "OUTPUT", f"-m set ! --match-set {SET} src -j RETURN", (SetMatch("src", SET, negate=True),), Return()),
    ("mangle", "PREROUTING", "-p tcp -j TPROXY --on-port 15006 --tproxy-mark 0x539/0xffff",
     (TCP,), TProxy(15006, 0x539, 0xFFFF)),
    ("mangle", "PREROUTING", "-j MARK --set-xmark 0x539/0xffff", (), SetMark(0x539, 0xFFFF)),
    ("mangle", "PREROUTING", "-j CONNMARK --save-mark", (), SaveMark()),
    ("mangle", "PREROUTING", "-j CONNMARK --restore-mark", (), RestoreMark()),
    ("mangle", "PREROUTING", "-j CONNMARK --set-xmark 0x111/0xfff", (), SetConnmark(0x111, 0xFFF)),
    ("raw", "PREROUTING", "-p udp -j CT --zone 3", (UDP,), SetZone(3)),
    ("nat", "OUTPUT", "-j NETAPPLY_X", (), Jump("NETAPPLY_X")),
]  # fmt: skip
ONE: list[tuple[Family, str, str, str, tuple[Match, ...], Statement]] = [
    ("ip", "nat", "OUTPUT", "-p tcp -j DNAT --to-destination 127.0.0.1:15053", (TCP,), Dnat(b"\x7f\0\0\1", 15053)),
    ("ip6", "nat", "OUTPUT", "-p tcp -j DNAT --to-destination [::1]:15053", (TCP,), Dnat(bytes(15) + b"\1", 15053)),
    ("ip", "nat", "OUTPUT", "! -s 127.0.0.6 -d 10.0.0.0/13 -j RETURN",
     (AddressMatch("src", Cidr(b"\x7f\0\0\6", 32), negate=True), AddressMatch("dst", Cidr(b"\x0a\0\0\0", 13))),
     Return()),
    ("ip6", "nat", "OUTPUT", "-s fd00::/9 ! -d ::6 -p tcp -j RETURN",
     (AddressMatch("src", Cidr(b"\xfd" + bytes(15), 9)),
      AddressMatch("dst", Cidr(bytes(15) + b"\6", 128), negate=True), TCP), Return()),
]  # fmt: skip
CASES = [(family, *case) for family in COMMAND for case in BOTH] + ONE


@pytest.fixture(scope="module")
def place(private_xtables_lock: str) -> Iterator[tuple[Netns, Namespace]]:
    """A namespace where the oracle writes and we read, with a set and a chain that the cases speak of."""
    netns = namespaces.make()
    kernel = Namespace.open(netns.path)
    commit_set(kernel, CreateSet(NamedSet("netapply-4-first", "ip", (Cidr(b"\1\2\3\4", 32),))))  # takes the index 0
    for command in COMMAND.values():
        netns.run(command, "-t", "nat", "-N", "NETAPPLY_X")
    yield netns, kernel
    kernel.close()
    netns.close()


@pytest.fixture(scope="module")
def cgroup() -> Iterator[str]:
    with temporary_cgroup() as name:
        yield name


@pytest.mark.usefixtures("cgroup")
@pytest.mark.parametrize(("family", "table", "chain", "words", "matches", "statement"), CASES)
def test_an_entry_is_what_iptables_would_write(
    place: tuple[Netns, Namespace],
    family: Family,
    table: str,
    chain: str,
    words: str,
    matches: tuple[Match, ...],
    statement: Statement,
) -> None:
    netns, kernel = place
    name = SET.replace("x", "4" if family == "ip" else "6")
    block = Cidr(b"\1\2\3\4", 32) if family == "ip" else Cidr(bytes(16), 64)
    commit_set(kernel, CreateSet(NamedSet(name, family, (block,))))
    matches = tuple(match._replace(set=name) if isinstance(match, SetMatch) else match for match in matches)
    comment = "" if "-m limit" in words else 'plan: it\'s \\"quoted"'
    note = ["-m", "comment", "--comment", comment] if comment else []
    command, *rest = [COMMAND[family], "-t", table]
    before, _, target = words.replace(SET, name).partition("-j ")
    arguments = [*before.split(), *note, "-j", *target.replace("'cap: '", "cap:_").split()]
    arguments = [word.replace("cap:_", "cap: ") for word in arguments]
    netns.run(command, *rest, "-F", chain)
    try:
        netns.run(command, *rest, "-A", chain, *arguments)
    except AssertionError:
        if isinstance(matches[0] if matches else None, CgroupMatch):
            pytest.skip("no cgroup v2 to be made here")
        raise
    block_of = {each.name: each for each in read_table(kernel, family, table).blocks}
    rule = Rule(matches, statement, None, comment)
    assert block_of[chain].entries[0].key == encode_rule(rule, family, {name: set_index(kernel, name)}).key


@pytest.mark.parametrize(
    "ext",
    [
        Extension("nothing", 0, bytes(8)),
        Extension("tcp", 1, bytes(16)),
        Extension("tcp", 0, bytes(8)),
        Extension("tcp", 0, bytes(10) + b"\1" + bytes(5)),  # --tcp-flags
        Extension("owner", 1, bytes(16) + b"\3\0" + bytes(6)),  # uid and gid in one
        Extension("set", 4, b"\x09\0\1\0" + bytes(44)),  # a set that is not ours
        Extension("conntrack", 3, bytes(168)),
        Extension("limit", 0, bytes(40)),
        Extension("multiport", 1, b"\0\xff" + bytes(46)),
    ],
)
def test_a_match_that_we_do_not_write_is_refused(ext: Extension) -> None:
    with pytest.raises(DecodeError):
        xtables.decode_match(ext, {1: "netapply-4-a"})


@pytest.mark.parametrize(
    "ext",
    [
        Extension("MARK", 1, bytes(8)),
        Extension("LOG", 0, b"\5" + bytes(31)),
        Extension("REDIRECT", 0, b"\1\0\0\0" + bytes(20)),
        Extension("TPROXY", 1, bytes(8) + b"\x7f\0\0\1" + bytes(20)),
        Extension("REJECT", 0, bytes(8)),
    ],
)
def test_a_target_that_we_do_not_write_is_refused(ext: Extension) -> None:
    with pytest.raises(DecodeError):
        xtables.decode_target(ext, "ip")


def test_what_the_kernel_keeps_for_itself_is_ignored() -> None:
    """Kernels before 4.11 showed pointers and running values there."""
    for match in (LimitMatch(6, 7), CgroupMatch("system.slice", 0)):
        ext = xtables.match_extension(match, 6)
        assert ext is not None
        kept = xtables.PRIVATE[ext.name]
        dirty = ext._replace(info=ext.info[:kept].ljust(len(ext.info), b"\xee"))
        assert xtables.decode_match(dirty) == match
    zone = xtables.target_extension(SetZone(5), "ip")
    assert zone is not None
    assert xtables.decode_target(zone._replace(info=zone.info[:64] + b"\xee" * 8), "ip") == SetZone(5)
