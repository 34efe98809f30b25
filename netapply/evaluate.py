"""Walk a rule set as the kernel does, for the first packet of a flow: the verdict, and every rule passed on the way.

Pure. What it predicts is held against `decide`, and against packets and the kernel's rule counters.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import assert_never

from netapply.flow import Decision, Flow, Verdict
from netapply.ruleset import Chain, Cidr, Match, NamedSet, PortRange, Rule, Ruleset, Table
from netapply.values import NamedTuple

#: A chain that jumps deeper than this is a loop (nf_tables.h: NFT_JUMP_STACK_SIZE).
MAX_DEPTH = 16


class Visit(NamedTuple):
    """A rule that the packet met. `failed` is the first match that did not hold, None when all did."""

    table: Table
    chain: Chain
    position: int
    rule: Rule
    failed: Match | None


class Trace(NamedTuple):
    """What became of the packet, the rules that it met in order, and the one that decided (None: it fell through)."""

    decision: Decision
    visits: tuple[Visit, ...]
    decided: Visit | None


def evaluate(ruleset: Ruleset, flow: Flow) -> Trace:
    """The fate of `flow` under `ruleset`."""
    return _Walk(ruleset, flow).run()


class _Walk:
    """One packet on its way through the hooks."""

    def __init__(self, ruleset: Ruleset, flow: Flow) -> None:
        self._flow = flow
        self._sets = {each.name: each for each in ruleset.sets}
        self._tables = [table for table in ruleset.tables if table.family in (flow.family, "inet")]
        self._mark, self._connmark, self._zone = flow.mark, 0, 0
        self._visits: list[Visit] = []
        self._fate: Decision | None = None
        self._decided: Visit | None = None

    def run(self) -> Trace:
        for table, chain in self._hooks():
            self._chain(table, chain, 0)
            if self._fate is not None and self._fate.verdict != "tproxy":
                break
        fate = self._fate or Decision("bypass", path=self._decided.rule.path if self._decided else "")
        return Trace(fate._replace(zone=self._zone), tuple(self._visits), self._decided)

    def _hooks(self) -> list[tuple[Table, Chain]]:
        """Base chains that see this packet, by priority. NAT looks at what is new to conntrack, over lo once."""
        hook = "output" if self._flow.direction == "outbound" else "prerouting"
        seen_before = self._flow.tracked_as != "new" or (hook == "prerouting" and self._flow.iface == "lo")
        bases = [
            (chain.base.priority, table, chain)
            for table in self._tables
            for chain in table.chains
            if chain.base is not None and chain.base.hook == hook and not (seen_before and chain.base.type == "nat")
        ]
        return [(table, chain) for _, table, chain in sorted(bases, key=lambda each: each[0])]

    def _chain(self, table: Table, chain: Chain, depth: int) -> bool:
        """Walk one chain; True when the packet is done with this hook."""
        if depth > MAX_DEPTH:
            return False
        for index, rule in enumerate(chain.head + chain.rules):
            if rule.family not in (None, self._flow.family):
                continue
            failed = next((match for match in rule.matches if not self._holds(match)), None)
            visit = Visit(table, chain, index, rule, failed)
            self._visits.append(visit)
            if failed is None:
                done = self._do(visit, depth)
                if done is not None:
                    return done
        return False

    def _do(self, visit: Visit, depth: int) -> bool | None:
        """Carry out the statement: None goes on, False leaves the chain, True leaves the hook."""
        statement = visit.rule.statement
        match statement.kind:
            case "jump":
                target = next(chain for chain in visit.table.chains if chain.name == statement.chain)
                return True if self._chain(visit.table, target, depth + 1) else None
            case "return":
                self._leave(visit)
                return False
            case "accept":
                self._leave(visit)
                return True
            case "drop":
                return self._end(visit, "drop")
            case "redirect":
                return self._end(visit, "redirect", statement.port)
            case "dnat":
                return self._end(visit, "dnat", statement.port, statement.address)
            case "tproxy":
                self._mark = (self._mark & ~statement.mask) ^ statement.mark
                return self._end(visit, "tproxy", statement.port)
            case "set-mark":
                self._mark = (self._mark & ~statement.mask) ^ statement.value
            case "set-connmark":
                self._connmark = (self._connmark & ~statement.mask) ^ statement.value
            case "save-mark":
                self._connmark = self._mark
            case "restore-mark":
                self._mark = self._connmark
            case "set-zone":
                self._zone = self._zone or statement.zone
            case "log":
                pass
            case _:
                assert_never(statement)
        return None

    def _leave(self, visit: Visit) -> None:
        if self._fate is None:
            self._decided = visit

    def _end(self, visit: Visit, verdict: Verdict, port: int = 0, address: bytes = b"") -> bool:
        """The packet's fate. TPROXY has given it its socket, and only a drop takes it away; but it goes on to nat."""
        if self._fate is None or verdict == "drop":
            self._fate = Decision(verdict, port, address, path=visit.rule.path)
            self._decided = visit
        return True

    def _holds(self, match: Match) -> bool:
        flow = self._flow
        match match.kind:
            case "iface":
                mine = (match.direction == "in") == (flow.direction == "inbound")
                return (mine and iface_matches(match.name, flow.iface)) != match.negate
            case "address":
                return covers(match.cidr, flow.source if match.side == "src" else flow.destination) != match.negate
            case "set":
                address = flow.source if match.side == "src" else flow.destination
                return contains(self._sets[match.set], address) != match.negate
            case "protocol":
                return flow.protocol == match.protocol
            case "port":
                return in_ranges(match.ranges, flow.sport if match.side == "src" else flow.dport) != match.negate
            case "syn":
                return flow.opens
            case "owner":
                owner = flow.uid if match.id == "uid" else flow.gid
                return (match.first <= owner <= match.last) != match.negate
            case "cgroup":
                return f"{flow.cgroup}/".startswith(f"{match.path}/") != match.negate
            case "mark":
                return (self._mark & match.mask == match.value) != match.negate
            case "connmark":
                return (self._connmark & match.mask == match.value) != match.negate
            case "state":
                return flow.tracked_as in match.states
            case "socket":
                return flow.state == "established"
            case "limit":
                return True
            case _:
                assert_never(match)


def iface_matches(pattern: str, name: str) -> bool:
    """A trailing `+` matches any rest."""
    return name.startswith(pattern[:-1]) if pattern.endswith("+") else name == pattern


def covers(block: Cidr, packed: bytes) -> bool:
    """Is the address in the block? Never across families."""
    if len(block.packed) != len(packed):
        return False
    shift = len(packed) * 8 - block.prefix
    return int.from_bytes(block.packed) >> shift == int.from_bytes(packed) >> shift


def contains(named: NamedSet, packed: bytes) -> bool:
    """Is the address an element? They are sorted and do not overlap: the last one that starts before it decides."""
    at = bisect_right(named.elements, Cidr(packed, len(packed) * 8)) - 1
    return at >= 0 and covers(named.elements[at], packed)


def in_ranges(ranges: tuple[PortRange, ...], port: int) -> bool:
    """Is the port in one of the ranges, ends included?"""
    return any(first <= port <= last for first, last in ranges)
