"""An agent for tests: in places of the test's own, with a record of what it told."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from netapply.agent import Agent, AgentConfig, Budget, Event
from netapply.backend import find_backend
from netapply.namespace import Namespace
from netapply.ownership import ownership
from netapply.ruleset import Ruleset

PATIENCE = 15.0
#: For tests in which one namespace drifts again and again.
GENEROUS = Budget(heals=1_000_000)


class Record:
    """What an agent told, to be waited for."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._more = asyncio.Event()

    def add(self, event: Event) -> None:
        self.events.append(event)
        self._more.set()

    def all(self, kind: str) -> list[Any]:
        return [event for event in self.events if event.kind == kind]

    async def next(self, kind: str, after: int = 0, patience: float = PATIENCE) -> Any:
        """The first event of this kind behind the first `after` events."""

        async def look() -> Any:
            while True:
                for event in self.events[after:]:
                    if event.kind == kind:
                        return event
                self._more.clear()
                await self._more.wait()

        try:
            return await asyncio.wait_for(look(), patience)
        except TimeoutError:
            told = "\n".join(map(str, self.events[after:]))
            raise AssertionError(f"no {kind} event within {patience} s, but\n{told}") from None


@asynccontextmanager
async def running(tmp_path: Path, *, journal: str = "", **settings: Any) -> AsyncIterator[tuple[Agent, Record]]:
    """An agent with its state below `tmp_path`; no plan files unless told."""
    defaults: dict[str, Any] = {
        "plans": "",
        "state": str(tmp_path / "state"),
        "journal": journal or str(tmp_path / "journal"),
        "poll": 0.05,
        "budget": GENEROUS,
        "queue": 1 << 20,
    }
    config = AgentConfig(**{**defaults, **settings})
    record = Record()
    agent = Agent(config)
    events = agent.events()

    async def listen() -> None:
        async for event in events:
            record.add(event)

    listener = asyncio.create_task(listen())
    try:
        async with agent:
            yield agent, record
        await asyncio.wait_for(listener, PATIENCE)
    finally:
        listener.cancel()


@contextmanager
def memory_directory() -> Iterator[str]:
    """A directory that is no disk, as the journal's own place is, for what is measured."""
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="netapply-test-", dir=place) as path:
        yield path


async def until(true: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait until something is the case."""
    deadline = asyncio.get_running_loop().time() + patience
    while not true():
        assert asyncio.get_running_loop().time() < deadline, "it never came to be"
        await asyncio.sleep(0.005)


async def in_thread(work: Callable[[], Any]) -> Any:
    """A tool, or another writer, beside the agent."""
    future: Awaitable[Any] = asyncio.to_thread(work)
    return await future


def standing(path: str, backend: str) -> Ruleset | None:
    """What stands of ours, by a look of our own."""
    with Namespace.open(path) as namespace:
        return find_backend(backend).read(namespace, ownership("netapply")).ruleset


def put(path: str, backend: str, ruleset: Ruleset | None) -> None:
    """Make ours something else, as another program would."""
    chosen = find_backend(backend)
    with Namespace.open(path) as namespace:
        for step in chosen.encode(chosen.read(namespace, ownership("netapply")), ruleset):
            chosen.commit(namespace, step)
