"""nfnetlink, the netlink subsystem of nf_tables: attributes, messages, batches, dumps.

The pure half turns values to bytes and back; the other half sends them through a `Kernel`. Layouts and numbers are
those of linux/netlink.h, linux/netfilter/nfnetlink.h and linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from struct import Struct, error
from sys import byteorder
from typing import TypeVar

from netapply.errors import ConflictError, DecodeError, GenerationChanged, KernelError
from netapply.kernel import NETLINK_NETFILTER, Kernel
from netapply.ruleset import TableFamily
from netapply.sockets import socket
from netapply.values import NamedTuple

T = TypeVar("T")

# linux/netlink.h: message types and flags. "EXCL" refuses what exists, "APPEND" puts a rule at the end of its chain.
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200
NLMSGERR_ATTR_MSG, NLMSGERR_ATTR_OFFS = 1, 2
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF

# linux/netfilter/nfnetlink.h
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFNL_BATCH_GENID = 0x10, 0x11, 1
NFNL_SUBSYS_NFTABLES = 10

# linux/netfilter.h: families
NFPROTO_INET, NFPROTO_IPV4, NFPROTO_IPV6 = 1, 2, 10
NFPROTO: dict[TableFamily, int] = {"inet": NFPROTO_INET, "ip": NFPROTO_IPV4, "ip6": NFPROTO_IPV6}

# enum nf_tables_msg_types
NFT_MSG_NEWTABLE, NFT_MSG_GETTABLE, NFT_MSG_DELTABLE = 0, 1, 2
NFT_MSG_NEWCHAIN, NFT_MSG_GETCHAIN, NFT_MSG_DELCHAIN = 3, 4, 5
NFT_MSG_NEWRULE, NFT_MSG_GETRULE, NFT_MSG_DELRULE = 6, 7, 8
NFT_MSG_NEWSET, NFT_MSG_GETSET, NFT_MSG_DELSET = 9, 10, 11
NFT_MSG_NEWSETELEM, NFT_MSG_GETSETELEM, NFT_MSG_DELSETELEM = 12, 13, 14
NFT_MSG_NEWGEN, NFT_MSG_GETGEN = 15, 16
NFTA_GEN_ID = 1
#: The generation of a namespace in which nobody ever changed anything (net/netfilter/nf_tables_api.c).
UNTOUCHED = 1

#: How often a dump is repeated that others keep changing under us. Each repeat is well below a millisecond.
READ_ATTEMPTS = 16

_READS = {
    NFT_MSG_GETTABLE: "tables",
    NFT_MSG_GETCHAIN: "chains",
    NFT_MSG_GETRULE: "rules",
    NFT_MSG_GETSET: "sets",
    NFT_MSG_GETSETELEM: "set elements",
}
_HEADER = Struct("=IHHIIBBH")  # nlmsghdr and nfgenmsg in one: length, type, flags, sequence, port, family, version, id
_NLMSGHDR = Struct("=IHHII")
_NLA = Struct("=HH")
_INT32 = Struct("=i")
_NO_ERRNO = 1 << 16  # above those of linux/errno.h, and of subsystems, which begin at 4096
_UINT32 = Struct("=I")
_NLA_U32 = Struct("=HH4s")
_NLA_U64 = Struct("=HH8s")
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")
_SUBSYSTEM = NFNL_SUBSYS_NFTABLES << 8
_BATCH_ID = socket.htons(NFNL_SUBSYS_NFTABLES)


# --- attributes ----------------------------------------------------------------------------------------------


def attr(kind: int, data: bytes) -> bytes:
    """One attribute (struct nlattr) of at most 65,531 bytes, padded to four."""
    size = len(data) + 4
    return _NLA.pack(size, kind) + data + _PADDING[size & 3]


def nested(kind: int, *parts: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attr(kind | NLA_F_NESTED, b"".join(parts))


def string(kind: int, text: str) -> bytes:
    """A NUL-terminated string; the kernel's names need not be UTF-8 (see `text`)."""
    return attr(kind, text.encode("utf-8", "surrogateescape") + b"\0")


def u32(kind: int, value: int) -> bytes:
    """32 bits, big endian as nf_tables wants all its numbers; negative verdicts wrap."""
    return _NLA_U32.pack(8, kind, (value & 0xFFFFFFFF).to_bytes(4))


def u64(kind: int, value: int) -> bytes:
    """64 bits, big endian."""
    return _NLA_U64.pack(12, kind, value.to_bytes(8))


def iter_attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type without flags, payload) of each attribute, in order; the form for lists, where types repeat."""
    offset, end = 0, len(data)
    while offset + 4 <= end:
        size, kind = _NLA.unpack_from(data, offset)
        if size < 4 or offset + size > end:
            raise DecodeError(f"a netlink attribute of {size} bytes does not fit in the {end - offset} that are there")
        yield kind & NLA_TYPE_MASK, data[offset + 4 : offset + size]
        offset += (size + 3) & ~3


class Attributes(dict[int, bytes]):
    """Attributes by type. To look up one that is not there raises DecodeError, as no kernel leaves out what we ask."""

    def __missing__(self, kind: int) -> bytes:
        raise DecodeError(f"netlink attribute {kind} is missing")


def parse_attributes(data: bytes) -> Attributes:
    """Attributes by type, flags removed. Of a type that repeats the last one counts. Raises DecodeError."""
    return Attributes(iter_attributes(data))


def number(data: bytes) -> int:
    """The value of a big-endian attribute of any width."""
    return int.from_bytes(data)


def text(data: bytes) -> str:
    """The value of a string attribute."""
    return data.rstrip(b"\0").decode("utf-8", "surrogateescape")


# --- messages and batches ------------------------------------------------------------------------------------


class Operation(NamedTuple):
    """One message of a batch. `flags` go without NLM_F_REQUEST; `label` is for errors: "add rule ip nat OUTPUT #3"."""

    command: int
    family: int
    body: bytes
    flags: int
    label: str


class Batch(NamedTuple):
    """Operations encoded and numbered 1..n: the bytes can be sent to as many namespaces as want them."""

    messages: bytes
    labels: tuple[str, ...]


class Message(NamedTuple):
    """One object as the kernel describes it: its family (NFPROTO_*), and attributes by type."""

    family: int
    attributes: dict[int, bytes]


def message(command: int, family: int, body: bytes = b"", flags: int = 0, sequence: int = 0) -> bytes:
    """One nf_tables message; NLM_F_REQUEST is added."""
    kind = _SUBSYSTEM | command
    return _HEADER.pack(20 + len(body), kind, flags | NLM_F_REQUEST, sequence, 0, family, 0, 0) + body


def encode_batch(operations: Sequence[Operation]) -> Batch:
    """The numbered messages of a batch, without its begin and end."""
    messages = [
        message(command, family, body, flags, sequence)
        for sequence, (command, family, body, flags, _) in enumerate(operations, 1)
    ]
    return Batch(b"".join(messages), tuple(operation.label for operation in operations))


def batch(operations: Sequence[Operation] | Batch, generation: int | None) -> bytes:
    """A whole batch: begin with NFNL_BATCH_GENID (None: whatever the generation is), operations 1..n, end n+1."""
    encoded = operations if isinstance(operations, Batch) else encode_batch(operations)
    end = _HEADER.pack(20, NFNL_MSG_BATCH_END, NLM_F_REQUEST, len(encoded.labels) + 1, 0, 0, 0, _BATCH_ID)
    return _begin(generation) + encoded.messages + end


def _begin(generation: int | None) -> bytes:
    body = b"" if generation is None else u32(NFNL_BATCH_GENID, generation)
    return _HEADER.pack(20 + len(body), NFNL_MSG_BATCH_BEGIN, NLM_F_REQUEST, 0, 0, 0, 0, _BATCH_ID) + body


def send_batch(kernel: Kernel, operations: Sequence[Operation] | Batch, generation: int | None) -> None:
    """Commit a batch: all of it or nothing.

    Raises GenerationChanged where `generation` is stale, else KernelError with the label, errno and ext-ack of the
    first operation that failed. ENOBUFS means that answers were lost and the outcome unknown: only reading back tells.
    """
    encoded = operations if isinstance(operations, Batch) else encode_batch(operations)
    _transmit(kernel, batch(encoded, generation), encoded.labels)


def check_batch(kernel: Kernel, operations: Sequence[Operation] | Batch) -> None:
    """Let the kernel validate a batch and throw it away; nothing changes, not even the generation.

    A batch without an end is aborted when all of it has been looked at: nft -c does the same. Raises as send_batch.
    """
    encoded = operations if isinstance(operations, Batch) else encode_batch(operations)
    _transmit(kernel, _begin(None) + encoded.messages, encoded.labels)


def _transmit(kernel: Kernel, request: bytes, labels: tuple[str, ...]) -> None:
    # Operations ask for no acknowledgement: a good one acknowledges 0 even when the batch is aborted later on.
    try:
        answers = kernel.netlink(NETLINK_NETFILTER, request)
    except OSError as failure:
        raise KernelError("commit nf_tables batch", failure.errno or errno.EIO) from failure
    for answer in answers:
        for kind, flags, sequence, payload in _messages(answer):
            if kind == NLMSG_ERROR and (code := error_code(payload)):
                raise _failure(labels, sequence, code, _extack(payload, flags))


def _failure(labels: tuple[str, ...], sequence: int, code: int, extack: str) -> KernelError:
    if sequence == 0 and code == errno.ERESTART:
        return GenerationChanged("commit nf_tables batch", code, extack=extack, cause="the rule set has changed")
    label = labels[sequence - 1] if 0 < sequence <= len(labels) else "commit nf_tables batch"
    return KernelError(label, code, extack=extack)


# --- answers -------------------------------------------------------------------------------------------------


def _messages(datagram: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, payload) of each message in a datagram."""
    offset, end = 0, len(datagram)
    while offset + 16 <= end:
        size, kind, flags, sequence, _ = _NLMSGHDR.unpack_from(datagram, offset)
        if size < 16 or offset + size > end:
            raise DecodeError(f"a netlink message of {size} bytes does not fit in the {end - offset} that are there")
        yield kind, flags, sequence, datagram[offset + 16 : offset + size]
        offset += (size + 3) & ~3


def error_code(payload: bytes) -> int:
    """The positive errno of an NLMSG_ERROR or NLMSG_DONE, 0 for none. Raises DecodeError."""
    try:
        code = -int(_INT32.unpack_from(payload)[0])
    except error as short:
        raise DecodeError("a netlink error message without an error number") from short
    if not 0 <= code < _NO_ERRNO:
        raise DecodeError(f"a netlink error message with the error number {code}")
    return code


def _extack(payload: bytes, flags: int) -> str:
    """The kernel's own words (NLMSGERR_ATTR_MSG), else the place of the attribute that it did not like, or ""."""
    if not flags & NLM_F_ACK_TLVS or len(payload) < 20:
        return ""
    echoed = 16 if flags & NLM_F_CAPPED else (_NLMSGHDR.unpack_from(payload, 4)[0] + 3) & ~3
    said = parse_attributes(payload[4 + echoed :])
    if NLMSGERR_ATTR_MSG in said:
        return text(said[NLMSGERR_ATTR_MSG])
    where = said.get(NLMSGERR_ATTR_OFFS)
    return f"attribute at byte {_UINT32.unpack(where)[0]} of the message" if where and len(where) == 4 else ""


_GET_GENERATION = message(NFT_MSG_GETGEN, 0, sequence=1)  # no acknowledgement: the answer is one message
# Asked many times, so known by the shape that all kernels have answered in so far.
_GENERATION_KIND = (_SUBSYSTEM | NFT_MSG_NEWGEN).to_bytes(2, byteorder)
_GENERATION_HEAD = _NLA.pack(8, NFTA_GEN_ID)
_ERROR_KIND, _NOT_THERE = NLMSG_ERROR.to_bytes(2, byteorder), _INT32.pack(-errno.ENOENT)


# --- reading -------------------------------------------------------------------------------------------------


def request(kernel: Kernel, command: int, family: int, body: bytes = b"", flags: int = NLM_F_ACK) -> list[bytes]:
    """Send one request that is not a batch; returns each object of the answer as `parse_message` takes it.

    That is the family, and the attributes as they came, without what differs each time: equal bytes are equal objects.
    Raises KernelError, InterruptedError.
    """
    label = f"read nf_tables {_READS[command]}"
    try:
        answers = kernel.netlink(NETLINK_NETFILTER, message(command, family, body, flags, 1))
    except OSError as failure:
        raise KernelError(label, failure.errno or errno.EIO) from failure
    found: list[bytes] = []
    unpack, interrupted = _NLMSGHDR.unpack_from, NLM_F_DUMP_INTR if flags & NLM_F_DUMP == NLM_F_DUMP else 0
    for answer in answers:
        offset, end = 0, len(answer) - 16
        while offset <= end:
            size, kind, message_flags, _, _ = unpack(answer, offset)
            after = offset + size
            if size < 16 or after > end + 16:
                raise DecodeError(f"a netlink message of {size} bytes does not fit in {end + 16 - offset}")
            if message_flags & interrupted:
                raise InterruptedError
            if kind >> 8 == NFNL_SUBSYS_NFTABLES:
                found.append(answer[offset + 16 : offset + 18] + answer[offset + 20 : after])  # without the generation
            elif kind in (NLMSG_ERROR, NLMSG_DONE) and size >= 20:
                payload = answer[offset + 16 : after]
                if code := error_code(payload):
                    told = _extack(payload, message_flags) if kind == NLMSG_ERROR else ""
                    raise KernelError(label, code, extack=told)
            offset = after + 3 & ~3
    return found


def parse_message(data: bytes) -> Message:
    """One object of an answer. Raises DecodeError."""
    return Message(data[0] if data else 0, parse_attributes(data[2:]))


def get(kernel: Kernel, command: int, family: int, body: bytes) -> Message | None:
    """One object by its name; None where there is none. Raises KernelError."""
    try:
        found = request(kernel, command, family, body)
    except KernelError as failure:
        if failure.errno == errno.ENOENT:
            return None
        raise
    return parse_message(found[0]) if found else None


def dump(kernel: Kernel, command: int, family: int, body: bytes = b"") -> tuple[bytes, ...]:
    """All objects of one kind, for `parse_message`; again where the kernel says that they changed meanwhile.

    `family` 0 (NFPROTO_UNSPEC) means every family; `body` narrows, as with NFTA_RULE_TABLE. Raises KernelError,
    and ConflictError when it was interrupted READ_ATTEMPTS times.
    """
    for _ in range(READ_ATTEMPTS):
        try:
            return tuple(request(kernel, command, family, body, NLM_F_DUMP))
        except InterruptedError:
            continue
    raise ConflictError("somebody keeps changing the nf_tables rules while they are read")


def generation(kernel: Kernel) -> int:
    """The generation id of the namespace's rule set: every commit that changes something raises it."""
    return look(kernel)[0]


def look(kernel: Kernel, request: bytes = b"") -> tuple[int, bytes | None]:
    """The generation, and in one go what `request` asks for by its name, for `parse_message`: None where it is not.

    `request` is a message of sequence 2 without flags; where somebody commits between the two answers, the second one
    is of the next generation. Raises KernelError.
    """
    label = "read nf_tables generation"
    try:
        answers = kernel.netlink(NETLINK_NETFILTER, _GET_GENERATION + request)
    except OSError as failure:
        raise KernelError(label, failure.errno or errno.EIO) from failure
    at, found = None, None
    for answer in answers:
        if answer[4:6] == _GENERATION_KIND and answer[20:24] == _GENERATION_HEAD:
            at = int.from_bytes(answer[24:28])
            continue
        if answer[4:6] == _ERROR_KIND and answer[16:20] == _NOT_THERE:
            continue
        for kind, flags, sequence, payload in _messages(answer):
            if kind == NLMSG_ERROR and (code := error_code(payload)):
                if sequence != 2 or code != errno.ENOENT:
                    raise KernelError(label, code, extack=_extack(payload, flags))
            elif sequence == 2 and kind >> 8 == NFNL_SUBSYS_NFTABLES:
                found = payload[:2] + payload[4:]
            elif kind == _SUBSYSTEM | NFT_MSG_NEWGEN:
                at = number(parse_attributes(payload[4:]).get(NFTA_GEN_ID, b""))
    if at is None:
        raise DecodeError("the kernel answers NFT_MSG_GETGEN without a generation id")
    return at, found


def read_consistent(kernel: Kernel, read: Callable[[int], T], before: int) -> T:
    """What `read(generation)` returns when the generation is the same before and after it; repeated until it is.

    `before` is the generation at the moment. Raises ConflictError when it moved READ_ATTEMPTS times.
    """
    for _ in range(READ_ATTEMPTS):
        found = read(before)
        after = generation(kernel)
        if after == before:
            return found
        before = after
    raise ConflictError("somebody keeps changing the nf_tables rules while they are read")
