"""What `netapply.open` and `FakeKernel.open` give: one contract, for the kernel in every dialect and for the fake."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import netapply
from netapply import detection
from netapply.backend import BUILT_IN, Probe, find_backend
from netapply.compiler import compile_plan
from netapply.errors import (
    ApplyError,
    CancelledError,
    ConflictError,
    KernelError,
    NamespaceError,
    NetapplyError,
    UnsupportedError,
)
from netapply.flow import TCP, Flow
from netapply.importers.istio import VERSIONS, Facts, Version, plan_from_settings
from netapply.importers.istio_settings import IstioSettings
from netapply.plan import CapturePlan, Inbound, InboundPorts, OutboundCidrs
from netapply.ruleset import Cidr, PortRange
from netapply.testing import FakeCapture, FakeKernel
from tests.netns import Netns

PLAN = CapturePlan()
MANY = tuple(Cidr(bytes((10, 0, i, 0)), 24) for i in range(40))
OTHER = CapturePlan(
    inbound=Inbound("tproxy", InboundPorts(exclude=(PortRange(15020, 15021),))),
    outbound=PLAN.outbound._replace(cidrs=OutboundCidrs(exclude=MANY)),
)
LOCALHOST = b"\x7f\0\0\1"
TO_LOCALHOST = Flow("outbound", TCP, LOCALHOST, LOCALHOST, 40000, 9, "lo", 0, 0)
NFT_OUTBOUND = ("inet", "netapply", "nat-outbound")

AnyCapture = netapply.Capture | FakeCapture


class RealEngine:
    """A namespace of the kernel, and what others can do to it."""

    name = "kernel"

    def __init__(self, backend: str, netns: Netns, state: Path, patch: pytest.MonkeyPatch) -> None:
        self.backend = backend
        self.netns = netns
        self._state = state
        self._patch = patch

    def open(self) -> AnyCapture:
        return netapply.open(self.netns.path, state_directory=str(self._state), lock_timeout=5)

    def lose_first_outbound_rule(self) -> None:
        """Somebody deletes the first rule of the chain that captures outbound connections."""
        if self.backend == "nftables":
            listed = self.netns.run("nft", "-a", "list", "chain", *NFT_OUTBOUND)
            handle = re.findall(r"# handle (\d+)", listed)[1]  # the first is the chain's
            self.netns.run("nft", "delete", "rule", *NFT_OUTBOUND, "handle", handle)
        else:
            self.netns.run(self.backend, "-t", "nat", "-D", "NETAPPLY_OUTBOUND", "1")

    def connect_to_localhost(self) -> None:
        def connect() -> None:
            with suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", 9), timeout=5).close()

        self.netns.enter(connect)

    def fail_next_apply(self, error: Exception) -> None:
        dialect = type(find_backend(self.backend))
        commit, failures = dialect.commit, [error]

        def failing(self, kernel, step):
            if failures:
                raise failures.pop()
            commit(self, kernel, step)

        self._patch.setattr(dialect, "commit", failing)

    def lack(self, feature: str, reason: str) -> None:
        """The kernel refuses, once, and the probe says why."""
        found, chosen = Probe("usable", "all but one", {feature: reason}), find_backend(self.backend)
        refusals = iter([KernelError("add rule", 95)])

        def commit(_self: object, *arguments: object, _commit: Callable[..., object] = chosen.commit) -> object:
            for error in refusals:
                raise error
            return _commit(*arguments)

        self._patch.setitem(detection._usable, self.backend, found)
        if self.backend == "nftables":  # the others ask before they begin
            self._patch.setattr(type(chosen), "commit", commit)


class FakeEngine:
    """The same of the fake kernel."""

    name = "fake"

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.kernel = FakeKernel()

    def open(self) -> AnyCapture:
        return self.kernel.open("pod-1")

    def lose_first_outbound_rule(self) -> None:
        chains = [rule.chain for rule in self.open().show()]
        outbound = "nat-outbound" if self.backend == "nftables" else "NETAPPLY_OUTBOUND"
        self.kernel.drift("pod-1", chains.index(outbound))

    def connect_to_localhost(self) -> None:
        self.kernel.open("pod-1").send(TO_LOCALHOST)

    def fail_next_apply(self, error: Exception) -> None:
        self.kernel.fail_next("apply", error)

    def lack(self, feature: str, reason: str) -> None:
        self.kernel.missing[self.backend] = {feature: reason}


Engine = RealEngine | FakeEngine


@pytest.fixture(params=BUILT_IN)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def real(backend: str, make_netns: Callable[[], Netns], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RealEngine:
    state = tmp_path / "state"
    state.mkdir(0o700)
    return RealEngine(backend, make_netns(), state, monkeypatch)


@pytest.fixture(params=["kernel", "fake"])
def engine(request: pytest.FixtureRequest, backend: str) -> Engine:
    return request.getfixturevalue("real") if request.param == "kernel" else FakeEngine(backend)


@pytest.fixture
def capture(engine: Engine) -> Iterator[AnyCapture]:
    with engine.open() as opened:
        yield opened


def test_apply_says_what_it_did_and_why(engine: Engine, capture: AnyCapture) -> None:
    result = capture.apply(PLAN, backend=engine.backend)
    assert result.changed
    assert result.steps[0] == "add address ::6/128 dev lo"
    assert len(result.steps) > 1
    assert (result.backend, result.reason) == (engine.backend, "asked for")
    assert (result.effective, result.ipv6, result.degraded, result.notes) == (True, "capture", (), ())
    assert result.existing_flows == 0
    assert 0 < result.duration < 30


def test_a_second_apply_keeps_the_dialect_and_changes_nothing(engine: Engine, capture: AnyCapture) -> None:
    capture.apply(PLAN, backend=engine.backend)
    result = capture.apply(PLAN)
    assert (result.changed, result.steps) == (False, ())
    assert (result.backend, result.reason) == (engine.backend, "holds our rules in this namespace already")


def test_apply_of_another_plan_replaces_the_first(engine: Engine, capture: AnyCapture) -> None:
    capture.apply(PLAN, backend=engine.backend)
    assert capture.apply(OTHER).changed
    assert capture.verify(OTHER).same
    assert not capture.verify(PLAN).same
    assert capture.apply(PLAN).changed
    assert capture.verify(PLAN).same


def test_diff_lists_all_that_apply_would_do_and_does_none_of_it(engine: Engine, capture: AnyCapture) -> None:
    first = capture.diff(PLAN, backend=engine.backend)
    assert not first.same
    assert {change.kind for change in first.changes} == {"add"}
    assert {"routing"} < {change.where for change in first.changes}
    assert capture.show() == ()
    assert capture.diff(PLAN, backend=engine.backend) == first
    capture.apply(PLAN, backend=engine.backend)
    assert capture.diff(PLAN).changes == ()


def test_verify_without_a_plan_compares_with_the_last_apply(engine: Engine, capture: AnyCapture) -> None:
    with pytest.raises(NetapplyError, match="nothing was applied"):
        capture.verify()
    capture.apply(OTHER, backend=engine.backend)
    assert capture.verify().same
    assert (capture.verify().backend, capture.verify().reason) == (engine.backend, "the last apply used it")


def test_a_rule_lost_behind_the_back_is_told_and_put_back(engine: Engine, capture: AnyCapture) -> None:
    capture.apply(PLAN, backend=engine.backend)
    engine.lose_first_outbound_rule()
    (change,) = capture.verify().changes
    assert change.kind == "add"
    assert change.path == "proxy.passthrough_sources" or not change.path
    assert capture.verify(PLAN).changes == (change,)
    assert capture.apply(PLAN).changed
    assert capture.verify().same


def test_clean_takes_away_all_that_is_ours(engine: Engine, capture: AnyCapture) -> None:
    capture.apply(OTHER, backend=engine.backend)
    result = capture.clean()
    assert result.changed
    assert (result.backend, result.reason) == (engine.backend, "held our rules")
    assert capture.show() == ()
    again = capture.clean()
    assert (again.changed, again.backend, again.steps) == (False, "", ())
    assert again.reason == "nothing of ours was found in any dialect"
    with pytest.raises(NetapplyError, match="nothing was applied"):
        capture.verify()


def test_ours_in_another_dialect_is_a_conflict_and_nothing_is_touched(engine: Engine, capture: AnyCapture) -> None:
    capture.apply(PLAN, backend=engine.backend)
    before = capture.show()
    other = next(name for name in BUILT_IN if name != engine.backend)
    with pytest.raises(ConflictError, match=f"stand in {engine.backend}, and {other} was asked for") as raised:
        capture.apply(PLAN, backend=other)
    assert raised.value.dialects == (engine.backend,)
    with pytest.raises(ConflictError):
        capture.diff(PLAN, backend=other)
    assert capture.show() == before
    capture.clean()
    assert capture.apply(PLAN, backend=other).backend == other


def test_show_counts_a_connection_by_the_rules_that_it_meets(engine: Engine, capture: AnyCapture) -> None:
    capture.apply(PLAN, backend=engine.backend)
    assert not any(rule.packets for rule in capture.show())
    engine.connect_to_localhost()
    counted = [rule for rule in capture.show() if rule.packets]
    assert [(rule.packets, rule.bytes) for rule in counted] == [(1, 60)] * 2
    assert counted[0].chain in ("OUTPUT", "nat-output")
    assert counted[1].chain in ("NETAPPLY_OUTBOUND", "nat-outbound")
    capture.apply(PLAN)
    assert [rule for rule in capture.show() if rule.packets] == counted


def test_live_is_the_rule_set_that_was_applied_with_plan_paths_and_counters(
    engine: Engine, capture: AnyCapture
) -> None:
    assert capture.live() == ()
    capture.apply(PLAN, backend=engine.backend)
    engine.connect_to_localhost()
    (live,) = capture.live()
    assert live.backend == engine.backend
    wanted = compile_plan(PLAN, find_backend(engine.backend).dialect)
    rules = {(table.name, chain.name, rule, rule.path) for table, chain, _, rule in live.ruleset.walk()}
    assert rules == {(table.name, chain.name, rule, rule.path) for table, chain, _, rule in wanted.walk()}
    assert sum(packets for packets, _ in live.counters.values()) == sum(rule.packets for rule in capture.show()) == 2


@pytest.mark.parametrize("layout", VERSIONS)
def test_detect_finds_rules_of_another_layout_that_we_applied(
    engine: Engine, capture: AnyCapture, layout: Version
) -> None:
    plan = plan_from_settings(IstioSettings(istio_service_cidr="*"), layout, Facts((b"\n\0\0\5",)))
    capture.apply(plan, backend=engine.backend, layout=layout)
    found = capture.detect()
    assert [each.backend for each in found.candidates if each.ours] == [engine.backend]
    assert (found.chosen, found.reason) == (engine.backend, "holds our rules in this namespace already")


def test_detect_names_what_auto_takes_and_where_ours_stands(engine: Engine, capture: AnyCapture) -> None:
    found = capture.detect()
    assert found.chosen == "nftables"
    assert [each.backend for each in found.candidates] == list(BUILT_IN)
    assert not any(each.ours or each.in_use for each in found.candidates)
    capture.apply(PLAN, backend=engine.backend)
    found = capture.detect()
    assert (found.chosen, found.reason) == (engine.backend, "holds our rules in this namespace already")
    assert [each.backend for each in found.candidates if each.ours] == [engine.backend]
    assert [each.backend for each in found.candidates if each.in_use] == [engine.backend]


def test_a_cancelled_apply_leaves_what_was(engine: Engine, capture: AnyCapture) -> None:
    before = capture.diff(PLAN, backend=engine.backend)
    answers = iter([False, True])
    with pytest.raises(ApplyError) as caught:
        capture.apply(PLAN, backend=engine.backend, cancelled=lambda: next(answers))
    assert caught.value.restored
    assert isinstance(caught.value.__cause__, CancelledError)
    assert capture.diff(PLAN, backend=engine.backend) == before


def test_an_apply_cancelled_in_its_last_step_leaves_what_was(engine: Engine, capture: AnyCapture) -> None:
    asked = len(capture.apply(PLAN, backend=engine.backend).steps)
    capture.clean()
    answers = iter([*[False] * asked, True])
    with pytest.raises(ApplyError) as caught:
        capture.apply(PLAN, backend=engine.backend, cancelled=lambda: next(answers))
    assert caught.value.step == "commit the journal"
    assert capture.show() == ()


def test_an_unknown_layout_is_refused(engine: Engine, capture: AnyCapture) -> None:
    with pytest.raises(UnsupportedError, match="no layout is called 'shiny'"):
        capture.apply(PLAN, backend=engine.backend, layout="shiny")


@pytest.mark.parametrize("first", [None, OTHER], ids=["nothing", "another plan"])
def test_a_failed_apply_rolls_back_and_tells_why(
    engine: Engine, capture: AnyCapture, first: CapturePlan | None
) -> None:
    if first:
        capture.apply(first, backend=engine.backend)
    before = capture.show()
    error = KernelError("add rule ip nat NETAPPLY_OUTBOUND #3", 12)
    engine.fail_next_apply(error)
    with pytest.raises(ApplyError, match=r"ENOMEM.*the namespace is as it was") as caught:
        capture.apply(PLAN, backend=engine.backend)
    assert caught.value.restored
    assert caught.value.__cause__ is error
    assert capture.show() == before
    if first:
        assert capture.verify().same
    assert capture.apply(PLAN, backend=engine.backend).changed
    assert capture.verify(PLAN).same


def test_a_lacking_feature_is_refused_unless_it_is_only_preferred(engine: Engine, capture: AnyCapture) -> None:
    engine.lack("comments", "Linux 3.15")
    plan = PLAN._replace(comments=True)
    with pytest.raises(UnsupportedError, match=r"lacks what the plan needs: comments \(Linux 3.15\)"):
        capture.apply(plan, backend=engine.backend)
    assert capture.show() == ()
    result = capture.apply(plan._replace(prefer=("comments",)), backend=engine.backend)
    assert result.degraded == ("comments: rules carry no comments (Linux 3.15)",)
    assert capture.verify(PLAN).same


def test_lists_are_rules_where_sets_are_lacking(engine: Engine, capture: AnyCapture) -> None:
    engine.lack("sets", "no module")
    capture.apply(OTHER, backend=engine.backend)
    exclusions = [rule for rule in capture.show() if "10.0.39.0/24" in rule.rule]
    assert len(exclusions) == 1


def test_a_plan_that_waits_for_the_proxy_is_refused(engine: Engine, capture: AnyCapture) -> None:
    with pytest.raises(UnsupportedError, match="on-listen"):
        capture.apply(PLAN._replace(activation="on-listen"), backend=engine.backend)
    assert capture.show() == ()


def test_an_unknown_backend_is_refused(capture: AnyCapture) -> None:
    with pytest.raises(UnsupportedError, match="no backend is called 'pf'"):
        capture.apply(PLAN, backend="pf")


def test_two_captures_of_one_namespace_see_the_same(engine: Engine, capture: AnyCapture) -> None:
    with engine.open() as other:
        other.apply(PLAN, backend=engine.backend)
    assert capture.verify().same
    assert not capture.apply(PLAN).changed


def test_a_closed_capture_does_nothing_more(engine: Engine) -> None:
    capture = engine.open()
    capture.close()
    capture.close()
    works = (
        lambda: capture.apply(PLAN, backend=engine.backend),
        lambda: capture.diff(PLAN, backend=engine.backend),
        lambda: capture.verify(PLAN),
        capture.clean,
        capture.show,
        capture.detect,
    )
    for work in works:
        with pytest.raises(NamespaceError, match="is closed"):
            work()


def test_the_fake_answers_in_the_words_of_the_real_one(real: RealEngine) -> None:
    """Each operation of one scenario, result by result; names of steps, times, and the order of chains apart.

    Which counters survive another plan differs between the dialects, so these are left out once there is one.
    """
    told = {each.name: list(_scenario(each)) for each in (real, FakeEngine(real.backend))}
    assert len(told["kernel"]) == len(told["fake"]) == 17
    for genuine, fake in zip(told["kernel"], told["fake"], strict=True):
        assert fake == genuine


def _scenario(engine: Engine) -> Iterator[object]:
    other = next(name for name in BUILT_IN if name != engine.backend)
    with engine.open() as capture:
        yield capture.diff(PLAN, backend=engine.backend)
        yield capture.diff(OTHER, backend=engine.backend)
        yield _said(capture.verify)
        yield _said(lambda: capture.apply(PLAN._replace(activation="on-listen")))
        yield _outcome(capture.apply(PLAN, backend=engine.backend))
        yield sorted(capture.show())
        yield capture.diff(OTHER)
        yield _said(lambda: capture.apply(PLAN, backend=other))
        engine.connect_to_localhost()
        yield sorted(capture.show())
        engine.lose_first_outbound_rule()
        yield capture.verify()
        yield capture.verify(PLAN)
        yield _outcome(capture.apply(OTHER))
        yield sorted(rule._replace(packets=0, bytes=0) for rule in capture.show())
        yield sorted(capture.verify(PLAN).changes)
        yield capture.detect().reason
        yield _outcome(capture.clean())
        yield _outcome(capture.clean())


def _outcome(result: netapply.Result) -> netapply.Result:
    return result._replace(steps=(), duration=0)


def _said(work: Callable[[], object]) -> tuple[type, str, str]:
    with pytest.raises(NetapplyError) as caught:
        work()
    return caught.type, str(caught.value), caught.value.next_step
