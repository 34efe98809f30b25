"""The real Prometheus scrapes the real agent: by the configuration, with the alerts and the dashboard of the docs."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from netapply.lab import Place
from netapply.lab.namespaces import lab_names, sweep
from tests import netns as namespaces
from tests.envoy import get
from tests.netns import PATIENCE
from tests.prometheus import Prometheus, promtool, tool
from tests.test_agent_command import Running

DOCS = Path(__file__).parent.parent / "docs" / "prometheus"
DATA = Path(__file__).parent / "data"
METRICS = 9469  # as in docs/prometheus/prometheus.yaml, and the agent's socket unit
FAST = "200ms"


def alerts() -> dict[str, Any]:
    """The rules of the docs, by name."""
    (group,) = yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


class Scene:
    """An agent and a Prometheus in a namespace of their own, and a pod that the agent keeps."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        tool("prometheus")
        sweep()
        self.home = stack.enter_context(Place(lab_names(("monitor",))[0]))
        self.home.inside(lambda: subprocess.run(["ip", "link", "set", "lo", "up"], check=True))
        self.pod = stack.enter_context(namespaces.named())
        self.agent = Running(place)
        stack.callback(self.agent.stop)
        self.start_agent()
        configuration = yaml.safe_load((DOCS / "prometheus.yaml").read_text())
        configuration["global"] = {"scrape_interval": FAST, "scrape_timeout": FAST, "evaluation_interval": FAST}
        configuration["rule_files"] = [str(DOCS / name) for name in configuration["rule_files"]]
        self.prometheus = Prometheus(self.home, place, configuration)
        stack.callback(self.prometheus.stop)
        self.prometheus.start()

    def start_agent(self) -> None:
        self.agent.start(f"--metrics=127.0.0.1:{METRICS}", before=("nsenter", f"--net={self.home.path}"))

    def sees(self, expression: str, value: object) -> None:
        """Wait until Prometheus does: labels' values and the value of each series."""
        self._until(lambda: self.prometheus.query(expression) == value, lambda: str(self.prometheus.query(expression)))

    def alerted(self, name: str) -> None:
        """Wait until it would be an alert, were it so for long enough."""
        self._until(lambda: name in self._alerts(), lambda: str(self._alerts()))

    def _alerts(self) -> dict[str, str]:
        return {each["labels"]["alertname"]: each["state"] for each in self.prometheus.ask("/api/v1/alerts")["alerts"]}

    def _until(self, look: Callable[[], bool], otherwise: Callable[[], str]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not look():
            assert time.monotonic() < deadline, otherwise()
            time.sleep(0.1)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, _swept: None) -> Iterator[Scene]:
    with ExitStack() as stack:
        yield Scene(tmp_path_factory.mktemp("prometheus"), stack)


def file_plan(scene: Scene, text: str = "") -> None:
    plan = f"apiVersion: netapply/v1\nnamespaces: [{{path: {scene.pod.path}}}]\n{text}"
    (scene.agent.plans / "pod.yaml").write_text(plan)


def test_it_is_scraped_and_its_states_heals_and_decisions_are_seen(scene: Scene) -> None:
    scene.sees('up{job="netapply"}', {(): 1.0})
    file_plan(scene, "outbound: {ports: {exclude: [15020]}}\n")
    scene.sees('netapply_namespaces{state="inplace"}', {("inplace",): 1.0})
    scene.pod.run("nft", "flush", "ruleset")
    scene.sees('netapply_heals_total{process="nft"}', {("nft",): 1.0})
    scene.sees("netapply_heal_duration_seconds_count", {(): 1.0})
    (told,) = scene.prometheus.query("histogram_quantile(0.99, netapply_heal_duration_seconds_bucket)").values()
    assert 0 < told < 10
    scene.sees('netapply_decision_packets_total{path="outbound.ports.exclude"}', {("outbound.ports.exclude",): 0.0})
    (job,) = scene.prometheus.ask("/api/v1/targets")["activeTargets"]
    assert (job["health"], job["lastError"]) == ("up", "")


def test_promtool_has_nothing_to_say_against_what_the_agent_tells(scene: Scene) -> None:
    file_plan(scene)
    scene.sees('netapply_namespaces{state="inplace"}', {("inplace",): 1.0})
    promtool("check", "metrics", stdin=get(scene.home, ("127.0.0.1", METRICS), "/metrics")[1])


def test_every_expression_of_the_dashboard_is_one(scene: Scene) -> None:
    dashboard = json.loads((DOCS / "dashboard.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(found) > 12
    for expression in found:
        scene.prometheus.query(expression.replace("$instance", ".*").replace("$__rate_interval", "5s"))
    panels = [expression for expression in found if not re.search(r"heals_total|decision_|quantile", expression)]
    for expression in panels:  # these have something to show from the start
        shown = expression.replace("$instance", ".*").replace("$__rate_interval", "30s").replace("[1h]", "[30s]")
        assert scene.prometheus.query(shown), shown


def test_a_wrong_file_and_an_agent_that_died_are_alerts(scene: Scene) -> None:
    (group,) = scene.prometheus.ask("/api/v1/rules")["groups"]
    assert {rule["name"] for rule in group["rules"]} == set(alerts())
    wrong = scene.agent.plans / "wrong.yaml"
    wrong.write_text("apiVersion: netapply/v1\nnamespaces: [{path: nobody}]\ninbound: {mode: odd}\n")
    scene.alerted("NetapplyPlanFileRejected")
    wrong.unlink()
    assert scene.agent.process
    scene.agent.process.kill()
    scene.agent.process.wait(PATIENCE)
    scene.sees('up{job="netapply"}', {(): 0.0})
    scene.alerted("NetapplyDown")
    scene.start_agent()
    scene.sees('up{job="netapply"}', {(): 1.0})
    (group,) = scene.prometheus.ask("/api/v1/rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} == {"ok"}


def test_the_configuration_of_the_docs_is_one() -> None:
    promtool("check", "config", str(DOCS / "prometheus.yaml"))


def test_every_alert_comes_when_it_should_and_not_before() -> None:
    tests = yaml.safe_load((DATA / "alerts_test.yaml").read_text())["tests"]
    asked = [(each["alertname"], bool(each["exp_alerts"])) for test in tests for each in test["alert_rule_test"]]
    assert set(asked) == {(name, comes) for name in alerts() for comes in (True, False)}
    promtool("test", "rules", str(DATA / "alerts_test.yaml"))
