"""The drop-in, killed while it changes iptables-legacy, where no change of two tables is one to the kernel."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

import pytest

import netapply
from tests.netns import PATIENCE, Netns

WORDS = ("-b", "*", "-i", "*", "--dual-stack", "--backend", "iptables-legacy")
#: netapply, killed by itself before or after its Nth exchange of a table: N, "before" or "after", words.
DYING = """
import os, signal, sys
from netapply.cli import main
from netapply.namespace import Namespace

left, when, change = int(sys.argv.pop(1)), sys.argv.pop(1), Namespace.setsockopt

def dying(self, family, option, blob, scratch=None):
    global left
    if option != 64:  # IPT_SO_SET_REPLACE
        return change(self, family, option, blob, scratch)
    left -= 1
    if left < 0 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    answer = change(self, family, option, blob, scratch)
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer

Namespace.setsockopt = dying
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def pod(netns: Netns) -> Netns:
    """A namespace with an address of each family, and a foreign rule in each."""
    netns.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "peer0")
    for name in ("eth0", "peer0"):
        netns.run("ip", "link", "set", name, "up")
    netns.run("ip", "address", "add", "10.99.0.2/24", "dev", "eth0")
    netns.run("ip", "address", "add", "fd99::2/64", "dev", "eth0", "nodad")
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        netns.run(tool, "-t", "nat", "-A", "OUTPUT", "-p", "udp", "--dport", "9", "-j", "ACCEPT")
    return netns


def command(pod: Netns, port: str) -> list[str]:
    return ["istio-iptables", "--network-namespace", pod.path, *WORDS, "-d", port]


def apply(pod: Netns, port: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "netapply", *command(pod, port)], check=True, timeout=PATIENCE, capture_output=True
    )


def picture(pod: Netns) -> tuple[str, str]:
    """The rules of both families, without counters and dates."""
    texts = (pod.run(tool) for tool in ("iptables-legacy-save", "ip6tables-legacy-save"))
    kept = (line.partition(" [")[0] for text in texts for line in (*text.splitlines(), "") if line[:1] != "#")
    first, *rest = (tuple(group) for more, group in itertools.groupby(kept, bool) if more)
    return "\n".join(first), "\n".join(line for group in rest for line in group)


def pictures(pod: Netns) -> list[tuple[str, str]]:
    """Of the rules that exclude port 80, and of those that exclude 443, which stand in the end."""
    found: list[tuple[str, str]] = []
    for port in ("80", "443"):
        apply(pod, port)
        found.append(picture(pod))
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]
    return found


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_exchange_each_table_is_old_or_new_and_the_next_command_makes_it_all_one(
    pod: Netns, when: str, figure: Callable[[str], None]
) -> None:
    """From 443 to 80. Between two exchanges the families differ: until the next command, which goes back first."""
    new, old = pictures(pod)
    mixed = 0
    for at in range(20):
        died = subprocess.run(
            [sys.executable, "-c", DYING, str(at), when, *command(pod, "80")], timeout=PATIENCE, check=False
        ).returncode
        found = picture(pod)
        assert found[0] in (old[0], new[0])
        assert found[1] in (old[1], new[1])
        if not died:
            assert found == new
            assert at == 2  # two families, a table each
            figure(f"killed {when} each of {at} exchanges: {mixed} time with one family new and one old, healed")
            return
        assert died == -signal.SIGKILL
        mixed += found not in (old, new)
        with netapply.open(pod.path) as capture:
            capture.clean()
            assert capture.show() == ()
        assert "ISTIO_" not in "".join(picture(pod))
        assert "--dport 9 " in picture(pod)[0]
        assert "--dport 9 " in picture(pod)[1]
        apply(pod, "443")
        assert picture(pod) == old
    pytest.fail("there are more exchanges than that")


def test_killed_between_two_exchanges_the_next_command_says_that_it_undid_it(pod: Netns) -> None:
    new, old = pictures(pod)
    subprocess.run([sys.executable, "-c", DYING, "0", "after", *command(pod, "80")], timeout=PATIENCE, check=False)
    assert picture(pod) == (new[0], old[1])
    done = subprocess.run(
        [sys.executable, "-m", "netapply", *command(pod, "443")],
        check=True,
        timeout=PATIENCE,
        capture_output=True,
        text=True,
    )
    assert "interrupted run was undone (replace table ip nat)" in done.stdout + done.stderr
    assert picture(pod) == old


def test_killed_at_any_moment_the_next_run_makes_both_families_one(pod: Netns, figure: Callable[[str], None]) -> None:
    both = pictures(pod)
    found: list[tuple[int, int]] = []
    for number in range(16):
        process = subprocess.Popen(
            [sys.executable, "-m", "netapply", *command(pod, ("80", "443")[number % 2])],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.04 + number * 0.01)
        process.kill()
        process.wait()
        now = picture(pod)
        found.append(([one for one, _ in both].index(now[0]), [six for _, six in both].index(now[1])))
    apply(pod, "443")
    assert picture(pod) == both[1]
    changes = sum(now == (number % 2, number % 2) for number, now in enumerate(found))
    mixed = sum(four != six for four, six in found)
    figure(
        f"killed 16 times, 40 to 190 ms after the start: {changes} as they should be, {mixed} with the families apart"
    )
