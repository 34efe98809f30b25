"""The bench measures what it says: the same rules by every way, everything in turn, and bars that can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.bars import Bar
from bench.measure import interleaved, spread
from bench.operations import WAYS, subjects_of
from bench.plans import PLANS
from bench.subjects import OPERATIONS
from netapply.backend import BUILT_IN
from netapply.lab import Place

LISTINGS = {
    "nftables": ("nft list ruleset",),
    "iptables-nft": ("iptables-nft-save", "ip6tables-nft-save"),
    "iptables-legacy": ("iptables-legacy-save", "ip6tables-legacy-save"),
}


def test_a_spread_is_the_median_and_what_one_in_ten_is_beyond() -> None:
    assert spread([5.0, 1.0, 9.0]) == (5.0, 1.0, 9.0, 3)
    assert spread(list(range(101))) == (50, 10, 90, 101)


def test_everything_has_a_turn_in_each_round_stage_by_stage_and_another_begins() -> None:
    log: list[str] = []

    def turn(name: str) -> float:
        log.append(name)
        return 1.0

    first = {name: (lambda name=name: turn(name)) for name in "ab"}
    second = {name: (lambda name=name: turn(name)) for name in "cd"}
    times = interleaved([first, second], rounds=2, warm_up=0)
    assert "".join(log) == "abcd" + "badc"
    assert {name: each.times for name, each in times.items()} == dict.fromkeys("abcd", 2)


@pytest.mark.parametrize(("bar", "met"), [
    (Bar("", 1.3, 1.3), True),
    (Bar("", 1.31, 1.3), False),
    (Bar("", 25, 25, least=True), True),
    (Bar("", 24, 25, least=True), False),
    (Bar("what cannot be measured", None, 5), False),
])  # fmt: skip
def test_a_bar_is_met_or_not(bar: Bar, met: bool) -> None:
    assert bar.met is met


@pytest.mark.parametrize("backend", BUILT_IN)
@pytest.mark.parametrize("plan", PLANS)
def test_every_way_leads_to_the_same_rules_after_each_operation(backend: str, plan: str) -> None:
    """The tools are told the rules as text, the floor is what our backend sent: the kernel lists the same."""
    with ExitStack() as stack:
        spots, subjects = subjects_of(stack, backend, PLANS[plan])
        seen = []
        for operation in OPERATIONS:
            for subject in subjects.values():
                subject.do(operation)
            listings = {way: _listed(spot, backend) for way, spot in spots.items()}
            assert set(listings) == set(WAYS)
            assert listings == dict.fromkeys(WAYS, listings["whole"])
            seen.append(listings["whole"])
        assert len(set(seen)) == 3


def _listed(spot: Place, backend: str) -> str:
    """The rules as the dialect's tools list them: empty tables that stay are nobody's."""
    command = ["sh", "-c", "; ".join(LISTINGS[backend])]
    text = spot.inside(lambda: subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)).stdout
    lines = [line for line in text.splitlines() if line[:1] not in ("#", ":", "*") and line != "COMMIT"]
    return "\n".join(lines)


def test_the_command_writes_what_it_prints(tmp_path: Path) -> None:
    """One part in quick mode; --strict tells by the exit code whether its bars are met."""
    output = tmp_path / "bench.json"
    command = [sys.executable, "-m", "bench", "--quick", "--only", "dataplane", "--strict", "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    written = json.loads(output.read_text())
    assert [bar["name"] in done.stdout for bar in written["bars"]] == [True] * 3
    assert set(written["dataplane"]["nftables with"]) == {"median", "low", "high", "times"}
    assert done.returncode == (0 if all(bar["met"] for bar in written["bars"]) else 1)
