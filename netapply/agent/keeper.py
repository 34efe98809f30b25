"""One namespace under a plan, as the event loop sees it: what it should hold, what is known, and what is due.

Whatever happens (a wish, news of the kernel, a look that found something, a timer) makes the keeper due; one task at a
time then works it off in a worker thread. So a namespace has at most one job waiting among all the others'.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Protocol

import structlog

from netapply.agent.budget import Account
from netapply.agent.events import (
    Appeared,
    Applied,
    Cause,
    Dormant,
    Drifted,
    Event,
    Failed,
    Healed,
    Listening,
    Quarantined,
    Recovered,
    Removed,
    Vanished,
)
from netapply.agent.held import Brought, Held, Wanted
from netapply.agent.listening import proxy_ports
from netapply.agent.model import AgentConfig, NamespaceStatus, State
from netapply.agent.monitor import Monitor
from netapply.agent.places import Place
from netapply.agent.tally import Tally
from netapply.agent.workers import Workers
from netapply.errors import LockError, NamespaceError, NetapplyError
from netapply.journal import Journal
from netapply.results import Result, RuleCounter

_log = structlog.stdlib.get_logger("netapply.agent")

#: Seconds after which a name that has just appeared is tried again: ip-netns(8) makes the file, then mounts on it.
_FIRST_RETRY = 0.001


class Surroundings(Protocol):
    """What a keeper needs of its agent."""

    config: AgentConfig
    journal: Journal
    workers: Workers
    tally: Tally

    def tell(self, event: Event) -> None:
        """Give an event to all that listen."""
        ...

    def ended(self, keeper: Keeper) -> None:
        """The process that named the namespace has ended."""
        ...

    def rival(self, keeper: Keeper, held: Held) -> str:
        """The name of another keeper that holds the same namespace; "" where there is none."""
        ...


class Keeper:
    """Holds one namespace to its plan."""

    def __init__(self, place: Place, around: Surroundings, labels: Mapping[str, str]) -> None:
        self.place = place
        self.labels = labels
        self.wanted: Wanted | None = None
        #: What was before an apply that is yet to be confirmed, and until when (wall clock).
        self.confirm_by = 0.0
        self.held: Held | None = None
        self.state: State = "pending"
        self.looked = 0.0
        self._around = around
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._account = Account(around.config.budget)
        self._causes: list[Cause] = []
        self._due = False  # something is to be looked at
        self._deep = False  # … and not only the rules
        self._suspect = False  # … and first of all whether it is there still
        self._since = 0.0  # the first news that were not answered yet
        self._not_before = 0.0
        self._retry = 0.0
        self._active = False
        self._dormant_since = 0.0
        self._open_since = 0.0
        self._open_seconds = 0.0
        self._last_apply = 0.0
        self._heals = 0
        self._last_cause: Cause | None = None
        self._error = ""
        self._closed = False

    # --- what is asked of it ---------------------------------------------------------------------------------

    async def apply(self, wanted: Wanted) -> Result:
        """Make the namespace hold `wanted` and keep it so. Raises NetapplyError; then the wish before stays."""
        stop = threading.Event()
        async with self._turn:
            held = await self._opened()
            if wanted.plan.activation != "now":
                self.wanted, self._not_before = wanted, 0.0
                self._set("pending")
                await self._attend()
                self._kick()
                return Result(self.state == "inplace", held.backend, f"activation on-listen: {self.state}")
            work = partial(held.bring, wanted, count_flows=True, cancelled=stop.is_set)
            brought = await self._around.workers.run(work, stop)
            self._watch(held)
            self.wanted = wanted
            self._account.succeeded()
            self._not_before = 0.0
            self._in_place(brought, "pending")
            self._kick()
            return brought.result

    async def remove(self) -> Result:
        """Take down what is ours, and keep nothing more. Raises NetapplyError."""
        async with self._turn:
            held = await self._opened()
            result = await self._around.workers.run(held.clean)
            self.wanted = None
            self._set("pending")
            self._around.tell(Removed(self.place.name, time.time(), result.steps))
            return result

    async def withdraw(self) -> None:
        """Nothing speaks of the namespace any more: take down what is ours, if it is there. Raises NetapplyError."""
        self.wanted = None
        if self.held is None and self.state == "gone":
            return
        try:
            await self.remove()
        except NamespaceError:
            self._vanish()

    async def reconcile(self) -> None:
        """Look at everything, and put right what is not as it should be; back when that was tried."""
        self._not_before = 0.0
        async with self._turn:
            self._due = self._deep = True
            self._since = self._since or time.monotonic()
            await self._attend()
            self._kick()

    async def counters(self) -> tuple[RuleCounter, ...]:
        """Our live rules with their counters. Raises NetapplyError."""
        async with self._turn:
            held = await self._opened()
            layout = self.wanted.layout if self.wanted else "netapply"
            return await self._around.workers.run(lambda: held.counters(layout))

    def want(self, wanted: Wanted | None) -> None:
        """From now on the namespace should hold this; None: what a plan file put there goes."""
        if wanted == self.wanted:
            return
        self.wanted = wanted
        self._not_before = 0.0
        self.wake(deep=True)

    def wake(self, *, deep: bool = False, since: float = 0.0) -> None:
        """Something may have changed: look as soon as may be."""
        self._due, self._deep = True, self._deep or deep
        self._since = self._since or since or time.monotonic()
        if self._task is None and not self._closed:
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

    async def close(self) -> None:
        """Stop, once what is being done is done. The rules stay."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        async with self._turn:
            self._account_open(time.monotonic())
            self._around.tally.fail_open_seconds += self._open_seconds
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
            self.state,
            wanted.source if wanted else "",
            wanted.fingerprint if wanted else "",
            self.held.backend if self.held else "",
            wanted.layout if wanted else "",
            self._last_apply,
            self._heals,
            self._last_cause,
            self.fail_open_seconds,
            self._error,
            self.labels,
            self.confirm_by,
        )

    @property
    def fail_open_seconds(self) -> float:
        """For how long capture was wanted and not in force."""
        running = time.monotonic() - self._open_since if self._open_since else 0.0
        return self._open_seconds + running

    @property
    def due_for_look(self) -> float:
        """Seconds between looks: short where the kernel tells nothing."""
        polls = self.held is not None and not self.held.has_news
        return self._around.config.poll if polls else 60.0

    @property
    def busy(self) -> bool:
        """Whether something is being done or waits to be."""
        return self._turn.locked() or self._due

    # --- news ------------------------------------------------------------------------------------------------

    def _watch(self, held: Held) -> None:
        for monitor in (held.rules, held.routing):
            if monitor is not None and monitor.fileno() >= 0:
                self._loop.add_reader(monitor.fileno(), self._news, held, monitor)

    def _news(self, held: Held, monitor: Monitor) -> None:
        if not self._take(held, monitor):
            return
        if self.state == "quarantined":
            self._open()
        self.wake()

    def _take(self, held: Held, monitor: Monitor) -> bool:
        """Read what is there; whether it is a reason to look."""
        news = monitor.read()
        tally = self._around.tally
        tally.notifications += news.messages
        tally.forged += news.forged
        tally.overruns += news.overrun
        causes = [cause for cause in news.causes if cause.generation > held.generation]
        self._causes = (self._causes + causes)[-16:]
        self._deep = self._deep or news.routing or news.overrun
        return bool(causes) or news.routing or news.overrun

    # --- work ------------------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        try:
            while self._due and not self._closed:
                wait = self._not_before - time.monotonic()
                if wait > 0:
                    self._wake_in(wait)
                    return
                async with self._turn:
                    await self._attend()
        finally:
            self._task = None
            if self._due and not self._closed and self._timer is None:
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
        deep, since = self._deep, self._since
        self._due = self._deep = False
        self._since = 0.0
        wanted = self.wanted
        suspect, self._suspect = self._suspect, False
        if suspect and self.held is not None and not self._is_the_same(self.held):
            self._vanish()
        try:
            held = await self._opened()
            if wanted is None:
                await self._withdraw(held)
            elif wanted.plan.activation != "now" and not await self._wakes(held, wanted):
                pass
            elif deep or self.state != "inplace" or not await self._holds(held):
                await self._bring(held, wanted, since or time.monotonic())
            else:
                self._causes.clear()
        except NamespaceError as error:
            self._missing(error)
        except (NetapplyError, OSError) as error:
            self._failed(error)

    async def _holds(self, held: Held) -> bool:
        if all(cause.generation <= held.generation for cause in self._causes) and held.has_news and self._causes:
            return True  # our own commit's news, or what was seen meanwhile
        return await self._around.workers.run(held.holds)

    async def _opened(self) -> Held:
        if self.held is not None:
            return self.held
        config, spec = self._around.config, self.place.spec
        work = partial(Held.open, spec, self._around.journal, host=config.host, lock_timeout=config.lock_timeout)
        try:
            held = await self._around.workers.run(work)
        except OSError as error:
            raise NamespaceError(f"{self.place.name} cannot be watched: {error.strerror}") from error
        rival = self._around.rival(self, held)
        if rival:
            held.close()
            raise NetapplyError(f"{self.place.name} is the same namespace as {rival}, which is kept already")
        self.held, self._retry = held, 0.0
        self._watch(held)
        if self.place.process:
            self._watch_process(self.place.process)
        self._around.tell(Appeared(self.place.name, time.time(), self.place.path, held.identity.inode))
        return held

    async def _bring(self, held: Held, wanted: Wanted, since: float) -> None:
        was, known = self.state, held.generation
        if was == "inplace":
            self._set("healing")
        stop = threading.Event()
        brought = await self._around.workers.run(partial(held.bring, wanted, cancelled=stop.is_set), stop)
        for monitor in (held.rules, held.routing):
            if monitor is not None and monitor.fileno() >= 0:
                self._due |= self._take(held, monitor)  # what the kernel said meanwhile; ours is known already
        self._watch(held)
        if wanted is not self.wanted:
            self._due = self._deep = True
        if not brought.drifted:
            self._in_place(brought, was)
            self._causes.clear()
            return
        self._healed(held, brought, self._cause(known, held), since)

    def _cause(self, known: int, held: Held) -> Cause | None:
        """Who changed what was put right: the last before our own commit."""
        causes, self._causes = self._causes, []
        theirs = [cause for cause in causes if known < cause.generation < max(held.generation, known + 2)]
        self._causes = [cause for cause in causes if cause.generation > held.generation > 0]
        return theirs[-1] if theirs else None

    def _in_place(self, brought: Brought, was: State) -> None:
        wanted, held, result = self.wanted, self.held, brought.result
        if wanted is None or held is None:
            return
        self._due = self._due or brought.again
        self._account.succeeded()
        self._noted(result)
        if was != "inplace" or result.changed:
            self._last_apply = time.time()
            tally = self._around.tally
            tally.applies += 1
            tally.apply_seconds.observe(result.duration)
            name, mark, changed = self.place.name, wanted.fingerprint, result.changed
            done = Applied(
                name, time.time(), mark, result.backend, changed, result.duration, result.steps, result.degraded
            )
            self._around.tell(done)
        self._set("inplace")

    def _healed(self, held: Held, brought: Brought, cause: Cause | None, since: float) -> None:
        now, name, result = time.monotonic(), self.place.name, brought.result
        seconds = max(0.0, brought.proven - since)
        tally = self._around.tally
        tally.heals[cause.process if cause else ""] += 1
        tally.heal_seconds.observe(seconds)
        self._heals += 1
        self._last_cause = cause or self._last_cause
        self._last_apply = time.time()
        self._due = self._due or brought.again
        self._noted(result)
        at = time.time()
        self._around.tell(Drifted(name, at - (now - since), brought.changes, cause))
        self._around.tell(Healed(name, at - (now - brought.proven), cause, seconds, result.steps))
        self._set("inplace")
        rest = self._account.healed(now)
        if rest:
            self._not_before = now + rest
            reason = (
                f"healed more than {self._around.config.budget.heals} times in {self._around.config.budget.window:g} s"
            )
            who = f", last because of {cause.process} ({cause.pid})" if cause else ""
            tally.quarantines += 1
            self._around.tell(Quarantined(name, at, at + rest, reason + who))
            self._set("quarantined")
            self._due = self._deep = True
            _log.warning("quarantined", namespace=name, seconds=rest, reason=reason + who)
        elif held.backend == "iptables-nft":
            self._not_before = now + self._around.config.settle

    def _noted(self, result: Result) -> None:
        for note in result.notes:
            if "interrupted run" in note:
                self._around.tally.recoveries += 1
                self._around.tell(Recovered(self.place.name, time.time(), note))

    async def _withdraw(self, held: Held) -> None:
        if self.state == "pending":
            return
        result = await self._around.workers.run(held.clean)
        self._set("pending")
        self._around.tell(Removed(self.place.name, time.time(), result.steps))

    async def _wakes(self, held: Held, wanted: Wanted) -> bool:
        """Whether capture is to be up now; if not, it is down when this returns."""
        ports = proxy_ports(wanted.plan)
        listens = await self._around.workers.run(lambda: held.listens(ports))
        if self.state == "pending" and not self._active:
            self._active = await self._around.workers.run(held.stands)  # from before we began
        now = time.monotonic()
        if listens or (self._active and wanted.fail == "closed"):
            if listens and self.state == "dormant":
                seconds = now - self._dormant_since
                self._around.tell(Listening(self.place.name, time.time(), wanted.plan.proxy.outbound_port, seconds))
            self._active = True
            if wanted.fail == "open":
                self._wake_in(self._around.config.poll)
            return True
        if self._active or self.state == "pending":
            await self._around.workers.run(held.clean)
        if self.state != "dormant":
            self._dormant_since = now
            missing = ", ".join(map(str, sorted(ports)))
            self._around.tell(Dormant(self.place.name, time.time(), f"nobody listens on all of {missing}"))
        self._active = False
        self._set("dormant")
        # Who has just begun to wait is looked at often, and less and less.
        self._wake_in(min(max(0.02, (now - self._dormant_since) / 50), self._around.config.poll))
        return False

    # --- what can go wrong -----------------------------------------------------------------------------------

    def _failed(self, error: Exception) -> None:
        now = time.monotonic()
        wait = self._account.failed()
        self._not_before = now + wait
        self._due = self._deep = True
        self._wake_in(wait)
        self._error = str(error)
        tally = self._around.tally
        tally.failures += 1
        tally.lock_failures += isinstance(error, LockError)
        self._set("failed")
        step = getattr(error, "next_step", "")
        self._around.tell(Failed(self.place.name, time.time(), self._error, step, time.time() + wait))
        _log.warning("failed", namespace=self.place.name, error=self._error, next_step=step, again_in=wait)

    def _missing(self, error: NamespaceError) -> None:
        """It is not there, or is another one by now."""
        self._vanish()
        self._error = str(error)
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
            self._around.tell(Vanished(self.place.name, time.time()))
        self._active = False
        self._causes.clear()
        self._set("gone")

    def _let_go(self) -> None:
        held, self.held = self.held, None
        if held is None:
            return
        for monitor in (held.rules, held.routing):
            if monitor is not None and monitor.fileno() >= 0:
                self._loop.remove_reader(monitor.fileno())
        held.close()

    def _watch_process(self, pid: int) -> None:
        """Let go of the namespace when the process that names it ends."""
        with suppress(OSError):
            fd = os.pidfd_open(pid)
            self._loop.add_reader(fd, self._ended, fd)

    def _ended(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        os.close(fd)
        if not self._closed:
            self._vanish()
            self._around.ended(self)

    # --- state -----------------------------------------------------------------------------------------------

    def _set(self, state: State) -> None:
        self.state = state
        if state in ("inplace", "healing"):
            self._account_open(time.monotonic())
            self._error = ""
        elif state in ("dormant", "failed"):
            self._open()
        elif state in ("gone", "pending"):
            self._account_open(time.monotonic())

    def _open(self) -> None:
        self._open_since = self._open_since or time.monotonic()

    def _account_open(self, now: float) -> None:
        if self._open_since:
            self._open_seconds += now - self._open_since
            self._open_since = 0.0
