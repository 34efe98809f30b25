"""One namespace under a plan, as the event loop sees it: what it should hold, what is known, and what is due.

Whatever happens (a wish, news of the kernel, a look that found something, a timer) makes the keeper due; one task at a
time then works it off in a worker thread. So a namespace has at most one job waiting among all the others'.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import structlog

from netapply.agent.budget import Account
from netapply.agent.chronicle import Chronicle
from netapply.agent.events import Event
from netapply.agent.held import Asked, Attended, Brought, Held, Wanted
from netapply.agent.looks import Looks
from netapply.agent.model import AgentConfig, NamespaceStatus, State
from netapply.agent.places import Place
from netapply.agent.tally import Tally
from netapply.agent.watchers import Watchers
from netapply.agent.workers import Workers
from netapply.errors import NamespaceError, NetapplyError
from netapply.journal import Journal
from netapply.nsfs import NamespaceId
from netapply.results import Result, RuleCounter

_log = structlog.stdlib.get_logger("netapply.agent")

#: Seconds after which a name that has just appeared is tried again: ip-netns(8) makes the file, then mounts on it.
_FIRST_RETRY = 0.001


class Surroundings(Protocol):
    """What a keeper needs of its agent."""

    config: AgentConfig
    journal: Journal
    workers: Workers
    #: For what takes the lock of the xtables tools, which somebody may hold: nothing else waits behind it.
    lock_workers: Workers
    watchers: Watchers
    looks: Looks
    #: Sockets of an earlier agent that own tables, by key; None where tables are to have no owner.
    owners: Mapping[str, int] | None
    tally: Tally

    def tell(self, event: Event) -> None:
        """Give an event to all that listen."""
        ...

    def ended(self, keeper: Keeper) -> None:
        """The process that named the namespace has ended."""
        ...

    def claim(self, keeper: Keeper, identity: NamespaceId) -> str:
        """The name of another keeper that holds this namespace; "" where it is this one's now. From any thread."""
        ...

    def unclaim(self, keeper: Keeper, identity: NamespaceId) -> None:
        """It is nobody's any more."""
        ...


class Keeper:
    """Holds one namespace to its plan."""

    def __init__(self, place: Place, around: Surroundings, labels: Mapping[str, str]) -> None:
        self.place = place
        self.labels = labels
        self.wanted: Wanted | None = None
        #: Until when an apply is yet to be confirmed (wall clock); 0 where none is.
        self.confirm_by = 0.0
        self.held: Held | None = None
        self.state: State = "pending"
        #: For `Looks`: when it is looked at, and whether the kernel does not tell of every change.
        self.look_at, self.silent = 0.0, False
        #: Where its name comes and goes; "" for one without.
        self.directory = os.path.dirname(place.path)
        self._around = around
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._account = Account(around.config.budget)
        self._due = False  # something is to be looked at
        self._deep = False  # … and not only the rules
        self._suspect = False  # … and first of all whether it is there still
        self._since = 0.0  # the first news that were not answered yet
        self._not_before = 0.0
        self._retry = 0.0
        self._is_new = False
        self._process = -1  # a pidfd
        #: Whether a plan that waits for its proxy is in force; None until somebody looked.
        self._active: bool | None = None
        self._failure: Exception | None = None
        self._told = Chronicle(place.name, around.tally, around.tell)
        #: Whether nothing more is begun here.
        self.closed = False

    # --- what is asked of it ---------------------------------------------------------------------------------

    async def apply(
        self,
        wanted: Wanted,
        reason: str = "",
        *,
        flush: bool = False,
        stands: Callable[[Wanted | None, Result], None] = lambda _before, _result: None,
    ) -> Result:
        """Make the namespace hold `wanted` and keep it so. Raises NetapplyError; then the wish before stays.

        Cancelled, likewise, unless it stands by then. `stands` is called with the wish before once it does, whether or
        not whoever asked has left.
        """
        stop = threading.Event()
        brought: Brought | None = None

        def work() -> Result:
            nonlocal brought
            asked = Asked(reason, flush)
            brought = self._opened().bring(wanted, asked=asked, cancelled=stop.is_set)
            return brought.result

        async with self._turn:
            if self.held is not None and not self._is_the_same(self.held):
                self._vanish()
            if wanted.plan.activation != "now":
                return await self._apply_waiting(wanted, stands)
            try:
                return await self._workers_for(wanted).run(work, stop)
            finally:
                self._introduce()
                if brought is not None:
                    before, self.wanted = self.wanted, wanted
                    self._not_before = 0.0
                    self._due, self._deep = self._due or brought.again, self._deep or brought.again
                    self._in_place(brought, "pending")
                    self._kick()
                    stands(before, brought.result)

    async def _apply_waiting(self, wanted: Wanted, stands: Callable[[Wanted | None, Result], None]) -> Result:
        """The same of a plan that waits for its proxy: it is in force, or dormant."""
        before, self.wanted, self._not_before = self.wanted, wanted, 0.0
        self._set("pending")
        self._deep = True
        try:
            await self._attend()
        finally:
            backend = self.held.backend if self.held else ""
            result = Result(self.state == "inplace", backend, f"activation on-listen: {self.state}")
            if self.state in ("failed", "gone", "pending"):
                self.wanted = before
            else:
                stands(before, result)
            self._kick()
        if self.wanted is not wanted:
            raise self._failure or NamespaceError(self._told.error)
        return result

    def _workers_for(self, wanted: Wanted | None) -> Workers:
        """Who works here: others where the lock of the xtables tools is likely to be taken."""
        backend = (self.held.backend if self.held else "") or (wanted.backend if wanted else "")
        return self._around.lock_workers if backend == "iptables-legacy" else self._around.workers

    async def remove(self, reason: str = "") -> Result:
        """Take down what is ours, and keep nothing more. Raises NetapplyError."""
        async with self._turn:
            return await self._take_down(reason)

    async def _take_down(self, reason: str = "") -> Result:
        wanted, result = self.wanted, None

        def work() -> Result:
            nonlocal result
            result = self._opened().clean(reason)
            return result

        try:
            return await self._workers_for(wanted).run(work)
        finally:
            self._introduce()
            if result is not None:
                if self.wanted is wanted:  # else something speaks of it again by now
                    self.wanted = None
                self._set("pending")
                self._told.removed(result)

    async def leave(self, back: int) -> None:
        """Keep nothing more, and leave what stood so many states before. Raises NetapplyError; then all is kept."""
        async with self._turn:
            await self._go_back(back)
            self.wanted = None

    async def insist_on_leaving(self, back: int) -> None:
        """The same; where that fails it is tried again as by `withdraw`, and nothing is kept meanwhile."""
        await self._insist(lambda: self._go_back(back))

    async def _go_back(self, back: int) -> None:
        try:
            if back:
                await self._workers_for(self.wanted).run(lambda: self._opened().go_back(back, "nobody confirmed it"))
        finally:
            self._introduce()
        self._set("pending")

    async def withdraw(self) -> None:
        """Nothing speaks of the namespace any more: take down what is ours, if it is there.

        Where that fails it is tried again, ever more rarely. Back when it is done, or something speaks of it again.
        """
        await self._insist(self._take_down)

    async def _insist(self, work: Callable[[], Awaitable[object]]) -> None:
        self.wanted = None
        while not (self.closed or (self.held is None and self.state == "gone")):
            try:
                async with self._turn:
                    if self.wanted is not None:
                        return
                    await work()
            except NamespaceError:
                self._vanish()
            except NetapplyError as error:
                if not self.closed:  # else its process ended meanwhile
                    self._failed(error)
                    await asyncio.sleep(self._not_before - time.monotonic())
                    if self.wanted is None:
                        continue
            return

    async def reconcile(self) -> None:
        """Look at everything, and put right what is not as it should be; back when that was tried."""
        self._not_before = 0.0
        async with self._turn:
            self._due = self._deep = True
            self._since = self._since or time.monotonic()
            try:
                await self._attend()
            finally:
                self._kick()

    async def settled(self) -> None:
        """Back when what is due by now was tried."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def counters(self) -> tuple[RuleCounter, ...]:
        """Our live rules with their counters. Raises NetapplyError."""
        async with self._turn:
            layout = self.wanted.layout if self.wanted else "netapply"
            try:
                return await self._workers_for(self.wanted).run(lambda: self._opened().counters(layout))
            finally:
                self._introduce()

    def want(self, wanted: Wanted) -> None:
        """From now on the namespace should hold this."""
        if wanted == self.wanted:
            return
        self.wanted = wanted
        self._not_before = 0.0
        self.wake(deep=True)

    def wake(self, *, deep: bool = False, since: float = 0.0) -> None:
        """Something may have changed: look as soon as may be."""
        self._due, self._deep = True, self._deep or deep
        self._since = self._since or since or time.monotonic()
        if self._task is None and not self.closed:
            self._task = self._loop.create_task(self._tend())

    def appeared(self) -> None:
        """Its name was made, or changed: perhaps it is there, or another one than it was."""
        self._retry = _FIRST_RETRY
        if self.held is not None:
            self.recheck()
        else:
            self._not_before = 0.0
            self.wake(deep=True)

    def recheck(self) -> None:
        """Let go of a namespace that its name does not lead to any more."""
        if self._turn.locked():
            self._suspect = True
            self.wake()
        elif self.held is not None and not self._is_the_same(self.held):
            self._vanish()
            self.wake(deep=True)

    def _is_the_same(self, held: Held) -> bool:
        try:
            held.namespace.verify_identity()
        except NamespaceError:
            return False
        return True

    def stop(self) -> None:
        """Begin nothing more."""
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()

    async def close(self) -> None:
        """Stop, once what is being done is done. The rules stay."""
        self.stop()
        async with self._turn:
            self._around.tally.fail_open_seconds += self._told.open_seconds
            self._let_go()
        if self._task is not None:
            await asyncio.wait([self._task])

    @property
    def status(self) -> NamespaceStatus:
        """All there is to say at a glance."""
        wanted = self.wanted
        return NamespaceStatus(
            self.place.name,
            self.place.path,
            self.held.identity if self.held else None,
            self.shown,
            wanted.source if wanted else "",
            wanted.fingerprint if wanted else "",
            self.held.backend if self.held else "",
            wanted.layout if wanted else "",
            self._told.last_apply,
            self._told.heals,
            self._told.last_cause,
            self._told.open_seconds,
            self._told.error,
            self.labels,
            self.confirm_by,
        )

    @property
    def shown(self) -> State:
        """The state, and whether that is being put right."""
        return "healing" if self.held is not None and self.held.healing else self.state

    @property
    def fail_open_seconds(self) -> float:
        """For how long capture was wanted and not in force."""
        return self._told.open_seconds

    @property
    def busy(self) -> bool:
        """Whether something is being done or waits to be."""
        return self.working or self._due

    @property
    def working(self) -> bool:
        """Whether something is being done at this moment."""
        return self._turn.locked()

    # --- news ------------------------------------------------------------------------------------------------

    def _news(self) -> None:
        """The kernel has something to tell of this namespace, or its process has ended."""
        if self.state == "quarantined":
            self._told.is_open()
        self.wake()

    # --- work ------------------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        try:
            while self._due and not self.closed:
                wait = self._not_before - time.monotonic()
                if wait > 0:
                    self._wake_in(wait)
                    return
                async with self._turn:
                    if not self.closed:
                        await self._attend()
        finally:
            self._task = None
            if self._due and not self.closed and self._timer is None:
                self._wake_in(0.0)

    def _kick(self) -> None:
        """What came up while somebody else had the turn is worked off by a task of its own."""
        if self._due:
            self.wake()

    def _wake_in(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.wake()

    async def _attend(self) -> None:
        """Do what is due. The turn is ours."""
        deep, since = self._deep, self._since or time.monotonic()
        suspect, self._suspect = self._suspect, False
        self._due = self._deep = False
        self._since = 0.0
        wanted, was, active = self.wanted, self.state, self._active
        if suspect and self.held is not None and not self._is_the_same(self.held):
            self._vanish()
        if wanted is None:
            return
        stop = threading.Event()
        deep = deep or was not in ("inplace", "dormant")
        done: Attended | None = None

        def work() -> None:
            nonlocal done
            done = self._opened().attend(wanted, deep=deep, active=active, cancelled=stop.is_set)

        try:
            await self._workers_for(wanted).run(work, stop)
        except asyncio.CancelledError:  # whoever asked has left: what is due is due all the same
            self._introduce()
            if done is None:
                self._due = self._deep = True
            else:
                self._done(wanted, was, done, since)
            raise
        except NamespaceError as error:
            self._missing(error)
        except (NetapplyError, OSError) as error:
            self._introduce()
            self._failed(error)
        except Exception as error:  # noqa: BLE001 - a fault of ours in one namespace must not end the care for it
            _log.exception("a fault of the agent's own", namespace=self.place.name)
            self._failed(error)
        else:
            self._introduce()
            if done is not None:
                self._done(wanted, was, done, since)

    def _done(self, wanted: Wanted, was: State, done: Attended, since: float) -> None:
        """Note and tell what came of it."""
        brought = done.brought
        if wanted is not self.wanted or (brought is not None and brought.again):
            self._due = self._deep = True
        if not self._is_awake(wanted, was, done):
            return
        if brought is None:
            self._set("inplace")
        elif brought.drifted:
            self._healed(brought, since)
        else:
            self._in_place(brought, was)

    def _opened(self) -> Held:
        """The namespace, opened if need be. In a worker thread. Raises NetapplyError."""
        if self.closed:
            raise NetapplyError(f"{self.place.name} is not kept any more")
        if self.held is not None:
            return self.held
        around, config = self._around, self._around.config
        try:
            held = Held.open(
                self.place.spec,
                around.journal,
                around.watchers,
                self._news,
                host=config.host,
                lock_timeout=config.lock_timeout,
                owners=around.owners,
            )
        except OSError as error:
            raise NetapplyError(f"{self.place.name} cannot be watched: {error.strerror}") from error
        rival = around.claim(self, held.identity)
        if rival:
            held.close()
            raise NetapplyError(f"{self.place.name} is the same namespace as {rival}, which is kept already")
        self.held = held
        self._is_new = True
        return held

    def _introduce(self) -> None:
        """In the loop, after work that may have opened the namespace: count what was read, and tell of a new one."""
        if self.held is None:
            return
        self._told.read(self.held)
        if self._is_new or self.silent != self.held.is_silent:
            self.silent = self.held.is_silent
            self._around.looks.add(self)
        if self._is_new:
            self._is_new, self._retry = False, 0.0
            self.held.listen()
            self._told.appeared(self.place.path, self.held.identity.inode)
            self._watch_process()

    def _in_place(self, brought: Brought, was: State) -> None:
        self._account.succeeded()
        if self.wanted is not None and (was != "inplace" or brought.result.changed):
            self._told.applied(self.wanted, brought.result)
        self._set("inplace")

    def _healed(self, brought: Brought, since: float) -> None:
        now, config = time.monotonic(), self._around.config
        self._told.healed(brought, since)
        self._set("inplace")
        rest = self._account.healed(now)
        if rest:
            self._not_before = now + rest
            self._due = self._deep = True
            self._set("quarantined")
            self._told.quarantined(rest, config.budget.heals, config.budget.window)
        elif brought.result.backend == "iptables-nft":
            self._not_before = now + config.settle

    def _is_awake(self, wanted: Wanted, was: State, done: Attended) -> bool:
        """Note whether the proxy listens, where the plan waits for that; whether capture is up."""
        if done.listens is None:
            return True
        poll = self._around.config.poll
        self._active = done.up
        if done.up:
            if done.listens:
                self._told.listening(wanted)
            if wanted.fail == "open":
                self._wake_in(poll)
            return True
        if was != "dormant":
            self._told.dormant(wanted)
        self._set("dormant")
        # Who has just begun to wait is looked at often, and less and less.
        self._wake_in(min(max(0.02, self._told.dormant_seconds() / 50), poll))
        return False

    # --- what can go wrong -----------------------------------------------------------------------------------

    def _failed(self, error: Exception) -> None:
        now = time.monotonic()
        wait = self._account.failed()
        self._not_before = now + wait
        self._due = self._deep = True
        self._wake_in(wait)
        self._failure = error
        self._set("failed")
        self._told.failed(error, wait)

    def _missing(self, error: NamespaceError) -> None:
        """It is not there, or is another one by now."""
        self._vanish()
        self._told.error = str(error)
        self._failure = error
        if self._retry:  # its name was made a moment ago
            self._retry = min(2 * self._retry, self._around.config.poll)
            self._due = self._deep = True
            self._not_before = time.monotonic() + self._retry
            if self._retry >= self._around.config.poll:
                self._retry = 0.0

    def _vanish(self) -> None:
        held = self.held
        self._let_go()
        if held is not None:
            self._told.vanished()
        self._active = None
        self._set("gone")

    def _let_go(self) -> None:
        held, self.held = self.held, None
        self._is_new = False
        if self._process >= 0:
            self._around.watchers.remove(self._process)
            os.close(self._process)
            self._process = -1
        self._around.looks.remove(self)
        if held is not None:
            self._around.unclaim(self, held.identity)
            held.close()

    def _watch_process(self) -> None:
        """Let go of the namespace when the process that names it ends."""
        if self.place.process:
            try:
                self._process = os.pidfd_open(self.place.process)
            except OSError:
                self._ended()
            else:
                self._around.watchers.add(self._process, self._ended)
                self._around.watchers.arm(self._process)

    def _ended(self) -> None:
        self._around.ended(self)

    # --- state -----------------------------------------------------------------------------------------------

    def _set(self, state: State) -> None:
        self.state = state
        if state == "inplace":
            self._told.is_closed()
            self._told.error = ""
        elif state in ("dormant", "failed") and self.wanted is not None:
            self._told.is_open()
        elif state in ("gone", "pending"):
            self._told.is_closed()
