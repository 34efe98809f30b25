"""The socket API: what it answers, whom it refuses, and that nobody holds it up. The agent behind it is a double."""

from __future__ import annotations

import array
import asyncio
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar, get_args, get_type_hints

import jsonschema
import pytest

from netapply.agent import events
from netapply.agent.endpoints import ENDPOINTS
from netapply.agent.events import Healed
from netapply.agent.front import Front, loopback, unix_socket
from netapply.agent.http import Deadlines
from netapply.agent.model import AgentConfig
from netapply.agent.openapi import description
from netapply.agent.policy import Meter, Peer, Policy, Quota
from netapply.cli import client
from netapply.cli.arguments import build_parser
from netapply.cli.client import Client
from netapply.documents import LIMITS
from netapply.errors import ConflictError, Fault, KernelError, LockError, NamespaceError, NetapplyError, PlanError
from netapply.jsonform import error_fields, plain
from netapply.planfile import load_plan
from tests.agent_double import AgentDouble
from tests.netns import PATIENCE, Netns

T = TypeVar("T")

PLAN = b"apiVersion: netapply/v1\noutbound: {ports: {exclude: [15020]}}\n"
READERS = 54321  # a group that nobody has


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that other users can go through, which pytest's are not."""
    path = Path(tempfile.mkdtemp(prefix="netapply-test-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
async def agent(place: Path) -> AgentDouble:
    sockets = {"socket": str(place / "control.sock"), "read_socket": str(place / "read.sock")}
    return AgentDouble(AgentConfig(**sockets, read_group=str(READERS), metrics="127.0.0.1:0", queue=8))


@pytest.fixture
async def front(agent: AgentDouble) -> AsyncIterator[Front]:
    deadlines = Deadlines(idle=1.0, head=0.3, body=0.5, work=1.0, write=0.5)
    async with Front(agent, deadlines=deadlines, quota=Quota(connections=12, connections_of_user=8)) as front:
        yield front


async def away(work: Callable[[], T]) -> T:
    """Run what blocks in a thread, as the server lives in this one."""
    return await asyncio.wait_for(asyncio.to_thread(work), PATIENCE)


def raw(path: str, data: bytes, *, end: bool = True) -> bytes:
    """All that is answered to these bytes, until the server closes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(path)
        with suppress(OSError):  # it answers before all is there
            sock.sendall(data)
            if end:
                sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(65536), b""))


def curl(*words: str, uid: int = 0, groups: str = "") -> tuple[int, dict]:
    """Status and JSON that curl gets, as another user if need be."""
    other = ["setpriv", f"--reuid={uid}", f"--regid={uid}", f"--groups={groups}" if groups else "--clear-groups"]
    command = [*(other if uid else []), "curl", "-s", "--max-time", "10", "-w", "\n%{http_code}", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body) if body else {}


async def subscribed(agent: AgentDouble, number: int = 1) -> None:
    """Wait until so many listen to events."""
    async with asyncio.timeout(PATIENCE):
        while len(agent.subscribers._all) != number:  # noqa: ASYNC110 - it has no event for that
            await asyncio.sleep(0.01)


# --- what it answers -----------------------------------------------------------------------------------------


async def test_curl_applies_looks_and_removes(agent: AgentDouble, front: Front, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_bytes(PLAN)
    words = ("--unix-socket", agent.config.socket)
    one = "http://agent/v1/namespaces/pod-1"
    status, answer = await away(lambda: curl(*words, "-X", "PUT", "--data-binary", f"@{plan}", one))
    assert (status, answer["ok"], answer["changed"], answer["backend"]) == (200, True, True, "nftables")
    assert agent.plans == [load_plan(PLAN)]
    status, answer = await away(lambda: curl(*words, "http://agent/v1/namespaces"))
    assert [each["name"] for each in answer["namespaces"]] == ["pod-1"]
    assert (await away(lambda: curl(*words, "-X", "DELETE", one)))[0] == 200
    assert (await away(lambda: curl(*words, one)))[0] == 404


async def test_a_plan_with_faults_comes_back_with_all_of_them(agent: AgentDouble, front: Front) -> None:
    body = b"apiVersion: netapply/v1\nproxy: {uids: [x y], outbound_port: 99999}\n"
    with pytest.raises(PlanError) as raised:
        await away(lambda: Client(agent.config.socket).ask("PUT", "/v1/namespaces/pod-1", body))
    assert {fault.path for fault in raised.value.faults} == {"proxy.uids[0]", "proxy.outbound_port"}
    assert not agent.asked


@pytest.mark.parametrize(
    "error",
    [
        NamespaceError("gone", next_step="look"),
        ConflictError("ours there", dialects=("nftables",)),
        LockError("held"),
        PlanError((Fault("a", "b", "c"),)),
        KernelError("add rule", 12, extack="no"),
        NetapplyError("anything"),
    ],
)
async def test_an_error_of_the_agent_is_the_same_at_the_other_end(
    agent: AgentDouble, front: Front, error: NetapplyError
) -> None:
    agent.failing = error
    with pytest.raises(type(error)) as raised:
        await away(lambda: Client(agent.config.socket).ask("PUT", "/v1/namespaces/pod-1", PLAN))
    assert type(raised.value) is type(error)
    assert str(raised.value) == str(error)
    assert error_fields(raised.value) == error_fields(error)


async def test_a_fault_of_ours_is_told_as_one_and_the_server_goes_on(agent: AgentDouble, front: Front) -> None:
    agent.failing = ZeroDivisionError("secret")
    with pytest.raises(NetapplyError, match="ZeroDivisionError; see the agent's log"):
        await away(lambda: Client(agent.config.socket).ask("PUT", "/v1/namespaces/pod-1", PLAN))
    assert (await away(lambda: Client(agent.config.socket).ask("GET", "/v1/namespaces")))["ok"]


async def test_words_of_the_query_are_checked_all_at_once(agent: AgentDouble, front: Front) -> None:
    target = "/v1/namespaces/pod-1?layout=odd&confirm=0&fail=maybe"
    with pytest.raises(PlanError) as raised:
        await away(lambda: Client(agent.config.socket).ask("PUT", target, PLAN))
    assert {fault.path for fault in raised.value.faults} == {"layout", "confirm", "fail"}
    with pytest.raises(PlanError, match="colour"):
        await away(lambda: Client(agent.config.socket).ask("GET", "/v1/namespaces?colour=red"))


async def test_events_come_as_json_lines_and_only_of_the_namespace_that_was_asked_for(
    agent: AgentDouble, front: Front
) -> None:
    def listen() -> list[dict]:
        lines = Client(agent.config.read_socket).lines("/v1/events?namespace=b")
        return [next(lines), next(lines)]

    listening = asyncio.ensure_future(away(listen))
    await subscribed(agent)
    for name in "abab":
        agent.subscribers.tell(Healed(name, 1.0, None, 0.002, ()))
    events = await listening
    assert [event["namespace"] for event in events] == ["b", "b"]
    assert events[0]["version"] == "netapply.event/v1"
    await subscribed(agent, 0)  # who has left is listened to no more


async def test_a_subscriber_who_does_not_read_loses_events_and_delays_nobody(agent: AgentDouble, front: Front) -> None:
    with socket.socket(socket.AF_UNIX) as lazy:
        lazy.connect(agent.config.read_socket)
        lazy.sendall(b"GET /v1/events HTTP/1.0\r\n\r\n")
        await subscribed(agent)
        for _ in range(20_000):
            agent.subscribers.tell(Healed("a", 1.0, None, 0.002, ()))
        assert agent.subscribers.lost > 19_000
        assert (await away(lambda: Client(agent.config.socket).ask("GET", "/v1/namespaces")))["ok"]


async def test_health_tells_a_loop_that_is_stuck(agent: AgentDouble, front: Front) -> None:
    words = ("--unix-socket", agent.config.read_socket)
    assert (await away(lambda: curl(*words, "http://agent/health/live")))[0] == 200
    assert (await away(lambda: curl(*words, "http://agent/health/ready")))[0] == 200
    agent.ticked -= 60
    assert (await away(lambda: curl(*words, "http://agent/health/live")))[0] == 503


# --- descriptors ---------------------------------------------------------------------------------------------


async def test_a_namespace_is_named_by_a_descriptor_that_comes_along(
    agent: AgentDouble, front: Front, netns: Netns
) -> None:
    seen: list[tuple[int, int]] = []
    apply = agent.apply

    async def look(target, plan, **words):
        status = os.fstat(target.spec)
        seen.append((status.st_dev, status.st_ino))
        return await apply(target, plan, **words)

    agent.apply = look
    before = len(os.listdir("/proc/self/fd"))
    await away(lambda: Client(agent.config.socket).ask("PUT", "/v1/namespaces/fd", PLAN, fd=netns.fd))
    there = os.fstat(netns.fd)
    assert seen == [(there.st_dev, there.st_ino)]
    await asyncio.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= before  # the agent's copy is closed


async def test_a_descriptor_beside_a_name_must_be_of_the_same_namespace(
    agent: AgentDouble, front: Front, named_netns: Netns, make_netns: Callable[..., Netns]
) -> None:
    ask = Client(agent.config.socket).ask
    target = f"/v1/namespaces/{named_netns.name}"
    await away(lambda: ask("PUT", target, PLAN, fd=named_netns.fd))
    with pytest.raises(ConflictError, match="another namespace to the agent"):
        await away(lambda: ask("PUT", target, PLAN, fd=make_netns().fd))
    assert [what for what, _ in agent.asked] == ["apply"]


async def test_the_agents_own_descriptors_cannot_be_named(agent: AgentDouble, front: Front) -> None:
    for word in ("fd:3", "fd%3A0"):
        with pytest.raises(NamespaceError, match="its own"):
            await away(lambda word=word: Client(agent.config.socket).ask("PUT", f"/v1/namespaces/{word}", PLAN))
    with pytest.raises(NamespaceError, match="no descriptor came"):
        await away(lambda: Client(agent.config.socket).ask("PUT", "/v1/namespaces/fd", PLAN))


async def test_descriptors_that_nobody_asked_for_are_closed(agent: AgentDouble, front: Front, netns: Netns) -> None:
    before = len(os.listdir("/proc/self/fd"))

    def send(number: int) -> bytes:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(agent.config.socket)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [netns.fd] * number))
            sock.sendmsg([b"GET /v1/namespaces HTTP/1.0\r\n\r\n"], [rights])
            return b"".join(iter(lambda: sock.recv(65536), b""))

    assert (await away(lambda: send(1))).startswith(b"HTTP/1.1 400")
    assert (await away(lambda: send(60))).startswith(b"HTTP/1.1 400")
    await asyncio.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= before


# --- who may -------------------------------------------------------------------------------------------------

ROOT, READER, OTHER = Peer(1, 0, 0, frozenset()), Peer(1, 7, 7, frozenset({9})), Peer(1, 8, 8, frozenset())


@pytest.mark.parametrize(
    ("policy", "peer", "read", "change"),
    [
        (Policy(5), ROOT, True, True),
        (Policy(5), Peer(1, 5, 1, frozenset()), True, True),
        (Policy(0, 9), READER, True, False),
        (Policy(0, 7), READER, True, False),
        (Policy(0, 9), OTHER, False, False),
        (Policy(0), OTHER, False, False),
        (Policy(0, 9, read_only=True), ROOT, True, False),
        (Policy(0, 9, read_only=True), READER, True, False),
        (Policy(0, anybody=True, read_only=True), Peer(0, -1, -1, frozenset()), True, False),
        (Policy(0), Peer(0, -1, -1, frozenset()), False, False),
    ],
)
def test_a_policy_knows_root_the_owner_and_the_reading_group(
    policy: Policy, peer: Peer, read: bool, change: bool
) -> None:
    assert (not policy.refusal(peer, "read"), not policy.refusal(peer, "change")) == (read, change)


async def test_a_member_of_the_reading_group_reads_and_changes_nothing(agent: AgentDouble, front: Front) -> None:
    url = "http://agent/v1/namespaces"
    for path in (agent.config.socket, agent.config.read_socket):
        words = ("--unix-socket", path)
        assert (await away(lambda words=words: curl(*words, url, uid=65534, groups=str(READERS))))[0] == 200
        refused = await away(
            lambda words=words: curl(*words, "-X", "PUT", "-d", "x", f"{url}/pod-1", uid=65534, groups=str(READERS))
        )
        assert refused[0] == 403
        assert (await away(lambda words=words: curl(*words, url, uid=65534)))[0] == 0  # the socket's mode
    assert not agent.asked


async def test_the_reading_socket_lets_not_even_root_change_anything(agent: AgentDouble, front: Front) -> None:
    for endpoint in ENDPOINTS:
        if endpoint.verb == "change":
            target = endpoint.path.replace("{namespace}", "pod-1")
            with pytest.raises(NetapplyError, match="this socket is for reading"):
                await away(lambda e=endpoint, t=target: Client(agent.config.read_socket).ask(e.method, t))
    assert not agent.asked


async def test_the_metrics_address_answers_metrics_and_health_alone(agent: AgentDouble, front: Front) -> None:
    host, port = front.metrics_address
    for endpoint in ENDPOINTS:
        if endpoint.name != "metrics":
            url = f"http://{host}:{port}{endpoint.path.replace('{namespace}', 'pod-1')}"
            status, _ = await away(lambda e=endpoint, url=url: curl("-X", e.method, url))
            assert (status == 200) == endpoint.public, endpoint.path


# --- nobody holds it up --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /v1/namespaces HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 20_000, 431),
        (b"GET /nowhere HTTP/1.0\r\n\r\n", 404),
        (b"GET //[ HTTP/1.0\r\n\r\n", 400),
        (b"PATCH /v1/namespaces HTTP/1.0\r\n\r\n", 405),
        (b"GET /v1/namespaces HTTP/1.0\r\ncontent-length: 5\r\n\r\nhello", 413),
        (
            b"PUT /v1/namespaces/a HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % (LIMITS.max_bytes + 1) + b"x" * 9_000_000,
            413,
        ),
        (b"PUT /v1/namespaces/a%00b HTTP/1.0\r\ncontent-length: 0\r\n\r\n", 422),
        (b"GET /v1/namespaces?" + b"a=b&" * 100 + b" HTTP/1.0\r\n\r\n", 422),
    ],
)
async def test_what_is_no_good_request_is_refused_in_json(
    agent: AgentDouble, front: Front, data: bytes, status: int
) -> None:
    answer = await away(lambda: raw(agent.config.socket, data))
    assert answer.startswith(b"HTTP/1.1 %d" % status)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["ok"] is False
    assert not agent.asked


@pytest.mark.parametrize(
    "data", [b"", b"GET /v1/names", b"PUT /v1/namespaces/a HTTP/1.1\r\nhost: a\r\ncontent-length: 99\r\n\r\nx"]
)
async def test_a_slow_client_is_dropped(agent: AgentDouble, front: Front, data: bytes) -> None:
    assert await away(lambda: raw(agent.config.socket, data, end=False)) == b""


async def test_requests_follow_one_another_on_a_connection(agent: AgentDouble, front: Front) -> None:
    one = b"GET /health/live HTTP/1.1\r\nhost: a\r\n\r\n"
    last = b"GET /health/live HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
    assert (await away(lambda: raw(agent.config.socket, one + one + last, end=False))).count(b"HTTP/1.1 200 OK") == 3


async def test_a_body_in_chunks_after_100_continue_is_taken(agent: AgentDouble, front: Front, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_bytes(PLAN)
    words = ("--unix-socket", agent.config.socket, "-H", "Expect: 100-continue", "-H", "Transfer-Encoding: chunked")
    status, _ = await away(lambda: curl(*words, "-T", str(plan), "http://agent/v1/namespaces/pod-1"))
    assert status == 200


async def test_a_client_who_hangs_up_cancels_what_he_asked_for(agent: AgentDouble, front: Front) -> None:
    agent.gate.clear()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(agent.config.socket)
        sock.sendall(b"PUT /v1/namespaces/a HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(PLAN) + PLAN)
        await asyncio.wait_for(agent.entered.wait(), PATIENCE)
    await asyncio.wait_for(agent.cancelled.wait(), PATIENCE)


async def test_work_that_takes_too_long_is_given_up(agent: AgentDouble, front: Front) -> None:
    agent.gate.clear()
    with pytest.raises(NetapplyError, match="not done after 1 s"):
        await away(lambda: Client(agent.config.socket).ask("PUT", "/v1/namespaces/a", PLAN))
    assert agent.cancelled.is_set()


async def test_one_user_cannot_take_all_connections(agent: AgentDouble, front: Front) -> None:
    held = []
    try:
        for _ in range(8):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(agent.config.socket)
            held.append(sock)
        await asyncio.sleep(0.1)
        assert (await away(lambda: raw(agent.config.socket, b""))).startswith(b"HTTP/1.1 503")
        words = ("--unix-socket", agent.config.read_socket, "http://agent/v1/namespaces")
        assert (await away(lambda: curl(*words, uid=65534, groups=str(READERS))))[0] == 200
    finally:
        for sock in held:
            sock.close()


def test_a_user_has_a_burst_of_requests_and_then_a_rate() -> None:
    meter = Meter(Quota(requests_per_second=10.0, burst=5.0))
    assert [meter.ask(7, 100.0) for _ in range(5)] == [0.0] * 5
    assert meter.ask(7, 100.0) == pytest.approx(0.1)
    assert meter.ask(8, 100.0) == 0.0
    assert meter.ask(7, 100.15) == 0.0
    assert meter.ask(7, 100.15) > 0


# --- sockets -------------------------------------------------------------------------------------------------


async def test_a_socket_that_a_killed_agent_left_is_replaced_and_a_living_one_is_not(place: Path) -> None:
    path = str(place / "x.sock")
    unix_socket(path).close()  # its file stays
    listener = unix_socket(path, READERS)
    status = os.stat(path)
    assert (status.st_mode & 0o777, status.st_gid) == (0o660, READERS)
    with pytest.raises(NetapplyError, match="an agent answers"):
        unix_socket(path)
    assert os.listdir(place) == ["x.sock"]
    listener.close()
    (place / "file").write_text("mine")
    with pytest.raises(NetapplyError, match="is no socket"):
        unix_socket(str(place / "file"))


async def test_sockets_go_with_the_front(agent: AgentDouble, place: Path) -> None:
    async with Front(agent):
        assert sorted(os.listdir(place)) == ["control.sock", "read.sock"]
        assert os.stat(agent.config.socket).st_mode & 0o777 == 0o660
    assert os.listdir(place) == []


@pytest.mark.parametrize(
    "address", ["0.0.0.0:9469", "10.0.0.1:1", "localhost", "127.0.0.1:x", "127.0.0.1:99999", ":80"]
)
def test_metrics_are_offered_on_loopback_alone(address: str) -> None:
    with pytest.raises(NetapplyError):
        loopback(address)


def test_the_command_knows_the_agents_places_and_defaults() -> None:
    config = AgentConfig()
    assert (config.socket, config.read_socket) == (client.CONTROL, client.READ)
    words = vars(build_parser(lean=True).parse_args(["agent"]))
    known = {name: value for name, value in config._asdict().items() if name in words}
    assert {name: words[name] for name in known} == known


# --- the description -----------------------------------------------------------------------------------------


def test_the_description_in_the_docs_is_the_one_that_the_agent_gives() -> None:
    shipped = Path(__file__).parent.parent / "docs" / "openapi.json"
    made = json.dumps(description(), indent=1) + "\n"
    if os.environ.get("NETAPPLY_WRITE_DOCS"):
        shipped.write_text(made)
    assert shipped.read_text() == made, "NETAPPLY_WRITE_DOCS=1 pytest tests/test_agent_http.py -k description"


async def test_answers_are_as_the_description_says(agent: AgentDouble, front: Front) -> None:
    whole = description()
    ask = Client(agent.config.socket).ask
    await away(lambda: ask("PUT", "/v1/namespaces/pod-1", PLAN))
    order = sorted(ENDPOINTS, key=lambda endpoint: (endpoint.method == "DELETE", len(endpoint.path) < 30))
    checked = 0
    for endpoint in order:
        operation = whole["paths"][endpoint.path][endpoint.method.lower()]
        (kind, content), *_ = operation["responses"]["200"]["content"].items()
        if kind != "application/json" or endpoint.name == "openapi":
            continue
        target = endpoint.path.replace("{namespace}", "pod-1")
        target += "?seconds=60" if endpoint.name == "extend" else ""
        answer = await away(lambda e=endpoint, t=target: ask(e.method, t, PLAN if e.body else b""))
        jsonschema.Draft202012Validator({**whole, **content["schema"]}).validate(answer)
        checked += 1
    assert checked >= 12
    assert (await away(lambda: ask("GET", "/openapi.json")))["paths"].keys() == whole["paths"].keys()
    with pytest.raises(NamespaceError):
        await away(lambda: ask("DELETE", "/v1/namespaces/pod-1"))


async def test_every_event_is_as_the_description_says() -> None:
    schemas = description()["components"]["schemas"]
    samples = {str: "x", float: 1.0, int: 1, bool: True}
    for kind in get_args(events.Event):
        hints = get_type_hints(kind)
        known = kind._field_defaults
        event = kind(
            **{
                name: samples.get(hint, None if name == "cause" else ())
                for name, hint in hints.items()
                if name not in known
            }
        )
        validator = jsonschema.Draft202012Validator({"components": {"schemas": schemas}, **schemas["Event"]})
        validator.validate(plain(event))
