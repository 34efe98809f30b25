"""The whole way of a packet: the rules that it meets in hook output, and in prerouting if it stays here. Pure.

The walk through one hook is `netapply.evaluate`'s. A packet that stays in the namespace is seen twice, when it leaves
by `lo` and when it enters by `lo`: the rules of both hooks count it, and either can catch it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from netapply.evaluate import Trace, Visit, evaluate
from netapply.flow import Decision, Flow
from netapply.ruleset import Chain, Family, NamedSet, Ruleset, Statement, Table
from netapply.values import NamedTuple

LOOPBACK: dict[Family, bytes] = {"ip": b"\x7f\0\0\1", "ip6": b"\0" * 15 + b"\1"}
CAPTURES = frozenset(("redirect", "dnat", "tproxy", "drop"))


class Outcome(NamedTuple):
    """The walk through all sights, without words: what is to become of it, and the rules that led there."""

    decision: Decision
    decided: tuple[Visit, ...]
    sights: tuple[tuple[Flow, Trace], ...]


def outcome(ruleset: Ruleset, flow: Flow) -> Outcome:
    """Walk both sights. A verdict of the second one counts: packets over `lo` can be caught there too."""
    first = evaluate(ruleset, flow)
    decision, sights = first.decision, [(flow, first)]
    decided = _deciding(first)
    back = _second_sight(flow, first)
    if back is not None:
        second = evaluate(ruleset, back)
        sights.append((back, second))
        if second.decision.verdict != "bypass":
            decision, decided = second.decision, _deciding(second)
    return Outcome(decision, decided, tuple(sights))


def complete(ruleset: Ruleset) -> Ruleset:
    """The rule set with an empty chain for each jump to what is not there: somebody else's rules among ours."""
    named = {each.name for each in ruleset.sets}
    sets = {m.set: NamedSet(m.set, "ip", ()) for *_, rule in ruleset.walk() for m in rule.matches if m.kind == "set"}
    missing = tuple(each for name, each in sets.items() if name not in named)
    return Ruleset(tuple(_with_targets(table) for table in ruleset.tables), ruleset.sets + missing)


def _with_targets(table: Table) -> Table:
    there = {chain.name for chain in table.chains}
    targets = {
        rule.statement.chain
        for chain in table.chains
        for rule in chain.head + chain.rules
        if rule.statement.kind == "jump"
    }
    return table._replace(chains=table.chains + tuple(Chain(name) for name in sorted(targets - there)))


def _second_sight(flow: Flow, first: Trace) -> Flow | None:
    """The packet when it enters by `lo`, after what was done to it in hook output; None where it does not."""
    decision = first.decision
    if flow.direction == "inbound" or decision.verdict == "drop":
        return None
    destination, port = flow.destination, flow.dport
    if decision.verdict == "redirect":
        destination, port = LOOPBACK[flow.family], decision.port  # nf_nat_redirect.c: in hook output
    elif decision.verdict == "dnat":
        destination, port = decision.address, decision.port
    if not (is_loopback(destination) or (flow.iface == "lo" and destination == flow.destination)):
        return None
    mark, connmark = flow.mark, 0
    for visit in first.visits:
        if visit.failed is None:
            mark, connmark = marked(visit.rule.statement, mark, connmark)
    return flow._replace(
        direction="inbound", destination=destination, dport=port, iface="lo", uid=-1, gid=-1, cgroup="", mark=mark
    )


def is_loopback(packed: bytes) -> bool:
    """127.0.0.0/8 or ::1."""
    return packed[:1] == b"\x7f" if len(packed) == 4 else packed == LOOPBACK["ip6"]


def marked(statement: Statement, mark: int, connmark: int) -> tuple[int, int]:
    """The marks of packet and connection after a statement."""
    match statement.kind:
        case "set-mark":
            return (mark & ~statement.mask) ^ statement.value, connmark
        case "tproxy":
            return (mark & ~statement.mask) ^ statement.mark, connmark
        case "set-connmark":
            return mark, (connmark & ~statement.mask) ^ statement.value
        case "save-mark":
            return mark, mark
        case "restore-mark":
            return connmark, connmark
        case _:
            return mark, connmark


def _ways(visits: Iterable[Visit]) -> Iterator[tuple[Visit, ...]]:
    """Each visit behind the jumps that led to it, the one from the base chain first."""
    jumps: list[tuple[str, Visit]] = []
    for visit in visits:
        if visit.chain.base is not None:
            jumps.clear()
        while jumps and jumps[-1][0] != visit.chain.name:
            jumps.pop()
        yield (*(jump for _, jump in jumps), visit)
        if visit.failed is None and visit.rule.statement.kind == "jump":
            jumps.append((visit.rule.statement.chain, visit))


def _deciding(trace: Trace) -> tuple[Visit, ...]:
    """The way to the rule that decided: that captured, or the last that left where something could have captured."""
    ways = list(_ways(trace.visits))
    if trace.decision.verdict != "bypass":
        return next(way for way in ways if way[-1] is trace.decided)
    left = [
        way
        for way in ways
        if way[-1].failed is None
        and way[-1].rule.statement.kind in ("return", "accept")
        and captures(way[0].table, way[0].chain)
    ]
    return left[-1] if left else ()


def captures(table: Table, chain: Chain) -> bool:
    """Whether any rule that can be reached from the chain captures."""
    chains = {each.name: each for each in table.chains}
    waiting, seen = [chain.name], {chain.name}
    while waiting:
        for rule in (here := chains[waiting.pop()]).head + here.rules:
            if rule.statement.kind in CAPTURES:
                return True
            if rule.statement.kind == "jump" and rule.statement.chain not in seen:
                seen.add(rule.statement.chain)
                waiting.append(rule.statement.chain)
    return False
