"""What would have to be otherwise for a packet to go elsewhere, found by walking others through the rules. Pure.

Candidates come from the rules themselves. For each kind of rule that ends a packet's way, the packet that it is made
for; for each match of the rule that decided, the packet that it does not hold for; besides a stranger's, one over
`lo`, the other family's and the other protocol's. What is told of a candidate is what the walk through the rules says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from netapply.evaluate import contains, covers, iface_matches, in_ranges
from netapply.explain import Place, places
from netapply.flow import TCP, UDP, Decision, Flow
from netapply.reasons import PROTOCOLS, show_address, show_endpoint
from netapply.ruleset import Chain, Family, Match, NamedSet, Rule, Ruleset, Side, Table
from netapply.sights import LOOPBACK, Outcome, complete, is_loopback, outcome
from netapply.values import NamedTuple

#: Addresses that plans name by wide blocks alone (RFC 5737, RFC 3849), and one for where these are meant.
SOMEWHERE: dict[Family, tuple[bytes, bytes, bytes]] = {
    "ip": (b"\xc0\0\2\1", b"\xc6\x33\x64\1", b"\x08\x08\x08\x08"),
    "ip6": (
        b"\x20\1\x0d\xb8" + b"\0" * 11 + b"\1",
        b"\x20\1\x0d\xb8" + b"\0" * 11 + b"\2",
        b"\xfd" + b"\0" * 14 + b"\1",
    ),
}
_PORTS, _STRANGERS, _DEVICES = (8080, 80, 443, 9999), (1000, 65534, 2000, 0), ("eth0", "eth1", "lo")
_SHAPE = ("side", "direction", "name", "id", "protocol", "negate")
MOST = 12


class Otherwise(NamedTuple):
    """A packet that goes elsewhere: what is different about it, what becomes of it, and the rules that decide."""

    change: str
    decision: Decision
    decided: tuple[Place, ...]


def otherwise(ruleset: Ruleset, flow: Flow, most: int = MOST) -> tuple[Otherwise, ...]:
    """At most `most` packets with another fate than `flow`, one for each rule that would decide; the nearest first."""
    whole = complete(ruleset)
    given = outcome(whole, flow)
    found: dict[tuple[object, ...], tuple[int, str, Outcome]] = {}
    for varied in filter(_possible, dict.fromkeys(_candidates(whole, flow, given))):
        result = outcome(whole, varied)
        if result.decision[:3] == given.decision[:3]:
            continue
        words = _change(flow, varied)
        key = (result.decision[:3], tuple(place[:3] for place in places(result.decided)))
        if key not in found or len(words) < found[key][0]:
            found[key] = (len(words), ", ".join(words), result)
    nearest = sorted(found.values(), key=lambda each: each[0])[:most]
    return tuple(Otherwise(change, result.decision, places(result.decided)) for _, change, result in nearest)


def _candidates(ruleset: Ruleset, flow: Flow, given: Outcome) -> Iterator[Flow]:
    sets = {each.name: each for each in ruleset.sets}
    if flow.direction == "outbound":
        yield _consistent(flow, flow._replace(iface="eth0" if flow.iface == "lo" else "lo"))
        yield flow._replace(uid=_STRANGERS[0], gid=_STRANGERS[0])
    for visit in given.decided:
        for match in visit.rule.matches:
            varied = _varied(match, flow, sets, hold=False)
            if varied is not None:
                yield _consistent(flow, varied)
    for matches in _goals(ruleset, flow):
        varied = flow
        for match in matches:
            varied = _varied(match, varied, sets, hold=True) if varied is not None else None
        if varied is not None:
            yield _consistent(flow, varied)
    yield _other_family(flow)
    if flow.protocol in (TCP, UDP):
        yield flow._replace(protocol=UDP if flow.protocol == TCP else TCP)


# --- what rules are made for ---------------------------------------------------------------------------------


def _goals(ruleset: Ruleset, flow: Flow) -> Iterator[tuple[Match, ...]]:
    """All that must hold for a packet to reach and match a rule that ends its way: of rules alike, the first."""
    hook = "output" if flow.direction == "outbound" else "prerouting"
    seen: set[tuple[object, ...]] = set()
    for table in ruleset.tables:
        if table.family not in (flow.family, "inet"):
            continue
        for chain in table.chains:
            if chain.base is not None and chain.base.hook == hook:
                for end, matches in _ends(table, chain, flow.family, (), 0):
                    alike = (table.name, end, *(tuple(getattr(m, name, m.kind) for name in _SHAPE) for m in matches))
                    if alike not in seen:
                        seen.add(alike)
                        yield matches


def _ends(
    table: Table, chain: Chain, family: Family, before: tuple[Match, ...], depth: int
) -> Iterator[tuple[object, tuple[Match, ...]]]:
    """Each rule that is no jump, as its chain, statement and path, and the matches that lead to it."""
    for rule in chain.head + chain.rules:
        if rule.family not in (None, family):
            continue
        if rule.statement.kind != "jump":
            yield (chain.name, rule.statement, rule.path), before + rule.matches
        elif depth < len(table.chains):
            yield from _ends(table, _target(table, rule), family, before + rule.matches, depth + 1)


def _target(table: Table, rule: Rule) -> Chain:
    return next(each for each in table.chains if rule.statement.kind == "jump" and each.name == rule.statement.chain)


def _varied(match: Match, flow: Flow, sets: dict[str, NamedSet], *, hold: bool) -> Flow | None:
    """`flow`, changed so that `match` holds, or does not; None where no first packet of a flow is like that."""
    match match.kind:
        case "iface":
            return _by_device(flow, match.direction, match.name, wanted=hold != match.negate)
        case "address":
            block, wanted = match.cidr, hold != match.negate
            if covers(block, _address(flow, match.side)) == wanted:
                return flow
            if not wanted:
                return _with_address(flow, match.side, _outside(NamedSet("", block.family, (block,))))
            return _with_address(flow, match.side, block.packed)
        case "set":
            named, wanted = sets[match.set], hold != match.negate
            if contains(named, _address(flow, match.side)) == wanted:
                return flow
            inside = named.elements[0].packed if named.elements else None
            return _with_address(flow, match.side, inside if wanted else _outside(named))
        case "protocol":
            return flow if (flow.protocol == match.protocol) == hold else flow._replace(protocol=match.protocol)
        case "port":
            wanted, port = hold != match.negate, flow.sport if match.side == "src" else flow.dport
            if in_ranges(match.ranges, port) == wanted:
                return flow
            free = (each for each in _PORTS if not in_ranges(match.ranges, each))
            port = match.ranges[0].first if wanted else next(free, 0)
            return flow._replace(sport=port) if match.side == "src" else flow._replace(dport=port)
        case "syn":
            if flow.opens == hold:
                return flow
            return flow._replace(protocol=TCP, state="new") if hold else None
        case "owner":
            wanted, owner = hold != match.negate, flow.uid if match.id == "uid" else flow.gid
            if (match.first <= owner <= match.last) == wanted:
                return flow
            others = (each for each in _STRANGERS if not match.first <= each <= match.last)
            return _owned(flow, match.id, match.first if wanted else next(others, match.last + 1))
        case "cgroup":
            wanted = hold != match.negate
            if f"{flow.cgroup}/".startswith(f"{match.path}/") == wanted:
                return flow
            return flow._replace(cgroup=match.path if wanted else "") if flow.direction == "outbound" else None
        case "mark":
            wanted = hold != match.negate
            if (flow.mark & match.mask == match.value) == wanted:
                return flow
            return flow._replace(mark=flow.mark & ~match.mask | (match.value if wanted else 0 if match.value else 1))
        case "connmark":
            return flow if (match.value == 0) == (hold != match.negate) else None
        case "state":
            if (flow.tracked_as in match.states) == hold:
                return flow
            return flow._replace(state="invalid") if hold and "invalid" in match.states else None
        case "socket":
            return None if hold else flow
        case "limit":
            return flow
        case _:
            assert_never(match)


def _by_device(flow: Flow, direction: str, name: str, *, wanted: bool) -> Flow | None:
    if (direction == "in") != (flow.direction == "inbound"):
        return None if wanted else flow
    if iface_matches(name, flow.iface) == wanted:
        return flow
    if wanted:
        device = f"{name[:-1]}0" if name.endswith("+") else name
    else:
        device = next((each for each in _DEVICES if not iface_matches(name, each)), flow.iface)
    # What enters by `lo` was sent here, and decided about then.
    return None if device == "lo" and flow.direction == "inbound" else flow._replace(iface=device)


def _owned(flow: Flow, what: str, number: int) -> Flow | None:
    if flow.direction == "inbound":
        return None
    return flow._replace(uid=number) if what == "uid" else flow._replace(gid=number)


def _address(flow: Flow, side: Side) -> bytes:
    return flow.source if side == "src" else flow.destination


def _with_address(flow: Flow, side: Side, packed: bytes | None) -> Flow | None:
    if packed is None or len(packed) != len(flow.destination):
        return None
    return flow._replace(source=packed) if side == "src" else flow._replace(destination=packed)


def _outside(named: NamedSet) -> bytes | None:
    return next((each for each in SOMEWHERE[named.family][1:] if not contains(named, each)), None)


# --- packets that can be -------------------------------------------------------------------------------------


def _possible(flow: Flow) -> bool:
    """Whether such a packet can come: none with an address of loopback comes in from elsewhere."""
    return flow.direction == "outbound" or not (is_loopback(flow.source) or is_loopback(flow.destination))


def _consistent(given: Flow, varied: Flow) -> Flow:
    """With the device that leads to the destination, and the source that is taken on the way there."""
    if varied.direction == "inbound":
        return varied
    somewhere = SOMEWHERE[varied.family]
    if is_loopback(varied.destination) and not is_loopback(given.destination):
        varied = varied._replace(iface="lo")
    if varied.iface == "lo" and varied.source == given.source:
        return varied._replace(source=varied.destination)
    if given.iface == "lo" and varied.iface != "lo":
        remote = somewhere[1] if varied.destination == given.destination else varied.destination
        return varied._replace(source=somewhere[0], destination=remote)
    return varied


def _other_family(flow: Flow) -> Flow:
    family: Family = "ip6" if flow.family == "ip" else "ip"
    source, destination, _ = SOMEWHERE[family]
    if flow.iface == "lo":
        destination = LOOPBACK[family] if is_loopback(flow.destination) else destination
        return flow._replace(source=destination, destination=destination)
    return flow._replace(source=source, destination=destination)


def _change(flow: Flow, varied: Flow) -> list[str]:
    """What is different about a packet, a phrase each, in the words of the command where it has any."""
    words: list[str] = []
    if varied.family != flow.family:
        words.append(f"over {'IPv6' if varied.family == 'ip6' else 'IPv4'}")
        flow = flow._replace(source=varied.source, destination=varied.destination)
    if varied.protocol != flow.protocol:
        words.append(f"by {PROTOCOLS.get(varied.protocol, varied.protocol)}")
    words += [
        f"{name}={getattr(varied, name)}"
        for name in ("uid", "gid", "cgroup", "state")
        if getattr(varied, name) != getattr(flow, name)
    ]
    if varied.mark != flow.mark:
        words.append(f"mark={varied.mark:#x}")
    moved, elsewhere = varied.iface != flow.iface, varied.destination != flow.destination
    over_lo = elsewhere and varied.iface == "lo"
    if (moved or over_lo) and not (over_lo and is_loopback(varied.destination)):
        words.append(f"iface={varied.iface}")
    implied = varied.iface == "lo" and varied.source == varied.destination and (moved or elsewhere)
    words += _endpoint("from", varied.source, varied.sport, flow.source, flow.sport, implied=implied)
    words += _endpoint("to", varied.destination, varied.dport, flow.destination, flow.dport, implied=False)
    return words


def _endpoint(side: str, packed: bytes, port: int, before: bytes, port_before: int, *, implied: bool) -> list[str]:
    if packed != before and not implied:
        return [f"{side} {show_endpoint(packed, port) if port != port_before else show_address(packed)}"]
    return [f"{side} port {port}"] if port != port_before else []
