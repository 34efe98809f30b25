"""`netapply agent`: words to an AgentConfig, and the service until it ends."""

from __future__ import annotations

import asyncio
import os

from netapply.cli.output import Printer
from netapply.cli.words import Arguments
from netapply.errors import NetapplyError


def run_agent(arguments: Arguments, printer: Printer) -> int:
    """Run the agent. Raises NetapplyError where it cannot begin."""
    try:
        from netapply.agent.confine import deny_programs
        from netapply.agent.manager import Manager, take_passed
        from netapply.agent.model import AgentConfig
        from netapply.agent.service import configure_log, serve
    except ModuleNotFoundError as error:
        if error.name not in ("structlog", "h11"):
            raise
        step = "pip install 'netapply[agent]'"
        raise NetapplyError(f"the agent needs {error.name}, which is not installed", next_step=step) from error
    config = AgentConfig(
        plans=arguments.plans,
        state=arguments.state,
        journal=arguments.journal,
        owned=arguments.owned,
        poll=arguments.poll,
        looks=arguments.looks,
        concurrency=arguments.concurrency,
        lock_timeout=arguments.lock_timeout,
        host=arguments.host,
        socket=arguments.socket,
        read_socket=arguments.read_socket,
        read_group=arguments.read_group,
        metrics=arguments.metrics,
    )
    configure_log(arguments.log)
    denied = deny_programs()
    if denied:
        printer.note(f"agent: starting programs was not given up: {denied}")
    passed = take_passed(os.environ)
    manager = Manager(os.environ, passed.namespaces)
    asyncio.run(serve(config, inherited=passed.sockets, kept=passed.namespaces, started=manager.started))
    return 0
