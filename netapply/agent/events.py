"""What the agent tells: a closed union of values, each with its `kind`, the wall-clock second `at`, and the namespace.

`namespace` is the name that status() shows; "" for what is of no one namespace.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from netapply.errors import Fault
from netapply.results import Change
from netapply.values import NamedTuple


class Cause(NamedTuple):
    """Who changed nf_tables rules, as NEWGEN says: task id, process name, and the generation that he made."""

    pid: int
    process: str
    generation: int


class Applied(NamedTuple):
    """A plan was put into force, or was found to be."""

    namespace: str
    at: float
    fingerprint: str
    backend: str
    changed: bool
    seconds: float
    steps: tuple[str, ...] = ()
    degraded: tuple[str, ...] = ()
    kind: Literal["applied"] = "applied"


class Removed(NamedTuple):
    """The plan was withdrawn, and all that was ours taken down."""

    namespace: str
    at: float
    steps: tuple[str, ...] = ()
    kind: Literal["removed"] = "removed"


class Drifted(NamedTuple):
    """The namespace does not hold its plan any more. `changes` lead from what stood to the plan."""

    namespace: str
    at: float
    changes: tuple[Change, ...]
    cause: Cause | None = None
    kind: Literal["drifted"] = "drifted"


class Healed(NamedTuple):
    """It holds its plan again; `seconds` from the event, or from the look that found it, to the proof by read-back."""

    namespace: str
    at: float
    cause: Cause | None
    seconds: float
    steps: tuple[str, ...]
    kind: Literal["healed"] = "healed"


class Failed(NamedTuple):
    """An apply, a heal or a removal failed; `again` is the wall-clock second of the next attempt, 0 for none."""

    namespace: str
    at: float
    error: str
    next_step: str = ""
    again: float = 0.0
    kind: Literal["failed"] = "failed"


class Quarantined(NamedTuple):
    """It drifted more often than its budget allows: looked at, but left alone until the wall-clock second `until`."""

    namespace: str
    at: float
    until: float
    reason: str
    kind: Literal["quarantined"] = "quarantined"


class Appeared(NamedTuple):
    """A namespace that a plan names is there, or is another one than it was."""

    namespace: str
    at: float
    path: str
    inode: int
    kind: Literal["appeared"] = "appeared"


class Vanished(NamedTuple):
    """A namespace that a plan names is gone; the plan waits for the next one of that name."""

    namespace: str
    at: float
    kind: Literal["vanished"] = "vanished"


class FileRejected(NamedTuple):
    """A plan file has faults, all of them here; what it said last, if that was right, stays in force."""

    path: str
    at: float
    faults: tuple[Fault, ...]
    namespace: str = ""
    kind: Literal["file-rejected"] = "file-rejected"


class PlanChanged(NamedTuple):
    """A plan file is new, or says something else, or is gone (`fingerprint` "")."""

    path: str
    at: float
    fingerprint: str
    namespace: str = ""
    kind: Literal["plan-changed"] = "plan-changed"


class Dormant(NamedTuple):
    """No capture until the proxy listens: a plan with activation on-listen."""

    namespace: str
    at: float
    reason: str
    kind: Literal["dormant"] = "dormant"


class Listening(NamedTuple):
    """The proxy listens: capture goes up. `open_seconds` is how long it was not."""

    namespace: str
    at: float
    port: int
    open_seconds: float
    kind: Literal["listening"] = "listening"


class Recovered(NamedTuple):
    """An interrupted run was finished or undone, as its journal said."""

    namespace: str
    at: float
    said: str
    kind: Literal["recovered"] = "recovered"


class Unconfirmed(NamedTuple):
    """Nobody confirmed an apply in time: what was before is in force again."""

    namespace: str
    at: float
    kind: Literal["unconfirmed"] = "unconfirmed"


class Lost(NamedTuple):
    """This subscriber did not keep up: `missed` events before this one were not delivered to it."""

    at: float
    missed: int
    namespace: str = ""
    kind: Literal["lost"] = "lost"


Event: TypeAlias = (
    Applied
    | Removed
    | Drifted
    | Healed
    | Failed
    | Quarantined
    | Appeared
    | Vanished
    | FileRejected
    | PlanChanged
    | Dormant
    | Listening
    | Recovered
    | Unconfirmed
    | Lost
)
