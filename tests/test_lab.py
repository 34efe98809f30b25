"""The lab: real packets through a pod, a proxy and a remote side; the stock tools put the rules in.

`XTABLES_LOCKFILE` is private: the machine's lock is everybody's.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from netapply.errors import NamespaceError
from netapply.lab import ADDRESSES, Answer, Expect, Identity, Lab, Place, Traffic, sweep, traffic_types
from netapply.lab.actors import acting_as
from netapply.lab.answers import decode
from netapply.lab.namespaces import NETNS_DIR, lab_names, remove

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")

ISTIO_TPROXY_PROXY = Identity(0, 1337)  # as whom Istio runs Envoy where inbound is TPROXY
LOOPBACK = {"ip": ("127.0.0.1/32", "127.0.0.6/32"), "ip6": ("::1/128", "::6/128")}
RESTORE = {"ip": "iptables-nft-restore", "ip6": "ip6tables-nft-restore"}
DIRECT_PORTS = "".join(f"-A ISTIO_INBOUND -p tcp --dport {port} -j RETURN\n" for port in (15008, 15090, 15021, 15020))

NAT = """*nat
:ISTIO_INBOUND -
:ISTIO_REDIRECT -
:ISTIO_IN_REDIRECT -
:ISTIO_OUTPUT -
-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006
{direct}-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
-A OUTPUT -p tcp -j ISTIO_OUTPUT
-A ISTIO_OUTPUT -o lo -s {passthrough} -j RETURN
-A ISTIO_OUTPUT -o lo ! -d {loopback} -p tcp -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -o lo ! -d {loopback} -p tcp -m owner --gid-owner 1337 -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --gid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -m owner --gid-owner 1337 -j RETURN
-A ISTIO_OUTPUT -d {loopback} -j RETURN
-A ISTIO_OUTPUT -j ISTIO_REDIRECT
{more}COMMIT
"""
INBOUND_REDIRECT = "-A PREROUTING -p tcp -j ISTIO_INBOUND\n"
MANGLE = """*mangle
:ISTIO_INBOUND -
:ISTIO_DIVERT -
:ISTIO_TPROXY -
-A ISTIO_DIVERT -j MARK --set-mark 1337
-A ISTIO_DIVERT -j ACCEPT
-A ISTIO_TPROXY ! -d {loopback} -p tcp -j TPROXY --tproxy-mark 1337/0xffffffff --on-port 15006
-A ISTIO_INBOUND -p tcp -m mark --mark 1337 -j RETURN
-A ISTIO_INBOUND -p tcp -s {passthrough} -i lo -j RETURN
-A ISTIO_INBOUND -p tcp -i lo -m mark ! --mark 1338 -j RETURN
{direct}-A ISTIO_INBOUND -p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT
-A ISTIO_INBOUND -p tcp -j ISTIO_TPROXY
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A PREROUTING -p tcp -m mark --mark 1337 -j CONNMARK --save-mark
-A OUTPUT -p tcp -o lo -m mark --mark 1337 -j RETURN
-A OUTPUT ! -d {loopback} -p tcp -o lo -m owner --uid-owner 1337 -j MARK --set-mark 1338
-A OUTPUT ! -d {loopback} -p tcp -o lo -m owner --gid-owner 1337 -j MARK --set-mark 1338
-A OUTPUT -p tcp -m connmark --mark 1337 -j CONNMARK --restore-mark
COMMIT
"""


def tool(lab: Lab, *command: str, text: str = "") -> str:
    """Run an oracle in the pod's namespace."""
    lock = os.environ.get("XTABLES_LOCKFILE") or f"/tmp/{lab.pod.name}.lock"
    environment = {**os.environ, "XTABLES_LOCKFILE": lock}
    done = subprocess.run(
        ["nsenter", f"--net={lab.pod.path}", *command],
        input=text, capture_output=True, text=True, timeout=10, check=False, env=environment,
    )  # fmt: skip
    Path(lock).unlink(missing_ok=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def restore(lab: Lab, rules: str, **words: str) -> None:
    """Put the same rules in for both families, each with its own loopback addresses."""
    for family in lab.families:
        loopback, passthrough = LOOPBACK[family]
        text = rules.format(loopback=loopback, passthrough=passthrough, direct=DIRECT_PORTS, **words)
        tool(lab, RESTORE[family], text=text)


def capture(lab: Lab, mode: str) -> None:
    """Istio's rules for the usual plan."""
    tool(lab, "ip", "address", "add", "::6/128", "dev", "lo")
    deadline = time.monotonic() + 5
    while "local ::6" not in tool(lab, "ip", "route", "get", "::6"):  # a worker of the kernel adds the route, later
        assert time.monotonic() < deadline
    if mode == "redirect":
        restore(lab, NAT, more=INBOUND_REDIRECT)
        return
    restore(lab, NAT + MANGLE, more="")
    for family in ("-4", "-6"):
        tool(lab, "ip", family, "rule", "add", "fwmark", "1337", "lookup", "133")
        tool(lab, "ip", family, "route", "add", "local", "default", "dev", "lo", "table", "133")


async def faults(lab: Lab, traffic: tuple[Traffic, ...]) -> list[str]:
    """What went otherwise than expected."""
    found = [(one, one.expect.faults(await lab.send(one.send))) for one in traffic]
    return [f"{one.number} {one.name} {one.family}: {', '.join(wrong)}" for one, wrong in found if wrong]


# --- the six traffic types -----------------------------------------------------------------------------------


async def test_without_rules_everything_is_answered_directly():
    async with Lab() as lab:
        assert lab.families == ("ip", "ip6")
        assert await faults(lab, traffic_types("direct")) == []


async def test_all_traffic_types_go_as_expected_under_redirect():
    async with Lab() as lab:
        capture(lab, "redirect")
        assert await faults(lab, traffic_types("redirect")) == []


async def test_all_traffic_types_go_as_expected_under_tproxy():
    async with Lab(proxy=ISTIO_TPROXY_PROXY) as lab:
        capture(lab, "tproxy")
        assert await faults(lab, traffic_types("tproxy")) == []


async def test_rules_that_lead_the_proxy_back_to_itself_are_seen():
    """Istio's TPROXY rules redirect a proxy of uid 1337 that speaks in its client's name: the app never sees it."""
    async with Lab() as lab:
        capture(lab, "tproxy")
        wrong = await faults(lab, traffic_types("tproxy"))
    assert [fault.split(":")[0] for fault in wrong] == ["1 remote to app ip", "1 remote to app ip6"]


async def test_a_wrong_rule_shows_in_the_faults():
    async with Lab() as lab:
        capture(lab, "redirect")
        tool(lab, "iptables-nft", "-t", "nat", "-I", "ISTIO_INBOUND", "-p", "tcp", "--dport", "8080", "-j", "RETURN")
        (fault,) = await faults(lab, traffic_types("redirect"))
    assert fault.startswith("1 remote to app ip: by way of (), not (15006,)")


async def test_the_first_hop_tells_the_original_destination():
    async with Lab() as lab:
        capture(lab, "redirect")
        for family in lab.families:
            to = (ADDRESSES[family].elsewhere, 443)
            answer = await lab.tcp("app", to)
            assert (answer.who, answer.port, answer.via_ports, answer.original_dst) == ("remote", 443, (15001,), to)


async def test_150_flows_a_second_are_possible():
    async with Lab() as lab:
        capture(lab, "redirect")
        started = time.monotonic()
        for _ in range(6):
            assert await faults(lab, traffic_types("redirect")) == []
        assert 6 * len(traffic_types("redirect")) / (time.monotonic() - started) > 150


# --- who owns what -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules",
    [
        "add rule inet t o meta skuid 4242 tcp dport 80 reject with tcp reset",
        "add rule inet t o meta skgid 4343 tcp dport 80 reject with tcp reset",
    ],
)
async def test_nft_sees_the_uid_and_gid_of_a_probe(rules: str):
    async with Lab() as lab:
        tool(lab, "nft", f"add table inet t; add chain inet t o {{ type filter hook output priority 0; }}; {rules}")
        for family in lab.families:
            to = (ADDRESSES[family].remote, 80)
            assert (await lab.tcp("app", to, uid=4242, gid=4343)).error == "refused"
            assert (await lab.tcp("app", to, uid=4241, gid=4342)).who == "remote"


@pytest.mark.parametrize("match", ["--uid-owner 4242", "--gid-owner 4343"])
async def test_xt_owner_sees_the_uid_and_gid_of_a_probe(match: str):
    async with Lab() as lab:
        restore(lab, f"*filter\n-A OUTPUT -p tcp -m owner {match} -j REJECT --reject-with tcp-reset\nCOMMIT\n")
        for family in lab.families:
            to = (ADDRESSES[family].remote, 80)
            assert (await lab.tcp("app", to, uid=4242, gid=4343)).error == "refused"
            assert (await lab.tcp("app", to)).who == "remote"


async def test_accepted_connections_belong_to_the_service():
    """What the app answers carries the app's uid and nobody else's, as if it were a process of its own."""
    async with Lab() as lab:
        answers = "-A OUTPUT -p tcp --sport 8080 --tcp-flags PSH PSH -m owner"
        restore(lab, f"*filter\n{answers} ! --uid-owner 1000 -j DROP\n{answers} ! --gid-owner 1000 -j DROP\nCOMMIT\n")
        assert (await lab.tcp("remote", (ADDRESSES["ip"].pod, 8080))).who == "app"


def test_what_is_opened_belongs_to_the_identity_and_credentials_come_back():
    with acting_as(Identity(4242, 4343)):
        ids = filesystem_ids()
    assert ids == [4242, 4343]
    assert filesystem_ids() == [os.geteuid(), os.getegid()]


def filesystem_ids() -> list[int]:
    status = Path("/proc/thread-self/status").read_text()
    return [int(line.split()[-1]) for line in status.splitlines() if line.startswith(("Uid:", "Gid:"))]


# --- probes --------------------------------------------------------------------------------------------------


async def test_udp_is_answered_by_the_address_that_was_asked():
    async with Lab() as lab:
        for family in lab.families:
            for to in ((ADDRESSES[family].remote, 9090), (ADDRESSES[family].elsewhere, 9090)):
                answer = await lab.udp("app", to)
                assert (answer.who, answer.port, answer.peer[0]) == ("remote", 9090, ADDRESSES[family].pod)


@pytest.mark.parametrize("over", ["udp", "tcp"])
async def test_dns_tells_who_answered(over: str):
    async with Lab() as lab:
        for family in lab.families:
            to = (ADDRESSES[family].elsewhere, 53)
            assert await lab.dns("app", to, over=over) == Answer("dns-upstream")
            tool(lab, "iptables-nft" if family == "ip" else "ip6tables-nft", *redirect_dns(over))
            assert await lab.dns("app", to, over=over) == Answer("dns-proxy")
            assert await lab.dns("proxy", to, over=over) == Answer("dns-upstream")


def redirect_dns(protocol: str) -> list[str]:
    owner = ["-m", "owner", "!", "--uid-owner", "1337"]
    return [
        "-t",
        "nat",
        "-A",
        "OUTPUT",
        "-p",
        protocol,
        "--dport",
        "53",
        *owner,
        "-j",
        "REDIRECT",
        "--to-ports",
        "15053",
    ]


async def test_a_probe_may_choose_its_source():
    async with Lab() as lab:
        for family in lab.families:
            ours = ADDRESSES[family]
            answer = await lab.tcp("remote", (ours.pod, 8080), bind=(ours.elsewhere, 4711))
            assert answer.peer == (ours.elsewhere, 4711)


async def test_failures_are_words():
    async with Lab() as lab:
        pod = ADDRESSES["ip"].pod
        assert (await lab.tcp("remote", (pod, 9))).error == "refused"
        assert (await lab.udp("remote", (pod, 9))).error == "refused"
        assert (await lab.tcp("remote", (pod, 15001))).error == "loop"
        tool(lab, "nft", "add table ip t; add chain ip t i { type filter hook input priority 0; policy drop; }")
        started = time.monotonic()
        assert (await lab.tcp("remote", (pod, 8080), timeout=0.1)).error == "timeout"
        assert (await lab.udp("remote", (pod, 8080), timeout=0.1)).error == "timeout"
        assert (await lab.dns("remote", (pod, 15053), timeout=0.1)).error == "timeout"
        assert time.monotonic() - started < 1


async def test_a_proxy_that_cannot_go_on_says_why():
    async with Lab() as lab:
        capture(lab, "redirect")
        answer = await lab.tcp("app", (ADDRESSES["ip"].elsewhere, 9))
        assert (answer.who, answer.error, answer.via_ports) == ("", "refused", (15001,))


async def test_more_services_can_be_added():
    async with Lab() as lab:
        lab.listen(lab.actor("app"), "ssh", (22,))
        assert (await lab.tcp("remote", (ADDRESSES["ip6"].pod, 22))).who == "ssh"
        with pytest.raises(OSError, match="in use"):
            lab.listen(lab.actor("root"), "another", (22,))


def test_an_answer_survives_the_wire():
    answer = Answer("app", 8080, ("::1", 5), (), "")
    assert decode(answer.encode()) == answer
    assert [decode(line).error for line in (b"", b"{}", b"[1]\n", b"\xff\n")] == [
        "reset",
        "garbled",
        "garbled",
        "garbled",
    ]


def test_an_expectation_names_each_difference():
    expect = Expect("app", (15006,), ("10.0.0.1", 80), "127.0.0.6")
    assert len(expect.faults(Answer("remote", 80, ("10.0.0.2", 1)))) == 4
    assert expect.faults(Answer(error="timeout")) == ("timeout",)


# --- coming and going ----------------------------------------------------------------------------------------


def lives(name: str) -> bool:
    return Path(NETNS_DIR, name).exists()


async def test_a_lab_comes_and_goes_in_less_than_100_ms():
    took = []
    for _ in range(3):
        started = time.monotonic()
        async with Lab() as lab:
            names = lab.pod.name, lab.remote.name
            assert lives(names[0])
            assert lives(names[1])
        took.append(time.monotonic() - started)
        assert not any(map(lives, names))
    assert min(took) < 0.1


async def test_a_lab_goes_when_its_body_raises():
    async def fail(lab: Lab) -> None:
        raise ZeroDivisionError(lab.pod.name)

    with pytest.raises(ZeroDivisionError) as caught:
        async with Lab() as lab:
            await fail(lab)
    assert not lives(str(caught.value))


async def test_nothing_of_a_lab_stays_open():
    async with Lab():
        pass
    before = open_descriptors_and_threads()
    async with Lab() as lab:
        await lab.tcp("app", (ADDRESSES["ip"].remote, 80))
    assert open_descriptors_and_threads() == before


def open_descriptors_and_threads() -> tuple[int, int]:
    return len([*Path("/proc/self/fd").iterdir()]), len([*Path("/proc/self/task").iterdir()])


CHILD = """
    import asyncio, sys
    from netapply.lab import Lab
    forks = []
    sys.addaudithook(lambda event, _: forks.append(event) if event in
        ("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "subprocess.Popen") else None)
    async def main():
        async with Lab({options}) as lab:
            print(lab.pod.name, lab.pod.path, (await lab.tcp("app", ("10.77.0.1", 80))).who, forks, flush=True)
            await asyncio.sleep({seconds})
    asyncio.run(main())
"""


def child(seconds: float, *wrapper: str, options: str = "") -> tuple[subprocess.Popen[str], list[str]]:
    """A process with a lab of its own, once the lab stands: the process and the words that it printed."""
    script = textwrap.dedent(CHILD).replace("{seconds}", str(seconds)).replace("{options}", options)
    process = subprocess.Popen(
        [*wrapper, sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout
    return process, process.stdout.readline().split()


def end(process: subprocess.Popen[str]) -> int:
    """Wait for it; it is killed if it takes more than 10 s."""
    try:
        return process.wait(10)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)
        assert process.stdout
        process.stdout.close()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, -signal.SIGINT)]
)
def test_a_signal_takes_the_lab_down(number: signal.Signals, code: int):
    process, words = child(20)
    assert lives(words[0])
    process.send_signal(number)
    assert end(process) == code
    assert not lives(words[0])


def test_the_next_lab_removes_what_a_killed_one_left_and_nothing_else():
    killed, dead = child(20)
    alive, words = child(20)
    try:
        killed.kill()
        end(killed)
        assert lives(dead[0])
        asyncio.run(come_and_go())
        assert not lives(dead[0])
        assert lives(words[0])
    finally:
        alive.terminate()
        end(alive)


def test_kept_namespaces_outlive_their_process_and_the_next_lab():
    process, words = child(0, options="keep=True")
    names = words[0], words[0].removesuffix("pod") + "remote"
    try:
        assert end(process) == 0
        asyncio.run(come_and_go())
        assert all(map(lives, names))
    finally:
        for name in names:
            remove(name)
    assert not any(map(lives, names))


async def come_and_go() -> None:
    async with Lab():
        pass


def test_a_locked_namespace_is_not_stale_whatever_its_pid_looks_like():
    """Another pid namespace may share /run/netns: its process ids mean nothing here."""
    (mine,) = lab_names(("pod",))
    foreign = mine.replace(str(os.getpid()), str(2**22 + 1))  # above the kernel's limit for process ids
    with Place(foreign):
        assert foreign not in sweep()
        assert lives(foreign)


def test_the_lab_starts_no_process():
    process, words = child(0)
    assert end(process) == 0
    assert words[2:] == ["remote", "[]"]


@pytest.mark.parametrize(
    ("run", "path"),
    [("mount -t tmpfs none /run", "/run/netns/"), ("mount -t tmpfs -o ro none /run", "/proc/")],
    ids=["no /run/netns", "read-only /run"],
)
def test_the_lab_works_without_a_netns_directory(run: str, path: str):
    process, words = child(0, "unshare", "-m", "sh", "-c", f'{run} && exec "$@"', "sh")
    assert end(process) == 0
    assert words[1].startswith(path)
    assert words[2] == "remote"


def test_without_privileges_the_error_says_what_to_do():
    os.seteuid(65534)
    try:
        with pytest.raises(NamespaceError) as caught:
            asyncio.run(come_and_go())
    finally:
        os.seteuid(0)
    assert caught.value.next_step == "run it as root"
