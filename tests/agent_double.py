"""An agent for tests of what stands before it: it keeps what it is told in a dict, and touches no kernel."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from netapply.agent.events import Event
from netapply.agent.model import STATES, AgentConfig, Histogram, Metrics, NamespaceStatus, Target
from netapply.agent.subscribers import Subscribers
from netapply.errors import NamespaceError
from netapply.nsfs import NamespaceId
from netapply.plan import CapturePlan
from netapply.planfile import fingerprint
from netapply.results import Result, RuleCounter

EMPTY = Histogram((0.001, 0.01), (1, 2, 3), 0.5)


class AgentDouble:
    """Answers as an Agent does. `failing` is raised by the next apply; `gate`, cleared, makes it wait there."""

    def __init__(self, config: AgentConfig) -> None:
        self.config = config
        self.kept: dict[str, NamespaceStatus] = {}
        self.asked: list[tuple[str, object]] = []
        self.plans: list[CapturePlan] = []
        self.failing: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.ticked = time.monotonic()
        self.heals: dict[str, int] = {"nft": 2, 'a"\\\n': 1}
        self.rules: tuple[RuleCounter, ...] = ()
        self.subscribers = Subscribers(config.queue)

    async def apply(
        self,
        target: Target,
        plan: CapturePlan,
        *,
        backend: str,
        layout: str,
        confirm_within: float,
        flush: bool,
        meant: CapturePlan | None,
        reason: str,
    ) -> Result:
        self.asked.append(("apply", target))
        self.entered.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.failing is not None:
            raise self.failing
        self.plans.append(plan)
        by = time.time() + confirm_within if confirm_within else 0.0
        name, mark = str(target.spec), fingerprint(plan)
        self.kept[name] = NamespaceStatus(
            name, f"/run/netns/{name}", NamespaceId(4, 5, 6), "inplace", "api", mark, "nftables", layout,
            time.time(), 0, None, 0.0, "", target.labels, by,
        )  # fmt: skip
        return Result(True, "nftables" if backend == "auto" else backend, "as told", ("batch",), duration=0.001)

    async def remove(self, target: Target, *, reason: str) -> Result:
        self._known(target)
        del self.kept[str(target.spec)]
        return Result(True, "nftables", "held our rules")

    async def confirm(self, target: Target) -> None:
        self._known(target)

    def extend(self, target: Target, seconds: float) -> None:
        self._known(target)

    async def go_back(self, target: Target) -> None:
        self._known(target)

    async def register(self, target: Target) -> None:
        self.asked.append(("register", target))

    async def unregister(self, target: Target) -> None:
        self._known(target)

    async def reconcile(self, target: Target | None = None) -> None:
        self.asked.append(("reconcile", target))

    async def counters(self, target: str) -> tuple[RuleCounter, ...]:
        self._known(Target(target))
        return self.rules

    def status(self) -> tuple[NamespaceStatus, ...]:
        return tuple(self.kept.values())

    def events(self) -> AsyncIterator[Event]:
        return self.subscribers.subscribe()

    def metrics(self) -> Metrics:
        states = dict.fromkeys(STATES, 0) | {"inplace": len(self.kept)}
        return Metrics(states, 1, 0, self.heals, EMPTY, EMPTY, 0, 0, 0, 1.5, 7, 0, 0, 0, 0, self.ticked)

    def _known(self, target: Target) -> None:
        if str(target.spec) not in self.kept:
            raise NamespaceError(f"the agent does not know {target.spec}")
