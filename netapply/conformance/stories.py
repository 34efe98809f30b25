"""What is done with the plan of a case, besides applying it. Each story tells what is wrong, a phrase each."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager

from netapply.conformance import conntrack, failing, foreign
from netapply.conformance.case import Case, Probe, Seen, Story
from netapply.conformance.drift import drifts
from netapply.conformance.flows import flow_of
from netapply.conformance.prober import PATIENCE, Batch
from netapply.conformance.stage import Reader, Stage, Standing, differences, plan_from, ports_of
from netapply.decide import DNS_PORT, decide
from netapply.errors import ApplyError
from netapply.lab.namespaces import timeout_scale
from netapply.ownership import ownership
from netapply.plan import CapturePlan


def tell(case: Case, stage: Stage, readers: Sequence[Reader] = ()) -> Iterator[str]:
    """Run the case; what is wrong. The stage is left with rules, for the caller to clean. Raises NetapplyError."""
    plan = plan_from(case.plan)
    stage.arrange(case, plan)
    yield from STORIES[case.story](case, stage, plan)
    if case.story != "foreign":
        now = plan_from(case.update) if case.story in ("update", "failure") else plan
        standing = Standing(
            stage.world.pod.path, stage.backend.name, case.layout, now, stage.compiled(now, case.layout)
        )
        for reader in readers:
            yield from reader(standing)


def _apply(case: Case, stage: Stage, plan: CapturePlan) -> Iterator[str]:
    """Apply, look, send, and apply once more."""
    if not stage.apply(plan, case.layout) and stage.compiled(plan, case.layout).tables:
        yield "apply says that it changed nothing"
    yield from _held(case, stage, plan)
    yield from stage.send(case.probes)
    if case.story == "apply":
        yield from stage.send(case.after)
    if case.all_replied:
        yield from _tracked(case, stage, plan)
    if stage.apply(plan, case.layout):
        yield "a second apply changed something"


def _tracked(case: Case, stage: Stage, plan: CapturePlan) -> Iterator[str]:
    """Conntrack has seen a reply to each flow, and has each query over UDP in the zone that the plan decides.

    One of no zone need not be tracked at all: where nothing is done to a family, conntrack may be off for it.
    """
    entries = conntrack.entries(stage.capture.namespace)
    yield from (f"conntrack has seen no reply: {entry}" for entry in entries if not entry.replied)
    queries = [
        probe
        for probe in stage.possible((*case.probes, *case.after))
        if (probe.protocol, probe.port) == ("udp", DNS_PORT)
    ]
    wanted = {(probe.to, decide(plan, flow_of(probe)).zone) for probe in queries}
    found = {(entry.destination, entry.zone) for entry in entries if (entry.protocol, entry.dport) == ("udp", DNS_PORT)}
    yield from (f"conntrack has no query to {server} in zone {zone}" for server, zone in sorted(wanted - found) if zone)
    yield from (f"conntrack has a query to {server} in zone {zone}" for server, zone in sorted(found - wanted))


def _held(case: Case, stage: Stage, plan: CapturePlan) -> Iterator[str]:
    """The rules that are read back are those that the plan compiles to."""
    name = stage.backend.name
    for change in stage.capture.diff(plan, backend=name, layout=case.layout).changes:
        yield f"read back, {change.kind} {change.where}: {change.what}"
    if not stage.capture.verify().same:
        yield "verify says that what was applied does not stand"


def _update(case: Case, stage: Stage, plan: CapturePlan) -> Iterator[str]:
    """Flows that are open when the plan changes stay with whom they were; new ones go by the new plan."""
    update = plan_from(case.update)
    stage.apply(plan, case.layout)
    probes = stage.possible(case.probes)
    with stage.prober.open(probes) as batch:
        yield from differences(probes, batch.run())
        if not stage.apply(update, case.layout):
            yield "the update changed nothing"
        for wrong in differences(probes, batch.again()):
            yield f"after the update, an open flow: {wrong}"
    yield from _held(case, stage, update)
    stage.arrange(case, update)
    yield from stage.send(case.after)


def _older(case: Case, stage: Stage, plan: CapturePlan) -> Iterator[str]:
    """Connections that began before there was connection tracking stay with whom they were, over an update too."""
    probes = stage.possible(case.probes)
    plans = (plan, plan_from(case.update)) if case.update else (plan,)
    with _untracked(stage, probes) as (batch, seen):
        yield from differences(probes, seen)
        for each in plans:
            stage.apply(each, case.layout)
            for wrong in differences(probes, batch.again()):
                yield f"a connection that is older than the plan: {wrong}"
    yield from _held(case, stage, plans[-1])
    stage.arrange(case, plans[-1])
    yield from stage.send(case.after)


@contextmanager
def _untracked(stage: Stage, probes: Sequence[Probe]) -> Generator[tuple[Batch, list[Seen]]]:
    """The probes' flows, which conntrack has not seen: it is switched off some time after the last rule is gone."""
    until = time.monotonic() + PATIENCE * timeout_scale()
    while True:
        with stage.prober.open(probes) as batch:
            seen = batch.run()
            if not conntrack.entries(stage.capture.namespace) or time.monotonic() > until:
                yield batch, seen
                return
        conntrack.flush(stage.capture.namespace)


def _foreign(case: Case, stage: Stage, plan: CapturePlan) -> Iterator[str]:
    """Rules of somebody else, of the plan `update`, stay as they are, and ours work beside them."""
    other = plan_from(case.update)
    foreign.put_up(stage, other)
    stage.spoiled = True
    before = stage.picture(case.layout)
    stage.prober.arrange((*ports_of(plan), *ports_of(other)), case.proxy, case.absent)
    yield from _apply(case, stage, plan)
    if stage.picture(case.layout).foreign != before.foreign:
        yield "with our rules, foreign rules are not as they were"
    stage.capture.clean(backend=stage.backend.name, layout=case.layout)
    yield from (f"after clean, {wrong}" for wrong in before.changes(stage.picture(case.layout)))
    yield from stage.send(case.after)


def _drift(case: Case, stage: Stage, plan: CapturePlan) -> Iterator[str]:
    """What somebody does to our rules shows as a difference, and the next apply puts it right."""
    stage.apply(plan, case.layout)
    namespace, backend = stage.capture.namespace, stage.backend
    owned = ownership(case.layout, (stage.compiled(plan, case.layout),))
    for name, changed in drifts(stage.compiled(plan, case.layout)):
        steps = backend.encode(backend.read(namespace, owned), changed)
        for step in steps:
            backend.commit(namespace, step)
        if not steps or stage.capture.diff(plan, backend=backend.name, layout=case.layout).same:
            yield f"drift does not show: {name}"
        elif stage.capture.verify().same:
            yield f"verify does not see drift: {name}"
        if not stage.apply(plan, case.layout):
            yield f"apply does not put right: {name}"
    yield from _held(case, stage, plan)
    yield from stage.send(case.probes)


def _failure(case: Case, stage: Stage, plan: CapturePlan) -> Iterator[str]:
    """Whatever fails on the way to the plan `update`, what stood before stands, and decides as before."""
    stage.apply(plan, case.layout)
    before, rules = stage.picture(case.layout), stage.read(case.layout)
    update = plan_from(case.update)
    for after in (False, True):
        for at in range(failing.MOST):
            hit, wrong = _fails(case, stage, update, at, after=after)
            yield from wrong
            if not hit:  # there are no more changes
                stage.apply(plan, case.layout)
                break
            if stage.read(case.layout) != rules:
                yield f"change {at + 1} failed, and our rules are not as they were"
            yield from (
                f"change {at + 1} failed, and {change}" for change in before.changes(stage.picture(case.layout))
            )
    yield from stage.send(case.probes)
    stage.apply(update, case.layout)


def _fails(case: Case, stage: Stage, update: CapturePlan, at: int, *, after: bool) -> tuple[bool, list[str]]:
    """Apply where the `at`th change fails: whether there was one, and what was wrong about it."""
    with failing.capture(stage, at, after=after) as (capture, fault):
        try:
            capture.apply(update, backend=stage.backend.name, layout=case.layout)
        except ApplyError as error:
            if not error.restored:
                return fault.hit, [f"change {at + 1} failed and was not rolled back: {error}"]
    return fault.hit, []


def _model(case: Case, stage: Stage, plan: CapturePlan) -> Iterator[str]:
    """Specification, rules, counters and packets agree; what stood before was another plan."""
    from netapply.conformance.model import disagreements

    yield from disagreements(case, stage, plan)


STORIES: Mapping[Story, Callable[[Case, Stage, CapturePlan], Iterator[str]]] = {
    "apply": _apply,
    "update": _update,
    "older": _older,
    "foreign": _foreign,
    "drift": _drift,
    "failure": _failure,
    "model": _model,
}
