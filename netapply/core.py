"""The operations that change a namespace: apply, clean, rollback. Synchronous; the namespace is an explicit argument.

with Namespace.open("pod-1") as namespace:
    result = apply(namespace, plan)

`netapply.open` gives the same as methods of one object (`netapply.api`). `migrate` is in `netapply.migration`, what
changes nothing in `netapply.inspection`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

from netapply import recovery, routing
from netapply.backend import Backend, find_backend
from netapply.compiler import compile_plan, compile_routing
from netapply.detection import PREFERENCE, UNSUPPORTED, Held, choose, holding_ours, lacking, next_usable, probe
from netapply.errors import ApplyError, ConflictError, JournalError, KernelError, PlanError, UnsupportedError
from netapply.existing import existing_flows, treated_otherwise
from netapply.features import degrade
from netapply.journal import NOWHERE, Entry, Journal, State, is_another
from netapply.namespace import Namespace
from netapply.ownership import NOTHING, Adopted, Adoption
from netapply.plan import CapturePlan
from netapply.remembered import remembered
from netapply.results import Result
from netapply.ruleset import Routing, Ruleset
from netapply.session import Session, also_used, owned_by, take
from netapply.texts import find_faulty_texts
from netapply.transaction import Outcome, Transaction


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
    replaces: int | None = None,
    exclusive: bool = False,
    reason: str = "",
) -> Result:
    """Make the namespace hold `plan`: all of it, or, when anything fails, what was there before.

    `backend` is a name or "auto", which keeps to the dialect that holds our rules already. `fingerprint` names the
    plan in the journal. `adopt` says what else is taken over, where chains of the layout's names or policy rules of
    others stand already: rules and routing that another program left. `count_flows` counts open connections that would
    be treated otherwise. `cancelled` is asked between steps. `proof` is called when all stands, and raises where
    connections do not go where they should (`netapply.canary`): then it is undone. `flush` has connection tracking
    forget the flows that would be treated otherwise (`netapply.conntrack`). `replaces` is the number of the state that
    has to stand, else ConflictError, and that nobody wants to go back to: this one takes its number. `exclusive` is as
    in `netapply.backend.Owned`. `reason` is for the history. Raises NetapplyError: ConflictError, UnsupportedError and
    LockError with nothing touched, ApplyError after a roll-back.
    """
    begun = time.perf_counter()
    refuse_waiting(plan)
    with take(namespace, journal or Journal(), "apply", reason) as session:
        session.require(replaces)
        owned = owned_by(session.entry, layout)
        chosen, why, unseen = choose(namespace, backend, owned, also_used(session.entry))
        adopted = NOTHING
        if adopt is not None and (chosen.detect(namespace, owned) or routing.of_others(namespace)):
            adopted = adopt()
        fixed = (namespace, session, plan, layout, fingerprint, adopted)
        words = partial(attempt, count_flows=count_flows, cancelled=cancelled, proof=proof, flush=flush)
        trying = partial(words, *fixed, exclusive=exclusive)
        try:
            done = trying(chosen, lacking(namespace, chosen, plan))
        except ApplyError as error:
            chosen, why = _instead(namespace, chosen, backend, plan, error)
            done = trying(chosen, probe(namespace, chosen).missing)
        if replaces is not None and session.files is not None and session.files.number != replaces:
            session.files.take_number(replaces)
        done = session.told(done, layout, fingerprint)
    return done._replace(reason=why, degraded=unseen + done.degraded, duration=time.perf_counter() - begun)


def attempt(
    namespace: Namespace,
    session: Session,
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
    exclusive: bool = False,
) -> Result:
    """Apply by this backend, without what is missing."""
    desired, effective, degraded = compiled(namespace, plan, backend, missing, layout)
    known = session.entry.created if session.entry else Routing()
    entry = Entry(True, backend.name, NOWHERE, desired, known, layout, fingerprint)
    owned = owned_by(session.entry, layout, desired.ruleset, adopted)._replace(exclusive=exclusive)
    transaction = Transaction(namespace, backend, owned, session.files, cancelled, adopted.routing, proof)
    outcome = transaction.run(entry, session.entry)
    if proof is not None and not outcome.steps:
        proof()  # nothing to undo
    said = session.entry
    told = said is not None and said.fingerprint == fingerprint and not (said.pending or is_another(said, entry))
    if not outcome.steps and session.files and not told:
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
    with take(namespace, journal or Journal(), "clean", reason) as session:
        adopted = adopt() if adopt is not None else NOTHING
        owned = owned_by(session.entry, layout, adopted=adopted)
        looked = holding_ours(namespace, owned, also_used(session.entry)) if backend == "auto" else Held((backend,), ())
        held, unseen = looked
        known = session.entry.created if session.entry else Routing()
        for name in held or PREFERENCE[:1]:
            entry = Entry(True, name, NOWHERE, NOWHERE, known)
            transaction = Transaction(namespace, find_backend(name), owned, session.files, adopted=adopted.routing)
            outcome = transaction.run(entry, settle=False)
            steps += outcome.steps
            known = outcome.created
        notes = session.notes
        try:
            if session.files:
                session.files.forget()
        except JournalError as error:  # too late to go back for, and the next command finds nothing to do
            notes += (f"nothing of ours is left, but {error}",)
        why = "held our rules" if held else "nothing of ours was found in any dialect"
        done = Result(bool(steps), ", ".join(held), why, steps, session.degraded + unseen, notes)
        done = session.told(done)
    return done._replace(duration=time.perf_counter() - begun)


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
    with take(namespace, journal or Journal(), "rollback", reason) as session:
        session.require(state)
        past = recovery.past(session.files, session.entry, back)
        owned = owned_by(session.entry, past.layout, past.desired.ruleset)
        held, unseen = holding_ours(namespace, owned, also_used(session.entry))
        if past.desired.ruleset is not None and (others := [name for name in held if name != past.backend]):
            raise ConflictError(
                f"that state was held by {past.backend}, and {', '.join(others)} holds ours now",
                next_step=f"netapply migrate PLAN --to {past.backend}, with the plan that stood then",
            )
        known = session.entry.created if session.entry else Routing()
        transaction = Transaction(namespace, find_backend(past.backend), owned, session.files)
        outcome = transaction.run(past._replace(pending=True, created=known), session.entry)
        why = f"state {past.number}" if past.number >= 0 else "nothing of ours, as before the first state"
        done = Result(bool(outcome.steps), past.backend, why, outcome.steps, session.degraded + unseen, session.notes)
        done = session.told(done, past.layout, past.fingerprint)
    return done._replace(duration=time.perf_counter() - begun)
