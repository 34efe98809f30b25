"""A node's agent in a process of its own, with namespaces that have names: what `bench.agents` starts, and asks.

    python -m bench.node DIRECTORY DIALECT POLL FD,FD,…

The descriptors are its parent's, of namespaces; they get names below DIRECTORY that this process alone sees, and a
plan file that speaks of them all. Then it runs the service as `netapply agent` does. It answers each line of its input
by one of its output, in JSON; of healed namespaces it tells by itself. It ends with its input.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from bench.plans import RULES
from netapply.agent import Agent, AgentConfig, Budget
from netapply.agent.service import serve
from netapply.lab.syscalls import MS_BIND, MS_PRIVATE, MS_REC, mount, unshare
from netapply.planfile import dump_plan

_CLONE_NEWNS = 0x20000  # linux/sched.h
#: Seconds before a quiet time is measured: what was closed late is closed, and what was new is looked at.
_SETTLE = 2.0


def main(directory: str, dialect: str, poll: float, fds: list[int]) -> None:
    names, plans = Path(directory, "netns"), Path(directory, "plans")
    for each in (names, plans):
        each.mkdir(exist_ok=True)
    unshare(_CLONE_NEWNS)
    mount("none", "/", MS_PRIVATE | MS_REC)
    for fd in fds:
        name = names / f"pod-{fd}"
        name.touch()
        mount(f"/proc/{os.getppid()}/fd/{fd}", str(name), MS_BIND)
    plan = {**dump_plan(RULES), "backend": dialect, "namespaces": [{"glob": f"{names}/pod-*"}]}
    (plans / "all.json").write_text(json.dumps(plan))
    config = AgentConfig(
        plans=str(plans),
        state=f"{directory}/state",
        journal=f"{directory}/journal",
        poll=poll or AgentConfig().poll,
        budget=Budget(heals=1_000_000),
        socket=f"{directory}/control.sock",
        read_socket="",
    )
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))  # nobody reads its log here
    begun = time.perf_counter(), time.process_time()
    asyncio.run(serve(config, started=partial(_started, begun)))


def _started(begun: tuple[float, float], agent: Agent, _: object) -> None:
    seconds, busy = time.perf_counter() - begun[0], time.process_time() - begun[1]
    states = {state: number for state, number in agent.metrics().namespaces.items() if number}
    _say({"started": seconds, "busy": busy, "states": states, "descriptors": len(os.listdir("/proc/self/fd"))})
    loop = asyncio.get_running_loop()
    _tasks.extend((loop.create_task(_tell(agent)), loop.create_task(_answer())))


_tasks: list[asyncio.Task[None]] = []


async def _tell(agent: Agent) -> None:
    async for event in agent.events():
        if event.kind == "healed":
            _say({"healed": os.path.basename(event.namespace), "at": event.at, "seconds": event.seconds})


async def _answer() -> None:
    """Each line is a number of seconds: how busy was this process in them, and how large is it?"""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        await asyncio.sleep(_SETTLE)
        begun, busy = time.perf_counter(), time.process_time()
        await asyncio.sleep(float(line))
        share = (time.process_time() - busy) / (time.perf_counter() - begun)
        _say({"share": share, "megabytes": _resident() / 1e6})
    os.kill(os.getpid(), signal.SIGTERM)  # as systemd ends it


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def _say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), [int(word) for word in sys.argv[4].split(",")])
