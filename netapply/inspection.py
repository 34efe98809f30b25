"""The operations that change nothing: diff, verify, live, show, detect. Synchronous, as those of `netapply.core`."""

from __future__ import annotations

from collections.abc import Iterable

from netapply import detection, routing
from netapply.backend import Backend, Owned, find_backend
from netapply.core import compiled
from netapply.detection import choose, holding_ours, lacking
from netapply.differences import ruleset_changes, with_paths
from netapply.errors import NetapplyError
from netapply.journal import Journal, State
from netapply.namespace import Namespace
from netapply.ownership import ownership
from netapply.plan import CapturePlan
from netapply.results import Change, Detection, Diff, Live, RuleCounter
from netapply.ruleset import Routing
from netapply.session import also_used, owned_by, peek


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
        step = "netapply recover finishes or undoes it, as apply and clean do"
        raise NetapplyError("a run was interrupted here", next_step=step)
    if entry is None or entry.desired.ruleset is None:
        raise NetapplyError(
            "nothing was applied to this namespace that the journal knows of",
            next_step="give the plan: netapply verify PLAN",
        )
    chosen = find_backend(entry.backend)
    changes = _changes(namespace, chosen, owned_by(entry), entry.desired, entry.created)
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
    entry = peek(namespace, journal or Journal())
    owned, applied = owned_by(entry, layout), entry.desired.ruleset if entry else None
    namespace.forget()  # what is remembered was counted then
    found: list[Live] = []
    for name in holding_ours(namespace, owned, also_used(entry))[0] if backend == "auto" else (backend,):
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
    return detection.detect(namespace, owned_by(peek(namespace, journal or Journal()), layout))
