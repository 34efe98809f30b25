"""The agent: holds the declared capture in every namespace of a node, and heals what others do to it.

    async with Agent(AgentConfig(plans="/etc/netapply/plans.d")) as agent:
        async for event in agent.events():
            print(event.kind, event.namespace)

An object to embed: it has no global state, and several may live in one process. `netapply agent` runs it as a service.
"""

from __future__ import annotations

from netapply.agent.agent import Agent as Agent
from netapply.agent.events import Cause as Cause
from netapply.agent.events import Event as Event
from netapply.agent.model import AgentConfig as AgentConfig
from netapply.agent.model import Budget as Budget
from netapply.agent.model import Histogram as Histogram
from netapply.agent.model import Metrics as Metrics
from netapply.agent.model import NamespaceStatus as NamespaceStatus
from netapply.agent.model import Target as Target
