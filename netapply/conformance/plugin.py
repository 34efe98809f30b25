"""The suite under pytest: one test for each case.

    pytest -p netapply.conformance.plugin --pyargs netapply.conformance.suite --netapply-backend NAME

A case that fails tells every difference; one that cannot run here is skipped with what is missing. It is not loaded by
itself: `-p` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from netapply.conformance.case import LEVELS, Level
from netapply.conformance.cases import cases_of
from netapply.conformance.runner import Runner

FIXTURE = "conformance_case"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Which backend, and how much of the suite."""
    group = parser.getgroup("netapply", "conformance of a netapply backend")
    group.addoption("--netapply-backend", metavar="NAME", help="the backend, built in or registered by anybody")
    group.addoption("--netapply-level", choices=LEVELS, default="core", help="default core")
    group.addoption("--netapply-case", default="", metavar="PATTERN", help="only cases of this name or glob")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case of the level, where a test asks for cases."""
    if FIXTURE in metafunc.fixturenames:
        config = metafunc.config
        wanted = str(config.getoption("--netapply-level"))
        level: Level = next(each for each in LEVELS if each == wanted)
        cases = cases_of(level, str(config.getoption("--netapply-case")))
        metafunc.parametrize(FIXTURE, cases, ids=[case.name for case in cases])


@pytest.fixture(scope="session")
def conformance_runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """The runner of the backend that was asked for."""
    backend = request.config.getoption("--netapply-backend")
    if not backend:
        raise pytest.UsageError("which backend? say --netapply-backend NAME")
    with Runner(backend) as runner:
        yield runner
