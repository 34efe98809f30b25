"""What an interrupted run left, finished or undone: by every command before anything else, and by `netapply recover`.

The journal says what was and what should be (`netapply.journal`), the kernel what is. If it is what should be, the run
is finished; otherwise it goes back to what was. Both are safe to be interrupted in turn: the journal says "pending"
until the read-back has agreed.
"""

from __future__ import annotations

from netapply import history
from netapply.backend import find_backend
from netapply.errors import JournalError, NetapplyError
from netapply.journal import KEPT, NOWHERE, Entry, Files, Journal
from netapply.namespace import Namespace
from netapply.ownership import NOTHING, ownership
from netapply.results import Result
from netapply.transaction import Transaction


def recover(namespace: Namespace, *, journal: Journal | None = None) -> Result:
    """Finish or undo what was interrupted here, and nothing else; `notes` say which. Raises NetapplyError."""
    files = (journal or Journal()).acquire(namespace.identity, namespace.lock_timeout, namespace.memory)
    try:
        entry = _load(files)
        if entry is None or not entry.pending:
            return Result(False, entry.backend if entry else "", "nothing was interrupted here")
        said = _restore(namespace, entry, files)
        stands, told = _told(namespace, files, said)
    finally:
        files.close()
    reason = f"an interrupted run was {said}"
    backend = stands.backend if stands else entry.backend
    return Result(said.startswith("undone"), backend, reason, notes=(told,) if told else ())


def resolve(namespace: Namespace, files: Files) -> tuple[Entry | None, tuple[str, ...]]:
    """The same before another command: the journal's entry, and what there is to say. It raises nothing of its own."""
    try:
        entry = files.load()
    except JournalError as error:
        return None, (f"{error}; it was set aside as {files.set_aside()}",)
    if entry is None or not entry.pending:
        return entry, ()
    try:
        said = _restore(namespace, entry, files)
    except NetapplyError as error:
        # Whoever comes next brings the namespace to a state of its own, from wherever it is.
        return entry, (f"an interrupted run could not be undone ({error})",)
    return _told(namespace, files, said)[0], (f"an interrupted run was {said}",)


def _told(namespace: Namespace, files: Files, said: str) -> tuple[Entry | None, str]:
    """What stands, as the journal says now, once the history has it; and what there is to say of that."""
    stands = files.load()
    event = history.event_of(namespace, "recover", "")._replace(result=said, state=files.number)
    if stands is not None:
        event = event._replace(backend=stands.backend, layout=stands.layout, fingerprint=stands.fingerprint)
    return stands, history.record(files, event)


def past(files: Files | None, entry: Entry | None, back: int) -> Entry:
    """What the journal says of the state so many before the present one. Raises NetapplyError where it says nothing."""
    if files is None or entry is None:
        raise NetapplyError(
            "the journal knows of no state of this namespace; clean forgets them, and so does a restart of the machine",
            next_step="apply the plan that you want",
        )
    if back == files.number + 1:
        return entry._replace(desired=NOWHERE, fingerprint="", number=-1)
    found = files.past(back)
    if found is None:
        raise NetapplyError(
            f"there is no state {back} before the present one; the last {KEPT} are kept",
            next_step="netapply history tells which there are",
        )
    return found


def _load(files: Files) -> Entry | None:
    try:
        return files.load()
    except JournalError as error:
        aside = files.set_aside()
        raise JournalError(
            f"{error}; it was set aside as {aside}, and what it spoke of may stand halfway",
            next_step="apply the plan, or clean: either brings the namespace to a state of its own from wherever it is",
        ) from error


def _restore(namespace: Namespace, entry: Entry, files: Files) -> str:
    if entry.leaving:
        from netapply import exchange  # is seldom interrupted

        return exchange.restore(namespace, entry, files)
    owned = ownership("netapply", (entry.before.ruleset, entry.desired.ruleset), NOTHING)
    return Transaction(namespace, find_backend(entry.backend), owned, files).restore(entry)
