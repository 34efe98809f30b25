"""The floor with the least look before it that keeps others' rules safe: what an encode-cached apply has to do.

nft dialects: ask for the generation, and send the kept bytes good for that one alone; one commit raises it by one, so
after the first time a changed generation is somebody else's doing. iptables-legacy: take the xtables lock, and compare
the table with the bytes that the kept ones were made from. Nothing is read back: the kernel's own acknowledgement is
whole-or-nothing in both. Where the look fails the whole path has to take over; here it is an error.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from bench.recording import Message, Option, Request
from bench.replay import LEVEL, Call, Sockets, play, refuse_errors
from netapply import syscalls
from netapply.kernel import NETLINK_NETFILTER
from netapply.ruleset import Family

_HEADER = struct.Struct("=IHHII")
_BEGIN, _BARE = 0x10, 20
_GETGEN = _HEADER.pack(_BARE, 10 << 8 | 16, 1, 1, 0) + bytes(4)  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETGEN
_GENERATION = slice(24, 28)  # of the answer, and of a begin: after the header and struct nlattr of NFTA_GEN_ID
_GENID_HEAD = struct.pack("=HH", 8, 1)  # struct nlattr of NFNL_BATCH_GENID
_GET_INFO, _GET_ENTRIES = 64, 65  # IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES
_NAT = b"nat".ljust(32, b"\0")  # XT_TABLE_MAXNAMELEN
_SIZE_AT = 80  # struct ipt_getinfo: name, valid_hooks, hook_entry[5], underflow[5], num_entries; then size

_getsockopt = ctypes.CDLL(None, use_errno=True).getsockopt
_getsockopt.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class Checked:
    """One namespace's sockets, and the requests of each operation behind a look at what is there."""

    def __init__(self, sockets: Sockets, lock: int) -> None:
        """`lock` is an open xtables lock: one for all namespaces, as opening takes longer than changing a table."""
        self._sockets = sockets
        self._lock = lock
        self._generation = b""

    def calls(self, requests: Sequence[Request], tables: dict[Family, bytes]) -> tuple[Call, ...]:
        """The requests as calls; `tables` is what the nat table of each family has to hold (iptables-legacy)."""
        calls: list[Call] = []
        options = [each for each in requests if isinstance(each, Option)]
        for each in requests:
            if isinstance(each, Option):
                if each is options[0]:
                    calls.append(self._under_the_lock(options, tables))
            elif each.protocol == NETLINK_NETFILTER and _HEADER.unpack_from(each.data)[1] == _BEGIN:
                calls.append(self._batch(each))
            else:
                calls += self._sockets.calls([each])
        return tuple(calls)

    def _batch(self, request: Message) -> Call:
        sock = self._sockets.netlink[NETLINK_NETFILTER]
        begin = _HEADER.pack(_BARE + 8, *_HEADER.unpack_from(request.data)[1:]) + request.data[_HEADER.size : _BARE]
        data = bytearray(begin + _GENID_HEAD + bytes(4) + request.data[_BARE:])

        def call() -> None:
            sock.send(_GETGEN)
            generation = sock.recv(4096)[_GENERATION]
            if self._generation not in (b"", generation):
                raise RuntimeError("somebody else changed the rules")
            data[_GENERATION] = generation
            sock.send(data)
            try:
                while True:
                    refuse_errors(sock.recv(65536))
            except BlockingIOError:
                pass
            self._generation = (int.from_bytes(generation) + 1).to_bytes(4)

        return call

    def _under_the_lock(self, options: Sequence[Option], tables: dict[Family, bytes]) -> Call:
        replacements = self._sockets.calls(options)
        looks = [self._look(family, expected) for family, expected in tables.items()]

        def call() -> None:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                play(looks)
                play(replacements)
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

        return call

    def _look(self, family: Family, expected: bytes) -> Call:
        """A call that reads the nat table into the same buffer each time, where it should not differ."""
        wanted = _request(len(expected)) + expected
        found = ctypes.create_string_buffer(wanted, len(wanted))
        length = ctypes.byref(ctypes.c_uint(len(wanted)))
        fd = self._sockets.inet[family].fileno()

        def call() -> None:
            if _getsockopt(fd, LEVEL[family], _GET_ENTRIES, found, length) or found.raw != wanted:
                raise RuntimeError("somebody else changed the table")

        return call


@contextmanager
def xtables_lock() -> Generator[int]:
    """The lock file, open, and not yet locked."""
    lock = os.open(os.environ["XTABLES_LOCKFILE"], os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield lock
    finally:
        os.close(lock)


def tables_of(sockets: Sockets, requests: Sequence[Request]) -> dict[Family, bytes]:
    """What now stands in the tables that these requests replace."""
    families: set[Family] = {each.family for each in requests if isinstance(each, Option)}
    return {family: _table(sockets, family) for family in families}


def _table(sockets: Sockets, family: Family) -> bytes:
    """The entries of the nat table of iptables-legacy; looking creates it."""
    fd, level = sockets.inet[family].fileno(), LEVEL[family]
    info = syscalls.getsockopt(fd, level, _GET_INFO, _NAT.ljust(_SIZE_AT + 4, b"\0"))
    size: int = struct.unpack_from("=I", info, _SIZE_AT)[0]
    request = _request(size)
    return syscalls.getsockopt(fd, level, _GET_ENTRIES, request + bytes(size))[len(request) :]


def _request(size: int) -> bytes:
    return _NAT + struct.pack("=I4x", size)  # struct ipt_get_entries
