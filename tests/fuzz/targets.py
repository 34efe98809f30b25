"""What takes bytes: dumps of the kernel in three dialects, netlink, files of the state directory, plan files."""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from netapply import history, journal, netlink, rtnetlink
from netapply.agent import store
from netapply.backend import OURS, find_backend, readable
from netapply.compiler import compile_plan
from netapply.errors import (
    ConflictError,
    DecodeError,
    JournalError,
    KernelError,
    LockError,
    NetapplyError,
    PlanError,
    UnsupportedError,
)
from netapply.kernel import NETLINK_NETFILTER, NETLINK_ROUTE
from netapply.planfile import dump_plan, fingerprint, load_plan
from netapply.record import hexed, ruleset_from_json, ruleset_to_json
from netapply.ruleset import Ruleset
from netapply_wire import ipset, nfnetlink
from tests.fuzz.engine import Target
from tests.fuzz.tapes import Input, Replay

_READ = (DecodeError, KernelError, ConflictError, UnsupportedError, LockError)


def _dialect(name: str) -> Callable[[Input], object]:
    """Read what the tape says; then what an apply does with it: record it, plan its removal and its return."""

    def run(tape: Input) -> object:
        backend = find_backend(name)
        ipset._seen[:] = [True]  # else what is asked depends on what was asked before
        snapshot = backend.read(Replay(tape), OURS)
        ruleset, _, foreign = snapshot.ruleset, snapshot.counters, snapshot.foreign
        assert foreign == snapshot.foreign
        hash(ruleset)
        recorded = json.loads(json.dumps(ruleset_to_json(ruleset), default=hexed))
        assert ruleset_from_json(recorded) == ruleset, "a rule set is not what its record says"
        backend.encode(snapshot, None)
        backend.encode(snapshot, _other(name))
        kept = readable(ruleset)
        backend.encode(snapshot, kept)
        if kept is not None:
            backend.render(kept)
        return ruleset

    return run


@cache
def _other(name: str) -> Ruleset | None:
    """What a plan without a word in it asks for."""
    return compile_plan(load_plan("apiVersion: netapply/v1"), find_backend(name).dialect)


_REQUESTS = (
    (NETLINK_ROUTE, rtnetlink._LIST_RULES),
    (NETLINK_NETFILTER, nfnetlink._GET_GENERATION),
    (NETLINK_NETFILTER, nfnetlink.batch((), None)),
)


class _Socket:
    """A netlink socket that receives these datagrams: of each piece the first byte says who sends it, and how whole."""

    def __init__(self, pieces: Input) -> None:
        self._left = list(pieces)

    def send(self, request: bytes) -> int:
        return len(request)

    def setsockopt(self, *_: object) -> None:
        pass

    def recvmsg(self, *_: object) -> tuple[bytes, list[object], int, tuple[int, int]]:
        if not self._left:
            raise BlockingIOError
        piece = self._left.pop(0)
        first = piece[0] if piece else 0
        return piece[1:], [], 0x20 if first & 0x80 else 0, (first & 0x7F, 0)


def _netlink(pieces: Input) -> object:
    """One request, and whatever comes back: the kernel's messages, others', cut ones. Of others' none gets through."""

    def never(*_: object) -> None:
        raise TimeoutError

    wait, netlink._wait = netlink._wait, never
    chosen, *answers = pieces or (b"",)
    protocol, request = _REQUESTS[sum(chosen) % len(_REQUESTS)]
    try:
        found = netlink.exchange(_Socket(tuple(answers)), protocol, request)  # type: ignore[arg-type]
    finally:
        netlink._wait = wait
    honest = [each[1:] for each in answers if not (each[0] if each else 0)]
    assert all(each in honest for each in found)
    return found


def _rtnetlink(tape: Input) -> object:
    for read in (rtnetlink.loopback_addresses, rtnetlink.local_addresses):
        found = list(read(Replay(tape)))
        assert all(isinstance(each, (bytes, tuple)) for each in found)
    return rtnetlink.rule_priorities(Replay(tape))


def _journal(pieces: Input) -> object:
    """A journal of the right checksum: what is understood can be written and understood again."""
    text = b"".join(pieces).replace(b"BOOT", journal._boot().encode())
    entry = journal._decode(b"%08x %b\n" % (zlib.crc32(text), text), "fuzz", pending=True)
    if entry is not None:
        again = journal._decode(journal._encode(entry), "fuzz", pending=True)
        assert again == entry, "an entry is not what its own bytes say"
        hash(entry)
    return entry


def _torn(pieces: Input) -> object:
    return journal._decode(b"".join(pieces), "fuzz", pending=False)


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="netapply-fuzz-", dir="/dev/shm")


def _directory() -> str:
    """A state directory in memory, gone with the process."""
    return _scratch().name


def _history(pieces: Input) -> object:
    """What is told of each change has the types that it promises."""
    Path(_directory(), history.FILE).write_bytes(b"".join(pieces))
    found = history.events(journal.Journal(_directory()))
    for event in found:
        wanted = history.Event(0.0, "", "", "", "")
        for value, model in zip(event, wanted, strict=True):
            assert isinstance(value, type(model) if not isinstance(model, float) else (int, float)), "a wrong type"
        json.dumps(event)
    return found


def _store(pieces: Input) -> object:
    """The agent's memory: what cannot be read is said, and the rest can be written again."""
    Path(_directory(), "desired.json").write_bytes(b"".join(pieces))
    kept, said = store.load(_directory())
    assert isinstance(said, str)
    store.save(_directory(), kept)
    assert store.load(_directory()) == (kept, ""), "what was written is not what was kept"
    return kept


def _plan(pieces: Input) -> object:
    """A plan that loads means the same when it is written and loaded again."""
    plan = load_plan(b"".join(pieces))
    again = load_plan(json.dumps(dump_plan(plan)))
    assert (again, fingerprint(again)) == (plan, fingerprint(plan)), "a plan is not what it writes"
    return plan


_PLAN_WORDS = (
    *b"""
    apiVersion netapply/v1 kind CapturePlan proxy uids gids mark port inbound outbound mode tproxy redirect ports cidrs
    include exclude owners dns capture all none zones ipv6 block skip interfaces reroute log prefix rate comments true
    false null 65535 65536 -1 0x539/0xfff 0.0.0.0/0 ::/0 10.0.0.0/8 fd00::1 ::ffff:1.2.3.4 80-90 90-80 * + eth0 name
    [ ] { } : , " ' & ! | > - # \\ \xc3\xa9 \xe2\x80\xa8 \x00 \x85 \xed\xa0\x80 1e9 .inf 0o17 2024-01-01 << ? %
    """.split(),
    *(b"\n", b"\n  ", b"\n- ", b": ", b", ", b"[[", b"\t", b"\r\n"),
)
_NAMES = (
    *b"""
    NETAPPLY_ NETAPPLY_X\xff ISTIO_ netapply netapply-4- ERROR OUTPUT < \xff\xfe nat REDIRECT set comment limit counter
    immediate cmp lookup netA netZ
    """.split(),
)
_JSON = (
    *b"""
    null {} [] "" 1e999 -1 1.5 true NaN "\\ud800" [[[[[[ BOOT "kind" "jump" "ip6" "files":[] "asked":{} "labels":1 "zz"
    """.split(),
    *(b"9" * 30, b"9" * 400, b"[" * 5000, b'{"a":' * 5000),
)

TARGETS: tuple[Target, ...] = (
    *(Target(name, _dialect(name), _READ, _NAMES) for name in ("nftables", "iptables-nft", "iptables-legacy")),
    Target("netlink", _netlink, (OSError,)),
    Target("rtnetlink", _rtnetlink, _READ),
    Target("journal", _journal, (JournalError,), _JSON),
    Target("torn-journal", _torn, (JournalError,), _JSON),
    Target("history", _history, (JournalError,), _JSON),
    Target("store", _store, (NetapplyError,), _JSON),
    Target("plan", _plan, (PlanError,), _PLAN_WORDS),
)
