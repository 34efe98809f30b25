"""Fixtures: namespaces of the test's own, and a lock file that is not the machine's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

from tests import netns as namespaces
from tests.netns import Netns


@pytest.fixture(autouse=True, scope="session")
def private_xtables_lock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """/run/xtables.lock is shared by all namespaces of the machine; no test, and no tool it runs, may take it."""
    path = str(tmp_path_factory.mktemp("xtables") / "lock")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XTABLES_LOCKFILE", path)
        yield path


@pytest.fixture(autouse=True, scope="session")
def private_state_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The journal of a test is nobody else's."""
    path = tmp_path_factory.mktemp("state", numbered=True)
    path.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETAPPLY_STATE_DIR", str(path))
        yield str(path)


# What lands must not depend on luck: CI tries the same examples each time, everybody else new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

_FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Tell a measured figure at the end of the run, whether or not the test held."""
    figures = request.config.stash.setdefault(_FIGURES, [])
    return lambda text: figures.append(f"{request.node.name}: {text}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the figures that the tests measured."""
    if figures := config.stash.get(_FIGURES, []):
        terminalreporter.section("figures")
        for line in figures:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def _swept() -> None:
    namespaces.sweep()


@pytest.fixture
def make_netns() -> Iterator[Callable[..., Netns]]:
    """Make namespaces, as many as the test wants; `lo=False` leaves `lo` down."""
    made: list[Netns] = []

    def make(*, lo: bool = True) -> Netns:
        try:
            made.append(namespaces.make(lo=lo))
        except PermissionError:
            pytest.skip("making a network namespace takes CAP_SYS_ADMIN")
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def netns(make_netns: Callable[..., Netns]) -> Netns:
    """A new network namespace with `lo` up, gone after the test."""
    return make_netns()


@pytest.fixture
def named_netns(_swept: None) -> Iterator[Netns]:
    """A new network namespace with a name that `ip netns` knows."""
    with namespaces.named() as netns:
        yield netns
