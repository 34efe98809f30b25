"""When is looked, what workers tell, what is on trial: parts of the agent that need a loop and no kernel."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from netapply.agent.lockfile import LockFile
from netapply.agent.looks import Looks
from netapply.agent.trials import Before, Trials
from netapply.agent.workers import Workers
from tests.agents import until

POLL = 0.1


class Holding:
    """What is held, as far as a look goes."""

    def __init__(self) -> None:
        self.looks: list[float] = []
        self.good = True

    def holds(self) -> bool:
        self.looks.append(time.monotonic())
        return self.good


class One:
    """A namespace to look at."""

    def __init__(self, *, silent: bool = True) -> None:
        self.held: Any = Holding()
        self.silent = silent
        self.look_at = 0.0
        self.busy = self.working = False
        self.woken: list[bool] = []

    def wake(self, *, deep: bool = False, since: float = 0.0) -> None:
        self.woken.append(deep)


async def looking(
    some: list[One], seconds: float, *, most: float = 1e6, act: Callable[[Looks], None] | None = None
) -> None:
    workers = Workers(1)
    looks = Looks(POLL, most, workers)
    for one in some:
        looks.add(one)
    looks.spread()
    task = asyncio.create_task(looks.run())
    if act:
        act(looks)
    await asyncio.sleep(seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    workers.close()


async def test_where_the_kernel_tells_nothing_is_looked_every_poll() -> None:
    one, other = One(), One(silent=False)
    await looking([one, other], 10.5 * POLL)
    assert 7 <= len(one.held.looks) <= 13
    assert max(b - a for a, b in zip(one.held.looks, one.held.looks[1:], strict=False)) < 3 * POLL
    assert not other.held.looks


async def test_what_does_not_hold_is_woken_to_look_at_everything() -> None:
    one = One()
    one.held.good = False
    await looking([one], 2 * POLL)
    assert one.woken
    assert all(one.woken)


async def test_looks_go_on_though_one_meets_what_nobody_thought_of() -> None:
    one, other = One(), One()
    one.held.holds = lambda: {}["a fault of ours"]
    await looking([one, other], 5 * POLL)
    assert len(one.woken) > 1, "who looks closer tells of the fault"
    assert len(other.held.looks) > 1


async def test_many_share_a_number_of_looks_evenly() -> None:
    many = [One() for _ in range(200)]
    await looking(many, 1.0, most=100)
    found = sorted(at for one in many for at in one.held.looks)
    assert 60 <= len(found) <= 140
    assert max(sum(1 for at in found if since <= at < since + 0.2) for since in found) <= 50
    assert max(len(one.held.looks) for one in many) == 1


async def test_a_hint_has_all_looked_at_at_once_and_many_hints_seldom() -> None:
    many = [One() for _ in range(20)]

    def hint(looks: Looks) -> None:
        for number in range(100):
            asyncio.get_running_loop().call_later(number / 1000, looks.hint)

    await looking(many, 0.3, most=1.0, act=hint)
    assert all(1 <= len(one.held.looks) <= 5 for one in many)


async def test_what_is_being_worked_at_is_looked_at_soon_after() -> None:
    one = One()
    one.busy = one.working = True
    asyncio.get_running_loop().call_later(3 * POLL, lambda: setattr(one, "busy", False))
    await looking([one], 5 * POLL)
    assert one.held.looks


async def test_who_is_cancelled_waits_for_the_thread_and_asks_it_to_stop() -> None:
    workers, stop, ended = Workers(1), threading.Event(), threading.Event()

    def work() -> None:
        assert stop.wait(10)
        time.sleep(0.05)
        ended.set()
        raise ValueError("undone")

    task = asyncio.create_task(workers.run(work, stop))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as raised:
        await task
    assert ended.is_set()
    assert isinstance(raised.value.__cause__, ValueError)
    workers.close()


async def test_workers_return_and_raise_for_each_who_asked() -> None:
    workers = Workers(4)
    assert await asyncio.gather(*(workers.run(lambda n=n: n) for n in range(1000))) == list(range(1000))

    def fail() -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        await workers.run(fail)
    workers.close()


async def test_an_apply_upon_one_that_waits_goes_back_to_before_both() -> None:
    gone_back: list[tuple[str, Before]] = []
    trials = Trials(lambda key, before: gone_back.append((key, before)))
    first, second = Before(None, 1), Before(None, 2)
    trials.begin("a", first, 60)
    trials.begin("a", second, 0.02)
    trials.begin("b", second, 0.01)
    assert trials.extend("b", 60)
    await until(lambda: bool(gone_back))
    assert gone_back == [("a", Before(None, 3))]
    assert trials.before["a"] == Before(None, 3), "until it has gone back"
    assert not trials.extend("a", 60)
    assert trials.end("a") is None
    assert trials.end("b") is not None
    assert not trials.before


def test_whoever_closes_the_lock_file_is_noticed_from_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import select

    path = tmp_path / "xtables.lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(path))
    lock_file = LockFile()
    lock_file.watch()
    path.touch()
    assert not select.select([lock_file], [], [], 0)[0]
    for _ in range(2):
        lock_file.watch()
        path.open().close()
        assert select.select([lock_file], [], [], 1)[0]
        lock_file.read()
        assert not select.select([lock_file], [], [], 0)[0]
        path.unlink()
        lock_file.read()
        path.touch()
    lock_file.close()
