"""Tables exchanged: under the xtables lock, from proven content, counters kept."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from netapply.errors import GenerationChanged
from netapply_iptables_legacy.encode import NEW, ReplaceTables
from netapply_iptables_legacy.snapshot import LegacySnapshot
from netapply_iptables_legacy.sockopt import COUNTERS_SIZE, Blob, add_counters, get_info, replace
from netapply_iptables_legacy.tables import Seen, known_table, read_table
from netapply_wire.ipset import CreateSet, DestroySet, commit_set, set_index
from netapply_wire.refusals import refused
from netapply_wire.xtables import SET_INDEX
from netapply_wire.xtables_lock import XtablesLock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from netapply.backend import Step
    from netapply.errors import KernelError
    from netapply.kernel import Kernel
    from netapply_iptables_legacy.encode import ReplaceTable
    from netapply_iptables_legacy.tables import KernelTable

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
    blobs = [_with_sets(kernel, each) for each in tables]
    with XtablesLock(kernel.lock_timeout):
        for each in tables:
            _prove_unchanged(kernel, each)
        counted: list[bytes] = []
        try:
            for each, blob in zip(tables, blobs, strict=True):
                counted.append(_exchange(kernel, each, blob))
        except BaseException:
            for each, counters in reversed([*zip(tables, counted, strict=False)]):
                _put_back(kernel, each, counters)
            raise
        for each, counters in zip(tables, counted, strict=True):
            _restore_counters(kernel, each, each.carry, counters)
    LegacySnapshot.expect(kernel, tuple(map(_expected, tables, blobs)))


def _with_sets(kernel: Kernel, table: ReplaceTable) -> Blob:
    if not table.sets:
        return table.after
    data = bytearray(table.after.data)
    for offset, name in table.sets:
        SET_INDEX.pack_into(data, offset, set_index(kernel, name))
    return table.after._replace(data=bytes(data))


def _prove_unchanged(kernel: Kernel, table: ReplaceTable) -> None:
    before, last = table.before, LegacySnapshot.last(kernel)
    try:
        if table.created:
            get_info(kernel, before.family, before.name)  # which creates it
    except OSError as error:
        raise _failure(table, error) from error
    seen = last.seen.get((before.family, before.name)) if last else None
    seen = seen or Seen(before, b"")
    if not read_table(kernel, before.family, before.name, seen).table.is_like(before):
        raise _changed(table, "somebody changed it after it was read")


def _exchange(kernel: Kernel, table: ReplaceTable, blob: Blob) -> bytes:
    try:
        return replace(kernel, table.before.family, table.before.name, blob, table.before.info.entries)
    except OSError as error:
        raise _failure(table, error) from error


def _expected(table: ReplaceTable, blob: Blob) -> KernelTable:
    return known_table(table.before.family, table.before.name, blob.info, blob.data)


def _put_back(kernel: Kernel, table: ReplaceTable, counters: bytes) -> None:
    """As it was before it was exchanged, and what it has counted, too."""
    before = table.before
    blob = Blob(before.info, before.data, before.offsets)
    try:
        replace(kernel, before.family, before.name, blob, table.after.info.entries)
    except OSError as error:
        raise _failure(table, error) from error
    _restore_counters(kernel, table, range(before.info.entries), counters)


def _restore_counters(kernel: Kernel, table: ReplaceTable, carry: Sequence[int], old: bytes) -> None:
    """`carry` has for each entry that stands now the place among the old ones whose counters it takes over, or NEW."""
    if not any(old):
        return
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
