"""The operations: apply, diff, verify, clean, show. Synchronous; the namespace is an explicit argument.

with netapply.Namespace.open("pod-1") as namespace:
    result = netapply.apply(namespace, plan)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from netapply import routing
from netapply.backend import OURS, Backend, find_backend
from netapply.compiler import compile_plan, compile_routing
from netapply.detection import PREFERENCE, choose, holding_ours, probe
from netapply.differences import ruleset_changes
from netapply.errors import JournalError, NetapplyError, UnsupportedError
from netapply.existing import existing_flows, treated_otherwise
from netapply.features import degrade
from netapply.journal import Entry, Files, Journal, State
from netapply.namespace import Namespace
from netapply.plan import CapturePlan
from netapply.results import Change, Diff, Result, RuleCounter
from netapply.ruleset import Routing, Ruleset
from netapply.transaction import Transaction

NOWHERE = State(None, Routing())


class _Session(NamedTuple):
    """One command's hold on a namespace: its journal (None where there can be none), what it said, and what to tell."""

    files: Files | None
    entry: Entry | None
    degraded: tuple[str, ...]
    notes: tuple[str, ...]


@contextmanager
def _session(namespace: Namespace, journal: Journal) -> Iterator[_Session]:
    """Take the namespace's journal, and first of all finish or undo what an interrupted run left."""
    try:
        files = journal.acquire(namespace.identity, namespace.lock_timeout)
    except JournalError as error:
        if journal.chosen:
            raise
        yield _Session(None, None, (f"journal: an interrupted run could not be undone ({error})",), ())
        return
    try:
        entry, notes = _recover(namespace, files)
        yield _Session(files, entry, (), notes)
    finally:
        files.close()


def _recover(namespace: Namespace, files: Files) -> tuple[Entry | None, tuple[str, ...]]:
    """The journal's entry, after an interrupted run that it speaks of was finished or undone."""
    try:
        entry = files.load()
    except JournalError as error:
        return None, (f"{error}; it was set aside as {files.set_aside()}",)
    if entry is None or not entry.pending:
        return entry, ()
    steps = Transaction(namespace, find_backend(entry.backend), OURS, files).restore(entry)
    said = f"undone ({'; '.join(steps)})" if steps else "found finished"
    return files.load(), (f"an interrupted run was {said}",)


def compiled(
    plan: CapturePlan, backend: Backend, kernel: Namespace, layout: str
) -> tuple[Ruleset, CapturePlan, tuple[str, ...]]:
    """The rule set for this backend on this kernel, the plan that it is of, and what had to be left out."""
    found = probe(kernel, backend)
    if found.status != "usable":
        raise UnsupportedError(f"{backend.name} is {found.status} here: {found.reason}", next_step="netapply detect")
    effective, degraded = degrade(plan, backend.name, found.missing)
    dialect = backend.dialect if "sets" not in found.missing else backend.dialect._replace(sets_from=0)
    return compile_plan(effective, dialect, layout), effective, degraded


def apply(
    namespace: Namespace,
    plan: CapturePlan,
    *,
    backend: str = "auto",
    layout: str = "netapply",
    journal: Journal | None = None,
    fingerprint: str = "",
    count_flows: bool = True,
    cancelled: Callable[[], bool] = lambda: False,
) -> Result:
    """Make the namespace hold `plan`: all of it, or, when anything fails, what was there before.

    `backend` is a name or "auto", which keeps to the dialect that holds our rules already. `fingerprint` names the
    plan in the journal. `count_flows` counts open connections that would be treated otherwise. `cancelled` is asked
    between steps. Raises NetapplyError:
    ConflictError, UnsupportedError and LockError with nothing touched, ApplyError after a roll-back.
    """
    begun = time.perf_counter()
    _refuse_waiting(plan)
    with _session(namespace, journal or Journal()) as session:
        chosen, reason = choose(namespace, backend)
        ruleset, effective, degraded = compiled(plan, chosen, namespace, layout)
        known = session.entry.created if session.entry else Routing()
        desired = State(ruleset, compile_routing(effective))
        before = chosen.read(namespace).ruleset if count_flows else None
        entry = Entry(True, chosen.name, NOWHERE, desired, known, layout, fingerprint)
        outcome = Transaction(namespace, chosen, OURS, session.files, cancelled).run(entry)
        if not outcome.steps and session.files and (session.entry is None or session.entry.fingerprint != fingerprint):
            session.files.store(entry._replace(pending=False, before=desired, created=outcome.created))
    flows = treated_otherwise(existing_flows(namespace), before, ruleset) if count_flows else None
    return Result(
        bool(outcome.steps),
        chosen.name,
        reason,
        outcome.steps,
        session.degraded + degraded,
        session.notes,
        effective=True,
        ipv6=effective.ipv6,
        existing_flows=flows,
        duration=time.perf_counter() - begun,
    )


def _refuse_waiting(plan: CapturePlan) -> None:
    if plan.activation == "on-listen":
        raise UnsupportedError(
            "activation: on-listen waits for the proxy's port, and a command that ends cannot wait",
            next_step="give the plan to the agent, or say activation: now and apply when the proxy listens",
        )


def clean(namespace: Namespace, *, backend: str = "auto", journal: Journal | None = None) -> Result:
    """Remove all that is ours, in every dialect ("auto") or one, by ownership: without a plan, from any version."""
    begun = time.perf_counter()
    steps: tuple[str, ...] = ()
    with _session(namespace, journal or Journal()) as session:
        held = holding_ours(namespace) if backend == "auto" else (backend,)
        known = session.entry.created if session.entry else Routing()
        for name in held or PREFERENCE[:1]:
            entry = Entry(True, name, NOWHERE, NOWHERE, known)
            outcome = Transaction(namespace, find_backend(name), OURS, session.files).run(entry)
            steps += outcome.steps
            known = outcome.created
        if session.files:
            session.files.forget()
    reason = "held our rules" if held else "nothing of ours was found in any dialect"
    names = ", ".join(held)
    return Result(
        bool(steps), names, reason, steps, session.degraded, session.notes, duration=time.perf_counter() - begun
    )


def diff(namespace: Namespace, plan: CapturePlan, *, backend: str = "auto", layout: str = "netapply") -> Diff:
    """What `apply` would change, rule by rule, against the live kernel. Changes nothing, and recovers nothing."""
    chosen, reason = choose(namespace, backend)
    ruleset, effective, _ = compiled(plan, chosen, namespace, layout)
    return Diff(chosen.name, reason, _changes(namespace, chosen, State(ruleset, compile_routing(effective))))


def verify(
    namespace: Namespace,
    plan: CapturePlan | None = None,
    *,
    backend: str = "auto",
    layout: str = "netapply",
    journal: Journal | None = None,
) -> Diff:
    """Whether the kernel still holds `plan`, or, without one, what the last apply put there.

    Raises NetapplyError where no plan is given and the journal knows of no apply.
    """
    if plan is not None:
        return diff(namespace, plan, backend=backend, layout=layout)
    files = (journal or Journal()).acquire(namespace.identity, namespace.lock_timeout)
    try:
        entry = files.load()
    finally:
        files.close()
    if entry is None or entry.desired.ruleset is None:
        raise NetapplyError(
            "nothing was applied to this namespace that the journal knows of",
            next_step="give the plan: netapply verify PLAN",
        )
    chosen = find_backend(entry.backend)
    return Diff(chosen.name, "the last apply used it", _changes(namespace, chosen, entry.desired, entry.created))


def _changes(
    namespace: Namespace, backend: Backend, desired: State, known: Routing | None = None
) -> tuple[Change, ...]:
    changes = ruleset_changes(backend, backend.read(namespace).ruleset, desired.ruleset)
    standing = routing.read(namespace, desired.routing, known or Routing())
    steps = routing.plan(standing, desired.routing)
    return changes + tuple(
        Change("add" if step.add else "remove", "routing", step.name.partition(" ")[2]) for step in steps
    )


def show(namespace: Namespace, *, backend: str = "auto") -> tuple[RuleCounter, ...]:
    """Our live rules with their counters, in the dialect that holds them; () when nothing of ours is there."""
    found: list[RuleCounter] = []
    for name in holding_ours(namespace) if backend == "auto" else (backend,):
        chosen = find_backend(name)
        snapshot = chosen.read(namespace)
        counters = snapshot.counters
        for table, chain, index, rule in (snapshot.ruleset or Ruleset()).walk():
            packets, size = counters.get((table.family, table.name, chain.name, index), (0, 0))
            text = chosen.render_rule(table, chain, rule)
            found.append(RuleCounter(table.family, table.name, chain.name, index, text, packets, size, rule.path))
    return tuple(found)
