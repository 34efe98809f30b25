"""`netapply doctor`: each check says what is so, in namespaces and on machines that are made to be so."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netapply.api import Capture, open_capture
from netapply.cli import main
from netapply.doctor import Finding, Sight, examine, network, others, proxy
from netapply.doctor import machine as of_machine
from netapply.doctor.report import Redactor, write_report
from netapply.lab import Lab
from netapply.lab.flows import APP_PORT
from netapply.lab.network import ADDRESSES
from netapply.plan import CapturePlan
from netapply.planfile import load_plan
from tests.netns import PATIENCE, Netns

V1 = "apiVersion: netapply/v1\n"


def plan(text: str = "") -> CapturePlan:
    return load_plan(V1 + text, format="yaml")


@pytest.fixture
def capture(netns: Netns) -> Iterator[Capture]:
    with open_capture(netns.path) as capture:
        yield capture


class Root:
    """A machine's files, as a test wants them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "proc").mkdir()

    def write(self, name: str, text: str = "") -> Path:
        place = self.path / name.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        return place

    def run(self, pid: int, name: str, *, uid: int = 0, namespace: str = "", words: tuple[str, ...] = ()) -> None:
        """A process that is called so."""
        self.write(f"proc/{pid}/comm", name[:15] + "\n")
        self.write(f"proc/{pid}/status", f"Name:\t{name}\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n")
        self.write(f"proc/{pid}/cmdline", "\0".join(words or (name,)) + "\0")
        if namespace:
            place = self.path / f"proc/{pid}/ns/net"
            place.parent.mkdir()
            place.symlink_to(namespace)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def only(check: Callable[[Sight], Iterator[Finding]], sight: Sight) -> Finding:
    (found,) = check(sight)
    return found


def about(findings: Iterator[Finding], check: str) -> Finding:
    return next(each for each in findings if each.check == check)


# --- the namespace ---------------------------------------------------------------------------------------------------


def test_looking_changes_nothing(netns: Netns, capture: Capture) -> None:
    def everything() -> str:
        return netns.run("nft", "list", "ruleset") + netns.run("cat", "/proc/net/ip_tables_names")

    before = everything()
    findings = list(examine(Sight(capture, plan())))
    assert everything() == before
    assert {each.result for each in findings} <= {"ok", "notice"}, findings
    assert all(each.fix and "\n" not in each.fix for each in findings if each.result != "ok"), findings
    assert len({each.check for each in findings}) >= 18


def test_every_dialect_is_told_and_the_one_that_auto_takes(capture: Capture) -> None:
    found = {each.check: each for each in network.dialects(Sight(capture))}
    assert set(found) == {"dialect nftables", "dialect iptables-nft", "dialect iptables-legacy", "backend auto"}
    assert found["backend auto"].evidence.startswith("nftables: ")


@pytest.mark.parametrize(
    ("peer", "command"),
    [
        ("Istio", "iptables-nft -t nat -N ISTIO_OUTPUT"),
        ("Istio", "iptables-legacy -t nat -N ISTIO_OUTPUT"),
        ("Istio", "nft add table inet istio-proxy-nat"),
        ("Linkerd", "iptables-legacy -t nat -N PROXY_INIT_REDIRECT"),
        ("Kuma", "iptables-nft -t nat -N KUMA_MESH_OUTBOUND"),
        ("Consul", "nft add table inet consul_tproxy"),
        ("Consul", "iptables-legacy -t nat -N CONSUL_PROXY_OUTPUT"),
    ],
)
def test_rules_of_another_mesh_are_seen_and_beside_ours_they_are_trouble(
    netns: Netns, capture: Capture, peer: str, command: str
) -> None:
    netns.run(*command.split())
    found = about(network.residue(Sight(capture)), f"rules of {peer}")
    assert found.result == "notice"
    assert command.split(maxsplit=1)[0] in found.evidence.replace("stand in nftables", "nft")
    capture.apply(plan())
    found = about(network.residue(Sight(capture)), f"rules of {peer}")
    assert (found.result, "beside ours" in found.evidence) == ("trouble", True)


def test_ours_in_two_dialects_is_trouble(netns: Netns, capture: Capture) -> None:
    capture.apply(plan())
    netns.run("iptables-legacy", "-t", "nat", "-N", "NETAPPLY_OUTBOUND")
    found = about(network.residue(Sight(capture)), "our rules")
    assert found.result == "trouble"
    assert found.fix.startswith("netapply clean")


def test_a_policy_rule_at_our_mark_is_trouble(netns: Netns, capture: Capture) -> None:
    tproxy = plan("inbound: {mode: tproxy}\n")
    assert only(network.marks, Sight(capture, tproxy)).result == "ok"
    netns.run("ip", "rule", "add", "fwmark", "0x539", "lookup", "77", "pref", "99")
    found = only(network.marks, Sight(capture, tproxy))
    assert found.result == "trouble"
    assert "policy rule 99 (fwmark 0x539/0xffffffff, table 77)" in found.evidence
    assert only(network.marks, Sight(capture, plan())).result == "ok"  # no mark in it
    netns.run("ip", "rule", "del", "pref", "99")
    netns.run("ip", "rule", "add", "fwmark", "0x40/0xf0", "lookup", "77")
    found = only(network.marks, Sight(capture, tproxy))
    assert (found.result, "overwrites bits" in found.evidence) == ("notice", True)
    masked = plan("inbound: {mode: tproxy, tproxy: {mark: 0x500/0xf00}}\n")
    assert only(network.marks, Sight(capture, masked)).result == "ok"


def test_our_own_policy_rule_is_not_foreign(capture: Capture) -> None:
    tproxy = plan("inbound: {mode: tproxy}\n")
    capture.apply(tproxy)
    assert only(network.marks, Sight(capture, tproxy)).result == "ok"


@pytest.mark.parametrize("rp_filter", ["0", "1", "2"])
@pytest.mark.parametrize("on", ["eth0", "all"])
@pytest.mark.parametrize("accept_local", ["0", "1"])
@pytest.mark.parametrize("by_mark", ["0", "1"])
async def test_what_is_said_to_drop_tproxys_packets_does_so_and_nothing_else_does(
    rp_filter: str, on: str, accept_local: str, by_mark: str
) -> None:
    settings = {"rp_filter": rp_filter, "accept_local": accept_local, "src_valid_mark": by_mark}
    tproxy = plan("inbound: {mode: tproxy}\n")
    async with Lab() as lab:
        for name, value in settings.items():
            place = Path(f"/proc/sys/net/ipv4/conf/{on}/{name}")
            lab.pod.inside(lambda place=place, value=value: place.write_text(value))
        with open_capture(lab.pod.path) as capture:
            capture.apply(tproxy)
            found = only(network.reverse_path, Sight(capture, tproxy))
            assert only(network.reverse_path, Sight(capture, plan())).result == "ok"  # REDIRECT needs no mark
        answer = await lab.tcp("remote", (ADDRESSES["ip"].pod, APP_PORT), timeout=0.5)
    assert answer.who == ("" if found.result == "trouble" else "app"), found


def test_route_localnet_for_all_is_trouble(netns: Netns, capture: Capture) -> None:
    netns.run("sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
    found = only(network.route_localnet, Sight(capture))
    assert (found.result, found.fix) == ("trouble", "sysctl -w net.ipv4.conf.all.route_localnet=0")


def test_ipv6_that_a_plan_skips_is_trouble_where_others_reach_it(netns: Netns, capture: Capture) -> None:
    skipping = Sight(capture, plan("ipv6: skip\n"))
    assert only(network.ipv6, skipping).result == "ok"
    netns.run("ip", "addr", "add", "2001:db8::1/64", "dev", "lo")
    assert only(network.ipv6, skipping).result == "trouble"
    assert only(network.ipv6, Sight(capture, plan())).result == "ok"
    netns.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    assert "disabled" in only(network.ipv6, Sight(capture, plan())).evidence


def test_a_proxy_that_does_not_listen_is_told(netns: Netns, capture: Capture) -> None:
    import socket

    found = only(proxy.ports, Sight(capture, plan("inbound: {mode: none}\n")))
    assert (found.result, "proxy.outbound_port 15001" in found.evidence) == ("notice", True)
    listener = netns.enter(socket.socket)
    listener.bind(("127.0.0.1", 15001))
    listener.listen()
    assert only(proxy.ports, Sight(capture, plan("inbound: {mode: none}\n"))).result == "ok"
    listener.close()


def test_a_second_program_with_the_proxys_uid_is_trouble(netns: Netns, capture: Capture, root: Root) -> None:
    root.run(10, "envoy", uid=1337, namespace=netns.path)
    root.run(11, "envoy", uid=1337, namespace=netns.path)
    root.run(12, "elsewhere", uid=1337, namespace="/proc/self/ns/net")
    assert only(proxy.owners, Sight(capture, plan(), str(root.path))).result == "ok"
    root.run(13, "app", uid=1337, namespace=netns.path)
    found = only(proxy.owners, Sight(capture, plan(), str(root.path)))
    assert (found.result, found.evidence) == ("trouble", "uid 1337 is exempt, and is that of app (13), envoy (10)")


def test_real_processes_with_the_proxys_uid_are_told_apart_by_name(netns: Netns, capture: Capture) -> None:
    def run(*words: str) -> None:
        running.append(netns.spawn("setpriv", "--reuid=1337", "--clear-groups", *words))

    def found() -> Finding:
        return only(proxy.owners, Sight(capture, plan()))

    running: list[subprocess.Popen[bytes]] = []
    try:
        run("sleep", "60")
        run("sleep", "60")
        _eventually(lambda: "sleep" in found().evidence)
        assert found().result == "ok"  # of one program there may be many
        run("tail", "-f", "/dev/null")
        _eventually(lambda: found().result == "trouble")
        assert "tail (" in found().evidence
    finally:
        for process in running:
            process.kill()
            process.wait(PATIENCE)


def _eventually(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- the machine -----------------------------------------------------------------------------------------------------


@pytest.fixture
def sight(capture: Capture, root: Root) -> Sight:
    return Sight(capture, None, str(root.path))


def test_a_lock_that_is_a_directory_is_trouble(root: Root, sight: Sight) -> None:
    assert only(of_machine.xtables_lock, sight).result == "ok"
    (root.path / "run/xtables.lock").mkdir(parents=True)
    found = only(of_machine.xtables_lock, sight)
    assert (found.result, "FileOrCreate" in found.fix) == ("trouble", True)


def test_who_holds_the_lock_is_named(root: Root, capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = root.write("lock")
    monkeypatch.setenv("XTABLES_LOCKFILE", str(lock))
    with open(lock, encoding="ascii") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        found = only(of_machine.xtables_lock, Sight(capture))
    assert found.result == "notice"
    assert f"({os.getpid()}) holds {lock}" in found.evidence
    assert only(of_machine.xtables_lock, Sight(capture)).result == "ok"


def test_networkd_is_asked_what_it_does_to_foreign_rules(root: Root, sight: Sight) -> None:
    assert only(others.networkd, sight).evidence == "does not run"
    root.run(5, "systemd-networkd")
    assert only(others.networkd, sight).result == "notice"
    root.write("etc/systemd/networkd.conf", "[Network]\nManageForeignRoutingPolicyRules=no\nManageForeignRoutes=no\n")
    assert only(others.networkd, sight).result == "ok"
    root.write("run/systemd/networkd.conf.d/a.conf", "[Network]\nManageForeignRoutingPolicyRules=yes\n")
    assert "ManageForeignRoutingPolicyRules" in only(others.networkd, sight).evidence
    root.write("etc/systemd/networkd.conf.d/b.conf", "[Network]\nManageForeignRoutingPolicyRules=false\n")
    assert only(others.networkd, sight).result == "ok"


def test_other_firewalls_are_named_with_their_habits(root: Root, sight: Sight) -> None:
    assert only(others.firewalls, sight).evidence == "none seen"
    root.run(7, "firewalld")
    root.run(8, "fail2ban-server")
    root.write("etc/nftables.conf", "#!/usr/sbin/nft -f\nflush ruleset\n")
    root.write("etc/iptables/rules.v4", "*nat\nCOMMIT\n")
    assert [each.evidence.split()[0] for each in others.firewalls(sight)] == ["firewalld", "fail2ban-server"]
    root.write("etc/systemd/system/sysinit.target.wants/nftables.service")
    root.write("etc/systemd/system/multi-user.target.wants/netfilter-persistent.service")
    root.write("etc/ufw/ufw.conf", "ENABLED=yes\n")
    found = [each.evidence for each in others.firewalls(sight)]
    names = ["firewalld", "nftables.service", "netfilter-persistent.service", "fail2ban-server", "ufw"]
    assert [each.split()[0] for each in found] == names
    assert "/etc/iptables/rules.v4 is restored whole" in found[2]
    assert all(each.fix for each in others.firewalls(sight))


@pytest.mark.parametrize(("backend", "word"), [("nftables", "its own table"), ("iptables", "every iptables table")])
def test_what_firewalld_flushes_goes_by_its_backend(root: Root, sight: Sight, backend: str, word: str) -> None:
    root.run(7, "firewalld")
    root.write("etc/firewalld/firewalld.conf", f"# FirewallBackend\nFirewallBackend={backend}\n")
    found = only(others.firewalls, sight)
    assert (f"firewalld (7), FirewallBackend={backend}: " in found.evidence, word in found.evidence) == (True, True)


def test_denials_of_security_modules_are_found(root: Root, sight: Sight) -> None:
    root.write("sys/fs/selinux/enforce", "1")
    assert "SELinux in force" in only(of_machine.security_modules, sight).evidence
    denied = (
        'type=AVC msg=audit(1): avc:  denied  { create } for  pid=9 comm="python3" tclass=netlink_netfilter_socket\n'
    )
    root.write("var/log/audit/audit.log", "x" * (3 << 20) + "\n" + denied)
    assert only(of_machine.security_modules, sight).result == "ok"  # process 9 is nobody of ours
    root.run(9, "python3", words=("/usr/bin/python3", "-I", "-m", "netapply", "agent"))
    found = only(of_machine.security_modules, sight)
    assert (found.result, "audit2allow" in found.fix) == ("trouble", True)


def test_denials_of_apparmor_are_found_without_auditd(root: Root, sight: Sight) -> None:
    root.write("sys/module/apparmor/parameters/enabled", "Y")
    root.write("var/log/kern.log", 'kernel: audit: apparmor="DENIED" operation="open" name="/run/netapply/x" pid=5 \n')
    found = only(of_machine.security_modules, sight)
    assert (found.result, "aa-logprof" in found.fix) == ("trouble", True)


def test_a_clock_before_the_program_was_made_is_trouble(sight: Sight, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(of_machine.clock, sight).result == "ok"
    monkeypatch.setattr("time.time", lambda: 1000.0)
    assert only(of_machine.clock, sight).result == "trouble"


def test_the_journal_is_the_one_that_was_named(netns: Netns, tmp_path: Path) -> None:
    named = tmp_path / "named"
    named.mkdir(mode=0o777)
    named.chmod(0o777)
    with open_capture(netns.path, state_directory=str(named)) as capture:
        found = only(of_machine.journal, Sight(capture))
    assert found.result == "trouble"
    assert str(named) in found.evidence


def test_a_journal_that_others_may_write_is_trouble(root: Root, sight: Sight) -> None:
    place = root.path / "run/netapply"
    place.mkdir(parents=True, mode=0o700)
    assert only(of_machine.journal, sight).result == "ok"
    root.write("run/netapply/4-1-1.pending")
    assert "interrupted" in only(of_machine.journal, sight).evidence
    place.chmod(0o777)
    assert only(of_machine.journal, sight).result == "trouble"


def test_a_state_directory_that_is_damaged_or_others_is_trouble(root: Root, sight: Sight) -> None:
    assert "not there yet" in only(of_machine.state, sight).evidence
    place = root.write("var/lib/netapply/desired.json", '{"format": 1}').parent
    place.chmod(0o700)
    assert only(of_machine.state, sight).result == "ok"
    root.write("var/lib/netapply/desired.json", '{"format": 1')
    found = only(of_machine.state, sight)
    assert (found.result, "is damaged" in found.evidence) == ("trouble", True)
    place.chmod(0o770)
    assert "others may write" in only(of_machine.state, sight).evidence


@pytest.mark.parametrize("name", ["var/lib/netapply", "run/netapply"])
def test_a_directory_without_room_or_that_is_read_only_is_trouble(root: Root, capture: Capture, name: str) -> None:
    """File systems of a mount namespace of its own, in which the command looks."""
    place = root.path / "small"
    place.mkdir()
    code = (
        "import os, sys; from netapply.doctor import machine, Sight; from pathlib import Path\n"
        f"root = {str(root.path)!r}\n"
        "check = machine.state if 'lib' in sys.argv[1] else machine.journal\n"
        "print([(each.result, each.evidence) for each in check(Sight(None, None, root))])\n"
    )
    script = (
        f"mkdir -p {root.path}/{name} && mount -t tmpfs -o size=256k,mode=700,$1 none {root.path}/{name} "
        f'&& exec {sys.executable} -c "$2" {name}'
    )
    for option, word in (("rw", "KiB and"), ("ro", "read-only")):
        command = ["unshare", "-m", "sh", "-c", script, "sh", option, code]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("[('trouble', "), done.stdout
        assert word in done.stdout


def test_the_agent_is_found_installed_or_running(root: Root, sight: Sight) -> None:
    assert "not installed" in only(of_machine.agent, sight).evidence
    root.write("etc/systemd/system/netapply.service", "[Service]\n")
    assert "is not enabled" in only(of_machine.agent, sight).evidence
    root.run(9, "python3", words=("/usr/bin/python3", "-I", "-m", "netapply", "agent", "--host"))
    assert only(of_machine.agent, sight).evidence == "runs as process 9"


def test_what_may_not_be_looked_at_is_unseen_and_not_well(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    from netapply.results import Candidate, Detection

    denied = Detection(
        "", "denied", (Candidate("nftables", "denied", "needs CAP_NET_ADMIN", ours=False, in_use=False),)
    )
    monkeypatch.setattr(Capture, "detect", lambda _: denied)
    assert [each.result for each in network.dialects(Sight(capture))] == ["unseen"]
    assert only(network.residue, Sight(capture)).result == "unseen"


def test_a_look_that_fails_is_told_and_the_others_go_on(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: Capture) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Capture, "detect", refused)
    found = {each.check: each for each in examine(Sight(capture))}
    assert found["dialects"] == Finding("dialects", "unseen", "[Errno 13] Permission denied", "run as root")
    assert found["clock"].result == "ok"


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_a_line_for_each_and_3_where_something_is_wrong(
    netns: Netns, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "-N", netns.path, "-o", "json"]) in (0, 3)
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {tuple(each) for each in findings} == {("check", "result", "evidence", "fix")}
    netns.run("sysctl", "-qw", "net.ipv4.conf.all.route_localnet=1")
    assert main(["doctor", "-N", netns.path]) == 3
    said = capsys.readouterr().out
    assert "trouble  route_localnet" in said
    assert "fix: sysctl -w net.ipv4.conf.all.route_localnet=0" in said


def test_the_report_names_nobody(
    netns: Netns, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", "hunter2")
    path = tmp_path / "plan.yaml"
    path.write_text(V1 + "outbound: {cidrs: {exclude: [10.20.30.0/24, '2001:db8:77::/48']}}\n")
    assert main(["apply", "-N", netns.path, str(path), "--alone"]) == 0
    report = tmp_path / "report.tar.gz"
    assert main(["doctor", "-N", netns.path, str(path), "--report", str(report)]) in (0, 3)
    assert report.stat().st_mode & 0o777 == 0o600
    with tarfile.open(report) as tar:
        parts = {each.name: (tar.extractfile(each) or tar).read().decode() for each in tar.getmembers()}
    assert {"doctor.json", "rules.json", "plan.json", "system.json"} <= {name.split("/")[1] for name in parts}
    whole = "".join(parts.values())
    assert not any(secret in whole for secret in ("10.20.30", "2001:db8:77", "hunter2", os.uname().nodename))
    assert "address-" in whole
    assert "127.0.0.1" in whole
    capsys.readouterr()
    assert main(["doctor", "-N", netns.path, "--report", str(report)]) == 1
    assert "File exists" in capsys.readouterr().err


def test_what_an_administrator_wrote_is_redacted_too(root: Root, capture: Capture, tmp_path: Path) -> None:
    root.write("etc/systemd/system/netapply.service", "[Service]\nEnvironment=API_TOKEN=hunter2 PEER=192.0.2.7\n")
    finding = Finding("security modules", "trouble", "denied by jane from /home/jane/x to 2001:db8::7", "a fix")
    report = tmp_path / "report.tar.gz"
    write_report(str(report), Sight(capture, None, str(root.path)), [finding])
    with tarfile.open(report) as tar:
        whole = "".join((tar.extractfile(each) or tar).read().decode() for each in tar.getmembers())
    assert not any(word in whole for word in ("hunter2", "192.0.2.7", "/home/jane", "2001:db8::7"))
    assert "Environment=API_TOKEN=hidden PEER=address-" in whole


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("from 10.0.0.1 to 10.0.0.1, 10.0.0.2", "from address-1 to address-1, address-2"),
        ("127.0.0.6 ::1 ::6 0.0.0.0", "127.0.0.6 ::1 ::6 0.0.0.0"),
        ("fe80::1%eth0 2001:db8::/32", "address-1%eth0 address-2/32"),
        ("02:00:5e:10:00:00", "hardware-1"),
        ("/home/jane/venv", "home-1/venv"),
        ("box7: box70 box7", "this-machine: box70 this-machine"),
        ("box7.corp.example: box7", "this-machine: this-machine"),
        ("from ::ffff:10.0.0.1 port 3", "from address-1 port 3"),
        ("Environment=API_TOKEN=abc PASSWORD='x y'", "Environment=API_TOKEN=hidden PASSWORD=hidden"),
        ("6.18.44 netapply 0.1.0 12:30:45", "6.18.44 netapply 0.1.0 12:30:45"),
    ],
)
def test_redaction_keeps_what_is_alike_alike(text: str, redacted: str) -> None:
    assert Redactor("box7.corp.example").redact(text) == redacted
