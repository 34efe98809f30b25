"""docs/operating.md, held against the code: log lines, alerts, checks. Its commands are run by tests/systemd."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import get_args

import yaml

from netapply.agent import service
from netapply.agent.events import Event
from netapply.api import open_capture
from netapply.doctor import Sight, examine
from netapply.planfile import load_plan
from tests.netns import Netns
from tests.test_docs import rows

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "operating.md"


def first_cells(title: str) -> list[str]:
    """Of the table below a heading, without its head; a prompt is no heading."""
    text = GUIDE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return [row[0] for row in rows(text)][2:]


def logged() -> set[str]:
    """What the agent may say in its log: the words of each call, and the events that it passes on."""
    said = {each._field_defaults["kind"] for each in get_args(Event)} - service._TOLD
    for path in (ROOT / "netapply" / "agent").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("_log."):
                word = call.args[0]
                said |= {word.value} if isinstance(word, ast.Constant) else set()
    return said


def test_every_line_of_the_log_is_explained_and_no_other() -> None:
    told = [name for cell in first_cells("Log") for name in re.findall(r"`([^`]+)`", cell)]
    assert len(told) == len(set(told))
    assert set(told) == logged()


def test_every_check_of_doctor_is_in_the_table(netns: Netns) -> None:
    plan = load_plan("apiVersion: netapply/v1\n", format="yaml")
    with open_capture(netns.path) as capture:
        names = {each.check for each in examine(Sight(capture, plan))} - {"namespace"}
    told = [name.strip() for cell in first_cells("Doctor") for name in cell.split(",")]
    assert {name for name in names if name not in told and f"{name.split()[0]} …" not in told} == set()
    assert {name for name in told if "…" not in name} <= names


def test_every_alert_has_its_first_look() -> None:
    (group,) = yaml.safe_load((ROOT / "docs/prometheus/alerts.yaml").read_text())["groups"]
    text = GUIDE.read_text()
    named = re.findall(r"Netapply\w+", text[text.index("| Alert |") : text.index("## Doctor")])
    assert sorted(named) == sorted(rule["alert"] for rule in group["rules"])
