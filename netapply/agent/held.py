"""One living namespace under a plan: opened, watched, brought to its plan, proven. Synchronous, for worker threads."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from netapply import core
from netapply.agent.listening import listening_ports
from netapply.agent.model import FailMode
from netapply.agent.monitor import Monitor, watch_routing, watch_rules
from netapply.backend import Backend, Owned, find_backend
from netapply.detection import lacking
from netapply.differences import ruleset_changes
from netapply.journal import Journal, State
from netapply.namespace import Namespace, NamespaceId
from netapply.ownership import ownership
from netapply.plan import CapturePlan
from netapply.remembered import remembered
from netapply.results import Change, Result, RuleCounter
from netapply.routing import NOTHING, Item, RoutingStep
from netapply.ruleset import Routing, Ruleset
from netapply.values import NamedTuple


class Wanted(NamedTuple):
    """What a namespace should hold, and who said so: a plan file's path, or "api"."""

    plan: CapturePlan
    backend: str = "auto"
    layout: str = "netapply"
    fingerprint: str = ""
    source: str = "api"
    fail: FailMode = "closed"


class Brought(NamedTuple):
    """What `Held.bring` did: its result and when it was proven; whether it undid drift, and what that was.

    `again`: somebody has changed it since.
    """

    result: Result
    proven: float
    drifted: bool
    changes: tuple[Change, ...]
    again: bool


class _Proven(NamedTuple):
    """What was seen to stand, and of which wish."""

    wanted: Wanted
    backend: Backend
    owned: Owned
    desired: State
    ruleset: Ruleset | None


class Held:
    """An open namespace. Its methods block, and are called by one thread at a time; `holds` by any."""

    def __init__(self, namespace: Namespace, journal: Journal) -> None:
        self.namespace = namespace
        self._journal = journal
        self._proven: _Proven | None = None
        #: Changes up to this nf_tables generation are known.
        self.generation = 0
        #: Before anything is read: what comes later is news.
        self.rules = watch_rules(namespace)
        self.routing: Monitor | None = None

    @classmethod
    def open(cls, spec: str | int, journal: Journal, *, host: bool, lock_timeout: float) -> Held:
        """Open what `spec` names, and begin to watch. Raises NamespaceError, OSError."""
        namespace = Namespace.open(spec, host=host, lock_timeout=lock_timeout)
        try:
            return cls(namespace, journal)
        except BaseException:
            namespace.close()
            raise

    @property
    def identity(self) -> NamespaceId:
        """Which namespace this is."""
        return self.namespace.identity

    @property
    def backend(self) -> str:
        """The dialect that the plan stands in; "" before the first time."""
        return self._proven.backend.name if self._proven else ""

    @property
    def has_news(self) -> bool:
        """Whether the kernel tells of every change of the rules: of iptables-legacy it tells nothing."""
        return self.generation > 0

    def bring(
        self, wanted: Wanted, *, count_flows: bool = False, cancelled: Callable[[], bool] = lambda: False
    ) -> Brought:
        """Make the namespace hold the plan, and prove it. Raises NetapplyError."""
        plan = wanted.plan._replace(activation="now") if wanted.plan.activation != "now" else wanted.plan
        last = self._proven if self._proven and self._proven.wanted == wanted else None
        before = last.backend.read(self.namespace, last.owned).ruleset if last else None
        result = core.apply(
            self.namespace,
            plan,
            backend=last.backend.name if last else wanted.backend,
            layout=wanted.layout,
            journal=self._journal,
            fingerprint=wanted.fingerprint,
            count_flows=count_flows,
            cancelled=cancelled,
        )
        proven = time.monotonic()
        backend = find_backend(result.backend)
        again = self._prove(wanted, plan, backend, believe=not result.changed)
        changes: tuple[Change, ...] = ()
        if last and result.changed:
            changes = _changes(backend, before, last.desired, result.steps)
        return Brought(result, proven, last is not None and result.changed, changes, again)

    def _prove(self, wanted: Wanted, plan: CapturePlan, backend: Backend, *, believe: bool) -> bool:
        """Note what stands now; whether it is something else already than what was just proven."""
        missing = lacking(self.namespace, backend, plan)
        desired, _, _ = core.compiled(self.namespace, plan, backend, missing, wanted.layout)
        if desired.routing != NOTHING and self.routing is None:
            self.routing = watch_routing(self.namespace)
        owned = _owned(wanted.layout, desired.ruleset)
        snapshot = backend.read(self.namespace, owned)
        again = not believe and bool(backend.encode(snapshot, desired.ruleset))
        if not again:
            self.generation = int(getattr(snapshot, "generation", 0))
        self._proven = _Proven(wanted, backend, owned, desired, snapshot.ruleset)
        return again

    def holds(self) -> bool:
        """Whether the rules are those that were proven last: by what is cheapest to read. Raises NetapplyError."""
        proven = self._proven
        if proven is None:
            return False
        snapshot = proven.backend.read(self.namespace, proven.owned)
        if snapshot.ruleset is not proven.ruleset and snapshot.ruleset != proven.ruleset:
            return False
        self.generation = max(self.generation, int(getattr(snapshot, "generation", 0)))
        return True

    def stands(self) -> bool:
        """Whether anything of ours stands here."""
        return bool(core.live(self.namespace, journal=self._journal))

    def clean(self) -> Result:
        """Take down all that is ours. Raises NetapplyError."""
        self._proven = None
        layout = "netapply"
        return core.clean(self.namespace, layout=layout, journal=self._journal)

    def counters(self, layout: str) -> tuple[RuleCounter, ...]:
        """Our live rules with their counters. Raises NetapplyError."""
        return core.show(self.namespace, layout=layout, journal=self._journal)

    def listens(self, ports: frozenset[int]) -> bool:
        """Whether somebody listens on all of these TCP ports. Raises OSError."""
        return ports <= listening_ports(self.namespace)

    def close(self) -> None:
        """Let go of the namespace, which keeps its rules. Idempotent."""
        self.rules.close()
        if self.routing is not None:
            self.routing.close()
        with suppress(OSError):
            self.namespace.close()


@remembered(64)
def _owned(layout: str, desired: Ruleset | None) -> Owned:
    return ownership(layout, (desired,))


def _changes(backend: Backend, before: Ruleset | None, desired: State, steps: tuple[str, ...]) -> tuple[Change, ...]:
    """What had drifted: rules by comparison, routing by what had to be done about it."""
    wanted = _additions(desired.routing)
    routing = tuple(Change("add", "routing", step.partition(" ")[2]) for step in steps if step in wanted)
    return ruleset_changes(backend, before, desired.ruleset) + routing


def _additions(routing: Routing) -> frozenset[str]:
    items: tuple[Item, ...] = (*routing.rules, *routing.routes, *routing.addresses)
    return frozenset(RoutingStep(add=True, item=item).name for item in items)
