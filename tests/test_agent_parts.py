"""The parts of the agent that need no kernel: budgets, places, plan files, what is kept, who is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netapply import CapturePlan, fingerprint, load_plan
from netapply.agent import Budget, store
from netapply.agent import desired as desired_module
from netapply.agent.budget import Account
from netapply.agent.desired import Desired, Request
from netapply.agent.events import Vanished
from netapply.agent.held import Wanted
from netapply.agent.inotify import Inotify
from netapply.agent.places import find_place
from netapply.agent.planfiles import (
    PlanFile,
    Selector,
    dump_plan_file,
    found_by,
    is_plan_file,
    matches_labels,
    parse_plan_file,
    read_plan_file,
)
from netapply.agent.subscribers import Subscribers
from netapply.agent.trials import Before
from netapply.errors import NamespaceError, NetapplyError, PlanError

MARK = fingerprint(CapturePlan())


@given(st.lists(st.floats(0, 3), min_size=1, max_size=200))
def test_no_window_sees_more_heals_than_the_budget_and_one(rests: list[float]) -> None:
    budget = Budget(heals=5, window=10, quarantine=4, longest=16)
    account, now, heals = Account(budget), 100.0, []
    for rest in rests:
        now += rest
        heals.append(now)
        now += account.healed(now)
    for moment in heals:
        assert len([each for each in heals if moment - budget.window < each <= moment]) <= 2 * (budget.heals + 1)


def test_quarantine_doubles_up_to_its_longest_and_forgets() -> None:
    account = Account(Budget(heals=1, window=1, quarantine=2, longest=5))
    account.healed(0)
    assert account.healed(0.1) == 2
    account.healed(3)
    assert account.healed(3.1) == 4
    account.healed(8)
    assert account.healed(8.1) == 5
    account.healed(100)
    assert account.healed(100.1) == 2


def test_failures_wait_longer_each_time_until_one_succeeds() -> None:
    account = Account(Budget(backoff=1, longest=3))
    assert [account.failed() for _ in range(3)] == [1, 2, 3]
    account.succeeded()
    assert account.failed() == 1


def test_places() -> None:
    assert find_place("pod-1") == find_place("/run/netns/pod-1")._replace(spec="pod-1")
    assert find_place("/run/netns/pod-1").name == "pod-1"
    assert find_place("pid:12").process == 12
    with pytest.raises(NamespaceError):
        find_place("pid:x")
    with pytest.raises(NamespaceError):
        find_place("")


@pytest.mark.parametrize(
    ("value", "labels", "matches"),
    [
        ("app=web", {"app": "web"}, True),
        ("app=web,tier=front", {"app": "web", "tier": "front", "x": "y"}, True),
        ("app=web, tier=front", {"app": "web"}, False),
        ("app=", {"app": "web"}, False),
    ],
)
def test_labels_all_have_to_match(value: str, labels: dict[str, str], matches: bool) -> None:
    assert matches_labels(value, labels) is matches


def test_editors_leavings_are_no_plan_files() -> None:
    names = ("a.yaml", ".a.yaml.swp", "a.yaml~", "b.json", "c.toml.dpkg-new", "#d.yaml", ".e.yaml")
    assert list(filter(is_plan_file, names)) == ["a.yaml", "b.json"]


@pytest.mark.parametrize("text", ["{}", "outbound: {cidrs: {exclude: [10.0.0.0/8]}}", "inbound: {mode: tproxy}"])
@pytest.mark.parametrize("backend", ["auto", "nftables"])
@pytest.mark.parametrize("fail", ["open", "closed"])
def test_what_is_dumped_is_parsed_the_same(text: str, backend: str, fail: str) -> None:
    plan = load_plan("apiVersion: netapply/v1\n" + text.replace("{}", ""))
    selectors = (Selector("path", "pod-1"), Selector("label", "app=web"))
    file = PlanFile("f", selectors, Wanted(plan, backend, "netapply", fingerprint(plan), "f", fail))
    assert parse_plan_file("f", dump_plan_file(file)) == file


@pytest.mark.parametrize(
    "raw", [None, [], {}, "x", [{}], [{"path": ""}], [{"path": "a", "glob": "b"}], [{"label": "x"}]]
)
def test_selectors_that_are_wrong_are_faults(raw: object) -> None:
    with pytest.raises(PlanError) as told:
        parse_plan_file("f", {"apiVersion": "netapply/v1", "namespaces": raw})
    assert told.value.faults[0].path.startswith("namespaces")


def test_a_file_without_namespaces_is_told_so() -> None:
    with pytest.raises(PlanError, match="namespaces"):
        parse_plan_file("f", {"apiVersion": "netapply/v1"})


def test_an_unknown_field_of_a_plan_file_is_told_with_all_that_there_are() -> None:
    document = {
        "apiVersion": "netapply/v1",
        "namespaces": [{"path": "x"}],
        "odd": 1,
        "layuot": "istio",
        "proxy": {"q": 1},
    }
    with pytest.raises(PlanError) as raised:
        parse_plan_file("f", document)
    said = {fault.path: fault.accepted for fault in raised.value.faults}
    assert said["odd"].endswith("prefer, namespaces, backend, layout, fail")
    assert said["layuot"] == "did you mean layout?"
    assert "namespaces" not in said["proxy.q"]


def test_a_glob_finds_names_and_nothing_where_there_is_no_directory(tmp_path: Path) -> None:
    for name in ("cni-1", "cni-2", "other"):
        (tmp_path / name).touch()
    assert found_by(Selector("glob", f"{tmp_path}/cni-*")) == (f"{tmp_path}/cni-1", f"{tmp_path}/cni-2")
    assert found_by(Selector("glob", f"{tmp_path}/nonesuch/*")) == ()


def test_a_pid_file_of_nonsense_finds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    assert found_by(Selector("pidFile", str(path))) == ()
    path.write_text("12; rm -rf /")
    assert found_by(Selector("pidFile", str(path))) == ()
    path.write_text("12\n")
    assert found_by(Selector("pidFile", str(path))) == ("pid:12",)


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    desired = Desired("")
    wanted = Wanted(CapturePlan(), fingerprint=MARK)
    for name, wish in (("pod-1", wanted), ("pod-2", None)):
        place = find_place(name)
        desired.requests[place.key] = Request(place, {"app": name}, wish)
    trial = find_place("pod-3")
    desired.requests[trial.key] = Request(trial, {}, wanted)
    process = find_place("pid:1")
    desired.requests[process.key] = Request(process, {}, wanted)
    store.save(str(tmp_path / "state"), desired.kept({trial.key: Before(None, 2)}))
    kept, said = store.load(str(tmp_path / "state"))
    again = Desired("")
    assert said == ""
    unconfirmed: dict[str, Before] = {}
    assert again.restore(kept, {}, unconfirmed.__setitem__) == ()
    assert unconfirmed == {trial.key: Before(None, 2)}
    found = {key: (request.labels, request.wanted) for key, request in again.requests.items()}
    assert found == {
        "/run/netns/pod-1": ({"app": "pod-1"}, wanted),
        "/run/netns/pod-2": ({"app": "pod-2"}, None),
        "/run/netns/pod-3": ({}, None),
    }


def test_a_state_directory_that_others_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(NetapplyError):
        store.save(str(tmp_path), store.Kept())
    assert store.load(str(tmp_path))[1]


def test_a_link_for_the_state_is_not_followed(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "elsewhere").write_text("{}")
    (tmp_path / "desired.json").symlink_to(tmp_path / "elsewhere")
    assert store.load(str(tmp_path))[1]
    store.save(str(tmp_path), store.Kept())
    assert (tmp_path / "elsewhere").read_text() == "{}"


def test_names_that_come_and_go_are_seen(tmp_path: Path) -> None:
    inotify = Inotify()
    try:
        assert not inotify.watch(str(tmp_path / "nonesuch"))
        assert inotify.watch(str(tmp_path))
        (tmp_path / "a").touch()
        os.rename(tmp_path / "a", tmp_path / "b")
        (tmp_path / "b").unlink()
        assert {name for _, name in inotify.read()} == {"a", "b"}
        assert list(inotify.read()) == []
    finally:
        inotify.close()


async def test_a_subscriber_that_lags_gets_the_newest_and_the_number_of_the_others() -> None:
    subscribers = Subscribers(3)
    events = subscribers.subscribe()
    for number in range(10):
        subscribers.tell(Vanished(str(number), 0.0))
    subscribers.close()
    told = [event async for event in events]
    assert [event.kind for event in told] == ["lost", "vanished", "vanished", "vanished"]
    assert told[0].missed == 7
    assert [event.namespace for event in told[1:]] == ["7", "8", "9"]
    assert subscribers.lost == 7


def test_of_many_plan_files_those_that_changed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{index}.yaml" for index in range(9)]
    for path in paths:
        path.write_text("apiVersion: netapply/v1\nnamespaces: [{path: pod-1}]\n")
    paths[0].write_text("torn")
    read: list[str] = []

    def noted(path: str) -> PlanFile:
        read.append(path)
        return read_plan_file(path)

    monkeypatch.setattr(desired_module, "read_plan_file", noted)
    desired = Desired(str(tmp_path))
    assert len(desired.read_files()) == len(paths)
    assert (desired.read_files(), len(read)) == ((), 2 * len(paths)), "so young that a change might not show"
    monkeypatch.setattr(desired_module, "_YOUNG", -1.0)
    desired.read_files()
    read.clear()
    paths[1].write_text("apiVersion: netapply/v1\nnamespaces: [{path: pod-2}]\n")
    paths[2].unlink()
    assert [change.path for change in desired.read_files()] == [str(paths[1]), str(paths[2])]
    assert (read, desired.rejected) == ([str(paths[1])], 1)
