"""The six traffic types of a sidecar as flows, each connection of them on its own, for the rules to decide. Pure.

`netapply.lab.flows` sends the same types as real packets.
"""

from __future__ import annotations

from collections.abc import Iterator

from netapply.flow import TCP, Flow
from netapply.otherwise import SOMEWHERE
from netapply.plan import PASSTHROUGH, CapturePlan
from netapply.ruleset import FAMILIES, Family, Ruleset
from netapply.sights import LOOPBACK
from netapply.values import NamedTuple

APP, SERVICE, CONTROL_PLANE, AGENT, HEALTH, METRICS = 8080, 80, 15012, 15020, 15021, 15090
APP_ID, CLIENT_PORT, DEVICE = 1000, 40000, "eth0"


class Cast(NamedTuple):
    """Who plays the proxy: its user and group (None where it has none of its own).

    `mark` is not 0 where inbound connections come by TPROXY, and reach the application from their client's address.
    """

    uid: int | None = 1337
    gid: int | None = 1337
    mark: int = 0


class Leg(NamedTuple):
    """One connection of a traffic type. `number` is the type, `name` says who talks to whom."""

    number: str
    name: str
    flow: Flow


def cast_of_plan(plan: CapturePlan) -> Cast:
    """The proxy that a plan speaks of."""
    mark = plan.inbound.tproxy.mark.value if plan.inbound.mode == "tproxy" else 0
    return Cast(next(iter(plan.proxy.uids), None), next(iter(plan.proxy.gids), None), mark)


def cast_of_rules(ruleset: Ruleset) -> Cast:
    """The proxy that rules speak of: the first owner that they let pass, and the mark that TPROXY sets."""
    uid = gid = None
    mark = 0
    for *_, rule in ruleset.walk():
        if rule.statement.kind == "tproxy":
            mark = mark or rule.statement.mark
        for match in rule.matches:
            if match.kind == "owner" and not match.negate and rule.statement.kind == "return":
                uid = match.first if uid is None and match.id == "uid" else uid
                gid = match.first if gid is None and match.id == "gid" else gid
    return Cast(uid, gid, mark)


def legs(cast: Cast) -> tuple[Leg, ...]:
    """Every connection of every type, in both families."""
    return tuple(leg for family in FAMILIES for leg in _legs(cast, family))


def _legs(cast: Cast, family: Family) -> Iterator[Leg]:
    own, remote, virtual = SOMEWHERE[family]
    local, passthrough = LOOPBACK[family], next(each.packed for each in PASSTHROUGH if each.family == family)
    source, mark = (remote, cast.mark) if cast.mark else (passthrough, 0)
    uid = APP_ID if cast.uid is None else cast.uid
    gid = APP_ID if cast.gid is None else cast.gid

    def inbound(port: int) -> Flow:
        return Flow("inbound", TCP, remote, own, CLIENT_PORT, port, DEVICE)

    def sent(to: bytes, port: int, uid: int, gid: int, source: bytes = own, mark: int = 0) -> Flow:
        over = "lo" if to in (own, local) else DEVICE
        source = local if to == local else source
        return Flow("outbound", TCP, source, to, CLIENT_PORT, port, over, uid, gid, mark=mark)

    yield Leg("1", "remote to app", inbound(APP))
    yield Leg("1", "proxy to app", sent(own, APP, uid, gid, source, mark))
    yield Leg("1", "proxy to app, by gid", sent(own, APP, 0, gid, source, mark))
    yield Leg("2", "app to remote", sent(remote, SERVICE, APP_ID, APP_ID))
    yield Leg("2", "proxy to remote", sent(remote, SERVICE, uid, gid))
    for who, port in (("agent", AGENT), ("metrics", METRICS), ("health", HEALTH)):
        yield Leg("3", f"remote to {who}", inbound(port))
    yield Leg("4", "app to own service", sent(virtual, SERVICE, APP_ID, APP_ID))
    yield Leg("4", "proxy to own address", sent(own, APP, uid, gid))
    yield Leg("4", "proxy to own address, by gid", sent(own, APP, 0, gid))
    yield Leg("4'", "app to own address", sent(own, APP, APP_ID, APP_ID))
    yield Leg("4'", "app to loopback", sent(local, APP, APP_ID, APP_ID))
    yield Leg("5", "inside the proxy", sent(local, AGENT, uid, gid))
    yield Leg("5", "inside the proxy, by gid", sent(local, AGENT, 0, gid))
    yield Leg("6", "agent to control plane", sent(remote, CONTROL_PLANE, uid, gid))
    yield Leg("6", "agent, by gid", sent(remote, CONTROL_PLANE, 0, gid))
    yield Leg("6", "agent, by neither", sent(remote, CONTROL_PLANE, 0, 0))
