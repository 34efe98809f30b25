"""ipset over netlink: the named sets of the iptables dialects, as sets of type hash:net.

Messages and attributes are those of linux/netfilter/ipset/ip_set.h, protocol version 7. A set's name ends in a hash of
its content, so that a set of that name is either right or still to be filled.
"""

from __future__ import annotations

import errno
import struct
import time
from typing import TYPE_CHECKING

from netapply.errors import DecodeError, KernelError
from netapply.kernel import NETLINK_NETFILTER
from netapply.ruleset import Cidr, Family, NamedSet
from netapply.values import NamedTuple
from netapply_wire.nfnetlink import attr, error_code, iter_attributes, nested, number, parse_attributes, string, text
from netapply_wire.refusals import refused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from netapply.kernel import Kernel

PROTOCOL = 7  # IPSET_PROTOCOL since 4.20
TYPE, REVISION = "hash:net", 6  # revision 6 of hash:net came with 3.19
SUBSYSTEM = 6  # NFNL_SUBSYS_IPSET
FAMILY: dict[Family, int] = {"ip": 2, "ip6": 10}  # NFPROTO_IPV4, NFPROTO_IPV6

CREATE, DESTROY, LIST, ADD, DEL, GET_BYNAME, GET_BYINDEX = 2, 3, 7, 9, 10, 14, 15  # enum ipset_cmd
ATTR_PROTOCOL, ATTR_NAME, ATTR_TYPE, ATTR_REVISION, ATTR_FAMILY = 1, 2, 3, 4, 5
ATTR_FLAGS, ATTR_DATA, ATTR_ADT, ATTR_LINE, ATTR_INDEX = 6, 7, 8, 9, 11
DATA_IP, DATA_CIDR, DATA_HASHSIZE, DATA_MAXELEM, DATA_REFERENCES = 1, 3, 18, 19, 25
LIST_HEADER = 4  # IPSET_FLAG_LIST_HEADER
NET_ORDER = 0x4000  # NLA_F_NET_BYTEORDER

SO_IP_SET, SOL_IP = 83, 0
OP_BY_NAME = 6
NO_INDEX = 65535  # IPSET_INVALID_ID: no set ever has it

NLMSG_ERROR = 2
REQUEST, ACK, DUMP = 1, 4, 0x300  # NLM_F_*; without NLM_F_EXCL creating and adding are idempotent

#: Not empty since this process saw ipset loaded. Where it is unloaded again netlink loads it, and it has no sets.
_seen: list[bool] = []
#: Elements in one message: the attribute that holds them must stay below 64 KiB.
CHUNK = 1000
#: How long to wait for a rule to let go of a set: nf_tables frees its rules in the background.
RELEASE_SECONDS = 1.0
#: The same for a set that somebody else seems to use: it may as well be a rule of ours that is not yet freed.
SHARED_SECONDS = 0.1
BUSY, REFERENCED = 4100, 4108  # IPSET_ERR_BUSY, IPSET_ERR_REFERENCED
CAUSES = {
    4098: "the kernel has no set type hash:net (module ip_set_hash_net)",
    4099: "too many sets",
    BUSY: "a rule that is not ours uses the set",
    4101: "a set of this name exists and has another type",
    4103: "a set of this name exists and has another type",
    4352: "the set is full",
}

_HEADER = struct.Struct("=IHHIIBBH")  # nlmsghdr and nfgenmsg
_BE32 = struct.Struct(">I")
_OPERATION = struct.Struct("=II32s")  # ip_set_req_get_set: op, version, name or index
_BE16 = struct.Struct(">H")
#: One element, DATA {IP {IPADDR_IPV4 or _IPV6}, CIDR}, and the lengths and types of its first three attributes. What
#: is sent has to say that the address is in network order; what comes back does not say it (since 4.1).
_ELEMENT = {"ip": struct.Struct("=6H4s2HB3x"), "ip6": struct.Struct("=6H16s2HB3x")}
_HEADS, _TAIL = struct.Struct("=6H"), struct.Struct("=2HB3x")  # … before and behind the address
_NESTED = 0x8000  # NLA_F_NESTED
_DUMPED = {
    "ip": (24, ATTR_DATA | _NESTED, 12, DATA_IP | _NESTED, 8, 1),
    "ip6": (36, ATTR_DATA | _NESTED, 24, DATA_IP | _NESTED, 20, 2),
}
_SENT = {family: (*heads[:5], heads[5] | NET_ORDER) for family, heads in _DUMPED.items()}


class CreateSet(NamedTuple):
    """The step that puts up a set with all its elements; harmless where it stands already."""

    set: NamedSet

    @property
    def name(self) -> str:
        return f"create set {self.set.name}"


class DestroySet(NamedTuple):
    """The step that removes a set which no rule of ours uses any more; a `shared` one stays if others do use it."""

    set: str
    shared: bool = False

    @property
    def name(self) -> str:
        return f"destroy set {self.set}" + (", if nobody else uses it" if self.shared else "")


class Listed(NamedTuple):
    """A set that stands in the kernel, its elements in `raw` as netlink gave them.

    `references` counts the rules that use it, in whatever dialect, and for some milliseconds also those that nf_tables
    has not freed yet. `at` is its index, which the match `set` stores.
    """

    name: str
    type: str
    family: int
    raw: tuple[bytes, ...]
    references: int = 0
    at: int = NO_INDEX

    def holds(self, wanted: NamedSet) -> bool:
        """Whether it has exactly these elements, and is what `CreateSet` makes."""
        if self.type != TYPE or self.family != FAMILY[wanted.family]:
            return False
        elements = split(wanted.elements)
        size = _ELEMENT[wanted.family].size
        found = {data[at : at + size] for data in self.raw for at in range(0, len(data), size)}
        # By their bytes is five times faster than decoded, but a kernel may spell them in another way.
        return found == set(_pack(elements, _DUMPED[wanted.family])) or {
            each for data in self.raw for each in _elements(wanted.family, data)
        } == {(cidr, True) for cidr in elements}

    def decode(self) -> NamedSet:
        """The set with its elements, sorted, and none where it is of another type.

        One that `CreateSet` does not make (nomatch) comes twice, so that no set that is wanted equals it.
        """
        family: Family = "ip6" if self.family == FAMILY["ip6"] else "ip"
        raw = self.raw if self.type == TYPE else ()
        found = [cidr for data in raw for cidr, plain in _elements(family, data) for _ in range(2 - plain)]
        return NamedSet(self.name, family, _join(found))


class Standing(NamedTuple):
    """The sets of our names that stand, and how often the rules of ours in one dialect use each, by its index."""

    sets: tuple[Listed, ...]
    uses: Mapping[int, int]

    @property
    def ours(self) -> tuple[Listed, ...]:
        """Those that our rules use, or nobody: the other iptables dialect has sets of the same names."""
        return tuple(each for each in self.sets if not each.references or self.uses.get(each.at))

    def steps(self, wanted: tuple[NamedSet, ...]) -> tuple[tuple[CreateSet, ...], tuple[DestroySet, ...]]:
        """What is to be done before the rules change, and what after they have."""
        standing = {each.name: each for each in self.sets}
        creates = (CreateSet(s) for s in wanted if s.name not in standing or not standing[s.name].holds(s))
        kept = {each.name for each in wanted}
        gone = (each for each in self.ours if each.name not in kept)
        destroys = (DestroySet(each.name, each.references > self.uses.get(each.at, 0)) for each in gone)
        return tuple(creates), tuple(destroys)


# --- steps ---------------------------------------------------------------------------------------------------


def commit_set(kernel: Kernel, step: CreateSet | DestroySet) -> None:
    """Do the step. Raises KernelError."""
    if isinstance(step, CreateSet):
        _create(kernel, step)
    else:
        _destroy(kernel, step)


def _create(kernel: Kernel, step: CreateSet) -> None:
    name, family, _ = step.set
    wanted = split(step.set.elements)
    # Both follow from the content: the kernel takes a second creation only with the same maximum.
    size = max(65536, len(wanted))
    data = nested(ATTR_DATA, _u32(DATA_HASHSIZE, max(64, len(wanted))), _u32(DATA_MAXELEM, size))
    body = string(ATTR_NAME, name) + string(ATTR_TYPE, TYPE) + attr(ATTR_REVISION, bytes([REVISION]))
    _request(kernel, step.name, CREATE, family, body + attr(ATTR_FAMILY, bytes([FAMILY[family]])) + data)
    found = find_set(kernel, name)
    standing = [each for data in found.raw for each in _elements(family, data)] if found else []
    right = {cidr for cidr, plain in standing if plain}.intersection(wanted)
    # What is wrong goes first: a set may be full.
    _change(kernel, step.name, DEL, step.set, [cidr for cidr, _ in standing if cidr not in right])
    _change(kernel, step.name, ADD, step.set, [cidr for cidr in wanted if cidr not in right] if right else wanted)


def _change(kernel: Kernel, label: str, command: int, owner: NamedSet, elements: Sequence[Cidr]) -> None:
    encoded = _pack(elements, _SENT[owner.family])
    for start in range(0, len(encoded), CHUNK):
        body = string(ATTR_NAME, owner.name) + nested(ATTR_ADT, *encoded[start : start + CHUNK]) + _u32(ATTR_LINE, 0)
        _request(kernel, label, command, owner.family, body)


def _destroy(kernel: Kernel, step: DestroySet) -> None:
    deadline = time.monotonic() + (SHARED_SECONDS if step.shared else RELEASE_SECONDS)
    while True:
        try:
            _request(kernel, step.name, DESTROY, "ip", string(ATTR_NAME, step.set))
        except KernelError as error:
            if error.errno == errno.ENOENT:
                return
            if error.errno not in (BUSY, REFERENCED):
                raise
            if time.monotonic() > deadline:
                if step.shared:
                    return
                raise
            time.sleep(0.005)
        else:
            return


# --- reading -------------------------------------------------------------------------------------------------


def list_sets(kernel: Kernel, prefix: str) -> tuple[Listed, ...]:
    """The sets whose names begin with `prefix`, sorted by name, with their elements. Raises KernelError."""
    if not _seen:
        if not _loaded(kernel):
            return ()
        _seen.append(True)
    # The names first: a dump with the elements would carry everybody's.
    try:
        heads = _request(kernel, "list sets", LIST, "ip", _HEADERS)
    except KernelError as error:
        if error.errno == errno.EINVAL:  # nfnetlink knows no such subsystem
            return ()
        raise
    names = sorted(name for head in heads if (name := text(head.get(ATTR_NAME, b""))).startswith(prefix))
    return tuple(found for name in names if (found := find_set(kernel, name)) is not None)


def find_set(kernel: Kernel, name: str) -> Listed | None:
    """The set of this name, with its elements; None where there is none. Raises KernelError."""
    try:
        parts = _request(kernel, f"list set {name}", LIST, "ip", string(ATTR_NAME, name))
    except KernelError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    head = next((part for part in parts if ATTR_TYPE in part), None)
    if head is None:
        return None
    references = number(parse_attributes(head[ATTR_DATA])[DATA_REFERENCES])
    raw = tuple(part[ATTR_ADT] for part in parts if ATTR_ADT in part)
    return Listed(name, text(head[ATTR_TYPE]), number(head[ATTR_FAMILY]), raw, references, number(head[ATTR_INDEX]))


def _loaded(kernel: Kernel) -> bool:
    """Whether the kernel has ipset at the moment. Netlink would load the module, or look for it each time in vain."""
    try:
        kernel.getsockopt("ip", SO_IP_SET, _OPERATION.pack(OP_BY_NAME, PROTOCOL, b""), SOL_IP)
    except PermissionError:
        return True  # we may not ask here: netlink answers for itself
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return False
        raise refused("look for ipset", error) from error
    return True


def set_index(kernel: Kernel, name: str) -> int:
    """The kernel's index of a set, which the match `set` stores. Raises KernelError where there is no such set."""
    (found,) = _request(kernel, f"find set {name}", GET_BYNAME, "ip", string(ATTR_NAME, name))
    return number(found[ATTR_INDEX])


def set_name(kernel: Kernel, index: int) -> str:
    """The name of the set with this index. Raises KernelError where there is none."""
    query = attr(ATTR_INDEX | NET_ORDER, _BE16.pack(index))
    (found,) = _request(kernel, f"find set with index {index}", GET_BYINDEX, "ip", query)
    return text(found[ATTR_NAME])


# --- elements and messages -----------------------------------------------------------------------------------


def split(elements: tuple[Cidr, ...]) -> tuple[Cidr, ...]:
    """Elements as hash:net takes them: it knows no prefix of 0, so that one becomes its two halves."""
    if any(prefix == 0 for _, prefix in elements):
        rest = bytes(len(elements[0].packed) - 1)
        return (Cidr(b"\0" + rest, 1), Cidr(b"\x80" + rest, 1))
    return elements


def _join(elements: list[Cidr]) -> tuple[Cidr, ...]:
    """The inverse of `split`, sorted: the two halves of everything are everything."""
    if len(set(elements)) == 2 and elements[0].prefix == elements[1].prefix == 1:
        return (Cidr(bytes(len(elements[0].packed)), 0),)
    return tuple(sorted(elements))


def _pack(elements: Iterable[Cidr], heads: tuple[int, ...]) -> list[bytes]:
    """Each as an element of a list of elements."""
    # Joined from what is the same in most of them: half the time that packing each takes.
    head = _HEADS.pack(*heads)
    tails = [_TAIL.pack(5, DATA_CIDR, prefix) for prefix in range(129)]
    return [head + packed + tails[prefix] for packed, prefix in elements]


def _elements(family: Family, data: bytes) -> Iterator[tuple[Cidr, bool]]:
    """Each block, and whether it is a plain member: neither exempt from the set (nomatch) nor there for a time only."""
    layout, heads = _ELEMENT[family], _DUMPED[family]
    if len(data) % layout.size == 0 and all(row[:6] == heads for row in layout.iter_unpack(data)):
        for *_, address, _, _, prefix in layout.iter_unpack(data):
            yield Cidr(address, prefix), True
        return
    for _, element in iter_attributes(data):
        attributes = parse_attributes(element)
        address = b"".join(parse_attributes(attributes[DATA_IP]).values())
        prefix = number(attributes[DATA_CIDR])
        if len(address) != (4 if family == "ip" else 16) or prefix > 8 * len(address):
            raise DecodeError("an element of a set is no block of addresses")
        yield Cidr(address, prefix), len(attributes) == 2


def _u32(kind: int, value: int) -> bytes:
    return attr(kind | NET_ORDER, _BE32.pack(value))


_HEADERS = _u32(ATTR_FLAGS, LIST_HEADER)


def _request(kernel: Kernel, label: str, command: int, family: Family, body: bytes) -> list[dict[int, bytes]]:
    """Send one message and return the attributes of each one of the answer. Raises KernelError."""
    body = attr(ATTR_PROTOCOL, bytes([PROTOCOL])) + body
    kind = SUBSYSTEM << 8 | command
    flags = REQUEST | (DUMP if command == LIST else ACK)
    header = _HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0, FAMILY[family], 0, 0)
    try:
        answers = kernel.netlink(NETLINK_NETFILTER, header + body)
    except OSError as error:
        raise refused(label, error) from error
    found: list[dict[int, bytes]] = []
    for answer in answers:
        offset = 0
        while offset + 16 <= len(answer):
            size, kind = struct.unpack_from("=IH", answer, offset)
            if size < 16 or offset + size > len(answer):
                raise DecodeError(f"a netlink message of {size} bytes does not fit in {len(answer) - offset}")
            payload = answer[offset + 16 : offset + size]
            if kind == NLMSG_ERROR and (code := error_code(payload)):
                raise refused(label, OSError(code, ""), CAUSES.get(code, ""))
            if kind >> 8 == SUBSYSTEM:
                found.append(parse_attributes(payload[4:]))
            offset += size + 3 & ~3
    return found
