"""System calls that the kernel refused, as errors that say what was asked and what to do about it."""

from __future__ import annotations

import errno

from netapply.errors import KernelError

_NEXT_STEPS = {
    errno.EPERM: "run as root, or with CAP_NET_ADMIN, in the user namespace that owns the namespace",
    errno.EACCES: "run as root, who alone may read that file, or with CAP_DAC_READ_SEARCH",
}


def refused(operation: str, error: OSError, cause: str = "") -> KernelError:
    """What a socket option or a file of /proc failed with; EIO where the failure has no number."""
    number = error.errno or errno.EIO
    return KernelError(operation, number, cause=cause, next_step=_NEXT_STEPS.get(number, ""))
