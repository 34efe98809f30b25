"""The six traffic types of a mesh's sidecar, as data: what is sent, and what must come back.

The plan that they suppose is the usual one: all inbound but 15090, 15021 and 15020, all outbound, the proxy on 15001
and 15006, uid and gid 1337, DNS left alone.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from netapply.lab.answers import Answer, Endpoint
from netapply.lab.network import ADDRESSES
from netapply.lab.proxy import INBOUND, OUTBOUND, PASSTHROUGH
from netapply.ruleset import FAMILIES, Family
from netapply.values import NamedTuple

APP_PORT, SERVICE_PORT, CONTROL_PLANE_PORT = 8080, 80, 15012
AGENT_PORT, HEALTH_PORT, METRICS_PORT = 15020, 15021, 15090

#: How inbound connections are captured; "direct" is a namespace without rules.
Capture: TypeAlias = Literal["direct", "redirect", "tproxy"]


class Send(NamedTuple):
    """A probe: who (`netapply.lab.ACTORS`) asks what is at `to`. `uid` and `gid` replace the actor's own."""

    source: str
    to: Endpoint
    uid: int | None = None
    gid: int | None = None
    protocol: Literal["tcp", "udp"] = "tcp"


class Expect(NamedTuple):
    """What an answer must say. None: it does not matter. `peer` is an address, that the answering service saw."""

    who: str
    via: tuple[int, ...] = ()
    original: Endpoint | None = None
    peer: str | None = None

    def faults(self, answer: Answer) -> tuple[str, ...]:
        """Where the answer differs, a phrase each; () when it is as expected."""
        if answer.error:
            return (f"{answer.error} after {list(answer.via_ports)}" if answer.via else answer.error,)
        seen = answer.peer[0] if answer.peer else None
        checks = (
            ("answered", answer.who, self.who, True),
            ("by way of", answer.via_ports, self.via, True),
            ("original destination", answer.original_dst, self.original, self.original is not None),
            ("service saw", seen, self.peer, self.peer is not None),
        )
        return tuple(
            f"{what} {got}, not {wanted}" for what, got, wanted, matters in checks if matters and got != wanted
        )


class Traffic(NamedTuple):
    """One flow of a traffic type. `number` is the type, `name` says who talks to whom."""

    number: str
    name: str
    family: Family
    send: Send
    expect: Expect


def traffic_types(capture: Capture, families: tuple[Family, ...] = FAMILIES) -> tuple[Traffic, ...]:
    """All flows of all types, with what is to be expected where inbound is captured like this."""
    return tuple(traffic for family in families for traffic in _of_family(capture, family))


def _of_family(capture: Capture, family: Family) -> list[Traffic]:
    ours = ADDRESSES[family]
    captured = capture != "direct"
    in_port, out_port = ((INBOUND,), (OUTBOUND,)) if captured else ((), ())
    app: Endpoint = (ours.pod, APP_PORT)
    service: Endpoint = (ours.elsewhere, SERVICE_PORT)
    virtual: Endpoint = (ours.virtual, SERVICE_PORT)
    control_plane: Endpoint = (ours.remote, CONTROL_PLANE_PORT)
    loopback = "::1" if family == "ip6" else "127.0.0.1"
    source = PASSTHROUGH[family] if capture == "redirect" else ours.remote  # what the app sees of the remote client

    def flow(what: str, send: Send, who: str, via: tuple[int, ...] = (), peer: str | None = None) -> Traffic:
        number, name = what.split(maxsplit=1)
        return Traffic(number, name, family, send, Expect(who, via, send.to if via else None, peer))

    return [
        flow("1 remote to app", Send("remote", app), "app", in_port, source),
        flow("2 app to remote", Send("app", service), "remote", out_port, ours.pod),
        *(
            flow(f"3 remote to {who}", Send("remote", (ours.pod, port)), who, (), ours.remote)
            for who, port in (("agent", AGENT_PORT), ("metrics", METRICS_PORT), ("health", HEALTH_PORT))
        ),
        # Without a proxy nobody knows the virtual address, and the rest of the world answers.
        flow("4 app to own service", Send("app", virtual), "app" if captured else "remote", out_port + in_port),
        flow("4' app to own address", Send("app", app), "app", (), ours.pod),
        flow("4' app to loopback", Send("app", (loopback, APP_PORT)), "app", (), loopback),
        flow("5 inside the proxy", Send("proxy", (loopback, AGENT_PORT)), "agent", (), loopback),
        flow("5 inside the proxy, by gid", Send("proxy", (loopback, AGENT_PORT), uid=0), "agent", (), loopback),
        flow("6 agent to control plane", Send("agent", control_plane), "control-plane", (), ours.pod),
        flow("6 agent, by gid", Send("agent", control_plane, uid=0), "control-plane", (), ours.pod),
        flow("6 agent, by neither", Send("agent", control_plane, uid=0, gid=0), "control-plane", out_port, ours.pod),
    ]
