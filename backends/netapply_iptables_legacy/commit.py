"""Tables exchanged: under the xtables lock, from proven content, counters kept."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from netapply.errors import GenerationChanged
from netapply_iptables_legacy.encode import NEW, ReplaceTables
from netapply_iptables_legacy.snapshot import LegacySnapshot
from netapply_iptables_legacy.sockopt import COUNTERS_SIZE, add_counters, replace, replacement, table_names
from netapply_iptables_legacy.tables import Seen, read_table
from netapply_wire.ipset import CreateSet, DestroySet, commit_set, set_index
from netapply_wire.refusals import refused
from netapply_wire.xtables import SET_INDEX
from netapply_wire.xtables_lock import XtablesLock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from netapply.backend import Step
    from netapply.errors import KernelError
    from netapply.kernel import Kernel
    from netapply_iptables_legacy.encode import ReplaceTable
    from netapply_iptables_legacy.sockopt import Place

_NO_COUNTERS = bytes(COUNTERS_SIZE)
_CAUSES = {
    errno.ENOENT: "the kernel lacks the table, or a match or target of one of the rules",
    errno.EINVAL: "the kernel does not take one of the rules in this chain",
    errno.ELOOP: "the chains jump in a circle",
}


def commit_step(kernel: Kernel, step: Step) -> None:
    """Do one step. Raises KernelError; GenerationChanged where somebody else was faster; LockError."""
    match step:
        case ReplaceTables():
            commit_tables(kernel, step.tables)
        case CreateSet() | DestroySet():
            LegacySnapshot.forget(kernel)
            commit_set(kernel, step)
        case _:
            raise TypeError(f"{step.name} is not a step of iptables-legacy")


def commit_tables(kernel: Kernel, tables: Sequence[ReplaceTable]) -> None:
    """Exchange the tables. Raises GenerationChanged where one is not what was planned for, KernelError, LockError.

    The kernel would take a new table as long as the number of entries is right; that nobody's rule is lost is what
    the lock and the comparison of the whole content are for. Nothing lies between one exchange and the next, so that
    who is killed there, which nobody can prevent, is killed in the microseconds of one system call.
    """
    requests = [_with_sets(kernel, each) if each.sets else each.request for each in tables]
    last = LegacySnapshot.last(kernel)
    seen: Mapping[Place, Seen] = last.seen if last else {}
    with XtablesLock(kernel.lock_timeout):
        for each in tables:
            _prove_unchanged(kernel, each, seen)
        counted: list[bytes] = []
        try:
            for each, request in zip(tables, requests, strict=True):
                counted.append(_exchange(kernel, each, request))
        except BaseException:
            for each, counters in reversed([*zip(tables, counted, strict=False)]):
                _put_back(kernel, each, counters)
            raise
        for each, counters in zip(tables, counted, strict=True):
            if counters.strip(b"\0"):
                _restore_counters(kernel, each, each.carry, counters)
    if last:
        last.expect(kernel, tuple(each.after for each in tables))


def _with_sets(kernel: Kernel, table: ReplaceTable) -> bytes:
    request = bytearray(table.request)
    start = len(request) - len(table.after.data)
    for offset, name in table.sets:
        SET_INDEX.pack_into(request, start + offset, set_index(kernel, name))
    return bytes(request)


def _prove_unchanged(kernel: Kernel, table: ReplaceTable, last: Mapping[Place, Seen]) -> None:
    before = table.before
    if table.created and before.name not in table_names(kernel, before.family):
        return  # the replacement creates it first, and the kernel compares the number of entries
    seen = last.get((before.family, before.name)) or Seen(before, b"")
    if not read_table(kernel, before.family, before.name, seen).table.is_like(before):
        raise _changed(table, "somebody changed it after it was read")


def _exchange(kernel: Kernel, table: ReplaceTable, request: bytes) -> bytes:
    try:
        return replace(kernel, table.before.family, request, table.before.info.entries)
    except OSError as error:
        raise _failure(table, error) from error


def _put_back(kernel: Kernel, table: ReplaceTable, counters: bytes) -> None:
    """As it was before it was exchanged, and what it has counted, too."""
    before, entries = table.before, table.after.info.entries
    try:
        replace(kernel, before.family, replacement(before.name, before.info, before.data, entries), entries)
    except OSError as error:
        raise _failure(table, error) from error
    _restore_counters(kernel, table, range(before.info.entries), counters)


def _restore_counters(kernel: Kernel, table: ReplaceTable, carry: Sequence[int], old: bytes) -> None:
    """`carry` has for each entry that stands now the place among the old ones whose counters it takes over, or NEW."""
    counters = [
        _NO_COUNTERS if origin == NEW else old[origin * COUNTERS_SIZE : (origin + 1) * COUNTERS_SIZE]
        for origin in carry
    ]
    try:
        add_counters(kernel, table.before.family, table.before.name, counters)
    except OSError as error:
        raise _failure(table, error) from error


def _failure(table: ReplaceTable, error: OSError) -> KernelError:
    number = error.errno or errno.EIO
    if number == errno.EAGAIN:
        return _changed(table, "somebody changed it without the lock")
    return refused(_step(table), error, _CAUSES.get(number, ""))


def _changed(table: ReplaceTable, cause: str) -> GenerationChanged:
    return GenerationChanged(_step(table), errno.EAGAIN, cause=cause)


def _step(table: ReplaceTable) -> str:
    return f"replace table {table.label}"
