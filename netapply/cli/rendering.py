"""A plan as text: what the dialect's own tool would restore, and what stands beside the rules."""

from __future__ import annotations

from netapply.backend import Backend
from netapply.compiler import compile_plan, compile_routing
from netapply.plan import CapturePlan
from netapply.routing import NOTHING, Standing
from netapply.routing import plan as routing_steps
from netapply.values import NamedTuple


class Rendering(NamedTuple):
    """`text` is the rules; `routing` the steps in ip(8)'s words."""

    text: str
    routing: tuple[str, ...]

    @property
    def lines(self) -> str:
        """All of it, the routing as comments."""
        return "\n".join([self.text.rstrip("\n"), *(f"# beside the rules: {step}" for step in self.routing)])


def rendering(plan: CapturePlan, backend: Backend, layout: str) -> Rendering:
    """What applying the plan to an empty namespace puts there. Touches nothing."""
    wanted = compile_routing(plan)._replace(sysctls=())
    steps = routing_steps(Standing(NOTHING, NOTHING), wanted)
    return Rendering(backend.render(compile_plan(plan, backend.dialect, layout)), tuple(step.name for step in steps))
