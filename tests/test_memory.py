"""What is remembered hides nothing: not what others change, not what packets count, not what another process wrote."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import netapply
from netapply.backend import BUILT_IN, find_backend
from netapply.errors import JournalError, LockError
from netapply.journal import Files, Journal
from netapply.namespace import Namespace
from netapply.plan import PASSTHROUGH, CapturePlan, OutboundCidrs, Proxy
from netapply.remembered import remembered
from netapply.ruleset import Cidr, NamedSet
from netapply_wire import ipset
from tests import foreign
from tests.netns import Netns

BACKENDS = tuple(BUILT_IN)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_nft_backend = pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])

#: Rules and nothing beside them.
PLAN = CapturePlan(proxy=Proxy(passthrough_sources=PASSTHROUGH[:1]))
OTHER = PLAN._replace(ipv6="skip")
BLOCKS = tuple(Cidr(bytes((10, 0, i, 0)), 24) for i in range(0, 80, 2))
LISTED = PLAN._replace(outbound=PLAN.outbound._replace(cidrs=OutboundCidrs(exclude=BLOCKS)))

#: By another process: a rule of ours is taken away, a chain is filled with a stranger's.
DAMAGE = {
    "nftables": ["nft flush chain inet netapply nat-outbound", "nft delete table inet netapply"],
    "iptables-nft": ["iptables-nft -t nat -F NETAPPLY_OUTBOUND", "ip6tables-nft -t nat -F OUTPUT"],
    "iptables-legacy": ["iptables-legacy -t nat -F NETAPPLY_OUTBOUND", "ip6tables-legacy -t nat -F OUTPUT"],
}


@each_backend
def test_what_another_process_changes_between_two_applies_is_put_right(netns: Netns, backend: str) -> None:
    with netapply.open(netns.path) as capture:
        capture.apply(PLAN, backend=backend)
        good = _lines(netns)
        assert not capture.apply(PLAN).changed
        for command in DAMAGE[backend] * 2:
            netns.run(*command.split())
            assert not capture.verify(PLAN, backend=backend).same
            assert capture.apply(PLAN, backend=backend).changed
            assert _lines(netns) == good


@pytest.mark.parametrize("backend", ["iptables-nft", "iptables-legacy"])
def test_sets_that_a_killed_process_left_are_found_by_who_has_the_namespace_open(
    netns: Netns, backend: str, tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(netapply.dump_plan(LISTED)))
    with netapply.open(netns.path) as capture:
        capture.apply(PLAN, backend=backend)
        assert not capture.apply(PLAN, backend=backend).changed  # so it is known that there are no sets
        command = [sys.executable, "-m", "tests.die_at", netns.path, str(plan), backend, "0", "after"]
        assert subprocess.run(command, timeout=60, check=False).returncode == 9
        assert ipset.list_sets(capture.namespace, "netapply-")
        assert "undone (destroy set" in capture.apply(PLAN, backend=backend).notes[0]
        assert not ipset.list_sets(capture.namespace, "netapply-")


@each_backend
def test_what_another_process_changes_right_before_the_commit_is_put_right(
    netns: Netns, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read, and the bytes that were made of it, are no longer of use then."""
    chosen = find_backend(backend)
    commit = chosen.commit
    damage = [DAMAGE[backend][0].split()]

    def later(_self: object, *arguments: object) -> None:
        if damage:
            netns.run(*damage.pop())
        commit(*arguments)  # type: ignore[arg-type]  # as they came

    with netapply.open(netns.path) as capture:
        capture.apply(PLAN, backend=backend)
        capture.apply(OTHER)
        capture.apply(PLAN)
        good = _lines(netns)
        capture.apply(OTHER)
        monkeypatch.setattr(type(chosen), "commit", later)
        capture.apply(PLAN)
        assert not damage
        assert _lines(netns) == good


@each_backend
def test_rules_that_another_process_removed_are_not_remembered_by_detection(netns: Netns, backend: str) -> None:
    """Else another dialect would be refused for ours that is not there, or ours that is there would be doubled."""
    other = BACKENDS[BACKENDS.index(backend) - 1]
    with netapply.open(netns.path) as capture, netapply.open(netns.path) as second:
        for _ in range(2):
            capture.apply(PLAN, backend=backend)
            second.clean()
            assert capture.apply(PLAN, backend=other).backend == other
            second.clean()


def test_a_set_that_another_process_changed_is_filled_again(netns: Netns) -> None:
    """Ipset is no part of nf_tables: its changes do not raise the generation."""
    with netapply.open(netns.path) as capture, Namespace.open(netns.path) as another:
        capture.apply(LISTED, backend="iptables-nft")
        (listed,) = ipset.list_sets(another, "netapply-")
        _take_away(another, listed.decode())
        assert not capture.verify(LISTED).same
        assert capture.apply(LISTED).changed
        (again,) = ipset.list_sets(another, "netapply-")
        assert again.decode() == listed.decode()


def _take_away(kernel: Namespace, of: NamedSet) -> None:
    """A set that is created again as it should be now loses what is too much in it."""
    ipset.commit_set(kernel, ipset.CreateSet(of._replace(elements=of.elements[1:])))


@each_backend
def test_what_packets_count_is_shown_each_time(netns: Netns, backend: str) -> None:
    """Also after an apply that found nothing to do, and so remembers what it read."""
    with netapply.open(netns.path) as capture:
        capture.apply(PLAN, backend=backend)
        counted: list[int] = []
        for _ in range(3):
            assert not capture.apply(PLAN).changed
            netns.run("ping", "-c", "1", "-W", "1", "127.0.0.1", check=False)
            subprocess.run(["nsenter", f"--net={netns.path}", sys.executable, "-c", _CONNECT], timeout=10, check=False)
            counted.append(sum(each.packets for each in capture.show()))
        assert counted[0] < counted[1] < counted[2]


_CONNECT = """
import socket
s = socket.socket()
s.settimeout(0.2)
s.connect_ex(("127.0.0.1", 9))
"""


def test_a_journal_that_another_process_wrote_is_read(netns: Netns, tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    with (
        netapply.open(netns.path, state_directory=state) as capture,
        netapply.open(netns.path, state_directory=state) as second,
    ):
        for _ in range(2):
            capture.apply(PLAN, backend="nftables")
            second.apply(OTHER)
            assert capture.verify().same
        second.clean()
        assert capture.apply(PLAN, backend="iptables-nft").changed
        assert second.verify().same


def test_a_state_directory_that_is_replaced_is_found_again(netns: Netns, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with netapply.open(netns.path, state_directory=str(state)) as capture:
        capture.apply(PLAN, backend="nftables")
        shutil.rmtree(state)
        capture.apply(OTHER)
        assert capture.verify().same
        assert [each.suffix for each in sorted(state.iterdir())] == ["", ".lock", ""]  # the last is the history
        state.chmod(0o755)
        with pytest.raises(JournalError):
            capture.apply(PLAN)


def test_threads_that_share_an_open_namespace_take_turns(netns: Netns, tmp_path: Path) -> None:
    """The lock that is kept open is one thread's at a time."""
    failures: list[BaseException] = []
    with netapply.open(netns.path, state_directory=str(tmp_path / "state")) as capture:

        def work(plan: CapturePlan) -> None:
            try:
                for _ in range(5):
                    capture.apply(plan, backend="nftables")
            except BaseException as error:  # noqa: BLE001 - told by the test
                failures.append(error)

        threads = [threading.Thread(target=work, args=(plan,)) for plan in (PLAN, OTHER, LISTED)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert capture.verify().same


def test_a_closed_namespace_leaves_no_descriptor_open(netns: Netns, tmp_path: Path) -> None:
    def opened() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    def use() -> None:
        with netapply.open(netns.path, state_directory=str(tmp_path / "state")) as capture:
            capture.apply(PLAN, backend="nftables")
            capture.show()
            capture.verify()
            capture.clean()

    use()
    threading.Event().wait(0.1)  # netlink sockets are closed 30 ms late
    before = opened()
    for _ in range(3):
        use()
    threading.Event().wait(0.1)
    assert opened() == before


@each_nft_backend
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_dies_around_its_one_step_leaves_what_was_or_what_should_be(
    netns: Netns, backend: str, when: str, tmp_path: Path
) -> None:
    """The next apply goes on from there, and clean needs no plan."""
    empty = foreign.picture(netns)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(netapply.dump_plan(PLAN)))
    for undo in (False, True):
        command = [sys.executable, "-m", "tests.die_at", netns.path, str(plan), backend, "0", when]
        assert subprocess.run(command, timeout=60, check=False).returncode == 9
        with netapply.open(netns.path) as capture:
            assert capture.verify(PLAN, backend=backend).same is (when == "after")
            if undo:
                capture.clean()
                assert foreign.picture(netns) == empty
            else:
                assert capture.apply(PLAN, backend=backend).changed is (when == "before")
                assert capture.verify().same
                capture.clean()


def _lines(netns: Netns) -> dict[str, list[str]]:
    return {command: sorted(text.splitlines()) for command, text in foreign.picture(netns).items()}


def test_a_result_is_known_by_its_arguments_themselves() -> None:
    asked: list[object] = []

    @remembered(2)
    def tell(*given: object) -> int:
        asked.append(given)
        return len(asked)

    one = (1, 2)
    two = (*one,)
    assert [tell(one), tell(two), tell(one), tell(one, two), tell(one, two)] == [1, 2, 1, 3, 3]
    assert tell(one) == 4  # the oldest of two made way
    assert tell(two) == 5


def test_no_other_object_gets_the_identity_of_one_that_is_remembered() -> None:
    @remembered(1)
    def tell(given: list[int]) -> int:
        return given[0]

    for number in range(100):
        assert tell([number]) == number
        gc.collect(0)


def test_results_are_right_from_many_threads() -> None:
    tell = remembered(3)(_first)
    given = [(number,) for number in range(10)]
    wrong: list[int] = []

    def work() -> None:
        for number in range(2000):
            at = number % 10
            if tell(given[at]) != at:
                wrong.append(at)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _first(given: tuple[int, ...]) -> int:
    return given[0]


def test_the_lock_that_is_kept_open_excludes_who_shares_the_namespace(netns: Netns, tmp_path: Path) -> None:
    with Namespace.open(netns.path) as namespace:

        def acquire(timeout: float) -> Files:
            return Journal(str(tmp_path / "state")).acquire(namespace.identity, timeout, namespace.memory)

        acquire(1).close()
        files = acquire(1)
        with pytest.raises(LockError):
            acquire(0.05)
        files.close()
        acquire(1).close()
