"""One table exchanged: under the xtables lock, from proven content, counters kept, and read back."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from netapply.errors import GenerationChanged
from netapply_iptables_legacy.encode import NEW
from netapply_iptables_legacy.entries import parse, stable
from netapply_iptables_legacy.sockopt import COUNTERS_SIZE, add_counters, get_entries, get_info, replace
from netapply_wire.ipset import set_index
from netapply_wire.refusals import refused
from netapply_wire.xtables import SET_INDEX
from netapply_wire.xtables_lock import XtablesLock

if TYPE_CHECKING:
    from netapply.errors import KernelError
    from netapply.kernel import Kernel
    from netapply_iptables_legacy.encode import ReplaceTable
    from netapply_iptables_legacy.sockopt import Blob

_NO_COUNTERS = bytes(COUNTERS_SIZE)
_CAUSES = {
    errno.ENOENT: "the kernel lacks the table, or a match or target of one of the rules",
    errno.EINVAL: "the kernel does not take one of the rules in this chain",
    errno.ELOOP: "the chains jump in a circle",
}


def commit_table(kernel: Kernel, step: ReplaceTable) -> None:
    """Exchange a table. Raises GenerationChanged where it is not what the step was made from, KernelError, LockError.

    The kernel would take the new table as long as the number of entries is right; that nobody's rule is lost is what
    the lock and the comparison of the whole content are for.
    """
    family, name = step.before.family, step.before.name
    after = _with_sets(kernel, step)
    with XtablesLock(kernel.lock_timeout):
        try:
            _prove_unchanged(kernel, step)
            old = replace(kernel, family, name, after, step.before.info.entries)
            _restore_counters(kernel, step, old)
            found = get_entries(kernel, family, name, after.info.size)
        except OSError as error:
            raise _failure(step, error) from error
        if stable(family, found, after.offsets) != after.data:
            raise _changed(step, "it does not read back as it was written")


def _with_sets(kernel: Kernel, step: ReplaceTable) -> Blob:
    if not step.sets:
        return step.after
    data = bytearray(step.after.data)
    for offset, name in step.sets:
        SET_INDEX.pack_into(data, offset, set_index(kernel, name))
    return step.after._replace(data=bytes(data))


def _prove_unchanged(kernel: Kernel, step: ReplaceTable) -> None:
    before = step.before
    info = get_info(kernel, before.family, before.name)  # creates the table where there is none
    found = get_entries(kernel, before.family, before.name, info.size)
    # Where no packet was counted meanwhile the bytes are the same; else what matters in them has to be.
    if found != before.data and parse(before.family, info, found) != before.blocks:
        raise _changed(step, "somebody changed it after it was read")


def _restore_counters(kernel: Kernel, step: ReplaceTable, old: bytes) -> None:
    counters = [
        _NO_COUNTERS if origin == NEW else old[origin * COUNTERS_SIZE : (origin + 1) * COUNTERS_SIZE]
        for origin in step.carry
    ]
    if any(each != _NO_COUNTERS for each in counters):
        add_counters(kernel, step.before.family, step.before.name, counters)


def _failure(step: ReplaceTable, error: OSError) -> KernelError:
    number = error.errno or errno.EIO
    if number == errno.EAGAIN:
        return _changed(step, "somebody changed it without the lock")
    return refused(step.name, error, _CAUSES.get(number, ""))


def _changed(step: ReplaceTable, cause: str) -> GenerationChanged:
    return GenerationChanged(step.name, errno.EAGAIN, cause=cause)
