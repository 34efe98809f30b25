"""What takes bytes takes any bytes: the kept inputs again, and some seconds of new ones. `make fuzz` takes minutes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import pytest

from netapply_iptables_legacy import tables
from tests.fuzz.engine import Target, attempt, fuzz, seeds_of
from tests.fuzz.targets import TARGETS

#: Seconds for all targets together.
SHORT = 20


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Bytes of the kernel's go with one header; with another, as here, nobody may remember them."""
    yield
    tables._seen.clear()


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_kept_inputs_are_refused_or_understood(target: Target) -> None:
    said = [said for pieces in seeds_of(target.name) if (said := attempt(target, pieces)[1])]
    assert not said


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_changed_inputs_are_refused_or_understood(target: Target, figure: Callable[[str], None]) -> None:
    seed = 0 if os.environ.get("CI") else random.randrange(1 << 32)
    outcome = fuzz(target, SHORT / len(TARGETS), seed, guided=False)
    figure(f"{outcome.tries} inputs, {outcome.refused} refused, seed {seed}")
    assert not [(found.said, found.pieces) for found in outcome.found]


def test_a_fault_is_found_and_told_by_its_place() -> None:
    def broken(pieces: tuple[bytes, ...]) -> object:
        return pieces[0].index(b"}")

    target = next(each for each in TARGETS if each.name == "plan")._replace(run=broken)
    (finding,) = fuzz(target, 0.2, 1).found
    assert "ValueError" in finding.said
    assert b"}" not in finding.pieces[0]


def test_the_same_seed_makes_the_same_inputs() -> None:
    def inputs(seed: int) -> list[bytes]:
        tried: list[bytes] = []

        def note(pieces: tuple[bytes, ...]) -> object:
            tried.append(pieces[0])
            return None

        target = next(each for each in TARGETS if each.name == "history")._replace(run=note)
        fuzz(target, 0.05, seed, guided=False)
        return tried[:20]

    assert inputs(7) == inputs(7) != inputs(8)
