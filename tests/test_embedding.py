"""The program of docs/embedding.md, run as it stands there."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.netns import PATIENCE, Netns

DOCUMENT = Path(__file__).parent.parent / "docs" / "embedding.md"


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    """The command that runs it."""
    (text,) = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "example.py").write_text(text)
    (tmp_path / "plan.yaml").write_text("apiVersion: netapply/v1\n")
    return [
        sys.executable,
        str(tmp_path / "example.py"),
        "--state",
        str(tmp_path / "state"),
        str(tmp_path / "plan.yaml"),
    ]


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str], beginning: str) -> str:
    assert process.stdout
    for text in process.stdout:
        if text.startswith(beginning):
            return text
    raise AssertionError(f"it ended without: {beginning}")


def test_it_applies_heals_and_says_so_and_ends_with_the_rules_in_place(program: list[str], named_netns: Netns) -> None:
    name = named_netns.name
    with running([*program, name]) as process:
        assert line(process, name) == f"{name}: changed=True by nftables\n"
        named_netns.run("nft", "flush", "ruleset")
        assert "differences by nft (" in line(process, f"{name}: ")
        assert "healed in" in line(process, f"{name}: ")
        process.send_signal(signal.SIGTERM)
        assert line(process, name) == f"{name}: inplace, healed 1 times\n"
        assert process.wait(PATIENCE) == 0
    assert "table inet netapply" in named_netns.run("nft", "list", "ruleset")
    with running([*program, name]) as process:
        assert line(process, name) == f"{name}: changed=False by nftables\n"


def test_an_error_has_its_next_step(program: list[str]) -> None:
    done = subprocess.run([*program, "no-such"], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 1
    assert "no-such does not exist; next: see `ip netns list`" in done.stdout
