"""One living namespace under a plan: opened, watched, brought to its plan, proven. Synchronous, for worker threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from netapply import core, inspection, routing
from netapply.agent.events import Cause
from netapply.agent.listening import listening_ports, proxy_ports
from netapply.agent.model import FailMode
from netapply.agent.monitor import Monitor, News, watch_routing, watch_rules
from netapply.agent.owning import Owning, can_own, owner_of, take_over
from netapply.agent.watchers import Watchers
from netapply.backend import Backend, Owned, find_backend
from netapply.detection import lacking
from netapply.differences import ruleset_changes
from netapply.errors import NetapplyError
from netapply.journal import Journal, State
from netapply.namespace import Namespace, NamespaceId
from netapply.ownership import ownership
from netapply.plan import CapturePlan
from netapply.remembered import remembered
from netapply.results import Change, Result, RuleCounter
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


class Asked(NamedTuple):
    """Somebody asked for an apply: why, for the history, and whether connection tracking is to forget what changes."""

    reason: str = ""
    flush: bool = False


class Brought(NamedTuple):
    """What `Held.bring` did: its result and when it was proven; whether it undid drift, what that was, and whose.

    `again`: somebody has changed it since.
    """

    result: Result
    proven: float
    drifted: bool
    changes: tuple[Change, ...]
    again: bool
    cause: Cause | None = None


class Attended(NamedTuple):
    """What `Held.attend` found: `brought` is None where nothing had to be looked at closely.

    `listens` is for a plan that waits for its proxy, and None for others; `up` says whether capture is.
    """

    brought: Brought | None
    listens: bool | None = None
    up: bool = True


class _Proven(NamedTuple):
    """What was seen to stand, and of which wish."""

    wanted: Wanted
    backend: Backend
    owned: Owned
    desired: State
    ruleset: Ruleset | None


class Held:
    """An open namespace. Its methods block, and are called by one thread at a time; `holds` by any."""

    def __init__(
        self,
        namespace: Namespace,
        journal: Journal,
        watchers: Watchers,
        call: Callable[[], None],
        *,
        owners: Mapping[str, int] | None = None,
    ) -> None:
        self.namespace = namespace
        self._owners = owners
        self._is_owner = False
        self._journal = journal
        self._proven: _Proven | None = None
        #: Changes up to this nf_tables generation are known.
        self.generation = 0
        #: Before anything is read: what comes later is news.
        self.rules = watch_rules(namespace)
        self.routing: Monitor | None = None
        self._watchers = watchers
        self._call = call
        self._counted = News()
        #: What an apply left as it was, though it is not all that the plan compiles to.
        self._doubted: tuple[Ruleset | None] | None = None
        #: Whether it is being put right at this moment.
        self.healing = False
        watchers.add(self.rules.fileno(), call)
        if owners:
            take_over(namespace, owners)

    @classmethod
    def open(
        cls,
        spec: str | int,
        journal: Journal,
        watchers: Watchers,
        call: Callable[[], None],
        *,
        host: bool,
        lock_timeout: float,
        owners: Mapping[str, int] | None = None,
    ) -> Held:
        """Open what `spec` names, and begin to watch; news are a reason to `call`, from `listen` on.

        With `owners` native tables are to be ours alone, where they can be: sockets of an earlier agent that own some,
        by key. Raises NamespaceError, OSError.
        """
        namespace = Namespace.open(spec, host=host, lock_timeout=lock_timeout)
        try:
            return cls(namespace, journal, watchers, call, owners=owners)
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
    def is_silent(self) -> bool:
        """Whether the kernel does not tell of every change: not of iptables-legacy, and not of settings."""
        return self.generation == 0 or bool(self._proven and self._proven.desired.routing.sysctls)

    @property
    def owner(self) -> tuple[str, int] | None:
        """The socket that our table belongs to, where it belongs to one: see `owner_of`."""
        return owner_of(self.namespace) if self._is_owner else None

    def attend(self, wanted: Wanted, *, deep: bool, active: bool | None, cancelled: Callable[[], bool]) -> Attended:
        """Answer the news that there are, or look at everything (`deep`). Raises NetapplyError, OSError.

        `active` says of a plan that waits for its proxy whether it was in force; None where nobody knows.
        """
        try:
            known = self.generation
            news = self._drain()
            waits, listens = wanted.plan.activation != "now", None
            if waits:
                listens = proxy_ports(wanted.plan) <= listening_ports(self.namespace)
                active = self.stands() if active is None else active
                if not listens and not (active and wanted.fail == "closed"):
                    if active or deep:
                        self.clean()
                    return Attended(None, listens, up=False)
            if not deep and self._proven is not None and self._proven.wanted == wanted:
                fresh = any(cause.generation > known for cause in news.causes)
                if not (news.routing or news.overrun) and (not (fresh or self.is_silent) or self.holds()):
                    return Attended(None, listens)
            self.healing = self._proven is not None and not deep
            brought = self.bring(wanted, cancelled=cancelled)
            since = self._drain()
            cause = self._whose(news.causes + since.causes, known)
            again = brought.again or since.routing or since.overrun
            again = again or any(each.generation > self.generation for each in since.causes)
            return Attended(brought._replace(cause=cause, again=again), listens)
        finally:
            self.healing = False
            self.listen()

    def _whose(self, causes: tuple[Cause, ...], known: int) -> Cause | None:
        """Who changed what was put right: the last before our own commit."""
        theirs = [cause for cause in causes if known < cause.generation < max(self.generation, known + 2)]
        return theirs[-1] if theirs else None

    def _drain(self) -> News:
        """All news that there are; counted."""
        found = [monitor.read() for monitor in (self.rules, self.routing) if monitor is not None]
        news = found[0] if len(found) == 1 else found[0].and_also(found[1])
        self._counted = self._counted.and_also(news)
        return news

    def listen(self) -> None:
        """Be called when there are news from now on, or if there are some."""
        for monitor in (self.rules, self.routing):
            if monitor is not None and monitor.fileno() >= 0:
                self._watchers.arm(monitor.fileno())

    def counted(self) -> News:
        """What was read since this was asked the last time; its causes do not matter."""
        counted, self._counted = self._counted, News()
        return counted

    def bring(
        self,
        wanted: Wanted,
        *,
        asked: Asked | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Brought:
        """Make the namespace hold the plan, and prove it. Raises NetapplyError.

        Where somebody `asked` for it the result is as without an agent: by the backend that he named, with what he
        wants to know.
        """
        plan = wanted.plan._replace(activation="now") if wanted.plan.activation != "now" else wanted.plan
        last = self._proven if self._proven and self._proven.wanted == wanted else None
        before = last.backend.read(self.namespace, last.owned).ruleset if last else None
        result = core.apply(
            self.namespace,
            plan,
            backend=last.backend.name if last and asked is None else wanted.backend,
            layout=wanted.layout,
            journal=self._journal,
            fingerprint=wanted.fingerprint,
            count_flows=asked is not None,
            cancelled=cancelled,
            flush=asked is not None and asked.flush,
            exclusive=self._owners is not None and can_own(self.namespace),
            reason=_reason(wanted, asked, healing=last is not None),
        )
        proven = time.monotonic()
        backend = find_backend(result.backend)
        again = self._prove(wanted, plan, backend, unchanged=not result.changed)
        changes: tuple[Change, ...] = ()
        if last and result.changed:
            changes = _changes(backend, before, last.desired, result.steps)
        return Brought(result, proven, last is not None and result.changed, changes, again)

    def _prove(self, wanted: Wanted, plan: CapturePlan, backend: Backend, *, unchanged: bool) -> bool:
        """Note what stands now; whether it is something else already than what was just proven."""
        missing = lacking(self.namespace, backend, plan)
        desired, _, _ = core.compiled(self.namespace, plan, backend, missing, wanted.layout)
        if desired.routing != routing.NOTHING and self.routing is None:
            self.routing = watch_routing(self.namespace)
            self._watchers.add(self.routing.fileno(), self._call)
            self._watchers.arm(self.routing.fileno())
        owned = _owned(wanted.layout, desired.ruleset)
        snapshot = backend.read(self.namespace, owned)
        again = bool(backend.encode(snapshot, desired.ruleset))
        self._is_owner = self._owners is not None and isinstance(backend, Owning) and backend.is_owned(snapshot)
        if again and unchanged:
            # Somebody was at it at this very moment, or the core left out more of the plan than we know. It is the
            # latter where an apply finds nothing to do while the same stands before and after.
            again, self._doubted = self._doubted != (snapshot.ruleset,), (snapshot.ruleset,)
        if not again:
            self._doubted = None
            self.generation = int(getattr(snapshot, "generation", 0))
        self._proven = _Proven(wanted, backend, owned, desired, desired.ruleset if again else snapshot.ruleset)
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
        wanted = proven.desired.routing
        return not wanted.sysctls or not routing.plan(routing.read(self.namespace, wanted), wanted)

    def stands(self) -> bool:
        """Whether anything of ours stands here."""
        return bool(inspection.live(self.namespace, journal=self._journal))

    def clean(self, reason: str = "") -> Result:
        """Take down all that is ours. `reason` is for the history. Raises NetapplyError."""
        self._proven, self._is_owner = None, False
        return core.clean(self.namespace, journal=self._journal, reason=reason)

    def go_back(self, back: int, reason: str) -> None:
        """Bring back the state so many before the present one, as the journal has it. Raises NetapplyError."""
        self._proven, self._is_owner = None, False
        try:
            core.rollback(self.namespace, back, journal=self._journal, reason=reason)
        except NetapplyError:
            if self.stands():  # else it is another namespace than it was, or was cleaned
                raise

    def counters(self, layout: str) -> tuple[RuleCounter, ...]:
        """Our live rules with their counters. Raises NetapplyError."""
        return inspection.show(self.namespace, layout=layout, journal=self._journal)

    def close(self) -> None:
        """Let go of the namespace, which keeps its rules. Idempotent."""
        for monitor in (self.rules, self.routing):
            if monitor is not None and monitor.fileno() >= 0:
                self._watchers.remove(monitor.fileno())
                monitor.close()
        with suppress(OSError):
            self.namespace.close()


def _reason(wanted: Wanted, asked: Asked | None, *, healing: bool) -> str:
    """What the history says."""
    if asked is None and healing:
        return "the agent healed it"
    return (asked.reason if asked else "") or f"the agent: {wanted.source}"


@remembered(64)
def _owned(layout: str, desired: Ruleset | None) -> Owned:
    return ownership(layout, (desired,))


def _changes(backend: Backend, before: Ruleset | None, desired: State, steps: tuple[str, ...]) -> tuple[Change, ...]:
    """What had drifted: rules by comparison, routing by what had to be done about it."""
    wanted = _additions(desired.routing)
    beside = tuple(Change("add", "routing", step.partition(" ")[2]) for step in steps if step in wanted)
    return ruleset_changes(backend, before, desired.ruleset) + beside


def _additions(wanted: Routing) -> frozenset[str]:
    items: tuple[routing.Item, ...] = (*wanted.rules, *wanted.routes, *wanted.addresses)
    return frozenset(routing.RoutingStep(add=True, item=item).name for item in items)
