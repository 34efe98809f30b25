"""The agent with many namespaces, and with many drifts: nothing is lost, nothing grows.

NETAPPLY_LONG=1 takes the long form: 100,000 drifts over 200 namespaces, some ten minutes.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from netapply import load_plan
from netapply.agent import Agent
from netapply.backend import find_backend
from netapply.errors import KernelError
from netapply.namespace import Namespace
from tests import netns as namespaces
from tests.agents import PATIENCE, memory_directory, running, standing, until
from tests.netns import Netns

LONG = bool(os.environ.get("NETAPPLY_LONG"))
MANY, SOME = 1_000, 200 if LONG else 20
DRIFTS = 100_000 if LONG else 1_000
PLAN = "apiVersion: netapply/v1\n"


@pytest.fixture
def journal() -> Iterator[str]:
    with memory_directory() as path:
        yield path


def resident() -> float:
    """Megabytes of memory that this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def unshared(number: int) -> list[Netns]:
    try:
        return [Netns(namespaces.in_thread(namespaces._unshare)) for _ in range(number)]
    except PermissionError:
        pytest.skip("making a network namespace takes CAP_SYS_ADMIN")


async def test_a_thousand_namespaces_start_quickly_and_cost_little(
    tmp_path: Path, journal: str, figure: Callable[[str], None]
) -> None:
    many = unshared(MANY)
    plans = tmp_path / "plans.d"
    plans.mkdir()
    selectors = "".join(f"  - path: {each.path}\n" for each in many)
    # IPv6 without its address: `lo` is down here, and the address would wait for a route.
    (plans / "all.yaml").write_text(f"{PLAN}ipv6: skip\nnamespaces:\n{selectors}")
    before = resident()
    try:
        for how in ("started", "started again, with all in place"):
            wall, busy = time.perf_counter(), time.process_time()
            async with running(tmp_path, journal=journal, plans=str(plans), poll=1.0) as (agent, _):
                wall, busy = time.perf_counter() - wall, time.process_time() - busy
                assert agent.metrics().namespaces["inplace"] == MANY
                figure(f"{MANY} namespaces {how} in {wall:.2f} s (bar 1.5), {busy:.2f} s of processor time")
                await asyncio.sleep(1)
                steady, since = time.process_time(), time.perf_counter()
                await asyncio.sleep(3)
                used = (time.process_time() - steady) / (time.perf_counter() - since)
                figure(
                    f"steady: {used * 100:.2f} % of a core (bar 1), {resident():.0f} MB (bar 120; {before:.0f} before)"
                )
                assert resident() < 120 + before
                assert used < 0.05
    finally:
        for each in many:
            each.close()


async def _drift(agent: Agent, netns: Netns, healed: dict[str, asyncio.Queue[float]], rounds: int) -> list[float]:
    """Delete the table again and again, each time when it has been healed."""
    backend, found = find_backend("nftables"), []
    await agent.apply(netns.path, load_plan(PLAN + "ipv6: skip\n"))
    with Namespace.open(netns.path) as namespace:
        for _ in range(rounds):
            for step in backend.encode(backend.read(namespace), None):
                await asyncio.to_thread(backend.commit, namespace, step)
            found.append(await asyncio.wait_for(healed[netns.path].get(), PATIENCE))
    return found


async def test_every_one_of_many_drifts_is_healed_and_nothing_grows(
    tmp_path: Path, journal: str, figure: Callable[[str], None]
) -> None:
    some = unshared(SOME)
    rounds = DRIFTS // SOME
    healed: dict[str, asyncio.Queue[float]] = {each.path: asyncio.Queue() for each in some}
    kinds: Counter[str] = Counter()
    try:
        async with running(tmp_path, journal=journal, poll=1.0) as (agent, record):
            events = agent.events()

            async def listen() -> None:
                async for event in events:
                    kinds[event.kind] += 1
                    record.events.clear()
                    if event.kind == "healed":
                        healed[event.namespace].put_nowait(event.seconds)

            listener = asyncio.create_task(listen())
            warm = max(10, rounds // 10)
            await asyncio.gather(*(_drift(agent, each, healed, warm) for each in some))
            memory, open_files = resident(), descriptors()
            begun = time.perf_counter()
            found = await asyncio.gather(*(_drift(agent, each, healed, rounds) for each in some))
            took = time.perf_counter() - begun
            await asyncio.sleep(0.2)
            every = sorted(seconds for each in found for seconds in each)
            figure(
                f"{len(every)} drifts over {SOME} namespaces in {took:.0f} s, {took / len(every) * 1e3:.1f} ms each; "
                f"at once: p50 {every[len(every) // 2] * 1e3:.1f} ms, p99 {every[-len(every) // 100] * 1e3:.1f} ms; "
                f"memory {memory:.0f} to {resident():.0f} MB, descriptors {open_files} to {descriptors()}"
            )
            assert kinds["healed"] == kinds["drifted"] == SOME * (rounds + warm)
            assert not kinds["failed"]
            assert descriptors() <= open_files
            assert resident() < memory + 8
            assert all(standing(each.path, "nftables") for each in some)
            listener.cancel()
    finally:
        for each in some:
            each.close()


@pytest.mark.parametrize("dialect", ["nftables", "iptables-nft", "iptables-legacy"])
async def test_one_that_is_fought_over_starves_nobody(
    dialect: str, tmp_path: Path, journal: str, figure: Callable[[str], None]
) -> None:
    """One namespace is flushed without rest; another is healed as quickly as ever."""
    fought, quiet = unshared(2)
    stop = asyncio.Event()
    backend = find_backend(dialect)
    try:
        async with running(tmp_path, journal=journal) as (agent, record):
            for each in (fought, quiet):
                await agent.apply(each.path, load_plan(PLAN + "ipv6: skip\n"), backend=dialect)

            async def fight() -> None:
                with Namespace.open(fought.path) as namespace:
                    while not stop.is_set():
                        for step in backend.encode(backend.read(namespace), None):
                            try:
                                await asyncio.to_thread(backend.commit, namespace, step)
                            except KernelError:  # the agent was faster
                                continue
                        await asyncio.sleep(0.001)

            def mine(netns: Netns = quiet) -> list[Any]:
                return [event for event in record.all("healed") if event.namespace == netns.path]

            fighter = asyncio.create_task(fight())
            seconds: list[float] = []
            with Namespace.open(quiet.path) as namespace:
                for _ in range(20):
                    for step in backend.encode(backend.read(namespace), None):
                        await asyncio.to_thread(backend.commit, namespace, step)
                    await until(lambda: len(mine()) > len(seconds))
                    seconds.append(mine()[-1].seconds)
            await until(lambda: len(mine(fought)) > 20)
            stop.set()
            await fighter
            figure(
                f"healed beside a fight: p50 {sorted(seconds)[10] * 1e3:.1f} ms, longest {max(seconds) * 1e3:.1f} ms"
            )
            assert not record.all("failed")
    finally:
        fought.close()
        quiet.close()
