"""`netapply agent` as a process, and the commands that talk to it: with it and without it they do the same."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.netns import PATIENCE, Netns

PLAN = "apiVersion: netapply/v1\noutbound: {ports: {exclude: [15020]}}\n"
OTHER = "apiVersion: netapply/v1\noutbound: {ports: {exclude: [15021]}}\n"
#: Somebody's rules that come first.
AWAY = """
table inet away {
    chain output {
        type nat hook output priority -150
        oifname "canary*" ip daddr 192.0.2.2 dnat ip to 192.0.2.2
    }
}
"""
#: Times; and connections come and go.
VOLATILE = ("duration", "existing_flows")


class Running:
    """An agent of the test's own, and the command in its surroundings."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.socket = str(place / "control.sock")
        self.plans = place / "plans"
        self.plans.mkdir()
        self.process: subprocess.Popen[bytes] | None = None
        self.plan = place / "plan.yaml"
        self.plan.write_text(PLAN)

    def start(self, *words: str, before: tuple[str, ...] = ()) -> None:
        places = {"plans": self.plans, "state": self.place / "state", "socket": self.socket}
        places["read-socket"] = self.place / "read.sock"
        flags = [f"--{name}={value}" for name, value in places.items()]
        command = [*before, sys.executable, "-m", "netapply", "agent", *flags, "--log=json", *words]
        with open(self.place / "log", "ab") as log:
            self.process = subprocess.Popen(command, stderr=log)
        for _ in range(PATIENCE * 20):
            with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(self.socket)
                return
            if self.process.poll() is not None:
                return
            time.sleep(0.05)

    def stop(self) -> int:
        if self.process is None:
            return 0
        process, self.process = self.process, None
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(PATIENCE)
        finally:
            process.kill()

    def run(self, *words: str, agent: bool = True, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "NETAPPLY_AGENT": self.socket if agent else "", "NO_COLOR": "1"}
        command = [*before, sys.executable, "-m", "netapply", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment, check=False)

    def read(self, *words: str, agent: bool = True) -> dict:
        done = self.run(*words, "-o", "json", agent=agent)
        answer: dict = json.loads(done.stdout)
        return answer | {"code": done.returncode}

    def log(self) -> list[dict]:
        return [json.loads(line) for line in (self.place / "log").read_text().splitlines()]


@pytest.fixture
def there(tmp_path: Path, _swept: None) -> Iterator[Running]:
    """No agent yet."""
    running = Running(tmp_path)
    yield running
    running.stop()


@pytest.fixture
def running(there: Running) -> Running:
    there.start()
    assert there.process
    assert there.process.poll() is None, (there.place / "log").read_text()
    return there


def ruleset(netns: Netns) -> str:
    return netns.run("nft", "-s", "list", "ruleset") + netns.run("ip", "addr", "show", "lo")


def eventually(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def test_apply_and_clean_do_the_same_with_the_agent_and_without(
    running: Running, make_netns: Callable[..., Netns]
) -> None:
    results, standing, cleaned = [], [], []
    for agent in (True, False):
        netns = make_netns()
        words = ("apply", "-N", netns.path, str(running.plan))
        results.append([running.read(*words, agent=agent), running.read(*words, agent=agent)])
        standing.append(ruleset(netns))
        cleaned.append([running.read("clean", "-N", netns.path, agent=agent), ruleset(netns)])
    for answer in [*results[0], *results[1], cleaned[0][0], cleaned[1][0]]:
        for name in VOLATILE:
            answer.pop(name, None)
    assert results[0] == results[1]
    assert [answer["changed"] for answer in results[0]] == [True, False]
    assert standing[0] == standing[1]
    assert cleaned[0] == cleaned[1]


@pytest.mark.parametrize(
    "words",
    [
        ("apply", "-N", "no-such-namespace"),
        ("apply", "-N", "/etc/passwd"),
        ("apply", "-N", "pid:0x1"),
        ("apply", "--backend", "odd"),
    ],
)
def test_errors_are_the_same_with_the_agent_and_without(running: Running, netns: Netns, words: tuple[str, ...]) -> None:
    if "-N" not in words:
        words = (*words, "-N", netns.path)
    assert running.read(*words, str(running.plan)) == running.read(*words, str(running.plan), agent=False)
    texts = [running.run(*words, str(running.plan), agent=agent).stderr for agent in (True, False)]
    assert texts[0] == texts[1]


def test_the_agent_heals_and_watch_says_who_it_was(running: Running, named_netns: Netns) -> None:
    assert running.run("apply", "-N", named_netns.name, str(running.plan)).returncode == 0
    before = ruleset(named_netns)
    environment = {**os.environ, "NETAPPLY_AGENT": running.socket}
    command = [sys.executable, "-m", "netapply", "watch", "-o", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as watch:
        assert watch.stdout
        try:
            deadline = time.monotonic() + PATIENCE
            heard = False
            while not heard and time.monotonic() < deadline:  # it may not listen yet
                named_netns.run("nft", "flush", "ruleset")
                heard = bool(select.select([watch.stdout], [], [], 0.5)[0])
            events = [json.loads(watch.stdout.readline())]
            while events[-1]["kind"] != "healed":
                events.append(json.loads(watch.stdout.readline()))
        finally:
            watch.terminate()
    assert [event["kind"] for event in events] == ["drifted", "healed"]
    assert {event["version"] for event in events} == {"netapply.event/v1"}
    assert events[0]["changes"]
    assert events[1]["cause"] is None or events[1]["cause"]["process"] == "nft"
    assert ruleset(named_netns) == before
    logged = [line for line in running.log() if line["event"] == "healed"]
    assert logged[0]["namespace"] == named_netns.name


def test_status_shows_a_line_for_each_namespace_and_3_where_a_plan_is_not_in_force(
    running: Running, named_netns: Netns
) -> None:
    assert running.run("status").stdout == "the agent keeps no namespace\n"
    running.run("apply", "-N", named_netns.name, str(running.plan))
    done = running.run("status")
    assert done.returncode == 0
    head, line = done.stdout.splitlines()
    assert head.split()[:3] == ["NAMESPACE", "STATE", "BACKEND"]
    assert line.split()[:3] == [named_netns.name, "inplace", "nftables"]
    assert running.read("status", "-N", named_netns.name)["namespaces"][0]["name"] == named_netns.name
    assert running.run("status", "-N", "nobody").returncode == 1
    broken = PLAN + f"backend: iptables-legacy\nnamespaces: [{{path: {running.place}/none}}]\n"
    (running.plans / "a.yaml").write_text(broken)
    eventually(lambda: len(running.read("status")["namespaces"]) == 2)


def test_clean_of_a_namespace_that_the_agent_does_not_keep_is_done_alone(running: Running, netns: Netns) -> None:
    running.run("apply", "--alone", "-N", netns.path, str(running.plan))
    assert running.read("status")["namespaces"] == []
    assert "netapply" in ruleset(netns)
    assert running.run("clean", "-N", netns.path).returncode == 0
    assert "netapply" not in ruleset(netns)


def test_clean_of_one_dialect_that_the_agent_would_put_back_is_refused(running: Running, netns: Netns) -> None:
    running.run("apply", "-N", netns.path, str(running.plan))
    done = running.run("clean", "--backend", "nftables", "-N", netns.path)
    assert done.returncode == 1
    assert "would put back" in done.stderr
    assert "netapply" in ruleset(netns)


def test_an_apply_on_trial_goes_back_unless_it_is_confirmed(running: Running, named_netns: Netns) -> None:
    other = running.place / "other.yaml"
    other.write_text(OTHER)
    name = named_netns.name
    running.run("apply", "-N", name, str(running.plan))
    done = running.run("apply", "--confirm", "1", "-N", name, str(other))
    assert done.returncode == 0, done.stderr
    assert "15021" in ruleset(named_netns)
    assert "on trial" in running.run("status").stdout
    eventually(lambda: "15020" in ruleset(named_netns))
    running.run("apply", "--confirm", "60", "-N", name, str(other))
    assert running.run("confirm", "-N", name).stdout == "confirmed\n"
    assert running.read("status")["namespaces"][0]["confirm_by"] == 0
    assert running.run("confirm", "-N", name).returncode == 1


def test_what_is_on_trial_is_given_more_time(running: Running, named_netns: Netns) -> None:
    name = named_netns.name
    assert running.run("extend", "-N", name, "60").returncode == 1
    running.run("apply", "--confirm", "2", "-N", name, str(running.plan))
    done = running.run("extend", "-N", name, "60")
    assert (done.returncode, done.stdout) == (0, "on trial for 60 s from now\n"), done.stderr
    assert running.read("status")["namespaces"][0]["confirm_by"] > time.time() + 50


def test_what_stood_before_the_agent_knew_of_it_comes_back(running: Running, named_netns: Netns) -> None:
    other, name = running.place / "other.yaml", named_netns.name
    other.write_text(OTHER)
    running.run("apply", "--alone", "-N", name, str(other))
    done = running.read("apply", "--confirm", "60", "-N", name, str(other))
    assert "nothing is on trial" in done["notes"][-1]
    running.run("clean", "-N", name)
    running.run("apply", "--alone", "-N", name, str(other))
    done = running.read("apply", "--confirm", "0.5", "-N", name, str(running.plan))
    assert "on trial for 0.5 s" in done["notes"][-1]
    eventually(lambda: running.read("status")["namespaces"] == [])
    assert "15021" in ruleset(named_netns)


def test_a_plan_is_proven_by_connections_or_goes_back_with_the_agent_as_without(
    running: Running, make_netns: Callable[..., Netns]
) -> None:
    other = running.place / "other.yaml"
    other.write_text(OTHER)
    told = []
    for agent in (True, False):
        netns = make_netns()
        netns.run("ip", "link", "set", "lo", "up")
        words = ("apply", "--probe", "-N", netns.path)
        good = running.read(*words, str(running.plan), agent=agent)
        netns.run("nft", "-f", "-", stdin=AWAY)
        before = ruleset(netns)
        bad = running.read(*words, str(other), agent=agent)
        assert bad["error"]["restored"]
        assert ruleset(netns) == before
        told.append([good, bad])
    assert [answer["code"] for answer in told[0]] == [0, 126]
    assert all(each["right"] for each in told[0][0]["canaries"])
    for answer in told[0] + told[1]:
        answer.pop("canaries", None)  # to ports by chance
        for name in VOLATILE:
            answer.pop(name, None)
    assert told[0] == told[1]
    status = running.read("status")["namespaces"][0]
    assert (status["state"], status["confirm_by"]) == ("inplace", 0)


def test_flows_are_forgotten_with_the_agent_as_without(running: Running, make_netns: Callable[..., Netns]) -> None:
    for agent in (True, False):
        words = ("apply", "--flush-conntrack", "-N", make_netns().path, str(running.plan))
        assert running.read(*words, agent=agent)["notes"] == ["connection tracking forgot 0 flows"]


def test_the_namespace_that_the_command_runs_in_goes_along_as_a_descriptor(running: Running, netns: Netns) -> None:
    done = running.run("apply", str(running.plan), before=("nsenter", f"--net={netns.path}"))
    assert done.returncode == 0, done.stderr
    assert "15020" in ruleset(netns)
    assert len(running.read("status")["namespaces"]) == 1
    done = running.run("clean", before=("nsenter", f"--net={netns.path}"))
    assert "15020" not in ruleset(netns)
    assert running.read("status")["namespaces"] == []


def test_without_an_agent_the_commands_work_alone_or_say_what_they_need(there: Running, netns: Netns) -> None:
    assert there.run("apply", "-N", netns.path, str(there.plan)).returncode == 0
    for words in (("status",), ("watch",), ("top",)):
        done = there.run(*words)
        assert done.returncode == 1
        assert "next: start it: netapply agent" in done.stderr
    done = there.run("confirm", "-N", netns.path)
    assert (done.returncode, "nothing is on trial" in done.stderr) == (1, True)


def test_a_socket_that_a_killed_agent_left_is_no_agent(running: Running, netns: Netns) -> None:
    assert running.process
    running.process.kill()
    running.process.wait(PATIENCE)
    assert os.path.exists(running.socket)
    assert running.run("apply", "-N", netns.path, str(running.plan)).returncode == 0
    running.start()
    assert running.run("status").returncode == 0
    assert running.stop() == 0
    assert not os.path.exists(running.socket)


def test_a_second_agent_on_the_same_socket_says_so_and_leaves_the_first_alone(running: Running) -> None:
    command = ("agent", f"--plans={running.plans}", "--state=", f"--socket={running.socket}", "--read-socket=")
    done = running.run(*command)
    assert done.returncode == 1
    assert "an agent answers at" in done.stderr
    assert running.run("status").returncode == 0


@pytest.mark.parametrize("words", [("--metrics=0.0.0.0:9469",), ("--read-group=no-such-group",)])
def test_an_agent_that_is_told_wrong_does_not_begin(there: Running, words: tuple[str, ...]) -> None:
    there.start(*words)
    assert there.process
    assert there.process.wait(PATIENCE) == 1
    assert "next:" in (there.place / "log").read_text()


def test_top_prints_one_look_where_there_is_no_terminal(running: Running, named_netns: Netns) -> None:
    running.run("apply", "-N", named_netns.name, str(running.plan))
    done = running.run("top")
    assert done.returncode == 0, done.stderr
    assert "outbound.ports.exclude" in done.stdout
    assert {row["namespace"] for row in running.read("top")["decisions"]} == {named_netns.name}


def test_top_draws_on_a_terminal_and_leaves_it_as_it_was(running: Running, named_netns: Netns) -> None:
    running.run("apply", "-N", named_netns.name, str(running.plan))
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["NETAPPLY_AGENT"] = running.socket
        os.execv(sys.executable, [sys.executable, "-m", "netapply", "top"])
    seen = b""
    pressed = False
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                data = os.read(terminal, 65536)
            except OSError:  # its end
                break
            seen += data
        if b"outbound.ports.exclude" in seen and not pressed:
            pressed = True
            os.write(terminal, b"q")
    os.close(terminal)  # which ends it, if q did not
    assert os.waitpid(pid, 0)[1] == 0
    assert b"\x1b[?1049h" in seen
    assert seen.rstrip().endswith(b"\x1b[?25h\x1b[?1049l")


def test_an_apply_without_an_agent_imports_nothing_of_it(there: Running, netns: Netns) -> None:
    code = "import sys; from netapply.cli import main; main(sys.argv[1:]); print(*sorted(sys.modules))"
    command = [sys.executable, "-c", code, "apply", "-N", netns.path, str(there.plan)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert not {name for name in loaded if name.startswith(("netapply.agent", "netapply.cli.client", "h11", "asyncio"))}


def test_the_history_tells_who_asked_the_agent_and_why(running: Running, named_netns: Netns) -> None:
    running.run("apply", "-N", named_netns.name, "--reason", "ticket 7 & more", str(running.plan))
    events = running.read("history", "-N", named_netns.name)["events"]
    assert events[-1]["reason"].startswith("uid 0, process ")
    assert events[-1]["reason"].endswith(": ticket 7 & more")
