"""`Agent`: many keepers, their wishes, and what is told about them. One event loop, a few worker threads."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

import structlog

from netapply.agent import store
from netapply.agent.desired import Desired, Request
from netapply.agent.events import Event, FileRejected, PlanChanged, Recovered, Unconfirmed, Vanished
from netapply.agent.held import Wanted
from netapply.agent.interrupted import resolve_interrupted
from netapply.agent.keeper import Keeper
from netapply.agent.lockfile import LockFile
from netapply.agent.looks import Looks
from netapply.agent.model import AgentConfig, Metrics, NamespaceStatus, Target
from netapply.agent.names import Names
from netapply.agent.roster import Roster, target_of
from netapply.agent.subscribers import Subscribers
from netapply.agent.tally import Tally
from netapply.agent.trials import Before, Trial, Trials
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
#: Plans that are known by their fingerprints.
_PLANS = 256


class _Undo(NamedTuple):
    """What there was before an apply: a wish and its states, what was on trial, and until when."""

    before: Before
    trial: Trial | None
    confirm_by: float


class Agent:
    """Keeps namespaces to their plans while it is entered. Leaving it leaves the rules in place.

    `kept` are descriptors of an earlier agent, by the keys of `descriptors()`: it duplicates them, until it is entered.
    """

    def __init__(self, config: AgentConfig | None = None, *, kept: Mapping[str, int] | None = None) -> None:
        self.config = config or AgentConfig()
        self.journal = Journal(self.config.journal)
        self.tally = Tally()
        self._kept = kept or {}
        self.owners = self._kept if self.config.owned == "auto" else None
        self._desired = Desired(self.config.plans)
        self._subscribers = Subscribers(self.config.queue)
        self._roster = Roster(self)
        self._trials = Trials(self._unconfirmed)
        self._plans: dict[str, CapturePlan] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._gathering: asyncio.TimerHandle | None = None
        self._changed = self._saved = 0
        self._running = False

    async def __aenter__(self) -> Self:
        self.workers = Workers(self.config.concurrency)
        self.lock_workers = Workers(self.config.concurrency)
        self.looks = Looks(self.config.poll, self.config.looks, self.workers)
        self._saving = asyncio.Lock()
        self._lock_file = LockFile()
        self._names = Names(
            self._desired, self._roster.keepers, plans_changed=self._gather_plans, resolve=self._resolve
        )
        self.watchers = Watchers()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.watchers.fileno(), self.watchers.dispatch)
        self._running = True
        try:
            self._restore()
            self._read_files()
            self._names.watch()
            self._resolve()
            await self._resolve_interrupted()
            await asyncio.gather(*(keeper.settled() for keeper in self._roster.keepers.values()))
            self._loop.add_reader(self._names.fileno(), self._names.read)
            self._loop.add_reader(self._lock_file.fileno(), self._lock_file_closed)
            self._names.read()
            self.looks.spread()
            for work in (self._go_round(), self.looks.run(), self._write_down()):
                self._spawn(work)
        except BaseException:
            await self._close()
            raise
        if self.owners is not None:
            self.owners = {}  # whoever kept them closes them from here on
        self.tally.ticked = time.monotonic()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        self._running = False
        self._loop.remove_reader(self._names.fileno())
        self._loop.remove_reader(self._lock_file.fileno())
        self._loop.remove_reader(self.watchers.fileno())
        for keeper in self._roster.keepers.values():
            keeper.stop()
        if self._gathering is not None:
            self._gathering.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(keeper.close() for keeper in self._roster.keepers.values()))
        await self._roster.parted()
        if self._saved < self._changed:  # whoever was to write it may have been cancelled while he waited for others
            await self._write_down()
        self._trials.close()
        self._names.close()
        self._lock_file.close()
        self.watchers.close()
        self.workers.close()
        self.lock_workers.close()
        self._subscribers.close()
        for keeper in self._roster.keepers.values():
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
        flush: bool = False,
        meant: CapturePlan | None = None,
        reason: str = "",
    ) -> Result:
        """Make the namespace hold `plan`, now and from now on, also after a restart of the agent.

        With `confirm_within`, in seconds, what was before comes back unless `confirm` is called in time, which puts
        `meant` in its place, if that is given: `plan` may spare a login until then (`netapply.logins`). `flush` has
        connection tracking forget the flows that would be treated otherwise. Raises NetapplyError, and what was wanted
        before stays in force; cancelled, likewise, or all is as if it had not been where `plan` stands by then. A
        namespace of which a plan file speaks is refused. `reason` is for the history.
        """
        named, mark = target_of(target), fingerprint(plan)
        wanted = Wanted(self._shared(mark, plan), backend, layout, mark, "api", named.fail)
        then = wanted._replace(plan=meant, fingerprint=fingerprint(meant)) if meant is not None else None
        undo: _Undo | None = None

        def stands(keeper: Keeper, before: Wanted | None, result: Result) -> None:
            nonlocal undo
            key = keeper.place.key
            undo = _Undo(Before(before, int(result.changed)), self._trials.of(key), keeper.confirm_by)
            self._desired.requests[key] = Request(keeper.place, keeper.labels, wanted)
            # As without an agent: what stood before needs no trial, unless it is on one, which then has more time.
            waits = result.changed or plan.activation != "now" or then is not None or undo.trial is not None
            self._try_out(keeper, undo.before, confirm_within if waits else 0.0, then)
            self._names.watch_for(keeper)

        while True:
            keeper, new = await self._found_or_new(named)
            try:
                _refuse_filed(keeper)
                result = await keeper.apply(wanted, reason, flush=flush, stands=partial(stands, keeper))
            except BaseException as error:
                if keeper.wanted is wanted:  # cancelled too late
                    self._spawn(self._write_down())
                elif keeper.closed and isinstance(error, NetapplyError):  # somebody else let go of it meanwhile
                    continue
                elif new:
                    await self._roster.drop(keeper)
                raise
            try:
                await self._save()
            except NetapplyError:  # a wish that the next start would not know of is none, as one that is refused
                if undo is not None:
                    await self._undo(keeper, undo)
                raise
            return result

    async def _undo(self, keeper: Keeper, undo: _Undo) -> None:
        """As well as may be, all is as it was before an apply."""
        with suppress(NetapplyError):
            if undo.before.wanted is None:
                await keeper.leave(undo.before.back)
            await self._bring_back(keeper, undo.before)
        if undo.trial is not None:
            self._trials.resume(keeper.place.key, undo.trial)
            keeper.confirm_by = undo.confirm_by

    async def _found_or_new(self, target: str | int | Target) -> tuple[Keeper, bool]:
        if not self._running:
            raise NetapplyError("the agent does not run")
        return await self._roster.find_or_add(target_of(target))

    def _try_out(self, keeper: Keeper, before: Before, seconds: float, meant: Wanted | None) -> None:
        """Put what was applied on trial for so long, or with 0 on none."""
        if seconds > 0:
            self._trials.begin(keeper.place.key, before, seconds, meant)
        else:
            self._trials.end(keeper.place.key)
        keeper.confirm_by = time.time() + seconds if seconds > 0 else 0.0

    async def confirm(self, target: str | int | Target) -> None:
        """Keep what was applied on trial, or put what is meant in its place. Raises NetapplyError.

        So it does where nothing waits; and where what is meant cannot be put there, all waits as before.
        """
        keeper = self._roster.find(target)
        key = keeper.place.key
        trial = self._trials.end(key)
        if trial is None:
            raise _nothing_waits(keeper)
        if trial.meant is not None:
            try:
                await keeper.apply(trial.meant, "confirmed")
            except BaseException:
                self._trials.resume(key, trial)
                raise
            self._desired.requests[key] = Request(keeper.place, keeper.labels, trial.meant)
        keeper.confirm_by = 0.0
        await self._save()

    def extend(self, target: str | int | Target, seconds: float) -> None:
        """Have what was applied on trial wait so long from now. Raises NetapplyError where nothing waits."""
        keeper = self._roster.find(target)
        if not self._trials.extend(keeper.place.key, seconds):
            raise _nothing_waits(keeper)
        keeper.confirm_by = time.time() + seconds

    async def go_back(self, target: str | int | Target) -> None:
        """Bring back at once what was before an apply on trial; back when it stands.

        Raises NetapplyError; then all waits as before, as it does where whoever asked is cancelled.
        """
        keeper = self._roster.find(target)
        key = keeper.place.key
        trial = self._trials.end(key)
        if trial is None:
            raise _nothing_waits(keeper)
        if trial.before.wanted is None:
            try:
                await keeper.leave(trial.before.back)
            except BaseException:
                self._trials.resume(key, trial)
                raise
        await self._bring_back(keeper, trial.before)

    async def remove(self, target: str | int | Target, *, reason: str = "") -> Result:
        """Take down what is ours in the namespace, and keep it no more. Raises NetapplyError."""
        while True:
            keeper, _ = await self._found_or_new(target)
            _refuse_filed(keeper)
            try:
                return await keeper.remove(reason)
            except NamespaceError:
                if keeper.wanted is None:
                    raise
                keeper.wanted = None  # it is gone, and so is all that was ours there
                return Result(changed=False, backend="", reason="the namespace is gone")
            except NetapplyError:
                if not keeper.closed:
                    raise  # else somebody else let go of it meanwhile
            finally:
                if keeper.wanted is None and not keeper.closed:
                    await self._forget(keeper)
                    self._resolve()  # a plan file may speak of it, too

    async def register(self, target: str | int | Target) -> None:
        """Make a namespace and its labels known, for plan files that select by label. Raises NetapplyError."""
        named = target_of(target)
        keeper, _ = await self._found_or_new(named)
        keeper.labels = dict(named.labels)
        wanted = keeper.wanted if keeper.wanted and keeper.wanted.source == "api" else None
        self._desired.requests[keeper.place.key] = Request(keeper.place, keeper.labels, wanted)
        self._names.watch_for(keeper)
        self._resolve()
        await self._save()

    async def unregister(self, target: str | int | Target) -> None:
        """Forget a namespace and its labels: what stands there for its labels is taken down."""
        keeper = self._roster.find(target)
        keeper.labels = {}
        self._desired.requests.pop(keeper.place.key, None)
        self._resolve()
        await self._save()

    async def reconcile(self, target: str | int | Target | None = None) -> None:
        """Look at one namespace, or at all, and put right what is not as it should be; back when that was tried."""
        keepers = list(self._roster.keepers.values()) if target is None else [self._roster.find(target)]
        await asyncio.gather(*(keeper.reconcile() for keeper in keepers))

    async def counters(self, target: str | int | Target) -> tuple[RuleCounter, ...]:
        """Our live rules of one namespace, with their counters. Raises NetapplyError."""
        return await self._roster.find(target).counters()

    def status(self) -> tuple[NamespaceStatus, ...]:
        """Every namespace that is kept or known, by name. Looks at nothing, and never waits."""
        return tuple(sorted((each.status for each in self._roster.keepers.values()), key=lambda status: status.name))

    def events(self) -> AsyncIterator[Event]:
        """Everything that happens from now on; it ends with the agent."""
        return self._subscribers.subscribe()

    def metrics(self) -> Metrics:
        """What was counted since the agent began."""
        keepers = list(self._roster.keepers.values())
        return self.tally.shown(
            [keeper.shown for keeper in keepers],
            fail_open=sum(keeper.fail_open_seconds for keeper in keepers),
            rejected_files=self._desired.rejected,
            events_lost=self._subscribers.lost,
        )

    def descriptors(self) -> Mapping[str, int]:
        """What the next agent should get as `kept`, by key.

        That is descriptors of namespaces that have no path, and sockets that own tables.
        """
        keepers = self._roster.keepers
        found = {key: keeper.place.fd for key, keeper in keepers.items() if keeper.place.fd >= 0}
        if self.owners is not None:
            owners = (keeper.held.owner for keeper in keepers.values() if keeper.held is not None)
            found.update(owner for owner in owners if owner is not None)
        return found

    # --- what keepers need -----------------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """Give an event to all that listen."""
        self._subscribers.tell(event)

    def claim(self, keeper: Keeper, identity: NamespaceId) -> str:
        """See `Roster.claim`."""
        return self._roster.claim(keeper, identity)

    def unclaim(self, keeper: Keeper, identity: NamespaceId) -> None:
        """See `Roster.unclaim`."""
        self._roster.unclaim(keeper, identity)

    def ended(self, keeper: Keeper) -> None:
        """The process that named a namespace has ended: its pid may be another's by now."""
        self._spawn(self._part_with(keeper))

    # --- what becomes of keepers -----------------------------------------------------------------------------

    async def _forget(self, keeper: Keeper) -> None:
        if self._roster.keepers.get(keeper.place.key) is not keeper:  # what is asked of its place now is not its
            await self._roster.drop(keeper)
            return
        self._trials.end(keeper.place.key)
        request = self._desired.requests.pop(keeper.place.key, None)
        if request is not None and request.labels and keeper.state != "gone":
            self._desired.requests[keeper.place.key] = request._replace(wanted=None)
        else:
            await self._roster.drop(keeper)
        await self._save()

    async def _part_with(self, keeper: Keeper) -> None:
        if keeper.held is not None:
            self.tell(Vanished(keeper.place.name, time.time()))
        await self._forget(keeper)

    def _unconfirmed(self, key: str, before: Before) -> None:
        keeper = self._roster.keepers.get(key)
        if keeper is not None and self._running:
            self.tell(Unconfirmed(keeper.place.name, time.time()))
            _log.warning("nobody confirmed in time", namespace=keeper.place.name)
            keeper.confirm_by = 0.0
            self._spawn(self._bring_back(keeper, before) if before.wanted else self._insist(keeper, before.back))

    async def _bring_back(self, keeper: Keeper, before: Before) -> None:
        keeper.confirm_by = 0.0
        self._trials.end(keeper.place.key)
        if before.wanted is None:
            await self._forget(keeper)
            return
        self._change_request(keeper, before.wanted)
        keeper.want(before.wanted)
        await keeper.settled()
        await self._save()

    async def _insist(self, keeper: Keeper, back: int) -> None:
        """Nobody confirmed it: have it go back, and until then let the state say so."""
        self._change_request(keeper, None)
        self._spawn(self._write_down())
        await keeper.insist_on_leaving(back)
        if keeper.wanted is None and self._running:
            await self._forget(keeper)

    def _change_request(self, keeper: Keeper, wanted: Wanted | None) -> None:
        request = self._desired.requests[keeper.place.key]
        self._desired.requests[keeper.place.key] = request._replace(wanted=wanted)

    def _shared(self, mark: str, plan: CapturePlan) -> CapturePlan:
        """The same object for the same plan: what was compiled and encoded of it is known by its identity."""
        if len(self._plans) >= _PLANS:
            del self._plans[next(iter(self._plans))]
        return self._plans.setdefault(mark, plan)

    # --- wishes ----------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        if not self.config.state:
            return
        kept, said = store.load(self.config.state)
        if said:
            _log.error("desired state was not read", reason=said)
        unconfirmed: dict[str, Before] = {}
        for key, reason in self._desired.restore(kept, self._kept, unconfirmed.__setitem__):
            _log.warning("a namespace is not there any more", key=key, reason=reason)
        for request in self._desired.requests.values():
            self._roster.add(request.place, request.labels)
        for key, before in unconfirmed.items():
            self._trials.go_back(key, before)

    async def _resolve_interrupted(self) -> None:
        kept = {keeper.place.path for keeper in self._roster.keepers.values()}
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

    def _gather_plans(self) -> None:
        if self._gathering is None:
            self._gathering = self._loop.call_later(_GATHER, self._plans_changed)

    def _plans_changed(self) -> None:
        self._gathering = None
        self._read_files()
        self._names.watch()
        self._resolve()
        self._spawn(self._write_down())

    def _resolve(self) -> None:
        """Give every keeper its wish: new ones to new namespaces, none to those that nothing speaks of any more."""
        keepers = self._roster.keepers
        known = [(keeper.place, keeper.labels) for keeper in keepers.values() if keeper.labels]
        found = self._desired.resolve(known)
        for key, (place, wanted) in found.items():
            shared = wanted._replace(plan=self._shared(wanted.fingerprint, wanted.plan))
            keeper = keepers.get(key) or self._roster.add(place, {})
            keeper.want(shared)
        for key, keeper in list(keepers.items()):
            if key not in found and keeper.wanted is not None:
                self._spawn(self._withdraw(keeper))

    async def _withdraw(self, keeper: Keeper) -> None:
        try:
            await keeper.withdraw()
        finally:
            if keeper.wanted is None and keeper.place.key not in self._desired.requests:
                await self._roster.drop(keeper)

    async def _save(self) -> None:
        """Write what should be to the disk. Several who ask at once wait for one write."""
        if not self.config.state:
            return
        self._changed += 1
        mine = self._changed
        async with self._saving:
            if self._saved < mine:
                upto, kept = self._changed, self._desired.kept(self._trials.before)
                await self.workers.run(lambda: store.save(self.config.state, kept))
                self._saved = upto

    async def _write_down(self) -> None:
        """The same where nobody waits for it."""
        try:
            await self._save()
        except NetapplyError as error:
            _log.error("desired state was not written", reason=str(error), next_step=error.next_step)

    # --- again and again -------------------------------------------------------------------------------------

    async def _go_round(self) -> None:
        """Look at names that nobody tells of; and tell that the loop and the workers work."""
        while True:
            begun = time.monotonic()
            self._names.look()
            self._lock_file.watch()
            await self.workers.run(time.monotonic)  # a tick means that the workers work
            self.tally.ticked = time.monotonic()
            await asyncio.sleep(max(0.0, self.config.poll - (time.monotonic() - begun)))

    def _lock_file_closed(self) -> None:
        self._lock_file.read()
        self.looks.hint()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a task of the agent failed", error=str(error), exc_info=error)


def _refuse_filed(keeper: Keeper) -> None:
    if keeper.wanted is not None and keeper.wanted.source != "api":
        source = keeper.wanted.source
        raise NetapplyError(f"{keeper.place.name} is under the plan file {source}", next_step=f"change {source}")


def _nothing_waits(keeper: Keeper) -> NetapplyError:
    return NetapplyError(
        f"nothing waits to be confirmed in {keeper.place.name}: it was confirmed, or has gone back",
        next_step="netapply history tells which",
    )
