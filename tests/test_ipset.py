"""Sets over netlink: made whole, read back, and gone again."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from netapply.errors import DecodeError, KernelError
from netapply.namespace import Namespace
from netapply.ruleset import Base, Chain, Cidr, Family, Jump, NamedSet, Return, Rule, Ruleset, SetMatch, Table
from netapply_iptables_legacy import BACKEND
from netapply_wire import ipset
from netapply_wire.ipset import CreateSet, DestroySet, commit_set, find_set, list_sets, set_index, set_name
from tests.netns import Netns

NAME = "netapply-4-0123456789"


def v4(count: int) -> tuple[Cidr, ...]:
    return tuple(Cidr(bytes([10, number >> 8, number & 255, 0]), 24) for number in range(count))


@pytest.fixture
def kernel(netns: Netns) -> Iterator[Namespace]:
    with Namespace.open(netns.path, lock_timeout=2.0) as opened:
        yield opened


@pytest.mark.parametrize(
    ("family", "elements"),
    [
        ("ip", (Cidr(b"\1\2\3\4", 32),)),
        ("ip", (Cidr(bytes(4), 0),)),
        ("ip", (Cidr(bytes(4), 1),)),
        ("ip", v4(10000)),
        ("ip6", (Cidr(b"\xfd" + bytes(15), 8), Cidr(b"\xfe" + bytes(15), 128))),
        ("ip6", (Cidr(bytes(16), 0),)),
        ("ip6", tuple(Cidr(b"\xfd\0" + number.to_bytes(4) + bytes(10), 48) for number in range(3000))),
    ],
)
def test_a_set_reads_back_as_it_was_made(kernel: Namespace, family: Family, elements: tuple[Cidr, ...]) -> None:
    """A block of prefix 0, which hash:net does not know, is there in two halves."""
    wanted = NamedSet(NAME, family, elements)
    commit_set(kernel, CreateSet(wanted))
    (found,) = list_sets(kernel, "netapply-")
    assert found.decode() == wanted
    assert set_name(kernel, set_index(kernel, NAME)) == NAME


def test_making_a_set_that_stands_changes_nothing(kernel: Namespace) -> None:
    wanted = CreateSet(NamedSet(NAME, "ip", v4(5)))
    commit_set(kernel, wanted)
    before = find_set(kernel, NAME), set_index(kernel, NAME)
    commit_set(kernel, wanted)
    assert (find_set(kernel, NAME), set_index(kernel, NAME)) == before


def test_a_set_with_too_few_or_too_many_elements_is_put_right(kernel: Namespace) -> None:
    """The name is a hash of the content, so one that stands was left half-made, or somebody changed it."""
    for elements in (v4(2), v4(9), (Cidr(b"\x0b\0\0\0", 8), *v4(4))):
        commit_set(kernel, CreateSet(NamedSet(NAME, "ip", elements)))
        commit_set(kernel, CreateSet(NamedSet(NAME, "ip", v4(5))))
        found = find_set(kernel, NAME)
        assert found is not None
        assert found.decode() == NamedSet(NAME, "ip", v4(5))


def test_an_incomplete_set_is_a_step_for_the_backend(kernel: Namespace) -> None:
    wanted = Ruleset((), (NamedSet(NAME, "ip", v4(5)),))
    commit_set(kernel, CreateSet(NamedSet(NAME, "ip", v4(4))))
    assert [step.name for step in BACKEND.encode(BACKEND.read(kernel), wanted)] == [f"create set {NAME}"]


def test_destroying_a_set_that_is_gone_is_no_error(kernel: Namespace) -> None:
    commit_set(kernel, CreateSet(NamedSet(NAME, "ip", v4(1))))
    commit_set(kernel, DestroySet(NAME))
    commit_set(kernel, DestroySet(NAME))
    assert list_sets(kernel, "") == ()
    assert find_set(kernel, NAME) is None


def test_older_kernels_say_that_a_set_is_gone(kernel: Namespace) -> None:
    """Newer ones take NLM_F_EXCL to mean it, which we do not set."""

    class Old:
        def netlink(self, protocol: int, request: bytes) -> list[bytes]:
            return [struct.pack("=IHHIIi", 20, 2, 0, 1, 0, -errno.ENOENT) + request[:16]]

    commit_set(Old(), DestroySet(NAME))
    assert find_set(Old(), NAME) is None


def test_a_set_that_a_foreign_rule_uses_is_not_destroyed(
    netns: Netns, kernel: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ipset, "RELEASE_SECONDS", 0.02)
    commit_set(kernel, CreateSet(NamedSet(NAME, "ip", v4(1))))
    netns.run("iptables-legacy", "-A", "OUTPUT", "-m", "set", "--match-set", NAME, "dst", "-j", "ACCEPT")
    with pytest.raises(KernelError, match="a rule that is not ours uses the set"):
        commit_set(kernel, DestroySet(NAME))
    assert NAME in netns.run("iptables-legacy-save")


def test_a_set_that_others_use_is_neither_ours_nor_destroyed(netns: Netns, kernel: Namespace) -> None:
    """iptables-nft has sets of the same names: cleaning this dialect must not need the other one to be gone."""
    wanted = NamedSet(NAME, "ip", v4(3))
    jump = Chain("OUTPUT", base=Base("nat", "output", -100), head=(Rule((), Jump("NETAPPLY_OUTPUT")),))
    rules = (Rule((SetMatch("dst", NAME),), Return()), Rule((SetMatch("src", NAME),), Return()))
    desired = Ruleset((Table("ip", "nat", (jump, Chain("NETAPPLY_OUTPUT", rules))),), (wanted,))
    for step in BACKEND.encode(BACKEND.read(kernel), desired):
        BACKEND.commit(kernel, step)
    netns.run("iptables-nft", "-A", "OUTPUT", "-m", "set", "--match-set", NAME, "dst", "-j", "ACCEPT")
    steps = BACKEND.encode(BACKEND.read(kernel), None)
    assert [step.name for step in steps] == ["replace table ip nat"]
    BACKEND.commit(kernel, steps[0])
    assert BACKEND.read(kernel).ruleset is None
    assert find_set(kernel, NAME) is not None


def test_other_peoples_sets_are_not_listed(kernel: Namespace) -> None:
    commit_set(kernel, CreateSet(NamedSet("theirs", "ip", v4(1))))
    assert list_sets(kernel, "netapply-") == ()


def test_an_unknown_set_or_index_is_an_error(kernel: Namespace) -> None:
    commit_set(kernel, CreateSet(NamedSet(NAME, "ip", v4(1))))
    with pytest.raises(KernelError, match="ENOENT"):
        set_index(kernel, "netapply-4-none")
    with pytest.raises(KernelError):
        set_name(kernel, 4711)


def test_a_set_of_another_type_is_refused() -> None:
    with pytest.raises(DecodeError, match="hash:ip"):
        ipset.Listed(NAME, "hash:ip", 2, 0, ()).decode()


def test_a_rule_finds_its_set_whatever_index_it_gets(netns: Netns, kernel: Namespace) -> None:
    """The index is looked up when the table is exchanged, and iptables reads the name back."""
    commit_set(kernel, CreateSet(NamedSet("theirs", "ip", v4(1))))
    jump = Chain("OUTPUT", base=Base("nat", "output", -100), head=(Rule((), Jump("NETAPPLY_OUTPUT")),))
    rules = (Rule((SetMatch("dst", NAME),), Return()), Rule((SetMatch("src", NAME, negate=True),), Return()))
    desired = Ruleset((Table("ip", "nat", (jump, Chain("NETAPPLY_OUTPUT", rules))),), (NamedSet(NAME, "ip", v4(100)),))
    for step in BACKEND.encode(BACKEND.read(kernel), desired):
        BACKEND.commit(kernel, step)
    assert set_index(kernel, NAME) > 0
    assert BACKEND.read(kernel).ruleset == desired
    saved = netns.run("iptables-legacy-save", "-t", "nat")
    assert f"-A NETAPPLY_OUTPUT -m set --match-set {NAME} dst -j RETURN" in saved
    assert f"-A NETAPPLY_OUTPUT -m set ! --match-set {NAME} src -j RETURN" in saved
