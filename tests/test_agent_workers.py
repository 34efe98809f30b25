"""Workers: one goes on at a time, another where it is held up, and nothing that is done stays untold."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from netapply.agent.workers import Workers


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """What work waits for, at most until the test is over."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
async def workers(release: threading.Event) -> AsyncIterator[Workers]:
    found = Workers(4)
    yield found
    release.set()
    found.close()


async def test_one_thread_does_what_does_not_hold_it_up(workers: Workers) -> None:
    names = await asyncio.gather(*(workers.run(lambda: threading.current_thread().name) for _ in range(200)))
    assert len(set(names)) == 1


async def test_others_go_on_while_some_are_held_up_and_in_the_end_there_is_one_again(
    workers: Workers, release: threading.Event
) -> None:
    held = [asyncio.create_task(workers.run(release.wait)) for _ in range(3)]
    await asyncio.sleep(0)
    more = [asyncio.create_task(workers.run(lambda: threading.current_thread().name)) for _ in range(50)]
    _, pending = await asyncio.wait(more, timeout=1)
    assert not pending
    assert len({each.result() for each in more}) == 1  # the fourth, as three wait
    release.set()
    assert all(await asyncio.gather(*held))
    deadline = time.monotonic() + 5
    while len([each for each in threading.enumerate() if each.name.startswith("netapply-agent-")]) > 1:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    assert await workers.run(lambda: 1) == 1


async def test_there_are_no_more_threads_than_may_be(workers: Workers, release: threading.Event) -> None:
    at_once, most, guard = 0, 0, threading.Lock()

    def wait() -> None:
        nonlocal at_once, most
        with guard:
            at_once += 1
            most = max(most, at_once)
        release.wait()
        with guard:
            at_once -= 1

    waiting = [asyncio.create_task(workers.run(wait)) for _ in range(12)]
    await asyncio.sleep(0.2)
    assert most == 4
    release.set()
    await asyncio.gather(*waiting)
    assert most <= 4


async def test_what_is_done_is_told_though_what_came_after_it_never_ends(
    workers: Workers, release: threading.Event
) -> None:
    for _ in range(20):
        release.clear()
        done, held = workers.run(lambda: 1), workers.run(release.wait)
        tasks = asyncio.create_task(done), asyncio.create_task(held)
        finished, _ = await asyncio.wait(tasks, timeout=1, return_when=asyncio.FIRST_COMPLETED)
        assert finished == {tasks[0]}
        release.set()
        await tasks[1]


async def test_who_is_cancelled_asks_the_work_to_stop_and_waits_for_it(workers: Workers) -> None:
    stop, ended = threading.Event(), threading.Event()

    def work() -> None:
        stop.wait()
        time.sleep(0.02)
        ended.set()

    task = asyncio.create_task(workers.run(work, stop))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_what_fails_is_told_to_who_asked(workers: Workers) -> None:
    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await workers.run(fail)
    assert await workers.run(lambda: 2) == 2
