"""The nfnetlink codec: bytes, and what the kernel says to them."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netapply import netlink
from netapply.backend import find_backend
from netapply.errors import ConflictError, DecodeError, GenerationChanged, KernelError
from netapply.namespace import Namespace
from netapply_wire import expressions
from netapply_wire import nfnetlink as nfnl
from tests.netns import Netns

TABLE = nfnl.string(1, "t")
ADD_TABLE = nfnl.Operation(nfnl.NFT_MSG_NEWTABLE, nfnl.NFPROTO_INET, TABLE, nfnl.NLM_F_CREATE, "add table inet t")
ADD_CHAIN = nfnl.Operation(
    nfnl.NFT_MSG_NEWCHAIN, nfnl.NFPROTO_INET, TABLE + nfnl.string(3, "c"), nfnl.NLM_F_CREATE, "add chain inet t c"
)
DELETE_NOTHING = nfnl.Operation(
    nfnl.NFT_MSG_DELCHAIN, nfnl.NFPROTO_INET, TABLE + nfnl.string(3, "nope"), 0, "delete chain inet t nope"
)


@pytest.fixture
def kernel(netns: Netns) -> Iterator[Namespace]:
    with Namespace.open(netns.path) as namespace:
        yield namespace


class Script:
    """A kernel that gives prepared answers to one request after another, the last one for ever."""

    lock_timeout = 1.0

    def __init__(self, *answers: list[bytes] | OSError) -> None:
        self.answers = list(answers)
        self.requests: list[bytes] = []

    def netlink(self, protocol: int, request: bytes) -> list[bytes]:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, OSError):
            raise answer
        return answer


def header(kind: int, payload: bytes, flags: int = 0, sequence: int = 1) -> bytes:
    return struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0) + payload


def failure(code: int, sequence: int, *said: bytes, echoed: bytes = b"") -> bytes:
    """NLMSG_ERROR as with NETLINK_CAP_ACK, or with the whole message echoed."""
    flags = 0x200 | (0 if echoed else 0x100)
    echo = struct.pack("=IHHII", 16 + len(echoed), 0xA00, 0, sequence, 0) + echoed
    return header(2, struct.pack("=i", -code) + echo + b"".join(said), flags, sequence)


def generation_is(value: int) -> list[bytes]:
    return [header(0xA00 | nfnl.NFT_MSG_NEWGEN, b"\0\0\0\0" + nfnl.u32(nfnl.NFTA_GEN_ID, value))]


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), st.binary(max_size=300))))
def test_attributes_come_back_in_order_and_without_flags(items: list[tuple[int, bytes]]) -> None:
    data = b"".join(
        nfnl.attr(kind | (nfnl.NLA_F_NESTED if index % 2 else 0), d) for index, (kind, d) in enumerate(items)
    )
    assert len(data) % 4 == 0
    assert list(nfnl.iter_attributes(data)) == items


@given(st.binary(max_size=60))
def test_malformed_attributes_are_a_decode_error_and_nothing_else(data: bytes) -> None:
    with contextlib.suppress(DecodeError):
        nfnl.parse_attributes(data)


def test_numbers_are_big_endian_and_negative_verdicts_wrap() -> None:
    assert nfnl.u32(1, -5) == struct.pack("=HH", 8, 1) + b"\xff\xff\xff\xfb"
    assert nfnl.u64(2, 1) == struct.pack("=HH", 12, 2) + b"\0" * 7 + b"\1"


def test_a_batch_is_begin_with_generation_then_operations_numbered_from_one_then_end() -> None:
    data = nfnl.batch([ADD_TABLE, ADD_CHAIN], 7)
    found = []
    while data:
        size, kind, _, sequence, _ = struct.unpack_from("=IHHII", data)
        found.append((kind, sequence))
        data = data[(size + 3) & ~3 :]
    assert found == [(0x10, 0), (0xA00, 1), (0xA03, 2), (0x11, 3)]
    assert nfnl.u32(nfnl.NFNL_BATCH_GENID, 7) in nfnl.batch([ADD_TABLE], 7)


def test_an_encoded_batch_is_the_same_bytes_as_its_operations() -> None:
    assert nfnl.batch(nfnl.encode_batch([ADD_TABLE, ADD_CHAIN]), 7) == nfnl.batch([ADD_TABLE, ADD_CHAIN], 7)


def test_a_commit_raises_the_generation_and_reading_does_not(kernel: Namespace) -> None:
    before = nfnl.generation(kernel)
    nfnl.send_batch(kernel, [ADD_TABLE], before)
    after = nfnl.generation(kernel)
    assert after == before + 1
    assert len(nfnl.dump(kernel, nfnl.NFT_MSG_GETTABLE, 0)) == 1
    assert nfnl.generation(kernel) == after


def test_a_stale_generation_is_said_so_and_commits_nothing(kernel: Namespace) -> None:
    stale = nfnl.generation(kernel)
    nfnl.send_batch(kernel, [ADD_TABLE], stale)
    with pytest.raises(GenerationChanged):
        nfnl.send_batch(kernel, [ADD_CHAIN], stale)
    assert nfnl.dump(kernel, nfnl.NFT_MSG_GETCHAIN, nfnl.NFPROTO_INET) == ()


def test_the_failing_operation_is_named_and_the_good_ones_are_undone(kernel: Namespace) -> None:
    with pytest.raises(KernelError) as caught:
        nfnl.send_batch(kernel, [ADD_TABLE, DELETE_NOTHING, ADD_CHAIN], None)
    assert (caught.value.operation, caught.value.errno) == ("delete chain inet t nope", errno.ENOENT)
    assert "attribute at byte" in caught.value.extack
    assert nfnl.get(kernel, nfnl.NFT_MSG_GETTABLE, nfnl.NFPROTO_INET, TABLE) is None


def test_the_kernels_own_words_are_in_the_error(kernel: Namespace) -> None:
    long = nfnl.Operation(nfnl.NFT_MSG_NEWTABLE, nfnl.NFPROTO_INET, nfnl.string(1, "x" * 300), 0, "add a long name")
    with pytest.raises(KernelError) as caught:
        nfnl.send_batch(kernel, [long], None)
    assert caught.value.extack == "Attribute failed policy validation"


def test_a_checked_batch_changes_nothing_and_bumps_no_generation(kernel: Namespace, netns: Netns) -> None:
    before = nfnl.generation(kernel)
    nfnl.check_batch(kernel, [ADD_TABLE, ADD_CHAIN])
    assert (nfnl.generation(kernel), netns.run("nft", "list", "ruleset")) == (before, "")


def test_a_checked_batch_reports_what_a_commit_would(kernel: Namespace) -> None:
    with pytest.raises(KernelError) as caught:
        nfnl.check_batch(kernel, [ADD_TABLE, DELETE_NOTHING])
    assert caught.value.operation == "delete chain inet t nope"


def test_an_acknowledgement_of_zero_is_no_failure() -> None:
    nfnl.send_batch(Script([failure(0, 1)]), [ADD_TABLE], 1)


def test_lost_answers_are_reported_as_enobufs() -> None:
    with pytest.raises(KernelError) as caught:
        nfnl.send_batch(Script(OSError(errno.ENOBUFS, "lost")), [ADD_TABLE], 1)
    assert caught.value.errno == errno.ENOBUFS


@pytest.mark.parametrize("echoed", [b"", b"\0" * 40], ids=["capped", "whole"])
def test_ext_ack_is_found_behind_the_echoed_message(echoed: bytes) -> None:
    said = nfnl.string(nfnl.NLMSGERR_ATTR_MSG, "no such thing")
    with pytest.raises(KernelError) as caught:
        nfnl.send_batch(Script([failure(22, 2, said, echoed=echoed)]), [ADD_TABLE, ADD_CHAIN], 1)
    assert (caught.value.operation, caught.value.extack) == ("add chain inet t c", "no such thing")


def test_an_interrupted_dump_is_repeated() -> None:
    table = header(0xA00, b"\1\0\0\0" + TABLE)
    interrupted = header(0xA00, b"\1\0\0\0" + TABLE, 0x10)
    kernel = Script([interrupted], [table + header(3, b"\0\0\0\0")])
    assert len(nfnl.dump(kernel, nfnl.NFT_MSG_GETTABLE, 0)) == 1
    assert len(kernel.requests) == 2


def test_a_dump_that_is_always_interrupted_is_a_conflict() -> None:
    kernel = Script([header(0xA00, b"\1\0\0\0" + TABLE, 0x10)])
    with pytest.raises(ConflictError):
        nfnl.dump(kernel, nfnl.NFT_MSG_GETTABLE, 0)
    assert len(kernel.requests) == nfnl.READ_ATTEMPTS


def test_a_read_is_repeated_until_the_generation_stands_still() -> None:
    kernel = Script(generation_is(2), generation_is(2))
    seen: list[int] = []

    def read(generation: int) -> int:
        seen.append(generation)
        return generation

    assert (nfnl.read_consistent(kernel, read, 1), seen) == (2, [1, 2])


def test_a_generation_that_never_stands_still_is_a_conflict() -> None:
    kernel = Script(*(generation_is(number) for number in range(nfnl.READ_ATTEMPTS + 2)))
    with pytest.raises(ConflictError):
        nfnl.read_consistent(kernel, lambda generation: generation, -1)


@pytest.mark.parametrize("read", [nfnl.generation, lambda k: nfnl.dump(k, nfnl.NFT_MSG_GETRULE, 0)])
def test_a_refused_read_names_itself(read: Callable[[Script], object]) -> None:
    with pytest.raises(KernelError, match="read nf_tables"):
        read(Script([failure(errno.EPERM, 1)]))


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
def test_who_may_not_is_told_at_once(kernel: Namespace, backend: str) -> None:
    """The kernel refuses a datagram of several questions with one answer: nobody waits for the others."""
    assert find_backend(backend).probe(kernel).status == "usable"  # opens what nobody could not
    kernel.forget()
    child = os.fork()
    if not child:
        os.setresuid(65534, 65534, 65534)
        begun = time.monotonic()
        said = find_backend(backend).probe(kernel).status
        os._exit(0 if said == "denied" and time.monotonic() - begun < netlink.DEADLINE / 2 else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("flag", [0, nfnl.NLA_F_NESTED], ids=["as dumped", "as sent"])
def test_a_rule_is_told_from_what_it_counted(flag: int) -> None:
    def rule(packets: int, octets: int) -> bytes:
        values = nfnl.u64(1, octets) + nfnl.u64(2, packets)
        counter = nfnl.string(1, "counter") + nfnl.attr(2 | flag, values)
        return expressions.meta(3) + nfnl.attr(1 | flag, counter) + expressions.verdict(-5)

    plain, packets, octets = expressions.split_counter(rule(3, 1 << 40))
    assert (packets, octets) == (3, 1 << 40)
    assert expressions.parse_expressions(plain)[0].name == "meta"
    assert flag or plain == expressions.split_counter(rule(0, 0))[0] == rule(0, 0)


def test_a_rule_without_a_counter_counted_nothing() -> None:
    assert expressions.split_counter(expressions.verdict(-5)) == (expressions.verdict(-5), 0, 0)
