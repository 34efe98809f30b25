"""Every exception that netapply raises on purpose.

    NetapplyError
    ├── PlanError            the plan is wrong: every fault at once
    ├── UnsupportedError     the dialect or kernel cannot express what the plan asks; nothing was touched
    ├── NamespaceError       the namespace cannot be opened, is refused, or is no longer the one that was opened
    ├── ConflictError        ours stands in another dialect, or somebody keeps changing the tables
    ├── LockError            the xtables lock was not to be had within its deadline
    ├── KernelError          a system call or a netlink operation failed
    ├── DecodeError          bytes that should be ours are not well-formed
    ├── JournalError         the write-ahead journal cannot be written or read
    ├── ValidationError      the rules that stand do not capture a connection
    ├── CancelledError       the caller gave up while the transaction ran
    └── ApplyError           the transaction failed; says whether the roll-back held

Branch on the class and on `errno`, never on the English text.
"""

from __future__ import annotations

import errno as errno_names
import os

from netapply.values import NamedTuple


class Fault(NamedTuple):
    """One thing that is wrong with a plan: where, what stands there, and what is accepted."""

    path: str
    value: str
    accepted: str

    def __str__(self) -> str:
        return f"{self.path}: {self.value} is not accepted; {self.accepted}"


class NetapplyError(Exception):
    """Something failed. `next_step` is what the user can do about it, or ""."""

    next_step: str = ""
    exit_code: int = 1

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        if next_step:
            self.next_step = next_step


class PlanError(NetapplyError):
    """The plan has faults. All of them are in `faults`; nothing was touched."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        super().__init__("\n".join(map(str, faults)))
        self.faults = faults


class UnsupportedError(NetapplyError):
    """This dialect on this kernel cannot do what the plan needs."""


class NamespaceError(NetapplyError):
    """The network namespace cannot be used."""


class ConflictError(NetapplyError):
    """Somebody else's, or another dialect's, rules are in the way.

    `dialects` are those in which rules of ours stand; () where these are not what is in the way.
    """

    def __init__(self, message: str, *, dialects: tuple[str, ...] = (), next_step: str = "") -> None:
        super().__init__(message, next_step=next_step)
        self.dialects = dialects


class LockError(NetapplyError):
    """The xtables lock is held by another process for longer than the deadline."""


class DecodeError(NetapplyError):
    """Bytes read from the kernel do not have the shape that their header promises."""


class JournalError(NetapplyError):
    """The journal of an apply cannot be written, read or trusted."""


class KernelError(NetapplyError):
    """The kernel refused an operation.

    `operation` names it in the field's words ("add rule ip nat NETAPPLY_OUTPUT #3"), `errno` is positive,
    `extack` is the kernel's own explanation where netlink gave one.
    """

    def __init__(self, operation: str, errno: int, *, extack: str = "", cause: str = "", next_step: str = "") -> None:
        name = errno_names.errorcode.get(errno, str(errno))
        said = f" ({extack})" if extack else ""
        why = f"; {cause}" if cause else ""
        super().__init__(f"{operation}: {name}, {os.strerror(errno)}{said}{why}", next_step=next_step)
        self.operation = operation
        self.errno = errno
        self.extack = extack


class GenerationChanged(KernelError):  # noqa: N818 - an event to be handled, named as the kernel's fact
    """Somebody changed the rule set between our read and our commit. Read again and retry."""


class ValidationError(NetapplyError):
    """No connection was captured. Istio's repair controller looks for this exit code."""

    exit_code = 126


class CancelledError(NetapplyError):
    """The caller gave up; the cause of an ApplyError, as all was rolled back."""


class ApplyError(NetapplyError):
    """The transaction failed at `step`. `restored` says whether the namespace is proven to be as it was."""

    def __init__(
        self, step: str, cause: BaseException, *, restored: bool, rollback: BaseException | None = None
    ) -> None:
        state = "the namespace is as it was" if restored else "the namespace could NOT be restored"
        undo = f"; the roll-back failed too: {rollback}" if rollback else ""
        super().__init__(f"{step}: {cause}; {state}{undo}", next_step=getattr(cause, "next_step", ""))
        #: The cause's: whoever looks for a failed validation finds it, rolled back or not.
        self.exit_code = getattr(cause, "exit_code", 1)
        self.step = step
        self.restored = restored
        self.rollback = rollback
