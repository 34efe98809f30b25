"""A backend that is not ours, found by its name under the entry-point group, passes level core of the suite."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from netapply.backend import ENTRY_POINTS, find_backend
from netapply.conformance.cases import cases_of
from netapply.conformance.runner import Runner


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What pip leaves of an installed package, as much as counts here."""
    site = tmp_path_factory.mktemp("site")
    about = site / "nft_text-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: nft-text\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nnft-text = tests.sample_backend:BACKEND\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(site)])
        find_backend.cache_clear()
        yield
    find_backend.cache_clear()


def test_it_is_short() -> None:
    assert len(Path(__file__).with_name("sample_backend.py").read_text().splitlines()) < 150


def test_it_is_found_by_its_name_and_passes_level_core(figure: Any) -> None:
    with Runner("nft-text") as runner:
        report = runner.report([runner.run(case) for case in cases_of("core")])
    failed = {each.case: each.differences[:3] for each in report.outcomes if each.status == "failed"}
    assert not failed
    skipped = {each.case: each.skipped for each in report.outcomes if each.status == "skipped"}
    assert all("cgroup" in reason for reason in skipped.values()), skipped
    figure(f"{report.count('passed')} cases, {len(skipped)} skipped, {report.probes} probes, {report.seconds:.0f} s")
