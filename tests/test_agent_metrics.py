"""What Prometheus reads: its form, its names, and that what alerts and dashboard speak of is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from netapply.agent.events import Cause
from netapply.agent.model import AgentConfig, NamespaceStatus
from netapply.agent.prometheus import Count, Decisions, exposition
from netapply.agent.tally import MOST_PROCESSES, OTHERS, Tally
from netapply.errors import NamespaceError
from netapply.results import RuleCounter
from tests.agent_double import AgentDouble
from tests.prometheus import promtool

DOCS = Path(__file__).parent.parent / "docs" / "prometheus"
NAME = re.compile(r"\bnetapply_\w+")


def rule(path: str, packets: int, position: int = 0) -> RuleCounter:
    return RuleCounter("inet", "netapply", "nat-output", position, "a rule", packets, 100 * packets, path)


@pytest.fixture
async def text() -> str:
    agent, decisions = AgentDouble(AgentConfig()), Decisions()
    decisions.add("pod-1", [rule("outbound.cidrs.exclude[3]", 5)])
    return exposition(agent.metrics(), decisions)


def samples(text: str) -> dict[str, float]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


async def test_every_sample_follows_its_help_and_type(text: str) -> None:
    known: set[str] = set()
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            name, kind = line.split()[2:]
            known = {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
            assert (kind == "counter") == name.endswith("_total")
        elif not line.startswith("#"):
            assert re.match(r"\w+", line)[0] in known


async def test_histograms_add_up_and_odd_process_names_are_escaped(text: str) -> None:
    found = samples(text)
    buckets = [found[f'netapply_heal_duration_seconds_bucket{{le="{bound}"}}'] for bound in ("0.001", "0.01", "+Inf")]
    assert buckets == [1, 3, 6]
    assert found["netapply_heal_duration_seconds_count"] == 6
    assert found[r'netapply_heals_total{process="a\"\\\n"}'] == 1
    assert found['netapply_decision_packets_total{path="outbound.cidrs.exclude"}'] == 5


def test_processes_that_call_themselves_new_names_share_one_count() -> None:
    tally = Tally()
    for number in range(MOST_PROCESSES + 1000):
        tally.healed(f"p{number}", 0.001)
    heals = tally.shown([], fail_open=0.0, rejected_files=0, events_lost=0).heals
    assert len(heals) == MOST_PROCESSES + 1
    assert heals[OTHERS] == 1000


async def test_a_decision_only_grows_when_its_rules_are_replaced() -> None:
    decisions = Decisions()
    decisions.add("a", [rule("outbound", 10), rule("outbound", 5, 1)])
    decisions.add("b", [rule("outbound", 1)])
    decisions.add("a", [rule("outbound", 3)])  # healed: counted from zero
    assert decisions.totals["outbound"] == Count(19, 1900)


async def test_a_scrape_reads_for_a_bounded_time_and_the_longest_unread_first() -> None:
    read: list[str] = []

    class Many:
        def status(self) -> tuple[NamespaceStatus, ...]:
            blank = NamespaceStatus("", "", None, "inplace", "", "", "nftables", "", 0, 0, Cause(1, "x", 1), 0, "")
            return tuple(blank._replace(name=name) for name in "abc")

        async def counters(self, target: str) -> tuple[RuleCounter, ...]:
            read.append(target)
            if target == "b":
                raise NamespaceError("gone")
            return (rule("outbound", 1),)

    decisions = Decisions(seconds=0.0)
    for _ in range(4):
        await decisions.refresh(Many())
    assert sorted(read[:3]) == ["a", "b", "c"]
    assert read[3] == read[0]
    assert decisions.totals["outbound"].packets == 2


async def test_promtool_accepts_the_metrics(text: str) -> None:
    promtool("check", "metrics", stdin=text)


def test_promtool_accepts_the_alerts() -> None:
    promtool("check", "rules", str(DOCS / "alerts.yaml"))


@pytest.mark.parametrize("name", ["alerts.yaml", "dashboard.json"])
async def test_what_alerts_and_dashboard_speak_of_is_told(text: str, name: str) -> None:
    source = (DOCS / name).read_text()
    loaded = yaml.safe_load(source) if name.endswith("yaml") else json.loads(source)
    expressions: list[str] = []

    def walk(value: object) -> None:
        if isinstance(value, dict):
            expressions.extend(str(value[key]) for key in ("expr", "query") if isinstance(value.get(key), str))
            for each in value.values():
                walk(each)
        elif isinstance(value, list):
            for each in value:
                walk(each)

    walk(loaded)
    told = {re.match(r"\w+", line)[0] for line in text.splitlines() if not line.startswith("#")}
    wanted = {metric for expression in expressions for metric in NAME.findall(expression)}
    assert wanted
    assert wanted <= told
