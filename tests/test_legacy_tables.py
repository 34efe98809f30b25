"""The iptables-legacy backend on the kernel: what is written reads back, by iptables too, and nobody's rule is lost."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from netapply.backend import OURS, Owned, is_strange, readable
from netapply.errors import ConflictError, DecodeError, GenerationChanged, KernelError, UnsupportedError
from netapply.kernel import Kernel
from netapply.namespace import Namespace
from netapply.ruleset import (
    Accept,
    AddressMatch,
    Base,
    Chain,
    Cidr,
    Drop,
    Family,
    IfaceMatch,
    Jump,
    NamedSet,
    OwnerMatch,
    PortMatch,
    PortRange,
    ProtocolMatch,
    Redirect,
    Return,
    Rule,
    Ruleset,
    SetMatch,
    Table,
)
from netapply_iptables_legacy import BACKEND
from netapply_iptables_legacy.rules import decode_rule, encode_rule
from netapply_iptables_legacy.snapshot import LegacySnapshot
from netapply_iptables_legacy.sockopt import SO_GET_ENTRIES, SO_GET_INFO, Info, add_counters, read_info
from netapply_iptables_legacy.tables import KernelTable
from tests import netns as namespaces
from tests.netns import Netns
from tests.test_legacy_rules import rulesets, temporary_cgroup

TCP = ProtocolMatch(6)
FOREIGN = """*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [7:420]
:POSTROUTING ACCEPT [1:60]
:THEIRS - [0:0]
:ZULU - [0:0]
[3:180] -A PREROUTING -i eth+ -p tcp -m statistic --mode nth --every 3 --packet 1 -j THEIRS
[5:300] -A OUTPUT -d 10.9.8.7/32 -m u32 --u32 "0x0=0x1" -j ZULU
[9:540] -A OUTPUT -m addrtype --dst-type LOCAL -g THEIRS
[2:120] -A THEIRS -p tcp
[4:240] -A THEIRS -j ZULU
[6:360] -A ZULU -p tcp -m recent --rcheck --name known -j RETURN
COMMIT
*filter
:INPUT DROP [2:100]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
[8:480] -A INPUT -m hashlimit --hashlimit-upto 5/sec --hashlimit-name x -j ACCEPT
COMMIT
"""


def plan(port: int = 15001, place: str = "first") -> Ruleset:
    jump = (Rule((TCP,), Jump("NETAPPLY_OUTPUT")),)
    built_in = Chain(
        "OUTPUT", () if place == "first" else jump, Base("nat", "output", -100), jump if place == "first" else ()
    )
    own = (
        Rule((OwnerMatch("uid", 1337, 1337),), Return()),
        Rule((IfaceMatch("out", "lo"),), Return(), None, "outbound.loopback"),
        Rule((TCP,), Redirect(port)),
    )
    return Ruleset((Table("ip", "nat", (built_in, Chain("NETAPPLY_OUTPUT", own))),))


def apply(kernel: Namespace, desired: Ruleset | None, owned: Owned = OURS) -> tuple[str, ...]:
    steps = BACKEND.encode(BACKEND.read(kernel, owned), desired)
    for step in steps:
        BACKEND.commit(kernel, step)
    return tuple(step.name for step in steps)


def saved(netns: Netns, *, six: bool = False) -> str:
    """What iptables-legacy-save says, with counters, without the lines that carry the date."""
    text = netns.run("ip6tables-legacy-save" if six else "iptables-legacy-save", "-c")
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


def names(kernel: Namespace) -> list[str]:
    return [kernel.read_file(f"net/{kind}_tables_names") for kind in ("ip", "ip6")]


@pytest.fixture
def kernel(netns: Netns) -> Iterator[Namespace]:
    with Namespace.open(netns.path, lock_timeout=2.0) as opened:
        yield opened


@pytest.fixture(scope="module")
def cgroup() -> Iterator[str]:
    with temporary_cgroup() as name:
        yield name


@pytest.fixture(scope="module")
def shared(private_xtables_lock: str) -> Iterator[tuple[Netns, Namespace]]:
    """One namespace for many random rule sets."""
    netns = namespaces.make()
    with Namespace.open(netns.path) as opened:
        yield netns, opened
    netns.close()


def untagged(snapshot: LegacySnapshot) -> dict[tuple[str, str], object]:
    """Every entry but for our tag, which iptables-restore drops."""
    return {
        place: [(block.name, [entry.tagged(place[0]).key for entry in block.entries]) for block in table.blocks]
        for place, table in snapshot.content.tables.items()
    }


def test_random_rule_sets_read_back_and_survive_iptables(shared: tuple[Netns, Namespace], cgroup: str) -> None:
    """Written, each reads back equal, prints as rendered, and a save restored by iptables gives the same bytes."""
    netns, kernel = shared

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(desired=rulesets(cgroup))
    def check(desired: Ruleset) -> None:
        apply(kernel, None)
        apply(kernel, desired)
        snapshot = BACKEND.read(kernel)
        assert snapshot.ruleset == desired
        assert BACKEND.encode(snapshot, desired) == ()
        texts = BACKEND.render(desired).split("# ip6tables-restore\n")
        assert isinstance(snapshot, LegacySnapshot)
        before = untagged(snapshot)
        for program, rendered in zip(("iptables", "ip6tables"), texts, strict=False):
            text = netns.run(f"{program}-legacy-save")
            printed = "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))
            for table in rendered.split("# iptables-restore\n")[-1].split("*")[1:]:
                assert table in printed
            netns.run(f"{program}-legacy-restore", stdin=text)
        again = BACKEND.read(kernel)
        assert isinstance(again, LegacySnapshot)
        assert before == untagged(again)
        apply(kernel, None)
        assert BACKEND.read(kernel).ruleset is None

    check()


def test_reading_probing_and_detecting_create_nothing(kernel: Namespace) -> None:
    assert names(kernel) == ["", ""]
    assert BACKEND.probe(kernel).status == "usable"
    assert not BACKEND.probe(kernel).in_use
    assert not BACKEND.detect(kernel)
    snapshot = BACKEND.read(kernel)
    assert snapshot.ruleset is None
    assert BACKEND.encode(snapshot, None) == ()
    assert BACKEND.encode(snapshot, plan())
    assert names(kernel) == ["", ""]


def test_only_the_tables_that_are_needed_are_created(kernel: Namespace) -> None:
    assert apply(kernel, plan()) == ("replace table ip nat",)
    assert names(kernel) == ["nat\n", ""]
    assert BACKEND.probe(kernel).in_use
    assert BACKEND.detect(kernel)


def test_a_second_apply_has_no_steps(kernel: Namespace) -> None:
    apply(kernel, plan())
    assert apply(kernel, plan()) == ()


def test_a_missing_table_and_an_emptied_one_are_alike_for_others(kernel: Namespace) -> None:
    before = BACKEND.read(kernel).foreign
    apply(kernel, plan())
    apply(kernel, None)
    assert BACKEND.read(kernel).foreign == before
    assert not BACKEND.detect(kernel)


@pytest.mark.parametrize("place", ["first", "last"])
def test_foreign_rules_policies_and_all_counters_stay(netns: Netns, kernel: Namespace, place: str) -> None:
    """The matches in FOREIGN are ones that we know nothing of, one rule has no target, and one is a goto."""
    netns.run("iptables-legacy-restore", "-c", stdin=FOREIGN)
    before, foreign = saved(netns), BACKEND.read(kernel).foreign
    apply(kernel, plan(15001, place))
    between = BACKEND.read(kernel)
    assert between.foreign == foreign
    assert between.ruleset == plan(15001, place)
    lines = [line for line in saved(netns).splitlines() if "NETAPPLY" not in line]
    assert lines == before.splitlines()
    outputs = [line for line in saved(netns).splitlines() if " OUTPUT " in line and "-A" in line]
    assert "NETAPPLY" in outputs[0 if place == "first" else -1]
    apply(kernel, plan(15009, place))
    apply(kernel, None)
    assert saved(netns) == before


def test_counters_of_rules_that_stay_are_kept(netns: Netns, kernel: Namespace) -> None:
    """And are those of the moment of the exchange."""
    apply(kernel, plan())
    text = saved(netns).replace("[0:0] -A NETAPPLY_OUTPUT -o lo", "[11:660] -A NETAPPLY_OUTPUT -o lo")
    netns.run("iptables-legacy-restore", "-c", stdin=text.replace("[0:0] -A OUTPUT", "[12:720] -A OUTPUT"))
    snapshot = BACKEND.read(kernel)
    steps = BACKEND.encode(snapshot, plan(15009))
    netns.run("iptables-legacy", "-t", "nat", "-Z", "OUTPUT")  # counters only: no reason to give up
    for step in steps:
        BACKEND.commit(kernel, step)
    assert snapshot.counters["ip", "nat", "OUTPUT", 0] == (12, 720)
    after = BACKEND.read(kernel).counters
    assert after["ip", "nat", "OUTPUT", 0] == (0, 0)
    assert after["ip", "nat", "NETAPPLY_OUTPUT", 1] == (11, 660)
    assert after["ip", "nat", "NETAPPLY_OUTPUT", 2] == (0, 0)


@pytest.mark.parametrize(
    "change",
    [
        ("-R", "THEIRS", "2", "-j", "ACCEPT"),
        ("-A", "THEIRS", "-j", "ACCEPT"),
        ("-E", "ZULU", "ALPHA"),
    ],
)
def test_a_change_between_read_and_commit_is_noticed(netns: Netns, kernel: Namespace, change: tuple[str, ...]) -> None:
    """Also one that leaves the number of entries as it was, which the kernel would let us overwrite."""
    netns.run("iptables-legacy-restore", "-c", stdin=FOREIGN)
    steps = BACKEND.encode(BACKEND.read(kernel), plan())
    netns.run("iptables-legacy", "-t", "nat", *change)
    changed = netns.run("iptables-legacy-save", "-t", "nat").splitlines()[1:-1]
    with pytest.raises(GenerationChanged):
        BACKEND.commit(kernel, steps[0])
    assert netns.run("iptables-legacy-save", "-t", "nat").splitlines()[1:-1] == changed


def test_a_table_of_as_many_entries_that_somebody_else_created_meanwhile_is_noticed(
    netns: Netns, kernel: Namespace
) -> None:
    chain = Chain("OUTPUT", (), Base("route", "output", -150), (Rule((TCP,), Accept()),))
    (step,) = BACKEND.encode(BACKEND.read(kernel), Ruleset((Table("ip", "mangle", (chain,)),)))
    netns.run("iptables-legacy", "-t", "mangle", "-P", "OUTPUT", "DROP")  # the number is all that the kernel compares
    with pytest.raises(GenerationChanged):
        BACKEND.commit(kernel, step)
    assert ":OUTPUT DROP" in saved(netns)


def test_a_table_that_somebody_else_created_meanwhile_is_noticed(netns: Netns, kernel: Namespace) -> None:
    steps = BACKEND.encode(BACKEND.read(kernel), plan())
    netns.run("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-j", "RETURN")
    with pytest.raises(GenerationChanged):
        BACKEND.commit(kernel, steps[0])


def test_a_foreign_jump_to_our_chain_is_a_conflict_that_names_it(netns: Netns, kernel: Namespace) -> None:
    apply(kernel, plan())
    netns.run("iptables-legacy", "-t", "nat", "-N", "THEIRS")
    netns.run("iptables-legacy", "-t", "nat", "-A", "THEIRS", "-j", "NETAPPLY_OUTPUT")
    snapshot = BACKEND.read(kernel)
    assert BACKEND.encode(snapshot, plan()) == ()
    with pytest.raises(ConflictError, match=r"THEIRS.*NETAPPLY_OUTPUT"):
        BACKEND.encode(snapshot, None)


def test_a_foreign_rule_put_before_our_head_is_drift(netns: Netns, kernel: Namespace) -> None:
    apply(kernel, plan())
    netns.run("iptables-legacy", "-t", "nat", "-I", "OUTPUT", "-j", "RETURN")
    assert apply(kernel, plan()) == ("replace table ip nat",)
    outputs = [line for line in saved(netns).splitlines() if "-A OUTPUT" in line]
    assert [("NETAPPLY" in line) for line in outputs] == [True, False]


def test_a_rule_of_ours_that_cannot_be_read_is_replaced(netns: Netns, kernel: Namespace) -> None:
    apply(kernel, plan())
    netns.run(
        "iptables-legacy",
        "-t",
        "nat",
        "-I",
        "NETAPPLY_OUTPUT",
        "-m",
        "statistic",
        "--mode",
        "nth",
        "--every",
        "2",
        "--packet",
        "0",
    )
    found = BACKEND.read(kernel).ruleset
    assert found is not None
    assert [is_strange(rule) for *_, rule in found.walk()] == [False, True, False, False, False]
    assert readable(found) == plan()
    apply(kernel, plan())
    assert BACKEND.read(kernel).ruleset == plan()


class Watched:
    """A kernel whose socket options fail, or come after somebody else's change, as the test says."""

    lock_timeout = 1.0
    memory = Kernel.memory

    def __init__(self, kernel: Namespace, before: Callable[[int], None]) -> None:
        self._kernel, self._before = kernel, before
        self.netlink, self.read_file, self.setsockopt = kernel.netlink, kernel.read_file, kernel.setsockopt

    def getsockopt(self, family: Family, option: int, buffer: bytes, level: int | None = None) -> bytes:
        if level is None:
            self._before(option)
        return self._kernel.getsockopt(family, option, buffer, level)


@pytest.mark.parametrize("look", [BACKEND.detect, BACKEND.probe, BACKEND.read], ids=["detect", "probe", "read"])
def test_a_table_that_is_replaced_while_it_is_read_is_read_again(
    netns: Netns, kernel: Namespace, look: Callable[[object], object]
) -> None:
    apply(kernel, plan())
    verbs = ["-I", "-D"]

    def change(option: int) -> None:
        if option == SO_GET_ENTRIES and verbs:
            netns.run("iptables-legacy", "-t", "nat", verbs.pop(), "PREROUTING", "-j", "RETURN", check=False)

    netns.run("iptables-legacy", "-t", "nat", "-I", "PREROUTING", "-j", "RETURN")
    look(Watched(kernel, change))
    assert verbs in ([], ["-I", "-D"])  # the probe reads no entries


def test_a_table_that_never_holds_still_is_a_conflict(kernel: Namespace) -> None:
    apply(kernel, plan())

    def change(option: int) -> None:
        if option == SO_GET_ENTRIES:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    for look in (BACKEND.read, BACKEND.detect):
        with pytest.raises(ConflictError, match="keeps changing table ip nat"):
            look(Watched(kernel, change))


@pytest.mark.parametrize("option", [SO_GET_INFO, SO_GET_ENTRIES])
def test_what_may_not_be_read_is_an_error_that_says_what_to_do(kernel: Namespace, option: int) -> None:
    apply(kernel, plan())

    def deny(asked: int) -> None:
        if asked == option:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    for look in (BACKEND.read, BACKEND.detect):
        with pytest.raises(KernelError, match="read table ip nat: EPERM") as caught:
            look(Watched(kernel, deny))
        assert "CAP_NET_ADMIN" in caught.value.next_step
    if option == SO_GET_INFO:
        assert BACKEND.probe(Watched(kernel, deny)).status == "denied"


def test_names_of_tables_that_may_not_be_read_are_an_error_that_says_what_to_do(kernel: Namespace) -> None:
    """/proc/net/ip_tables_names is root's alone."""
    watched = Watched(kernel, lambda _: None)

    def read_file(path: str) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    watched.read_file = read_file
    for look in (BACKEND.read, BACKEND.detect):
        with pytest.raises(KernelError, match="ip_tables_names: EACCES") as caught:
            look(watched)
        assert "root" in caught.value.next_step
    assert BACKEND.probe(watched).status == "denied"


@pytest.mark.parametrize("everything", [Cidr(bytes(4), 0), Cidr(bytes(16), 0)])
def test_a_test_for_any_address_is_refused(everything: Cidr) -> None:
    """It would read back as none. The opposite can be held."""
    with pytest.raises(UnsupportedError, match="/0"):
        encode_rule(Rule((AddressMatch("dst", everything),), Return()), everything.family, {})
    never = Rule((AddressMatch("dst", everything, negate=True),), Return())
    assert decode_rule(encode_rule(never, everything.family, {}), everything.family, {}) == never


def test_direct_rules_are_known_by_their_tag(netns: Netns, kernel: Namespace) -> None:
    """A rule straight in a built-in chain is ours where we put it there, and a foreign one of the same words is not."""
    rule = Rule((TCP, PortMatch("dst", (PortRange(80, 80),))), Redirect(15001))
    desired = Ruleset((Table("ip", "nat", (Chain("OUTPUT", base=Base("nat", "output", -100), head=(rule,)),)),))
    spelled = ("-p", "tcp", "-m", "tcp", "--dport", "80", "-j", "REDIRECT", "--to-ports", "15001")
    netns.run("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-p", "tcp", "-j", "RETURN")
    netns.run("iptables-legacy", "-t", "nat", "-A", "OUTPUT", *spelled)
    before = saved(netns)
    assert BACKEND.read(kernel).ruleset is None
    apply(kernel, desired)
    assert BACKEND.read(kernel).ruleset == desired
    assert BACKEND.detect(kernel)
    apply(kernel, None)
    assert saved(netns) == before


def test_chains_in_another_order_are_the_same(netns: Netns, kernel: Namespace) -> None:
    """They do whenever iptables writes: it sorts them by name."""
    own = [Chain(name, (Rule((), Return()),)) for name in ("NETAPPLY_B", "NETAPPLY_A")]
    jumps = tuple(Rule((), Jump(chain.name)) for chain in own)
    base = Chain("OUTPUT", base=Base("filter", "output", 0), head=jumps)
    desired = Ruleset((Table("ip", "filter", (base, *own)),))
    apply(kernel, desired)
    netns.run("iptables-legacy", "-A", "INPUT", "-j", "ACCEPT")
    assert apply(kernel, desired) == ()


def test_steps_come_in_the_order_of_switching_on_and_off(kernel: Namespace) -> None:
    block = NamedSet("netapply-4-0123456789", "ip", (Cidr(b"\1\2\3\4", 32),))
    listed = Rule((SetMatch("dst", block.name),), Return())

    def table(family: str, name: str, kind: str) -> Table:
        rules = (listed,) if family == "ip" else (Rule((), Return()),)
        priority = {"raw": -300, "mangle": -150, "nat": -100}[name]
        base = Chain("OUTPUT", base=Base(kind, "output", priority), head=(Rule((), Jump("NETAPPLY_X")),))
        return Table(family, name, (base, Chain("NETAPPLY_X", rules)))

    desired = Ruleset(
        (
            table("ip", "nat", "nat"),
            table("ip6", "nat", "nat"),
            table("ip", "mangle", "route"),
            table("ip", "raw", "filter"),
        ),
        (block,),
    )
    assert apply(kernel, desired) == (
        "create set netapply-4-0123456789",
        "replace tables ip raw, ip mangle, ip nat, ip6 nat",
    )
    found = BACKEND.read(kernel).ruleset
    assert found is not None
    assert sorted(found.tables) == sorted(desired.tables)
    assert found.sets == desired.sets
    assert apply(kernel, None) == (
        "replace tables ip nat, ip6 nat, ip mangle, ip raw",
        "destroy set netapply-4-0123456789",
    )


@pytest.mark.parametrize(
    "table",
    [
        Table("inet", "netapply", ()),
        Table("ip", "security", ()),
        Table("ip", "nat", (Chain("FORWARD", base=Base("nat", "forward", 0), head=(Rule((), Return()),)),)),
        Table("ip", "nat", (Chain("NETAPPLY_X", (Rule((), Jump("NETAPPLY_Y")),)),)),
        Table("ip", "nat", (Chain("NETAPPLY_" + "X" * 20),)),
    ],
)
def test_what_iptables_cannot_express_is_refused_before_anything_is_touched(kernel: Namespace, table: Table) -> None:
    with pytest.raises(UnsupportedError):
        BACKEND.encode(BACKEND.read(kernel), Ruleset((table,)))


def test_what_the_kernel_refuses_leaves_the_table_as_it_was(netns: Netns, kernel: Namespace) -> None:
    """xt_owner does not work in PREROUTING."""
    apply(kernel, plan())
    before = saved(netns)
    chain = Chain("NETAPPLY_IN", (Rule((OwnerMatch("uid", 1, 1),), Accept()),))
    base = Chain("PREROUTING", base=Base("nat", "prerouting", -100), head=(Rule((), Jump("NETAPPLY_IN")),))
    steps = BACKEND.encode(BACKEND.read(kernel), Ruleset((Table("ip", "nat", (base, chain)),)))
    with pytest.raises(KernelError, match="replace table ip nat: EINVAL"):
        BACKEND.commit(kernel, steps[0])
    assert saved(netns) == before


def test_a_chain_of_ours_that_stands_as_somebody_elses_is_a_conflict(netns: Netns, kernel: Namespace) -> None:
    netns.run("iptables-legacy", "-t", "nat", "-N", "MESH")
    desired = Ruleset((Table("ip", "nat", (Chain("MESH", (Rule((), Return()),)),)),))
    with pytest.raises(ConflictError, match="MESH"):
        BACKEND.encode(BACKEND.read(kernel), desired)


def test_roll_back_to_what_was_read_restores_it(netns: Netns, kernel: Namespace) -> None:
    netns.run("iptables-legacy-restore", "-c", stdin=FOREIGN)
    apply(kernel, plan(15001, "last"))
    before, text = BACKEND.read(kernel).ruleset, saved(netns)
    apply(kernel, Ruleset((Table("ip", "filter", (Chain("NETAPPLY_X", (Rule((), Drop()),)),)),)))
    apply(kernel, before)
    assert saved(netns) == text


def test_ten_thousand_rules_are_one_step(kernel: Namespace) -> None:
    rules = tuple(
        Rule((AddressMatch("dst", Cidr(bytes([10, number >> 8, number & 255, 0]), 24)),), Return())
        for number in range(10000)
    )
    jump = Chain("OUTPUT", base=Base("nat", "output", -100), head=(Rule((), Jump("NETAPPLY_OUTPUT")),))
    desired = Ruleset((Table("ip", "nat", (jump, Chain("NETAPPLY_OUTPUT", rules))),))
    assert apply(kernel, desired) == ("replace table ip nat",)
    assert BACKEND.read(kernel).ruleset == desired


def test_a_table_in_a_strange_shape_is_refused(kernel: Namespace, make_netns: Callable[..., Netns]) -> None:
    """Bytes are never trusted: a truncated or twisted table is a DecodeError, not another exception."""
    from netapply_iptables_legacy.entries import parse

    apply(kernel, plan())
    snapshot = BACKEND.read(kernel)
    assert isinstance(snapshot, LegacySnapshot)
    table = snapshot.content.tables["ip", "nat"]
    for at in range(0, len(table.data), 7):
        twisted = bytearray(table.data)
        twisted[at] ^= 0xFF
        for data in (bytes(twisted), table.data[:at]):
            try:
                parse("ip", table.info, data)
            except DecodeError:
                continue


# --- places ---------------------------------------------------------------------------------------------------


def jumps(netns: Netns) -> list[str]:
    """What the rules of OUTPUT lead to, in order."""
    lines = [line for line in netns.run("iptables-legacy-save", "-t", "nat").splitlines() if "-A OUTPUT" in line]
    return [line.rpartition(" ")[2] for line in lines]


def test_ours_stay_where_they_stand_when_foreign_rules_come_behind_them(netns: Netns, kernel: Namespace) -> None:
    netns.run("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-p", "udp", "-j", "RETURN")
    apply(kernel, plan(15001, "last"))
    netns.run("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-p", "udp", "-j", "ACCEPT")
    assert apply(kernel, plan(15001, "last")) == ()
    assert BACKEND.read(kernel).ruleset == plan(15001, "last")
    assert jumps(netns) == ["RETURN", "NETAPPLY_OUTPUT", "ACCEPT"]


def test_an_update_of_ours_keeps_their_place_among_foreign_rules(netns: Netns, kernel: Namespace) -> None:
    netns.run("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-p", "udp", "-j", "RETURN")
    apply(kernel, direct("last", 80))
    netns.run("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-p", "udp", "-j", "ACCEPT")
    assert apply(kernel, direct("last", 81, 82)) == ("replace table ip nat",)
    assert jumps(netns) == ["RETURN", "81", "82", "ACCEPT"]
    apply(kernel, direct("first", 83))
    assert jumps(netns) == ["83", "RETURN", "ACCEPT"]


def test_ours_with_a_foreign_rule_between_them_are_left_alone(netns: Netns, kernel: Namespace) -> None:
    """A foreign one before ours in front is another matter, as those are to be asked first."""
    apply(kernel, direct("last", 80, 81))
    netns.run("iptables-legacy", "-t", "nat", "-I", "OUTPUT", "2", "-p", "udp", "-j", "ACCEPT")
    assert apply(kernel, direct("last", 80, 81)) == ()
    assert jumps(netns) == ["80", "ACCEPT", "81"]


def test_in_front_and_at_the_end_are_told_apart_without_foreign_rules(kernel: Namespace) -> None:
    for place in ("first", "last"):
        apply(kernel, direct(place, 80))
        assert BACKEND.read(kernel).ruleset == direct(place, 80)
        assert apply(kernel, direct(place, 80)) == ()


def direct(place: str, *ports: int) -> Ruleset:
    """Rules straight in OUTPUT that redirect to these ports."""
    rules = tuple(Rule((TCP,), Redirect(port)) for port in ports)
    first = place == "first"
    chain = Chain("OUTPUT", () if first else rules, Base("nat", "output", -100), rules if first else ())
    return Ruleset((Table("ip", "nat", (chain,)),))


# --- what is remembered ---------------------------------------------------------------------------------------


def test_what_is_as_it_was_is_the_same_snapshot_and_encoded_once(netns: Netns, kernel: Namespace) -> None:
    desired = plan()
    apply(kernel, desired)
    first = BACKEND.read(kernel)
    assert BACKEND.read(kernel) is first
    assert BACKEND.encode(first, None) is BACKEND.encode(first, None)
    apply(kernel, None)
    steps = BACKEND.encode(BACKEND.read(kernel), desired)
    with Namespace.open(netns.path) as again:
        assert BACKEND.encode(BACKEND.read(again), desired) is steps


@pytest.mark.parametrize(
    "change",
    [
        ("-R", "NETAPPLY_OUTPUT", "1", "-m", "owner", "--uid-owner", "1338", "-j", "RETURN"),
        ("-t", "filter", "-P", "OUTPUT", "DROP"),
        ("-D", "NETAPPLY_OUTPUT", "1"),
        ("-A", "THEIRS", "-j", "ACCEPT"),
    ],
    ids=" ".join,
)
def test_a_foreign_change_between_two_reads_is_seen(netns: Netns, kernel: Namespace, change: tuple[str, ...]) -> None:
    """Also one that leaves the size of the table as it was."""
    netns.run("iptables-legacy", "-t", "nat", "-N", "THEIRS")
    netns.run("iptables-legacy", "-t", "filter", "-L")
    apply(kernel, plan())
    before = BACKEND.read(kernel)
    netns.run("iptables-legacy", *(() if "-t" in change else ("-t", "nat")), *change)
    after = BACKEND.read(kernel)
    assert (after.ruleset, after.foreign) != (before.ruleset, before.foreign)
    apply(kernel, plan())
    assert BACKEND.read(kernel).ruleset == plan()
    assert ("DROP" in saved(netns)) == ("DROP" in change)


def test_counters_are_shown_fresh_and_a_counted_packet_costs_no_new_encoding(netns: Netns, kernel: Namespace) -> None:
    desired = plan()
    apply(kernel, desired)
    before = BACKEND.read(kernel)
    steps = BACKEND.encode(before, None)
    text = saved(netns).replace("[0:0] -A NETAPPLY_OUTPUT -o lo", "[11:660] -A NETAPPLY_OUTPUT -o lo")
    netns.run("iptables-legacy-restore", "-c", stdin=text)
    apply(kernel, desired)  # the tag, which iptables-restore drops
    assert BACKEND.read(kernel).counters["ip", "nat", "NETAPPLY_OUTPUT", 1] == (11, 660)
    netns.run("iptables-legacy", "-t", "nat", "-Z")
    after = BACKEND.read(kernel)
    assert after.counters["ip", "nat", "NETAPPLY_OUTPUT", 1] == (0, 0)
    assert BACKEND.encode(after, None) is steps
    add_counters(kernel, "ip", "nat", [struct.pack("=QQ", 3, 180)] * read_info(kernel, "ip", "nat").entries)
    assert BACKEND.read(kernel).counters["ip", "nat", "NETAPPLY_OUTPUT", 1] == (3, 180)


def test_sets_that_come_and_go_elsewhere_are_seen(netns: Netns, kernel: Namespace) -> None:
    only = NamedSet("netapply-4-0123456789", "ip", (Cidr(b"\1\2\3\4", 32),))
    apply(kernel, Ruleset((), (only,)))
    for _ in range(2):
        assert BACKEND.read(kernel).ruleset == Ruleset((), (only,))
    with Namespace.open(netns.path) as another:
        apply(another, None)
    assert BACKEND.read(kernel).ruleset is None


# --- several tables -------------------------------------------------------------------------------------------


def test_where_a_table_is_refused_those_before_it_go_back_counters_and_all(netns: Netns, kernel: Namespace) -> None:
    """xt_owner does not work in PREROUTING."""
    netns.run("iptables-legacy-restore", "-c", stdin=FOREIGN)
    before = saved(netns)
    bad = (Rule((OwnerMatch("uid", 1, 1),), Accept()),)
    chain = Chain("PREROUTING", base=Base("nat", "prerouting", -100), head=bad)
    desired = Ruleset((*plan().tables, Table("ip6", "nat", (chain,))))
    (step,) = BACKEND.encode(BACKEND.read(kernel), desired)
    assert step.name == "replace tables ip nat, ip6 nat"
    with pytest.raises(KernelError, match="replace table ip6 nat: EINVAL"):
        BACKEND.commit(kernel, step)
    assert saved(netns) == before
    assert "PREROUTING" not in "".join(line for line in saved(netns, six=True).splitlines() if line.startswith("-A"))


def test_a_table_with_hooks_that_its_kind_has_not_is_refused() -> None:
    nothing = (0,) * 5
    with pytest.raises(DecodeError, match="table nat has hooks 0b11111"):
        KernelTable("ip", "nat", Info(0b11111, nothing, nothing, 0, 0), b"")
