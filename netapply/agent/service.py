"""`netapply agent`: an Agent with its sockets and its log, until a signal ends it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Literal, TypeAlias

import structlog

from netapply.agent.agent import Agent
from netapply.agent.events import Event
from netapply.agent.front import Front
from netapply.agent.model import AgentConfig
from netapply.jsonform import plain

LogForm: TypeAlias = Literal["auto", "json", "text"]

_log = structlog.stdlib.get_logger("netapply.agent")
#: The agent tells these to its log itself.
_TOLD = frozenset(("failed", "file-rejected", "quarantined", "unconfirmed", "lost"))
_json = structlog.processors.JSONRenderer(default=str)
#: syslog(3) by structlog's words.
_PRIORITIES = {"critical": 2, "error": 3, "exception": 3, "warning": 4}


def configure_log(form: LogForm = "auto") -> None:
    """Log to standard error: JSON, or text for people, which `auto` takes on a terminal. Only for a process of ours."""
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    last: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
        if text
        else [structlog.processors.format_exc_info, _for_journal if _is_journal(sys.stderr.fileno()) else _json]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(20),  # logging.INFO
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )


def _is_journal(fd: int) -> bool:
    """Whether this leads to the journal (systemd.exec(5): JOURNAL_STREAM)."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _for_journal(logger: structlog.typing.WrappedLogger, name: str, event: structlog.typing.EventDict) -> str:
    """JSON behind what the journal takes for its priority, and takes off (sd-daemon(3))."""
    line = _json(logger, name, event)
    assert isinstance(line, str)
    return f"<{_PRIORITIES.get(name, 6)}>{line}"


async def serve(
    config: AgentConfig,
    *,
    inherited: Mapping[str, socket.socket] | None = None,
    kept: Mapping[str, int] | None = None,
    started: Callable[[Agent, Front], None] = lambda _agent, _front: None,
) -> None:
    """Run until SIGTERM or SIGINT; SIGHUP looks at everything. `started` is called when all stands and answers."""
    ended, again = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number, what in ((signal.SIGTERM, ended), (signal.SIGINT, ended), (signal.SIGHUP, again)):
        loop.add_signal_handler(number, what.set)
    # What a start makes stays, and there is much of it: to look it through again and again would hold up heals.
    gc.disable()
    async with Agent(config, kept=kept) as agent, Front(agent, inherited=inherited) as front:
        gc.freeze()
        gc.enable()
        helpers = [asyncio.create_task(_log_events(agent.events())), asyncio.create_task(_look_again(agent, again))]
        _log.info("started", namespaces=len(agent.status()), socket=config.socket, metrics=front.metrics_address[1])
        started(agent, front)
        try:
            await ended.wait()
        finally:
            _log.info("stopping")
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)


async def _look_again(agent: Agent, asked: asyncio.Event) -> None:
    while True:
        await asked.wait()
        asked.clear()
        await agent.reconcile()


async def _log_events(events: AsyncIterator[Event]) -> None:
    async for event in events:
        if event.kind not in _TOLD:
            fields = {name: each for name, each in plain(event).items() if name not in ("kind", "at") and each}
            _log.info(event.kind, **fields)
