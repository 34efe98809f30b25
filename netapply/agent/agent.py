"""`Agent`: many keepers, their wishes, and what is told about them. One event loop, a few worker threads."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import structlog

from netapply.agent import store
from netapply.agent.desired import Desired, Request
from netapply.agent.events import Event, FileRejected, PlanChanged, Recovered, Unconfirmed, Vanished
from netapply.agent.held import Held, Wanted
from netapply.agent.inotify import Inotify
from netapply.agent.interrupted import resolve_interrupted
from netapply.agent.keeper import Keeper
from netapply.agent.model import STATES, AgentConfig, Metrics, NamespaceStatus, Target
from netapply.agent.places import Place, find_place
from netapply.agent.subscribers import Subscribers
from netapply.agent.tally import Tally
from netapply.agent.watchers import Watchers
from netapply.agent.workers import Workers
from netapply.errors import NamespaceError, NetapplyError
from netapply.journal import Journal
from netapply.nsfs import NamespaceId
from netapply.plan import CapturePlan
from netapply.planfile import fingerprint
from netapply.results import Result, RuleCounter
from netapply.values import NamedTuple

_log = structlog.stdlib.get_logger("netapply.agent")
#: Seconds in which an editor writes a plan file in several steps.
_GATHER = 0.02
#: Looks that one worker does in a row.
_CHUNK = 64


class _Trial(NamedTuple):
    """An apply that waits to be confirmed: what was before, and the timer that brings it back."""

    before: Wanted | None
    timer: asyncio.TimerHandle


class Agent:
    """Keeps namespaces to their plans while it is entered. Leaving it leaves the rules in place.

    `kept` are descriptors of an earlier agent, by the keys of `descriptors()`: it duplicates them.
    """

    def __init__(self, config: AgentConfig | None = None, *, kept: Mapping[str, int] | None = None) -> None:
        self.config = config or AgentConfig()
        self.journal = Journal(self.config.journal)
        self.tally = Tally()
        self._kept = kept or {}
        self._desired = Desired(self.config.plans)
        self._subscribers = Subscribers(self.config.queue)
        self._keepers: dict[str, Keeper] = {}
        self._claims: dict[NamespaceId, Keeper] = {}
        self._trials: dict[str, _Trial] = {}
        self._plans: dict[str, CapturePlan] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._gathering: asyncio.TimerHandle | None = None
        self._changed = self._saved = 0
        self._running = False

    async def __aenter__(self) -> Self:
        self.workers = Workers(self.config.concurrency)
        self._saving = asyncio.Lock()
        self._inotify = Inotify()
        self.watchers = Watchers()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.watchers.fileno(), self.watchers.dispatch)
        self._running = True
        try:
            self._restore()
            self._read_files()
            self._watch()
            self._resolve()
            await self._resolve_interrupted()
            await asyncio.gather(*(keeper.settled() for keeper in self._keepers.values()))
            self._loop.add_reader(self._inotify.fileno(), self._names_changed)
            self._names_changed()
            self._spawn(self._look_around())
            self._spawn(self._save())
        except BaseException:
            await self._close()
            raise
        self.tally.ticked = time.monotonic()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        self._running = False
        self._loop.remove_reader(self._inotify.fileno())
        self._loop.remove_reader(self.watchers.fileno())
        for timer in (self._gathering, *(trial.timer for trial in self._trials.values())):
            if timer is not None:
                timer.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(keeper.close() for keeper in self._keepers.values()))
        self._inotify.close()
        self.watchers.close()
        self.workers.close()
        self._subscribers.close()
        for keeper in self._keepers.values():
            if keeper.place.fd >= 0:
                os.close(keeper.place.fd)

    # --- what is asked of it ---------------------------------------------------------------------------------

    async def apply(
        self,
        target: str | int | Target,
        plan: CapturePlan,
        *,
        backend: str = "auto",
        layout: str = "netapply",
        confirm_within: float = 0.0,
        reason: str = "",
    ) -> Result:
        """Make the namespace hold `plan`, now and from now on, also after a restart of the agent.

        With `confirm_within`, in seconds, what was before comes back unless `confirm` is called in time. Raises
        NetapplyError, and what was wanted before stays in force; cancelled, likewise. A namespace of which a plan file
        speaks is refused. `reason` is for the history.
        """
        named = _target(target)
        keeper, new = self._keeper_for(named)
        before = keeper.wanted
        mark = fingerprint(plan)
        wanted = Wanted(self._shared(mark, plan), backend, layout, mark, "api", named.fail)
        try:
            self._refuse_filed(keeper)
            result = await keeper.apply(wanted, reason)
        except BaseException:
            if new:
                await self._drop(keeper)
            raise
        key = keeper.place.key
        self._desired.requests[key] = Request(keeper.place, keeper.labels, wanted)
        trial = self._trials.pop(key, None)
        if trial is not None:
            trial.timer.cancel()
            before = trial.before
        if confirm_within > 0:
            timer = self._loop.call_later(confirm_within, self._unconfirmed, key)
            self._trials[key] = _Trial(before, timer)
        keeper.confirm_by = time.time() + confirm_within if confirm_within > 0 else 0.0
        self._watch()
        await self._save()
        return result

    async def confirm(self, target: str | int | Target) -> None:
        """Keep what was applied on trial. Raises NetapplyError where nothing waits for it."""
        keeper = self._find(target)
        trial = self._trials.pop(keeper.place.key, None)
        if trial is None:
            raise NetapplyError(f"nothing waits to be confirmed in {keeper.place.name}")
        trial.timer.cancel()
        keeper.confirm_by = 0.0
        await self._save()

    async def remove(self, target: str | int | Target, *, reason: str = "") -> Result:
        """Take down what is ours in the namespace, and keep it no more. Raises NetapplyError."""
        keeper, _ = self._keeper_for(_target(target))
        self._refuse_filed(keeper)
        try:
            return await keeper.remove(reason)
        except NamespaceError:
            if keeper.wanted is None:
                raise
            keeper.wanted = None  # it is gone, and so is all that was ours there
            return Result(changed=False, backend="", reason="the namespace is gone")
        finally:
            if keeper.wanted is None:
                await self._forget(keeper)
                self._resolve()  # a plan file may speak of it, too

    async def register(self, target: str | int | Target) -> None:
        """Make a namespace and its labels known, for plan files that select by label. Raises NetapplyError."""
        named = _target(target)
        keeper, _ = self._keeper_for(named)
        keeper.labels = dict(named.labels)
        wanted = keeper.wanted if keeper.wanted and keeper.wanted.source == "api" else None
        self._desired.requests[keeper.place.key] = Request(keeper.place, keeper.labels, wanted)
        self._watch()
        self._resolve()
        await self._save()

    async def unregister(self, target: str | int | Target) -> None:
        """Forget a namespace and its labels: what stands there for its labels is taken down."""
        keeper = self._find(target)
        keeper.labels = {}
        self._desired.requests.pop(keeper.place.key, None)
        self._resolve()
        await self._save()

    async def reconcile(self, target: str | int | Target | None = None) -> None:
        """Look at one namespace, or at all, and put right what is not as it should be; back when that was tried."""
        keepers = list(self._keepers.values()) if target is None else [self._find(target)]
        await asyncio.gather(*(keeper.reconcile() for keeper in keepers))

    async def counters(self, target: str | int | Target) -> tuple[RuleCounter, ...]:
        """Our live rules of one namespace, with their counters. Raises NetapplyError."""
        return await self._find(target).counters()

    def status(self) -> tuple[NamespaceStatus, ...]:
        """Every namespace that is kept or known, by name. Looks at nothing, and never waits."""
        return tuple(sorted((each.status for each in self._keepers.values()), key=lambda status: status.name))

    def events(self) -> AsyncIterator[Event]:
        """Everything that happens from now on; it ends with the agent."""
        return self._subscribers.subscribe()

    def metrics(self) -> Metrics:
        """What was counted since the agent began."""
        tally, keepers = self.tally, list(self._keepers.values())
        states: dict[str, int] = dict.fromkeys(STATES, 0)
        for keeper in keepers:
            states[keeper.shown] += 1
        return Metrics(
            states,
            tally.applies,
            tally.failures,
            dict(tally.heals),
            tally.apply_seconds.shown(),
            tally.heal_seconds.shown(),
            tally.quarantines,
            tally.lock_failures,
            tally.recoveries,
            tally.fail_open_seconds + sum(keeper.fail_open_seconds for keeper in keepers),
            tally.notifications,
            tally.forged,
            tally.overruns,
            self._desired.rejected,
            self._subscribers.lost,
            tally.ticked,
        )

    def descriptors(self) -> Mapping[str, int]:
        """Descriptors of namespaces that have no path, by key: give them to the next agent as `kept`."""
        return {key: keeper.place.fd for key, keeper in self._keepers.items() if keeper.place.fd >= 0}

    # --- what keepers need -----------------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """Give an event to all that listen."""
        self._subscribers.tell(event)

    def claim(self, keeper: Keeper, identity: NamespaceId) -> str:
        """The name of another keeper that holds this namespace; "" where it is this one's now. From any thread."""
        other = self._claims.setdefault(identity, keeper)
        return "" if other is keeper else other.place.name

    def unclaim(self, keeper: Keeper, identity: NamespaceId) -> None:
        """It is nobody's any more."""
        if self._claims.get(identity) is keeper:
            del self._claims[identity]

    def ended(self, keeper: Keeper) -> None:
        """The process that named a namespace has ended: its pid may be another's by now."""
        self._spawn(self._part_with(keeper))

    # --- keepers ---------------------------------------------------------------------------------------------

    def _keeper_for(self, target: Target) -> tuple[Keeper, bool]:
        if not self._running:
            raise NetapplyError("the agent does not run")
        with suppress(NamespaceError):
            return self._find(target), False
        return self._add(find_place(target.spec), target.labels), True

    def _find(self, target: str | int | Target) -> Keeper:
        place = find_place(_target(target).spec)
        if place.fd >= 0:
            status = os.fstat(place.fd)
            os.close(place.fd)
            for identity, keeper in self._claims.items():
                if (identity.device, identity.inode) == (status.st_dev, status.st_ino):
                    return keeper
        found = self._keepers.get(place.key)
        if found is None:
            raise NamespaceError(f"the agent does not know {place.name}", next_step="see `netapply status`")
        return found

    def _add(self, place: Place, labels: Mapping[str, str]) -> Keeper:
        keeper = self._keepers[place.key] = Keeper(place, self, dict(labels))
        return keeper

    def _refuse_filed(self, keeper: Keeper) -> None:
        if keeper.wanted is not None and keeper.wanted.source != "api":
            source = keeper.wanted.source
            raise NetapplyError(f"{keeper.place.name} is under the plan file {source}", next_step=f"change {source}")

    async def _drop(self, keeper: Keeper) -> None:
        if self._keepers.get(keeper.place.key) is keeper:
            del self._keepers[keeper.place.key]
        await keeper.close()
        if keeper.place.fd >= 0:
            os.close(keeper.place.fd)

    async def _forget(self, keeper: Keeper) -> None:
        trial = self._trials.pop(keeper.place.key, None)
        if trial is not None:
            trial.timer.cancel()
        request = self._desired.requests.pop(keeper.place.key, None)
        if request is not None and request.labels and keeper.state != "gone":
            self._desired.requests[keeper.place.key] = request._replace(wanted=None)
        else:
            await self._drop(keeper)
        await self._save()

    async def _part_with(self, keeper: Keeper) -> None:
        if keeper.held is not None:
            self.tell(Vanished(keeper.place.name, time.time()))
        await self._forget(keeper)

    def _unconfirmed(self, key: str) -> None:
        trial, keeper = self._trials.pop(key, None), self._keepers.get(key)
        if trial is not None and keeper is not None:
            self._spawn(self._go_back(keeper, trial.before))

    async def _go_back(self, keeper: Keeper, before: Wanted | None) -> None:
        keeper.confirm_by = 0.0
        self.tell(Unconfirmed(keeper.place.name, time.time()))
        _log.warning("nobody confirmed in time", namespace=keeper.place.name)
        request = self._desired.requests[keeper.place.key]
        self._desired.requests[keeper.place.key] = request._replace(wanted=before)
        if before is None:
            with suppress(NetapplyError):
                await keeper.remove()
            await self._forget(keeper)
            return
        keeper.want(before)
        await self._save()

    def _shared(self, mark: str, plan: CapturePlan) -> CapturePlan:
        """The same object for the same plan: what was compiled and encoded of it is known by its identity."""
        if len(self._plans) >= 256:
            del self._plans[next(iter(self._plans))]
        return self._plans.setdefault(mark, plan)

    # --- wishes ----------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        if not self.config.state:
            return
        kept, said = store.load(self.config.state)
        if said:
            _log.error("desired state was not read", reason=said)
        for key, reason in self._desired.restore(kept, self._kept):
            _log.warning("a namespace is not there any more", key=key, reason=reason)
        for request in self._desired.requests.values():
            self._add(request.place, request.labels)

    async def _resolve_interrupted(self) -> None:
        kept = {keeper.place.path for keeper in self._keepers.values()}
        for name, said in await self.workers.run(
            lambda: resolve_interrupted(self.journal, kept, self.config.lock_timeout)
        ):
            self.tally.recoveries += 1
            self.tell(Recovered(name, time.time(), said))
            _log.warning("an interrupted run", namespace=name, said=said)

    def _read_files(self) -> None:
        for path, mark, faults in self._desired.read_files():
            if faults:
                self.tell(FileRejected(path, time.time(), faults))
                _log.error("plan file rejected", path=path, faults=[str(fault) for fault in faults])
            else:
                self.tell(PlanChanged(path, time.time(), mark))

    def _resolve(self) -> None:
        """Give every keeper its wish: new ones to new namespaces, none to those that nothing speaks of any more."""
        known = [(keeper.place, keeper.labels) for keeper in self._keepers.values() if keeper.labels]
        found = self._desired.resolve(known)
        for key, (place, wanted) in found.items():
            shared = wanted._replace(plan=self._shared(wanted.fingerprint, wanted.plan))
            keeper = self._keepers.get(key) or self._add(place, {})
            keeper.want(shared)
        for key, keeper in list(self._keepers.items()):
            if key not in found and keeper.wanted is not None:
                self._spawn(self._withdraw(keeper))

    async def _withdraw(self, keeper: Keeper) -> None:
        try:
            await keeper.withdraw()
        finally:
            if keeper.wanted is None and keeper.place.key not in self._desired.requests:
                await self._drop(keeper)

    async def _save(self) -> None:
        """Write what should be to the disk. Several who ask at once wait for one write."""
        if not self.config.state:
            return
        self._changed += 1
        mine = self._changed
        async with self._saving:
            if self._saved < mine:
                before = {key: trial.before for key, trial in self._trials.items()}
                upto, kept = self._changed, self._desired.kept(before)
                await self.workers.run(lambda: store.save(self.config.state, kept))
                self._saved = upto

    # --- names that come and go ------------------------------------------------------------------------------

    def _watch(self) -> tuple[str, ...]:
        """Watch what is not watched yet; the directories that are there by now, with names that nobody told of."""
        missing = self._desired.directories() - self._inotify.watched
        return tuple(directory for directory in missing if self._inotify.watch(directory))

    def _names_changed(self) -> None:
        listed = plans = False
        for directory, name in self._inotify.read():
            if not directory:  # some were lost
                listed = plans = True
                self._recheck(self._keepers.values())
                continue
            plans |= self._desired.is_plans(directory)
            listed |= self._desired.lists(directory)
            keeper = self._keepers.get(os.path.join(directory, name))
            if keeper is not None:
                keeper.appeared()
        if plans and self._gathering is None:
            self._gathering = self._loop.call_later(_GATHER, self._plans_changed)
        elif listed:
            self._resolve()

    def _plans_changed(self) -> None:
        self._gathering = None
        self._read_files()
        self._watch()
        self._resolve()
        self._spawn(self._save())

    def _recheck(self, keepers: Iterable[Keeper]) -> None:
        for keeper in list(keepers):
            if keeper.held is None:
                keeper.appeared()
            else:
                keeper.recheck()

    async def _look_around(self) -> None:
        """Again and again: look where the kernel tells nothing, and at names that nobody tells of."""
        while True:
            begun = time.monotonic()
            late = self._watch()
            if any(map(self._desired.is_plans, late)):
                self._plans_changed()
            elif any(map(self._desired.lists, late)):
                self._resolve()
            watched = self._inotify.watched
            self._recheck(
                keeper
                for keeper in self._keepers.values()
                if keeper.place.path and os.path.dirname(keeper.place.path) not in watched and not keeper.busy
            )
            self._look_for_late_ones()
            due = [keeper for keeper in self._keepers.values() if keeper.held and not keeper.busy]
            due = [keeper for keeper in due if begun - keeper.looked >= keeper.due_for_look - 0.001]
            for first in range(0, len(due), _CHUNK):
                await self._look_at(due[first : first + _CHUNK])
            await self.workers.run(time.monotonic)  # a tick means that the workers work
            self.tally.ticked = time.monotonic()
            await asyncio.sleep(max(0.0, self.config.poll - (time.monotonic() - begun)))

    def _look_for_late_ones(self) -> None:
        """Names that are there, and were not mounted on when they were made."""
        for keeper in self._keepers.values():
            if keeper.state == "gone" and not keeper.busy and os.path.exists(keeper.place.path):
                keeper.appeared()

    async def _look_at(self, keepers: list[Keeper]) -> None:
        begun = time.monotonic()

        def look() -> list[Keeper]:
            return [keeper for keeper in keepers if keeper.held is not None and not _holds(keeper.held)]

        for keeper in await self.workers.run(look):
            keeper.wake(deep=True, since=begun)
        for keeper in keepers:
            keeper.looked = begun

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a task of the agent failed", error=str(error), exc_info=error)


def _holds(held: Held) -> bool:
    """Whether it holds; where that cannot be seen, somebody has to look closer."""
    try:
        return held.holds()
    except (NetapplyError, OSError):
        return False


def _target(target: str | int | Target) -> Target:
    return target if isinstance(target, Target) else Target(target)
