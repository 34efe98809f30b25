"""`netapply agent`: words to an AgentConfig, and the service until it ends."""

from __future__ import annotations

import asyncio

from netapply.cli.output import Printer
from netapply.cli.words import Arguments
from netapply.errors import NetapplyError


def run_agent(arguments: Arguments, _: Printer) -> int:
    """Run the agent. Raises NetapplyError where it cannot begin."""
    try:
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
        poll=arguments.poll,
        concurrency=arguments.concurrency,
        lock_timeout=arguments.lock_timeout,
        host=arguments.host,
        socket=arguments.socket,
        read_socket=arguments.read_socket,
        read_group=arguments.read_group,
        metrics=arguments.metrics,
    )
    configure_log(arguments.log)
    asyncio.run(serve(config))
    return 0
