"""One command's hold on a namespace: its journal, under the lock, and what stands there as the journal says it.

    with take(namespace, journal, "apply", reason) as session:
        owned = owned_by(session.entry, layout)

First of all, what an interrupted run left is finished or undone.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from netapply import history, recovery
from netapply.backend import Owned
from netapply.detection import PREFERENCE
from netapply.errors import ApplyError, ConflictError, JournalError, NetapplyError
from netapply.journal import Entry, Files, Journal
from netapply.namespace import Namespace
from netapply.ownership import NOTHING, Adopted, ownership
from netapply.remembered import remembered
from netapply.results import Result
from netapply.ruleset import Ruleset
from netapply.values import NamedTuple


class Session(NamedTuple):
    """One command's hold on a namespace: its journal (None where there can be none), what it said, and what to tell."""

    files: Files | None
    entry: Entry | None
    degraded: tuple[str, ...]
    notes: tuple[str, ...]
    event: history.Event

    def require(self, number: int | None) -> None:
        """Raise ConflictError where another state stands than that of the number, if one is given."""
        if number is not None and self.files is not None and self.files.number != number:
            raise ConflictError(f"state {self.files.number} stands, and not {number}")

    def told(self, result: Result, layout: str = "", fingerprint: str = "") -> Result:
        """The result, once the history has it."""
        if self.files is None or not result.changed:
            return result
        said = history.record(
            self.files,
            self.event._replace(
                result="done",
                backend=result.backend,
                layout=layout,
                fingerprint=fingerprint,
                state=self.files.number,
            ),
        )
        return result._replace(notes=(*result.notes, said)) if said else result


@contextmanager
def take(namespace: Namespace, journal: Journal, operation: str, reason: str) -> Generator[Session]:
    """Take the namespace's journal, and first of all finish or undo what an interrupted run left."""
    event = history.event_of(namespace, operation, reason)
    try:
        files = journal.acquire(namespace.identity, namespace.lock_timeout, namespace.memory)
    except JournalError as error:
        if journal.chosen:
            raise
        told = f"journal: none is kept, and a killed run would not be undone ({error})"
        yield Session(None, None, (told,), (), event)
        return
    try:
        entry, notes = recovery.resolve(namespace, files)
        yield Session(files, entry, (), notes, event)
    except ApplyError as error:
        said = "failed, as it was" if error.restored else "failed, NOT restored"
        history.record(files, event._replace(result=said, state=files.number))
        raise
    finally:
        files.close()


def peek(namespace: Namespace, journal: Journal) -> Entry | None:
    """The journal's entry where there is one to be read; what is shown does not depend on it."""
    try:
        files = journal.acquire(namespace.identity, namespace.lock_timeout, namespace.memory)
    except NetapplyError:
        return None
    try:
        return files.load()
    except JournalError:
        return None
    finally:
        files.close()


def owned_by(
    entry: Entry | None, layout: str = "netapply", desired: Ruleset | None = None, adopted: Adopted = NOTHING
) -> Owned:
    """What is ours in a namespace whose journal says `entry`."""
    known = (entry.before.ruleset, entry.desired.ruleset) if entry else (None, None)
    return _owned_by_all(layout, *known, desired, adopted)


@remembered(32)
def _owned_by_all(
    layout: str, before: Ruleset | None, applied: Ruleset | None, desired: Ruleset | None, adopted: Adopted
) -> Owned:
    return ownership(layout, (before, applied, desired), adopted)


def also_used(entry: Entry | None) -> tuple[str, ...]:
    """The backend that was used here, if rules of it stand or it is not built in: to be looked at in any case."""
    if entry is None or (entry.backend in PREFERENCE and entry.desired.ruleset is None):
        return ()
    return (entry.backend,)
