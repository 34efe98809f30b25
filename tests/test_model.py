"""Random plans and flows, on which specification, rules, counters and packets agree; and the suite's own proof."""

from __future__ import annotations

import json
from typing import Any

import pytest

from netapply.backend import BUILT_IN
from netapply.compiler import decisions
from netapply.conformance.case import Case
from netapply.conformance.model import arbitrary_cases, on_paper, spelled
from netapply.conformance.mutations import mutations
from netapply.conformance.proof import prove
from netapply.conformance.runner import Runner
from netapply.conformance.shrink import shown, shrink
from netapply.conformance.stage import plan_from
from netapply.plan import API_VERSION
from netapply.planfile import load_plan
from netapply.ruleset import Return

SEED, PLANS, FLOWS = 4, 40, 20  # `make model` tries a thousand, and other seeds
#: A few mistakes of each kind; `make mutations` makes them all.
MISTAKES = (
    "lost: inversion of an address",
    "a port range ends one earlier",
    "tproxy without",
    "no route",
    "leaves a chain",
)


def test_the_same_seed_gives_the_same_cases_and_each_is_a_plan_file() -> None:
    cases = [*arbitrary_cases(SEED, 30, 5)]
    assert cases == [*arbitrary_cases(SEED, 30, 5)]
    assert cases != [*arbitrary_cases(SEED + 1, 30, 5)]
    for case in cases:
        plan = plan_from(case.plan)
        assert spelled(plan) == case.plan
        assert load_plan(json.dumps({"apiVersion": API_VERSION, **spelled(plan)}), format="json") == plan


@pytest.mark.parametrize("backend", BUILT_IN)
def test_four_answers_agree(backend: str, figure: Any) -> None:
    with Runner(backend) as runner:
        report = runner.report([runner.run(case) for case in arbitrary_cases(SEED, PLANS, FLOWS)])
    assert {each.case: each.differences for each in report.outcomes if each.differences} == {}
    figure(f"{report.probes} probes over {report.count('passed')} plans, none disagrees, {report.seconds:.0f} s")


def test_a_disagreement_shrinks_to_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that forgets excluded ports: what is left is a plan with one excluded port, and a flow to it."""
    exempt = decisions.exempt

    def forgetful(*arguments: Any) -> Any:
        return (
            rule for rule in exempt(*arguments) if rule.path != "outbound.ports.exclude" or rule.statement != Return()
        )

    def disagrees(case: Case) -> bool:
        return any(on_paper(case, plan_from(case.plan), case.probes))

    monkeypatch.setattr(decisions, "exempt", forgetful)
    found = next(case for case in arbitrary_cases(SEED + 1, 400, FLOWS) if disagrees(case))
    small = shrink(found, disagrees)
    (probe,) = small.probes
    assert set(small.plan) == {"outbound"}
    assert {*small.plan["outbound"]} <= {"ports"}
    assert small.plan["outbound"]["ports"]["exclude"]
    assert str(probe.port) in shown(small)


def test_there_are_at_least_60_mistakes_each_with_a_name_of_its_own() -> None:
    names = [each.name for each in mutations()]
    assert len(names) == len(set(names)) >= 60


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistaken_backend_fails_a_case(mistake: str, figure: Any) -> None:
    for found in prove("nftables", mistake):
        assert found.case, found
        figure(f"{found.mutation} → {found.case}")
