"""The test that pytest collects when it is asked for the suite; see `netapply.conformance.plugin`."""

from __future__ import annotations

import pytest

from netapply.conformance.case import Case
from netapply.conformance.runner import Runner


def test_case(conformance_runner: Runner, conformance_case: Case) -> None:
    """One case on one backend."""
    outcome = conformance_runner.run(conformance_case)
    if outcome.status == "skipped":
        pytest.skip(outcome.skipped)
    if outcome.differences:
        pytest.fail("\n".join(outcome.differences), pytrace=False)
