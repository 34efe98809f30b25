"""From the plan's lists to matches: address lists, port lists and owners, as a dialect can say them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from netapply.backend import Dialect
from netapply.flow import TCP, UDP
from netapply.plan import CapturePlan, Everything, Owners
from netapply.ruleset import (
    FAMILIES,
    AddressMatch,
    CgroupMatch,
    Cidr,
    Family,
    IfaceMatch,
    LimitMatch,
    Log,
    MarkMatch,
    Match,
    NamedSet,
    OwnerMatch,
    PortMatch,
    PortRange,
    ProtocolMatch,
    Rule,
    SetMatch,
    Side,
    Statement,
    SynMatch,
)
from netapply.spans import collapse, join, merge

#: The order in which every dialect can read a rule back: header fields first, then extensions.
ORDER = (
    "iface",
    "address",
    "protocol",
    "port",
    "syn",
    "set",
    "owner",
    "cgroup",
    "mark",
    "connmark",
    "state",
    "socket",
    "limit",
)
IS_TCP, IS_UDP = ProtocolMatch(TCP), ProtocolMatch(UDP)
#: Opens a connection of TCP. What is new to conntrack may be older than our rules, and is to stay as it is.
IS_SYN = SynMatch()
ON_LO = IfaceMatch("out", "lo")

#: Matches that are joined to a rule's others, and the one family that they speak of, if any.
Term = tuple[Family | None, tuple[Match, ...]]


def _rank(match: Match) -> tuple[int, bool]:
    second = (match.kind == "iface" and match.direction == "out") or (match.kind == "address" and match.side == "dst")
    return ORDER.index(match.kind), second


def rule(path: str, statement: Statement, *matches: Match, family: Family | None = None) -> Rule:
    """One rule with its matches in the canonical order. What always holds, as an interface `+`, is not said."""
    telling = (match for match in matches if not (match.kind == "iface" and match.name == "+" and not match.negate))
    return Rule(tuple(sorted(telling, key=_rank)), statement, family, path=path)


class Terms:
    """The plan's lists for one dialect. Long address lists become named sets, which are kept in `sets`."""

    def __init__(
        self, plan: CapturePlan, dialect: Dialect, sets: dict[str, NamedSet], *, tproxy: bool | None = None
    ) -> None:
        self.plan = plan
        self._dialect = dialect
        self.native = dialect.families == "inet"
        self.sets = sets
        #: TPROXY in this family or, where the families have plans of their own, in the other.
        self.tproxy = plan.inbound.mode == "tproxy" if tproxy is None else tproxy

    def addresses(self, side: Side, blocks: Everything | Iterable[Cidr], *, negate: bool = False) -> Iterator[Term]:
        """A term for each block, or for the set of a family's blocks; one empty term for "*"."""
        if isinstance(blocks, str):
            yield None, ()
            return
        listed = tuple(blocks)
        for family in FAMILIES:
            mine = tuple(block for block in listed if block.family == family)
            if self._dialect.sets_from and len(mine) >= self._dialect.sets_from:
                yield family, (SetMatch(side, self._named_set(family, mine), negate),)
            else:
                for block in mine:
                    if not (block.prefix or negate):
                        yield family, ()  # every address of the family: iptables cannot say so in a match
                        continue
                    yield family, (AddressMatch(side, block, negate),)

    def _named_set(self, family: Family, blocks: tuple[Cidr, ...]) -> str:
        elements = tuple(sorted(collapse(list(blocks))))  # an importer keeps the order and overlaps of its peer
        import hashlib  # costs a cold start, and few plans have sets

        digest = hashlib.sha256(b"".join(b"%b/%d" % element for element in elements)).hexdigest()[:10]
        name = f"netapply-{4 if family == 'ip' else 6}-{digest}"
        self.sets[name] = NamedSet(name, family, elements)
        return name

    def ports(self, side: Side, ranges: tuple[PortRange, ...]) -> Iterator[PortMatch]:
        """The ranges in as few matches as the dialect's slots allow."""
        slots = self._dialect.port_slots or 2 * len(ranges)
        chunk: list[PortRange] = []
        used = 0
        merged = merge(ranges)
        # nft joins neighbours in a list that holds a range, when it restores what it listed.
        if self.native and any(first != last for first, last in merged):
            merged = join(merged)
        for item in merged:
            cost = 1 if item.first == item.last else 2
            if chunk and used + cost > slots:
                yield PortMatch(side, tuple(chunk))
                chunk, used = [], 0
            chunk.append(item)
            used += cost
        if chunk:
            yield PortMatch(side, tuple(chunk))

    def port_choices(self, side: Side, ranges: Everything | tuple[PortRange, ...]) -> Iterator[tuple[PortMatch, ...]]:
        """The matches of `ports`, each alone; one empty choice for "*"."""
        if isinstance(ranges, str):
            yield ()
        else:
            yield from ((match,) for match in self.ports(side, ranges))

    def own(self) -> Iterator[tuple[str, Match]]:
        """Each way to tell the proxy's own packets, with the plan path that says so."""
        proxy = self.plan.proxy
        for uid in proxy.uids:
            yield "proxy.uids", OwnerMatch("uid", uid, uid)
        for gid in proxy.gids:
            yield "proxy.gids", OwnerMatch("gid", gid, gid)
        if proxy.mark is not None:
            yield "proxy.mark", MarkMatch(proxy.mark.value, proxy.mark.mask)

    def owners(self, owners: Owners) -> Iterator[OwnerMatch | CgroupMatch]:
        """One match for each entry. Only native nftables stores a cgroup's number, the others its path alone."""
        for first, last in owners.uids:
            yield OwnerMatch("uid", first, last)
        for first, last in owners.gids:
            yield OwnerMatch("gid", first, last)
        for path, number in owners.cgroups:
            yield CgroupMatch(path, number if self._dialect.families == "inet" else 0)


def logged(plan: CapturePlan, rules: Iterable[Rule]) -> Iterator[Rule]:
    """Each rule that captures, with a limited log rule of the same matches before it where the plan wants that."""
    for each in rules:
        if plan.log is not None and each.statement.kind in ("redirect", "dnat", "tproxy", "drop"):
            limit = LimitMatch(plan.log.rate)
            yield rule("log", Log(plan.log.prefix), *each.matches, limit, family=each.family)
        yield each
