"""Who is logged in through the namespace whose rules are on trial keeps his session, and may come in anew."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import netapply
from netapply import core
from netapply.backend import BUILT_IN
from netapply.decide import decide
from netapply.errors import NetapplyError
from netapply.flow import TCP, Flow
from netapply.logins import Login, find_logins, read_login, spare, write_login
from netapply.namespace import Namespace
from netapply.plan import CapturePlan, Inbound, InboundPorts
from netapply.planfile import fingerprint
from netapply.ruleset import PortRange
from tests import agents, strategies
from tests.netns import Netns
from tests.test_agent_command import Running

PORT, OTHER = 22, 8080
POD, REMOTE = ("10.77.0.2", "fd77::2"), ("10.77.0.1", "fd77::1")
SERVER = Path(__file__).with_name("sshd.py")
each_backend = pytest.mark.parametrize("backend", tuple(BUILT_IN))


class Pod:
    """A namespace with a server of logins and another one, and a remote one that is linked to it."""

    def __init__(self, pod: Netns, remote: Netns, place: Path) -> None:
        self.netns, self.remote = pod, remote
        pod.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
        pod.run("ip", "link", "set", "eth1", "netns", remote.path)
        for netns, name, addresses in ((pod, "eth0", POD), (remote, "eth1", REMOTE)):
            netns.run("ip", "link", "set", name, "up")
            netns.run("ip", "addr", "add", f"{addresses[0]}/24", "dev", name)
            netns.run("ip", "addr", "add", f"{addresses[1]}/64", "dev", name, "nodad")
        self._sshd = place / "sshd"
        self._sshd.symlink_to(os.path.realpath(sys.executable))
        self._servers: list[subprocess.Popen[str]] = []

    def serve(self, port: int, environment: str) -> None:
        words = ["nsenter", f"--net={self.netns.path}", str(self._sshd), str(SERVER), str(port), environment]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        self._servers.append(server)
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"

    def close(self) -> None:
        for server in self._servers:
            server.kill()
            server.wait(10)

    def connect(self, port: int = PORT, family: int = 4) -> socket.socket:
        address = POD[family == 6]
        return self.remote.enter(lambda: socket.create_connection((address, port), timeout=30))

    def answers(self, port: int, family: int = 4) -> bool:
        """Whether a new connection gets to the server."""
        address = POD[family == 6]
        try:
            made = self.remote.enter(lambda: socket.create_connection((address, port), timeout=1))
        except OSError:
            return False
        with closing(made):
            return say(made) == "pong"


def say(connection: socket.socket, *words: str) -> Any:
    connection.sendall(json.dumps(words).encode() + b"\n")
    with connection.makefile() as lines:
        return json.loads(lines.readline())


@pytest.fixture
def pod(make_netns: Callable[[], Netns], tmp_path: Path) -> Iterator[Pod]:
    made = Pod(make_netns(), make_netns(), tmp_path)
    yield made
    made.close()


def command(pod: Pod, *words: str) -> list[str]:
    return [sys.executable, "-m", "netapply", *words, "-N", pod.netns.path]


def write(place: Path, **groups: object) -> str:
    path = place / "plan.json"
    path.write_text(json.dumps({"apiVersion": "netapply/v1", **groups}))
    return str(path)


PLANS: dict[str, dict[str, object]] = {
    "redirect": {"invalid": "drop"},
    "tproxy": {"inbound": {"mode": "tproxy"}, "invalid": "drop-all"},
    "blocked": {"ipv6": "block", "inbound": {"ports": {"include": [PORT, OTHER]}}},
    "rerouted": {"interfaces": {"reroute": [{"interface": "eth0", "include": "*"}]}},
}


@each_backend
@pytest.mark.parametrize("kind", PLANS)
def test_a_login_stays_and_may_come_anew_while_a_plan_is_on_trial_and_is_captured_once_it_is_confirmed(
    pod: Pod, tmp_path: Path, backend: str, kind: str
) -> None:
    """Nobody listens in the proxy's place, so whoever is captured gets no answer. Where sudo stands between, or not."""
    environment = "told" if backend == "nftables" else "stripped"
    family = 6 if kind == "blocked" else 4
    path = write(tmp_path, **PLANS[kind])
    pod.serve(PORT, environment)
    pod.serve(OTHER, "told")
    assert pod.answers(OTHER, family)
    with closing(pod.connect(family=family)) as login:
        code, said, wrong = say(login, *command(pod, "apply", path, "--backend", backend, "--confirm", "60"))
        assert code == 0, wrong
        assert f"you are logged in from {REMOTE[family == 6]}: connections to port 22 are left alone" in said + wrong
        assert say(login) == "pong"
        assert pod.answers(PORT, family)
        assert not pod.answers(OTHER, family) or kind == "rerouted"
        with netapply.open(pod.netns.path) as capture:
            assert capture.verify().same
            rules = [each for each in capture.show() if each.path in ("inbound.ports.exclude", "interfaces.reroute[0]")]
            assert any("22" in each.rule or POD[0] in each.rule for each in rules)
        code, said, wrong = say(login, *command(pod, "confirm"))
        assert (code, said) == (0, "confirmed\n"), wrong
        assert say(login) == "pong"
        assert not pod.answers(PORT, family)
        with netapply.open(pod.netns.path) as capture:
            assert capture.verify().same
            assert capture.verify(netapply.load_plan(Path(path).read_bytes())).same
            assert capture.rollback().reason.startswith("nothing of ours")
            assert pod.answers(PORT, family)


@pytest.mark.parametrize("backend", ["iptables-legacy", "iptables-nft"])
@pytest.mark.parametrize("mode", ["REDIRECT", "TPROXY"])
def test_istios_rules_leave_a_login_alone_that_connection_tracking_has_not_seen(
    pod: Pod, tmp_path: Path, backend: str, mode: str
) -> None:
    """Its first packet after the apply is an answer, which those rules would send to the proxy."""
    settings = ("-u", "1337", "-m", mode, "-i", "*", "-b", "*" if mode == "TPROXY" else "22,8080")
    words = (sys.executable, "-m", "netapply", "import", "istio", "--ipv6", "no", "--", *settings)
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    path = tmp_path / "plan.yaml"
    path.write_text(done.stdout)
    pod.serve(PORT, "stripped")
    pod.serve(OTHER, "stripped")
    with closing(pod.connect()) as login:
        words = ("apply", str(path), "--backend", backend, "--layout", "istio", "--confirm", "60")
        code, _, wrong = say(login, *command(pod, *words))
        assert code == 0, wrong
        assert say(login) == "pong"
        assert pod.answers(PORT)
        assert not pod.answers(OTHER)
        pod.netns.run(*command(pod, "confirm"))
        assert not pod.answers(PORT)
        assert say(login) == "pong"


def test_who_is_not_confirmed_goes_back_and_who_stands_already_is_left(pod: Pod, tmp_path: Path) -> None:
    pod.serve(PORT, "stripped")
    path = write(tmp_path)
    with closing(pod.connect()) as login, netapply.open(pod.netns.path) as capture:
        assert say(login, *command(pod, "apply", path, "--confirm", "1"))[0] == 0
        deadline = time.monotonic() + 20
        while capture.show():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert say(login, *command(pod, "apply", path))[0] == 0
        assert not pod.answers(PORT)
        code, said, wrong = say(login, *command(pod, "apply", path, "--confirm", "60"))
        assert (code, "nothing is on trial" in said + wrong) == (0, True)


REFUSE = """
import sys
from netapply import core
from netapply.cli import main
from netapply.errors import NetapplyError
def refuse(*_, **__):
    raise NetapplyError("planned")
core.apply = refuse
sys.exit(main(sys.argv[1:]))
"""


def test_a_confirmation_that_fails_leaves_it_on_trial(pod: Pod, tmp_path: Path) -> None:
    """Another command has put something else there, or the kernel refuses: nothing is lost, and the login stays."""
    pod.serve(PORT, "stripped")
    with closing(pod.connect()) as login:
        assert say(login, *command(pod, "apply", write(tmp_path), "--confirm", "60"))[0] == 0
        die = "from netapply import core, errors; core.apply = lambda *a, **k: (_ for _ in ()).throw("
        die += (
            "errors.NetapplyError('planned')); import sys; from netapply.cli import main; sys.exit(main(sys.argv[1:]))"
        )
        code, _, wrong = say(login, sys.executable, "-c", die, "confirm", "-N", pod.netns.path)
        assert (code, "planned" in wrong) == (1, True)
        assert pod.answers(PORT)
        assert say(login, *command(pod, "extend", "60"))[0] == 0
        assert say(login, *command(pod, "confirm"))[0] == 0
        assert not pod.answers(PORT)
        assert say(login, *command(pod, "confirm"))[0] == 1


def test_the_agent_spares_a_login_until_it_is_confirmed(pod: Pod, tmp_path: Path) -> None:
    path = write(tmp_path, **PLANS["redirect"])
    agent = Running(tmp_path)
    agent.start()
    pod.serve(PORT, "stripped")
    pod.serve(OTHER, "stripped")
    env = ("env", f"NETAPPLY_AGENT={agent.socket}")
    try:
        with closing(pod.connect()) as login:
            code, said, wrong = say(login, *env, *command(pod, "apply", path, "--confirm", "60"))
            assert code == 0, wrong
            assert f"you are logged in from {REMOTE[0]}" in said + wrong
            assert pod.answers(PORT)
            assert not pod.answers(OTHER)
            assert say(login, *env, *command(pod, "confirm"))[0] == 0
            assert say(login) == "pong"
            assert not pod.answers(PORT)
            assert agent.read("status")["namespaces"][0]["confirm_by"] == 0
            assert say(login, *env, *command(pod, "confirm"))[0] == 1
            code, said, wrong = say(login, *env, *command(pod, "apply", path, "--confirm", "1"))
            deadline = time.monotonic() + 20
            while pod.answers(PORT):  # spared, and then as it was before
                assert time.monotonic() < deadline
    finally:
        agent.stop()


async def test_the_agent_has_it_on_trial_still_if_what_is_meant_cannot_be_put_there(
    netns: Netns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meant = CapturePlan(ipv6="skip")
    async with agents.running(tmp_path) as (agent, record):
        await agent.apply(netns.path, CapturePlan(), confirm_within=60, meant=meant)
        spared = agents.standing(netns.path, "nftables")

        def refuse(*_: object, **__: object) -> None:
            raise NetapplyError("planned")

        with monkeypatch.context() as patch:
            patch.setattr(core, "apply", refuse)
            with pytest.raises(NetapplyError, match="planned"):
                await agent.confirm(netns.path)
        assert agents.standing(netns.path, "nftables") == spared
        await agent.confirm(netns.path)
        assert agents.standing(netns.path, "nftables") != spared
        with pytest.raises(NetapplyError):
            await agent.confirm(netns.path)
        assert agent.status()[0].fingerprint == fingerprint(meant)
        assert not record.all("unconfirmed")


def test_a_login_elsewhere_is_none_of_this_namespaces(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    pod.serve(PORT, "told")
    with closing(pod.connect()) as login, Namespace.open(pod.netns.path) as namespace:
        far, far_port = login.getsockname()
        here, port = login.getpeername()
        monkeypatch.setenv("SSH_CONNECTION", f"{far} {far_port} {here} {port}")
        assert [(each.port, each.here) for each in find_logins(namespace)] == [(PORT, socket.inet_aton(POD[0]))]
        for said in (f"{far} {far_port + 1} {here} {port}", f"{far} {far_port}", "a b c d", "::1%lo 1 ::1 22", ""):
            monkeypatch.setenv("SSH_CONNECTION", said)
            assert find_logins(namespace) == ()


# --- the plan ----------------------------------------------------------------------------------------------------

LOGIN = st.sampled_from([strategies.ADDRESSES_4, strategies.ADDRESSES_6]).flatmap(
    lambda addresses: st.builds(Login, st.sampled_from(addresses), st.sampled_from(addresses), st.just(PORT))
)


@settings(max_examples=300, deadline=None)
@given(strategies.plans, LOGIN, strategies.flows())
def test_a_plan_that_spares_a_login_leaves_it_alone_and_captures_all_else(
    plan: CapturePlan, login: Login, flow: Flow
) -> None:
    spared = spare(plan, [login], "netapply")
    inward = flow._replace(
        direction="inbound", protocol=TCP, source=login.far, destination=login.here, dport=PORT, iface="eth0", mark=0
    )
    assert decide(spared, inward).verdict == "bypass"
    if flow.state != "invalid" and flow.dport != PORT and flow.destination != login.here:
        assert decide(spared, flow).same_as(decide(plan, flow))


@given(LOGIN)
def test_a_login_is_read_as_it_is_written(login: Login) -> None:
    assert read_login(write_login(login)) == login


@pytest.mark.parametrize("word", ["", "1.2.3.4,1.2.3.5", "1.2.3.4,::1,22", "a,b,22", "1.2.3.4,1.2.3.5,0", "::1,::2,x"])
def test_a_word_that_is_no_login_is_none(word: str) -> None:
    assert read_login(word) is None


def test_a_port_is_taken_out_of_a_list_where_istio_has_no_exclusion_beside_it() -> None:
    def included(*ranges: tuple[int, int]) -> CapturePlan:
        return CapturePlan(inbound=Inbound(ports=InboundPorts(tuple(PortRange(*each) for each in ranges))))

    logins = [Login(b"\1\2\3\4", b"\1\2\3\5", port) for port in (22, 80)]
    for before, after in (
        ([(22, 22)], []),
        ([(1, 100)], [(1, 21), (23, 79), (81, 100)]),
        ([(22, 23), (79, 80)], [(23, 23), (79, 79)]),
        ([(443, 443)], [(443, 443)]),
    ):
        assert spare(included(*before), logins, "istio").inbound == included(*after).inbound
