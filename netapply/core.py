"""The operations: apply, diff, verify, clean, live, show, detect. Synchronous; the namespace is an explicit argument.

with Namespace.open("pod-1") as namespace:
    result = apply(namespace, plan)

`netapply.open` gives the same as methods of one object (`netapply.api`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from functools import partial

from netapply import detection, history, recovery, routing
from netapply.backend import Backend, Owned, find_backend
from netapply.compiler import compile_plan, compile_routing
from netapply.detection import PREFERENCE, UNSUPPORTED, Held, choose, holding_ours, lacking, next_usable, probe
from netapply.differences import ruleset_changes, with_paths
from netapply.errors import (
    ApplyError,
    ConflictError,
    JournalError,
    KernelError,
    NetapplyError,
    PlanError,
    UnsupportedError,
)
from netapply.existing import existing_flows, treated_otherwise
from netapply.features import degrade
from netapply.journal import Entry, Files, Journal, State
from netapply.namespace import Namespace
from netapply.ownership import NOTHING, PREFIXES, Adopted, Adoption, ownership
from netapply.plan import CapturePlan
from netapply.remembered import remembered
from netapply.results import Change, Detection, Diff, Live, Result, RuleCounter
from netapply.ruleset import Routing, Ruleset
from netapply.texts import find_faulty_texts
from netapply.transaction import Outcome, Transaction
from netapply.values import NamedTuple

NOWHERE = State(None, Routing())


class _Session(NamedTuple):
    """One command's hold on a namespace: its journal (None where there can be none), what it said, and what to tell."""

    files: Files | None
    entry: Entry | None
    degraded: tuple[str, ...]
    notes: tuple[str, ...]
    event: history.Event

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
def _session(namespace: Namespace, journal: Journal, operation: str, reason: str) -> Generator[_Session]:
    """Take the namespace's journal, and first of all finish or undo what an interrupted run left."""
    event = history.event_of(namespace, operation, reason)
    try:
        files = journal.acquire(namespace.identity, namespace.lock_timeout, namespace.memory)
    except JournalError as error:
        if journal.chosen:
            raise
        told = f"journal: none is kept, and a killed run would not be undone ({error})"
        yield _Session(None, None, (told,), (), event)
        return
    try:
        entry, notes = recovery.resolve(namespace, files)
        yield _Session(files, entry, (), notes, event)
    except ApplyError as error:
        said = "failed, as it was" if error.restored else "failed, NOT restored"
        history.record(files, event._replace(result=said, state=files.number))
        raise
    finally:
        files.close()


def compiled(
    namespace: Namespace, plan: CapturePlan, backend: Backend, missing: Mapping[str, str], layout: str
) -> tuple[State, CapturePlan, tuple[str, ...]]:
    """What the namespace should hold, the plan that it is of, and what had to be left out."""
    effective, degraded, routing, ruleset = _compiled(plan, backend, missing, layout)
    wanted, without = possible(namespace, routing)
    return State(ruleset, wanted), effective, degraded + without


@remembered(32)
def _compiled(
    plan: CapturePlan, backend: Backend, missing: Mapping[str, str], layout: str
) -> tuple[CapturePlan, tuple[str, ...], Routing, Ruleset]:
    """The plan without what is missing, what that is, and what the rest compiles to."""
    effective, degraded = degrade(plan, backend.name, missing)
    dialect = backend.dialect if "sets" not in missing else backend.dialect._replace(sets_from=0)
    ruleset = compile_plan(effective, dialect, layout)
    if faults := tuple(find_faulty_texts(ruleset)):
        raise PlanError(faults)
    return effective, degraded, compile_routing(effective), ruleset


def apply(
    namespace: Namespace,
    plan: CapturePlan,
    *,
    backend: str = "auto",
    layout: str = "netapply",
    adopt: Adoption | None = None,
    journal: Journal | None = None,
    fingerprint: str = "",
    count_flows: bool = True,
    cancelled: Callable[[], bool] = lambda: False,
    proof: Callable[[], None] | None = None,
    flush: bool = False,
    reason: str = "",
) -> Result:
    """Make the namespace hold `plan`: all of it, or, when anything fails, what was there before.

    `backend` is a name or "auto", which keeps to the dialect that holds our rules already. `fingerprint` names the
    plan in the journal. `adopt` says what else is taken over, where chains of the layout's names or policy rules of
    others stand already: rules and routing that another program left. `count_flows` counts open connections that would
    be treated otherwise. `cancelled` is asked between steps. `proof` is called when all stands, and raises where
    connections do not go where they should (`netapply.canary`): then it is undone. `flush` has connection tracking
    forget the flows that would be treated otherwise (`netapply.conntrack`). `reason` is for the history. Raises
    NetapplyError: ConflictError, UnsupportedError and LockError with nothing touched, ApplyError after a roll-back.
    """
    begun = time.perf_counter()
    refuse_waiting(plan)
    with _session(namespace, journal or Journal(), "apply", reason) as session:
        owned = _owned(session.entry, layout)
        chosen, why, unseen = choose(namespace, backend, owned, _also(session.entry))
        adopted = NOTHING
        if adopt is not None and (chosen.detect(namespace, owned) or routing.of_others(namespace)):
            adopted = adopt()
        fixed = (namespace, session, plan, layout, fingerprint, adopted)
        attempt = partial(_attempt, *fixed, count_flows=count_flows, cancelled=cancelled, proof=proof, flush=flush)
        try:
            done = attempt(chosen, lacking(namespace, chosen, plan))
        except ApplyError as error:
            chosen, why = _instead(namespace, chosen, backend, plan, error)
            done = attempt(chosen, probe(namespace, chosen).missing)
        done = session.told(done, layout, fingerprint)
    return done._replace(reason=why, degraded=unseen + done.degraded, duration=time.perf_counter() - begun)


def _attempt(
    namespace: Namespace,
    session: _Session,
    plan: CapturePlan,
    layout: str,
    fingerprint: str,
    adopted: Adopted,
    backend: Backend,
    missing: Mapping[str, str],
    *,
    count_flows: bool,
    cancelled: Callable[[], bool],
    proof: Callable[[], None] | None,
    flush: bool = False,
) -> Result:
    """Apply by this backend, without what is missing."""
    desired, effective, degraded = compiled(namespace, plan, backend, missing, layout)
    known = session.entry.created if session.entry else Routing()
    entry = Entry(True, backend.name, NOWHERE, desired, known, layout, fingerprint)
    owned = _owned(session.entry, layout, desired.ruleset, adopted)
    transaction = Transaction(namespace, backend, owned, session.files, cancelled, adopted.routing, proof)
    outcome = transaction.run(entry, session.entry)
    if proof is not None and not outcome.steps:
        proof()  # nothing to undo
    said = session.entry
    if not outcome.steps and session.files and (said is None or said.pending or said.fingerprint != fingerprint):
        session.files.settle(entry._replace(before=desired, created=outcome.created))
    flows: int | None = None
    if count_flows:
        flows = treated_otherwise(existing_flows(namespace), outcome.before, desired.ruleset) if outcome.steps else 0
    return Result(
        bool(outcome.steps),
        backend.name,
        "",
        outcome.steps,
        session.degraded + degraded,
        session.notes + (_flushed(namespace, outcome, desired.ruleset) if flush and outcome.steps else ()),
        ipv6=effective.ipv6,
        existing_flows=flows,
    )


def _flushed(namespace: Namespace, outcome: Outcome, after: Ruleset | None) -> tuple[str, ...]:
    """Said, and no error: the plan stands."""
    from netapply.conntrack import forget_changed  # few ask for it

    try:
        return (f"connection tracking forgot {forget_changed(namespace, outcome.before, after)} flows",)
    except KernelError as error:
        return (f"flows that were there stay as they were ({error})",)


def _instead(
    namespace: Namespace, failed: Backend, wanted: str, plan: CapturePlan, error: ApplyError
) -> tuple[Backend, str]:
    """What to try after a roll-back that the probe can explain. Raises UnsupportedError, or `error` again."""
    cause = error.__cause__
    if not (error.restored and isinstance(cause, KernelError) and cause.errno in UNSUPPORTED):
        raise error
    found = probe(namespace, failed)
    if found.status == "usable":
        if not degrade(plan, failed.name, found.missing)[1] and "sets" not in found.missing:
            raise error
        return failed, f"{failed.name} without {', '.join(found.missing)}"
    if wanted != "auto":
        said = f"{failed.name} is {found.status} here: {found.reason}"
        raise UnsupportedError(said, next_step="netapply detect") from error
    return next_usable(namespace)


def possible(namespace: Namespace, wanted: Routing) -> tuple[Routing, tuple[str, ...]]:
    """The routing that can stand here, and what cannot: where IPv6 is switched off on `lo`, nothing of IPv6."""
    left = Routing(
        tuple(rule for rule in wanted.rules if rule.family == "ip"),
        tuple(route for route in wanted.routes if route.family == "ip"),
        tuple(address for address in wanted.addresses if len(address.packed) == 4),
        wanted.sysctls,
    )
    if left == wanted or not _ipv6_is_off(namespace):
        return wanted, ()
    return left, ("ipv6: switched off on lo, so its addresses and routes are left out; its rules stand",)


def _ipv6_is_off(namespace: Namespace) -> bool:
    try:
        return namespace.read_file("sys/net/ipv6/conf/lo/disable_ipv6").strip() == "1"
    except FileNotFoundError:
        return True  # a kernel without IPv6 has no such file
    except OSError as error:
        raise KernelError("read sysctl net.ipv6.conf.lo.disable_ipv6", error.errno or 0) from error


def refuse_waiting(plan: CapturePlan) -> None:
    """Raise UnsupportedError for a plan that only a running agent can carry out."""
    if plan.activation == "on-listen":
        raise UnsupportedError(
            "activation: on-listen waits for the proxy's port, and a command that ends cannot wait",
            next_step="give the plan to the agent, or say activation: now and apply when the proxy listens",
        )


def clean(
    namespace: Namespace,
    *,
    backend: str = "auto",
    layout: str = "netapply",
    adopt: Adoption | None = None,
    journal: Journal | None = None,
    reason: str = "",
) -> Result:
    """Remove all that is ours, in every dialect ("auto") or one, by ownership: without a plan, from any version.

    Of layout `layout` too, whoever put it there; and, with `adopt`, the rest of what another program left.
    """
    begun = time.perf_counter()
    steps: tuple[str, ...] = ()
    with _session(namespace, journal or Journal(), "clean", reason) as session:
        adopted = adopt() if adopt is not None else NOTHING
        owned = _owned(session.entry, layout, adopted=adopted)
        looked = holding_ours(namespace, owned, _also(session.entry)) if backend == "auto" else Held((backend,), ())
        held, unseen = looked
        known = session.entry.created if session.entry else Routing()
        for name in held or PREFERENCE[:1]:
            entry = Entry(True, name, NOWHERE, NOWHERE, known)
            transaction = Transaction(namespace, find_backend(name), owned, session.files, adopted=adopted.routing)
            outcome = transaction.run(entry, settle=False)
            steps += outcome.steps
            known = outcome.created
        if session.files:
            session.files.forget()
        why = "held our rules" if held else "nothing of ours was found in any dialect"
        done = Result(bool(steps), ", ".join(held), why, steps, session.degraded + unseen, session.notes)
        done = session.told(done)
    return done._replace(duration=time.perf_counter() - begun)


def migrate(
    namespace: Namespace,
    plan: CapturePlan,
    to: str,
    *,
    layout: str = "netapply",
    adopt: Adoption | None = None,
    journal: Journal | None = None,
    fingerprint: str = "",
    proof: Callable[[], None] | None = None,
    reason: str = "",
) -> Result:
    """Make the namespace hold `plan` in the dialect of backend `to`, and nothing of ours in another.

    Every flow is captured once all the while: see `netapply.migration`. `proof` is called once while both dialects
    stand and once at the end, and raises NetapplyError where connections do not go where they should. With `adopt`,
    what another program left in any layout that we know of is left behind too. Where nothing of ours stands, or only
    in this dialect, it is an apply. Raises as `apply` does; after ApplyError the old dialect holds what it held.
    """
    begun = time.perf_counter()
    refuse_waiting(plan)
    coming = find_backend(to)
    with _session(namespace, journal or Journal(), "migrate", reason) as session:
        adopted = adopt() if adopt is not None else NOTHING
        found = probe(namespace, coming)
        if found.status != "usable":
            raise UnsupportedError(f"{to} is {found.status} here: {found.reason}", next_step="netapply detect")
        desired, effective, degraded = compiled(namespace, plan, coming, found.missing, layout)
        owned = _owned(session.entry, layout, desired.ruleset, adopted)
        if adopt is not None:
            owned = owned._replace(prefixes=PREFIXES)
        held, unseen = holding_ours(namespace, owned, (*_also(session.entry), to))
        if len(set(held)) > 1:
            raise ConflictError(
                f"rules of ours stand in {len(held)} dialects at once: {', '.join(held)}",
                dialects=held,
                next_step="`netapply clean --backend NAME` removes them from one; then migrate",
            )
        if not held or held[0] == to:
            done = _attempt(
                namespace,
                session,
                plan,
                layout,
                fingerprint,
                adopted,
                coming,
                found.missing,
                count_flows=False,
                cancelled=lambda: False,
                proof=proof,
            )
            why = "holds our rules already" if held else "nothing of ours was here yet"
        else:
            from netapply.migration import Migration  # apply does without

            known = session.entry.created if session.entry else Routing()
            entry = Entry(True, to, NOWHERE, desired, known, layout, fingerprint)
            outcome = Migration(namespace, find_backend(held[0]), coming, owned, session.files).run(
                entry, adopted.routing, proof
            )
            why = f"from {held[0]}"
            done = Result(True, to, why, outcome.steps, session.degraded + degraded, session.notes, ipv6=effective.ipv6)
        done = session.told(done, layout, fingerprint)
    return done._replace(reason=why, degraded=unseen + done.degraded, duration=time.perf_counter() - begun)


def rollback(
    namespace: Namespace,
    back: int = 1,
    *,
    journal: Journal | None = None,
    state: int | None = None,
    reason: str = "",
) -> Result:
    """Bring back the state that stood `back` states ago, as the journal has it; that is a change like any other.

    Before the first state there was nothing of ours. `state`, if given, is the number of the one that has to stand;
    where another does, ConflictError. Raises NetapplyError, ConflictError and LockError with nothing touched,
    ApplyError after a roll-back.
    """
    begun = time.perf_counter()
    with _session(namespace, journal or Journal(), "rollback", reason) as session:
        if state is not None and session.files is not None and session.files.number != state:
            raise ConflictError(f"state {session.files.number} stands, and not {state}")
        past = recovery.past(session.files, session.entry, back)
        owned = _owned(session.entry, past.layout, past.desired.ruleset)
        held, unseen = holding_ours(namespace, owned, _also(session.entry))
        if past.desired.ruleset is not None and (others := [name for name in held if name != past.backend]):
            raise ConflictError(
                f"that state was held by {past.backend}, and {', '.join(others)} holds ours now",
                next_step=f"netapply migrate --to {past.backend}, and then again",
            )
        known = session.entry.created if session.entry else Routing()
        transaction = Transaction(namespace, find_backend(past.backend), owned, session.files)
        outcome = transaction.run(past._replace(pending=True, created=known), session.entry)
        why = f"state {past.number}" if past.number >= 0 else "nothing of ours, as before the first state"
        done = Result(bool(outcome.steps), past.backend, why, outcome.steps, session.degraded + unseen, session.notes)
        done = session.told(done, past.layout, past.fingerprint)
    return done._replace(duration=time.perf_counter() - begun)


def diff(namespace: Namespace, plan: CapturePlan, *, backend: str = "auto", layout: str = "netapply") -> Diff:
    """What `apply` would change, rule by rule, against the live kernel. Changes nothing, and recovers nothing."""
    chosen, reason, _ = choose(namespace, backend, ownership(layout))
    desired, _, _ = compiled(namespace, plan, chosen, lacking(namespace, chosen, plan), layout)
    return Diff(chosen.name, reason, _changes(namespace, chosen, ownership(layout, [desired.ruleset]), desired))


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
    files = (journal or Journal()).acquire(namespace.identity, namespace.lock_timeout, namespace.memory)
    try:
        entry = files.load()
    finally:
        files.close()
    if entry is not None and entry.pending:
        raise NetapplyError("a run was interrupted here", next_step="`netapply apply` or `clean` finishes or undoes it")
    if entry is None or entry.desired.ruleset is None:
        raise NetapplyError(
            "nothing was applied to this namespace that the journal knows of",
            next_step="give the plan: netapply verify PLAN",
        )
    chosen = find_backend(entry.backend)
    changes = _changes(namespace, chosen, _owned(entry), entry.desired, entry.created)
    return Diff(chosen.name, "the last apply used it", changes)


def _changes(
    namespace: Namespace, backend: Backend, owned: Owned, desired: State, known: Routing | None = None
) -> tuple[Change, ...]:
    changes = ruleset_changes(backend, backend.read(namespace, owned).ruleset, desired.ruleset)
    standing = routing.read(namespace, desired.routing, known or Routing())
    steps = routing.plan(standing, desired.routing)
    return changes + tuple(
        Change("add" if step.add else "remove", "routing", step.name.partition(" ")[2]) for step in steps
    )


def live(
    namespace: Namespace, *, backend: str = "auto", layout: str = "netapply", journal: Journal | None = None
) -> tuple[Live, ...]:
    """Our rules that stand, of each dialect that holds some ("auto") or of one; () when nothing of ours is there.

    The plan paths are those of the rules that the journal says were applied.
    """
    entry = _peek(namespace, journal or Journal())
    owned, applied = _owned(entry, layout), entry.desired.ruleset if entry else None
    namespace.forget()  # what is remembered was counted then
    found: list[Live] = []
    for name in holding_ours(namespace, owned, _also(entry))[0] if backend == "auto" else (backend,):
        snapshot = find_backend(name).read(namespace, owned)
        found.append(Live(name, with_paths(snapshot.ruleset, applied), snapshot.counters))
    return tuple(found)


def show(
    namespace: Namespace, *, backend: str = "auto", layout: str = "netapply", journal: Journal | None = None
) -> tuple[RuleCounter, ...]:
    """The rules of `live`, each as its dialect's tool prints it, with its counters."""
    return rule_counters(live(namespace, backend=backend, layout=layout, journal=journal))


def rule_counters(standing: Iterable[Live]) -> tuple[RuleCounter, ...]:
    """Every rule with what it counted. Pure."""
    found: list[RuleCounter] = []
    for each in standing:
        chosen = find_backend(each.backend)
        for table, chain, index, rule in each.ruleset.walk():
            packets, size = each.counters.get((table.family, table.name, chain.name, index), (0, 0))
            text = chosen.render_rule(table, chain, rule)
            found.append(RuleCounter(table.family, table.name, chain.name, index, text, packets, size, rule.path))
    return tuple(found)


def detect(namespace: Namespace, *, layout: str = "netapply", journal: Journal | None = None) -> Detection:
    """Every backend's state here, and the one that `auto` takes: see `netapply.detection.detect`. Changes nothing."""
    return detection.detect(namespace, _owned(_peek(namespace, journal or Journal()), layout))


def _peek(namespace: Namespace, journal: Journal) -> Entry | None:
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


def _owned(
    entry: Entry | None, layout: str = "netapply", desired: Ruleset | None = None, adopted: Adopted = NOTHING
) -> Owned:
    """What is ours in a namespace whose journal says `entry`."""
    known = (entry.before.ruleset, entry.desired.ruleset) if entry else (None, None)
    return _owned_by(layout, *known, desired, adopted)


@remembered(32)
def _owned_by(
    layout: str, before: Ruleset | None, applied: Ruleset | None, desired: Ruleset | None, adopted: Adopted
) -> Owned:
    return ownership(layout, (before, applied, desired), adopted)


def _also(entry: Entry | None) -> tuple[str, ...]:
    """The registered backend that was used here, if it was: the built-in ones are looked at anyway."""
    return (entry.backend,) if entry and entry.backend not in PREFERENCE else ()
