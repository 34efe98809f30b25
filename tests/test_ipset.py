"""Sets over netlink: made whole, read back, and gone again."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from netapply.backend import Backend
from netapply.errors import KernelError
from netapply.kernel import Kernel
from netapply.namespace import Namespace
from netapply.ruleset import Accept, Base, Chain, Cidr, Family, Jump, NamedSet, Return, Rule, Ruleset, SetMatch, Table
from netapply_iptables_legacy import BACKEND as LEGACY
from netapply_iptables_nft import BACKEND as IPTABLES_NFT
from netapply_wire import ipset
from netapply_wire.ipset import (
    ADD,
    DATA_CIDR,
    DATA_IP,
    DEL,
    NET_ORDER,
    CreateSet,
    DestroySet,
    commit_set,
    find_set,
    list_sets,
    set_index,
    set_name,
)
from netapply_wire.nfnetlink import attr, nested, string
from tests.netns import Netns

NAME = "netapply-4-0123456789"


BACKENDS = [LEGACY, IPTABLES_NFT]


def names(backend: Backend) -> str:
    return backend.name


def v6(count: int) -> tuple[Cidr, ...]:
    return tuple(Cidr(b"\xfd\0" + number.to_bytes(4) + bytes(10), 48) for number in range(count))


def ruleset(*sets: NamedSet, family: Family = "ip", uses: int = 1) -> Ruleset:
    """A chain of ours in nat OUTPUT that returns what is in the sets."""
    family = sets[0].family if sets else family
    jump = Chain("OUTPUT", base=Base("nat", "output", -100), head=(Rule((), Jump("NETAPPLY_OUTPUT")),))
    rules = tuple(Rule((SetMatch("dst", each.name),), Return()) for each in sets) * uses
    return Ruleset((Table(family, "nat", (jump, Chain("NETAPPLY_OUTPUT", (*rules, Rule((), Accept()))))),), sets)


def apply(kernel: Kernel, backend: Backend, desired: Ruleset | None) -> list[str]:
    steps = backend.encode(backend.read(kernel), desired)
    for step in steps:
        backend.commit(kernel, step)
    return [step.name for step in steps]


def tamper(kernel: Namespace, owner: NamedSet, command: int, block: Cidr, flags: bytes = b"") -> None:
    """Add or remove one element, as anybody may."""
    kind = 1 if owner.family == "ip" else 2
    address = nested(DATA_IP, attr(kind | NET_ORDER, block.packed))
    cadt_flags = attr(8 | NET_ORDER, flags) if flags else b""
    data = nested(ipset.ATTR_DATA, address, attr(DATA_CIDR, bytes([block.prefix])), cadt_flags)
    body = (
        string(ipset.ATTR_NAME, owner.name) + nested(ipset.ATTR_ADT, data) + attr(ipset.ATTR_LINE | NET_ORDER, bytes(4))
    )
    ipset._request(kernel, "tamper", command, owner.family, body)


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
    assert [step.name for step in LEGACY.encode(LEGACY.read(kernel), wanted)] == [f"create set {NAME}"]


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


@pytest.mark.parametrize("backend", BACKENDS, ids=names)
def test_a_set_that_others_use_stays_and_is_no_longer_ours(netns: Netns, kernel: Namespace, backend: Backend) -> None:
    """The iptables dialects have sets of the same names: cleaning one must not need the other to be gone."""
    desired = ruleset(NamedSet(NAME, "ip", v4(3)))
    apply(kernel, backend, desired)
    other = "iptables-legacy" if backend.name == "iptables-nft" else "iptables-nft"
    netns.run(other, "-A", "OUTPUT", "-m", "set", "--match-set", NAME, "dst", "-j", "ACCEPT")
    assert backend.read(kernel).ruleset == desired
    assert apply(kernel, backend, None)[1:] == [f"destroy set {NAME}, if nobody else uses it"]
    assert backend.read(kernel).ruleset is None
    assert backend.encode(backend.read(kernel), None) == ()
    assert find_set(kernel, NAME) is not None
    netns.run(other, "-F", "OUTPUT")


@pytest.mark.parametrize("backend", BACKENDS, ids=names)
def test_a_set_that_only_others_use_is_not_touched(netns: Netns, kernel: Namespace, backend: Backend) -> None:
    commit_set(kernel, CreateSet(NamedSet(NAME, "ip", v4(3))))
    netns.run("iptables-legacy", "-A", "OUTPUT", "-m", "set", "--match-set", NAME, "dst", "-j", "ACCEPT")
    assert backend.read(kernel).ruleset is None
    assert backend.encode(backend.read(kernel), None) == ()


def test_a_set_whose_rules_are_only_just_gone_is_destroyed(kernel: Namespace) -> None:
    """nf_tables frees its rules some milliseconds later, and until then they count as users."""
    backend = IPTABLES_NFT
    apply(kernel, backend, ruleset(NamedSet(NAME, "ip", v4(3))))
    apply(kernel, backend, ruleset(NamedSet(NAME, "ip", v4(3)), uses=2))
    apply(kernel, backend, None)
    assert list_sets(kernel, "") == ()


def test_other_peoples_sets_are_not_listed(kernel: Namespace) -> None:
    commit_set(kernel, CreateSet(NamedSet("theirs", "ip", v4(1))))
    assert list_sets(kernel, "netapply-") == ()


def test_an_unknown_set_or_index_is_an_error(kernel: Namespace) -> None:
    commit_set(kernel, CreateSet(NamedSet(NAME, "ip", v4(1))))
    with pytest.raises(KernelError, match="ENOENT"):
        set_index(kernel, "netapply-4-none")
    with pytest.raises(KernelError):
        set_name(kernel, 4711)


def test_a_set_of_another_type_equals_none_that_is_wanted() -> None:
    """A rule set can be read whatever somebody put under our names."""
    wanted = NamedSet(NAME, "ip", v4(1))
    strange = ipset.Listed(NAME, "hash:ip", 2, (b"\x08\0\1\0\1\2\3\4",))
    assert strange.decode() == NamedSet(NAME, "ip", ())
    assert not strange.holds(wanted)


@pytest.mark.parametrize("backend", BACKENDS, ids=names)
@pytest.mark.parametrize("family", ["ip", "ip6"])
@pytest.mark.parametrize(
    "change",
    [
        (DEL, [3], {}),
        (ADD, [99], {}),
        (ADD, [], {5: b"\0\0\0\4"}),  # IPSET_FLAG_NOMATCH: exempt from the set
        (ADD, [], {98: b"\0\0\0\4"}),
        (None, [3, 99], {}),
    ],
    ids=["one removed", "one added", "one exempt", "another one exempt", "one swapped"],
)
def test_a_set_that_somebody_changed_is_put_right(
    kernel: Namespace,
    backend: Backend,
    family: Family,
    change: tuple[int | None, list[int], dict[int, bytes]],
) -> None:
    """The name is a hash of the content, so whatever else is in it is drift."""
    blocks = {"ip": v4, "ip6": v6}[family](100)
    wanted = NamedSet(NAME, family, blocks[:40])
    desired = ruleset(wanted)
    apply(kernel, backend, desired)
    command, places, exempt = change
    if command is None:
        tamper(kernel, wanted, DEL, blocks[places[0]])
        command, places = ADD, places[1:]
    for place in places:
        tamper(kernel, wanted, command, blocks[place])
    for place, flags in exempt.items():
        tamper(kernel, wanted, ADD, blocks[place], flags)
    assert backend.read(kernel).ruleset != desired
    assert apply(kernel, backend, desired) == [f"create set {NAME}"]
    assert backend.read(kernel).ruleset == desired
    assert backend.encode(backend.read(kernel), desired) == ()


def test_a_full_set_with_a_wrong_element_is_put_right(kernel: Namespace) -> None:
    """What is wrong has to go before there is room."""
    blocks = tuple(Cidr(bytes([10, n >> 16, n >> 8 & 255, n & 255]), 32) for n in range(65537))
    wanted = NamedSet(NAME, "ip", blocks[:-1])
    commit_set(kernel, CreateSet(wanted))
    tamper(kernel, wanted, DEL, blocks[0])
    tamper(kernel, wanted, ADD, blocks[-1])
    commit_set(kernel, CreateSet(wanted))
    found = find_set(kernel, NAME)
    assert found is not None
    assert found.holds(wanted)


@pytest.mark.parametrize("flag", [0, 0x4000], ids=["as kernels say it now", "as before 4.1"])
@pytest.mark.parametrize("family", ["ip", "ip6"])
def test_a_set_is_compared_and_decoded_however_the_kernel_spells_it(family: Family, flag: int) -> None:
    blocks = tuple(sorted({"ip": v4, "ip6": v6}[family](5)))
    heads = (*ipset._DUMPED[family][:5], ipset._DUMPED[family][5] | flag)
    found = ipset.Listed(NAME, "hash:net", ipset.FAMILY[family], (b"".join(ipset._pack(blocks, heads)),))
    assert found.decode() == NamedSet(NAME, family, blocks)
    assert found.holds(NamedSet(NAME, family, blocks))
    assert not found.holds(NamedSet(NAME, family, blocks[1:]))


@pytest.mark.parametrize("backend", BACKENDS, ids=names)
@pytest.mark.parametrize("family", ["ip", "ip6"])
@pytest.mark.parametrize("before_ours", [0, 1, 3])
def test_one_list_follows_another(kernel: Namespace, backend: Backend, family: Family, before_ours: int) -> None:
    """Also to the index of the set that went, and to index 0; other people's sets shift them."""
    for number in range(before_ours):
        commit_set(kernel, CreateSet(NamedSet(f"theirs-{number}", "ip", v4(1))))
    blocks = {"ip": v4, "ip6": v6}[family](80)
    prefix = f"netapply-{family[2:] or 4}-"
    first, second = NamedSet(f"{prefix}a", family, blocks[:40]), NamedSet(f"{prefix}b", family, blocks[40:])
    fewer = NamedSet(f"{prefix}c", family, blocks[10:20])
    both = ruleset(first, second)
    for desired in (
        ruleset(first),
        ruleset(second),
        both,
        ruleset(fewer),
        ruleset(family=family),
        ruleset(first),
        None,
    ):
        apply(kernel, backend, desired)
        after = backend.read(kernel)
        assert after.ruleset == desired
        assert backend.encode(after, desired) == ()
    assert len(list_sets(kernel, "")) == before_ours


class Limited:
    """A process that may ask nothing by socket options."""

    memory = Kernel.memory

    def __init__(self, kernel: Namespace) -> None:
        self.lock_timeout = kernel.lock_timeout
        self.netlink = kernel.netlink
        self.read_file = kernel.read_file

    def getsockopt(self, family: Family, option: int, buffer: bytes, level: int | None = None) -> bytes:
        raise PermissionError(errno.EPERM, "Operation not permitted")


def test_iptables_nft_and_its_sets_need_no_socket_options(kernel: Namespace) -> None:
    desired = ruleset(NamedSet(NAME, "ip", v4(40)))
    for wanted in (ruleset(), desired, None):
        apply(Limited(kernel), IPTABLES_NFT, wanted)
        assert IPTABLES_NFT.read(Limited(kernel)).ruleset == wanted


def test_a_kernel_without_ipset_has_no_sets(kernel: Namespace) -> None:
    class Without(Limited):
        def netlink(self, protocol: int, request: bytes) -> list[bytes]:
            if request[5] == ipset.SUBSYSTEM:
                return [struct.pack("=IHHIIi", 20, 2, 0, 1, 0, -errno.EINVAL) + request[:16]]
            return kernel.netlink(protocol, request)

    without = Without(kernel)
    without.netlink = Without.netlink.__get__(without)
    assert list_sets(without, "") == ()


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOMEM])
def test_what_the_kernel_refuses_is_a_kernel_error(kernel: Namespace, number: int) -> None:
    class Refusing:
        def getsockopt(self, *_: object) -> bytes:
            raise OSError(number, "refused")

        def netlink(self, *_: object) -> list[bytes]:
            raise OSError(number, "refused")

    for look in (lambda: list_sets(Refusing(), ""), lambda: set_index(Refusing(), NAME)):
        with pytest.raises(KernelError) as caught:
            look()
        assert caught.value.errno == number
        assert ("run as root" in caught.value.next_step) == (number == errno.EPERM)


def test_a_rule_finds_its_set_whatever_index_it_gets(netns: Netns, kernel: Namespace) -> None:
    """The index is looked up when the table is exchanged, and iptables reads the name back."""
    commit_set(kernel, CreateSet(NamedSet("theirs", "ip", v4(1))))
    jump = Chain("OUTPUT", base=Base("nat", "output", -100), head=(Rule((), Jump("NETAPPLY_OUTPUT")),))
    rules = (Rule((SetMatch("dst", NAME),), Return()), Rule((SetMatch("src", NAME, negate=True),), Return()))
    desired = Ruleset((Table("ip", "nat", (jump, Chain("NETAPPLY_OUTPUT", rules))),), (NamedSet(NAME, "ip", v4(100)),))
    for step in LEGACY.encode(LEGACY.read(kernel), desired):
        LEGACY.commit(kernel, step)
    assert set_index(kernel, NAME) > 0
    assert LEGACY.read(kernel).ruleset == desired
    saved = netns.run("iptables-legacy-save", "-t", "nat")
    assert f"-A NETAPPLY_OUTPUT -m set --match-set {NAME} dst -j RETURN" in saved
    assert f"-A NETAPPLY_OUTPUT -m set ! --match-set {NAME} src -j RETURN" in saved
