"""The asyncio façade over the real capture and over the fake: same answers, side by side, cancelled without a trace."""

from __future__ import annotations

import asyncio
import fcntl
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import netapply
from netapply import aio
from netapply.aio import AsyncCapture
from netapply.backend import BUILT_IN
from netapply.errors import ApplyError, CancelledError, KernelError
from netapply.plan import CapturePlan
from netapply.results import Result
from netapply.testing import FakeKernel
from netapply_wire.xtables_lock import XtablesLock
from tests import test_api
from tests.netns import Netns
from tests.test_api import OTHER, PLAN, AnyCapture, Engine, RealEngine

backend, real, engine = test_api.backend, test_api.real, test_api.engine

PATIENCE = 10  # seconds that anything may take


@pytest.fixture
async def capture(engine: Engine) -> AsyncIterator[AsyncCapture]:
    async with AsyncCapture(engine.open) as opened:
        yield opened


class Gate:
    """Holds a thread from when it arrives until it is opened."""

    def __init__(self) -> None:
        self._arrived = threading.Event()
        self._opened = threading.Event()

    def hold(self) -> None:
        self._arrived.set()
        assert self._opened.wait(PATIENCE)

    def open(self) -> None:
        self._opened.set()

    async def arrival(self) -> None:
        assert await asyncio.to_thread(self._arrived.wait, PATIENCE)


class Held:
    """A capture whose apply stops at the gate before a step (1 is the first) of the way forward."""

    def __init__(self, capture: AnyCapture, gate: Gate, step: int) -> None:
        self._capture = capture
        self._gate = gate
        self._step = step
        self._asked = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._capture, name)

    def apply(self, plan: CapturePlan, *, cancelled: Callable[[], bool], **settings: str) -> Result:
        def asked() -> bool:
            self._asked += 1
            if self._asked == self._step:
                self._gate.hold()
            return cancelled()

        return self._capture.apply(plan, cancelled=asked, **settings)


def held(engine: Engine, gate: Gate, step: int) -> AsyncCapture:
    return AsyncCapture(lambda: Held(engine.open(), gate, step))


async def cancel_at(gate: Gate, task: asyncio.Task[Result], times: int = 1) -> asyncio.CancelledError:
    """Cancel the task while it is held; it must not be over before the gate is open."""
    await gate.arrival()
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0.02)
        assert not task.done()
    gate.open()
    with pytest.raises(asyncio.CancelledError) as caught:
        await asyncio.wait_for(task, PATIENCE)
    return caught.value


async def test_apply_diff_verify_show_and_clean_answer_as_the_sync_ones(engine: Engine, capture: AsyncCapture) -> None:
    assert not (await capture.diff(PLAN, backend=engine.backend)).same
    result = await capture.apply(PLAN, backend=engine.backend)
    assert (result.changed, result.backend, result.reason) == (True, engine.backend, "asked for")
    assert not (await capture.apply(PLAN)).changed
    assert (await capture.diff(PLAN)).same
    assert (await capture.verify()).same
    assert not (await capture.verify(OTHER)).same
    assert (await capture.detect()).chosen == engine.backend
    with engine.open() as sync:
        assert await capture.show() == sync.show()
    assert (await capture.clean()).changed
    assert await capture.show() == ()


async def test_failures_come_through_as_they_are(engine: Engine, capture: AsyncCapture) -> None:
    error = KernelError("add rule", 12)
    engine.fail_next_apply(error)
    with pytest.raises(ApplyError) as caught:
        await capture.apply(PLAN, backend=engine.backend)
    assert caught.value.restored
    assert caught.value.__cause__ is error


async def test_nothing_is_opened_before_it_is_entered_or_used() -> None:
    kernel = FakeKernel()
    capture = AsyncCapture(lambda: kernel.open("pod-1"))
    assert "pod-1" not in kernel.namespaces
    await capture.apply(PLAN)
    assert kernel.namespaces["pod-1"].rulesets
    await capture.close()
    await capture.close()


async def test_one_capture_works_while_another_one_is_held(
    engine: Engine, make_netns: Callable[[], Netns], tmp_path: Path
) -> None:
    gate = Gate()
    if isinstance(engine, RealEngine):
        opener = aio.open_capture(make_netns().path, state_directory=str(tmp_path / "state"))
    else:
        opener = AsyncCapture(lambda: engine.kernel.open("pod-2"))
    async with held(engine, gate, 2) as slow, opener as fast:
        task = asyncio.create_task(slow.apply(PLAN, backend=engine.backend))
        await gate.arrival()
        assert (await fast.apply(PLAN, backend=engine.backend)).changed
        assert (await fast.verify()).same
        assert not task.done()
        gate.open()
        assert (await task).changed
        assert (await slow.verify()).same


async def test_calls_on_one_capture_take_turns(engine: Engine) -> None:
    gate = Gate()
    async with held(engine, gate, 2) as capture:
        apply = asyncio.create_task(capture.apply(PLAN, backend=engine.backend))
        await gate.arrival()
        diff = asyncio.create_task(capture.diff(PLAN, backend=engine.backend))
        await asyncio.sleep(0.05)
        assert not diff.done()
        gate.open()
        assert (await apply).changed
        assert (await diff).same


async def test_of_two_captures_of_one_namespace_one_makes_the_change(engine: Engine, capture: AsyncCapture) -> None:
    async with AsyncCapture(engine.open) as other:
        calls = (each.apply(PLAN, backend=engine.backend) for each in (capture, other))
        assert sorted(result.changed for result in await asyncio.gather(*calls)) == [False, True]
        assert (await other.verify()).same


@pytest.mark.parametrize("times", [1, 3], ids=["once", "again and again"])
@pytest.mark.parametrize("first", [None, OTHER], ids=["nothing", "another plan"])
async def test_a_cancelled_apply_has_rolled_back_when_cancelled_error_is_seen(
    engine: Engine, capture: AsyncCapture, first: CapturePlan | None, times: int
) -> None:
    if first:
        await capture.apply(first, backend=engine.backend)
    before, gate = await capture.diff(PLAN, backend=engine.backend), Gate()
    shown = await capture.show()
    async with held(engine, gate, 2) as slow:
        error = await cancel_at(gate, asyncio.create_task(slow.apply(PLAN, backend=engine.backend)), times)
        assert isinstance(error.__cause__, ApplyError)
        assert error.__cause__.restored
        assert isinstance(error.__cause__.__cause__, CancelledError)
        with engine.open() as sync:
            assert sync.show() == shown
            assert sync.diff(PLAN, backend=engine.backend) == before
        assert (await slow.apply(PLAN, backend=engine.backend)).changed
        assert (await slow.verify(PLAN)).same


async def test_a_timeout_rolls_back_too(engine: Engine) -> None:
    gate = Gate()
    async with held(engine, gate, 2) as slow:
        with pytest.raises(TimeoutError):  # noqa: PT012 - the gate opens when the time is over
            async with asyncio.timeout(0.05):
                asyncio.get_running_loop().call_later(0.2, gate.open)
                await slow.apply(PLAN, backend=engine.backend)
        assert await slow.show() == ()


@pytest.mark.parametrize("backend", ["iptables-legacy"], indirect=True)
async def test_an_apply_cancelled_while_its_tables_wait_for_the_lock_takes_them_back(
    real: RealEngine, private_xtables_lock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both tables are exchanged in one step, once the lock is free; cancelled meanwhile, it does not last."""
    waiting, enter = threading.Event(), XtablesLock.__enter__

    def entering(lock: XtablesLock) -> XtablesLock:
        waiting.set()
        return enter(lock)

    monkeypatch.setattr(XtablesLock, "__enter__", entering)
    async with AsyncCapture(real.open) as capture:
        with holding(private_xtables_lock):
            task = asyncio.create_task(capture.apply(PLAN, backend=real.backend))
            assert await asyncio.to_thread(waiting.wait, PATIENCE)
            task.cancel()
            await asyncio.sleep(0.05)
            assert not task.done()
        with pytest.raises(asyncio.CancelledError) as caught:
            await asyncio.wait_for(task, PATIENCE)
        assert isinstance(caught.value.__cause__, ApplyError)
        assert caught.value.__cause__.step == "commit the journal"
        assert await capture.show() == ()
        assert "NETAPPLY" not in real.netns.run("iptables-legacy-save")


@contextmanager
def holding(path: str) -> Iterator[None]:
    fd = os.open(path, os.O_RDONLY | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


async def test_a_cancelled_opening_closes_what_the_thread_opened() -> None:
    kernel, gate, opened = FakeKernel(), Gate(), []

    def opener() -> netapply.CaptureLike:
        gate.hold()
        opened.append(kernel.open("pod-1"))
        return opened[0]

    async def use() -> None:
        async with AsyncCapture(opener):
            raise AssertionError("not entered")

    task = asyncio.create_task(use())
    await gate.arrival()
    task.cancel()
    await asyncio.sleep(0.02)
    gate.open()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(netapply.NamespaceError, match="is closed"):
        opened[0].show()


async def test_no_descriptor_is_left_behind(real: RealEngine) -> None:
    """Not by a whole life, not by a cancelled apply, not by one that failed; netlink sockets follow a little later."""
    await _live(real)
    before = _descriptors()
    for _ in range(3):
        await _live(real)
    assert await asyncio.to_thread(_settled, before) <= before


def _settled(wanted: int) -> int:
    """How many descriptors are open, when there are no more than that, or patience is at its end."""
    deadline = time.monotonic() + PATIENCE
    while (now := _descriptors()) > wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    return now


async def _live(real: RealEngine) -> None:
    gate = Gate()
    async with held(real, gate, 2) as capture:
        await cancel_at(gate, asyncio.create_task(capture.apply(PLAN, backend=real.backend)))
        await capture.apply(PLAN, backend=real.backend)
        with pytest.raises(netapply.ConflictError):
            await capture.apply(PLAN, backend=next(name for name in BUILT_IN if name != real.backend))
        await capture.verify()
        await capture.clean()


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))
