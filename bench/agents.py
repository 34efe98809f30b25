"""The agent on a node with many namespaces: its start, what it costs while nothing happens, how soon drift is healed.

The agent is a process of its own (`bench.node`), and the one that makes drift is this one. A heal is timed from before
the foreign change is sent to the kernel until the agent has read back that all stands again.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from bench import places
from netapply.backend import BUILT_IN, find_backend
from netapply.namespace import Namespace

#: Seconds in which nothing happens, for the steady state.
QUIET = 5.0
#: Seconds between two drifts, on average. Each is in another namespace.
APART = 0.03
#: How many drifts, in so many namespaces.
HEALS = 200
#: Seconds after which an agent is given up.
_PATIENCE = 120.0
_SEED = 20
QUANTILES = {"p50": 0.5, "p99": 0.99}


class Node(NamedTuple):
    """Of one agent with all its namespaces. Times in seconds; heals from the shortest to the longest.

    `start` is with nothing in place, `again` with everything. `share` is the part of a core that it takes in quiet,
    `megabytes` all its memory.
    """

    namespaces: int
    start: float
    again: float
    busy: float
    share: float
    megabytes: float
    descriptors: int
    heals: tuple[float, ...]

    def quantile(self, part: float) -> float:
        """The time that this part of the heals took at most."""
        return self.heals[min(len(self.heals) - 1, int(part * len(self.heals)))]

    def json(self) -> dict[str, float]:
        """Times in milliseconds."""
        heals = {name: round(self.quantile(part) * 1e3, 3) for name, part in QUANTILES.items()}
        return {
            **self._asdict(),
            "start": self.start * 1e3,
            "again": self.again * 1e3,
            "busy": self.busy * 1e3,
            "heals": len(self.heals),
            **heals,
        }


def measure(count: int, *, poll: float = 0.0) -> dict[str, Node]:
    """By dialect; `poll` 0.0 is the agent's own."""
    return {backend: _measure(backend, count, poll) for backend in BUILT_IN}


def _measure(backend: str, count: int, poll: float) -> Node:
    with places.many(count) as fds, tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        with _node(backend, poll, directory, fds) as first:
            started = first.next("started")
        with _node(backend, poll, directory, fds) as node:
            again = node.next("started")
            quiet = node.ask(QUIET)
            heals = _drift(node, backend, fds[:: max(1, count // HEALS)])
    return Node(
        count,
        started["started"],
        again["started"],
        started["busy"],
        quiet["share"],
        quiet["megabytes"],
        again["descriptors"],
        tuple(sorted(heals)),
    )


class _Talk:
    """What is asked of the node, and what it tells."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdin
        assert process.stdout
        self._stdin, self._stdout = process.stdin, process.stdout

    def ask(self, seconds: float) -> dict[str, Any]:
        self._stdin.write(f"{seconds}\n")
        self._stdin.flush()
        return self.next("share")

    def next(self, key: str) -> dict[str, Any]:
        """The next line that tells of `key`."""
        while line := self._stdout.readline():
            told: dict[str, Any] = json.loads(line)
            if key in told:
                return told
        raise RuntimeError(f"the agent ended with {self._process.wait(_PATIENCE)} before it told of {key!r}")


@contextmanager
def _node(backend: str, poll: float, directory: str, fds: list[int]) -> Generator[_Talk]:
    words = (directory, backend, str(poll), ",".join(map(str, fds)))
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-m", "bench.node", *words], stdin=pipe, stdout=pipe, text=True, bufsize=1
    ) as process:
        late = threading.Timer(_PATIENCE, process.kill)
        late.start()
        try:
            yield _Talk(process)
            process.communicate(timeout=_PATIENCE)
        except BaseException:
            process.kill()
            raise
        finally:
            late.cancel()


def _drift(node: _Talk, backend: str, fds: list[int]) -> list[float]:
    """Take ours away in one namespace after another; seconds until each was healed."""
    chosen, chance = find_backend(backend), random.Random(_SEED)  # noqa: S311 - the same moments in each run
    since: dict[str, float] = {}
    with ExitStack() as stack:
        for fd in fds:
            namespace = stack.enter_context(Namespace.open(fd))
            *first, last = chosen.encode(chosen.read(namespace), None)
            for step in first:
                chosen.commit(namespace, step)
            since[f"pod-{fd}"] = time.time()
            chosen.commit(namespace, last)
            time.sleep(APART * 2 * chance.random())
        told = (node.next("healed") for _ in fds)
        return [each["at"] - since[each["healed"]] for each in told]
