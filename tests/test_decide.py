"""The specification and the compiled rules agree, for any plan, flow and kind of dialect."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from netapply.backend import Dialect
from netapply.compiler import compile_plan
from netapply.decide import decide
from netapply.evaluate import evaluate
from netapply.flow import Flow
from netapply.plan import CapturePlan
from tests.strategies import flows, plans

DIALECTS = {"split": Dialect("split", 15, 3), "inet": Dialect("inet", 0, 2)}


@pytest.mark.parametrize("kind", DIALECTS)
@settings(max_examples=400, deadline=None)
@given(plan=plans, flow=flows())
def test_walking_the_rules_gives_what_the_plan_decides(kind: str, plan: CapturePlan, flow: Flow) -> None:
    trace = evaluate(compile_plan(plan, DIALECTS[kind]), flow)
    assert trace.decision.same_as(decide(plan, flow)), (trace.decision, decide(plan, flow), trace.decided)
