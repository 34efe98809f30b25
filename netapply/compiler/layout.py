"""A layout arranges decisions: parts of chains, hung into tables. Assembling turns parts into a dialect's tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from netapply.backend import Dialect
from netapply.ruleset import FAMILIES, Base, Chain, ChainType, Family, Hook, Jump, NamedSet, Rule, Ruleset, Table
from netapply.values import NamedTuple

TableName = Literal["raw", "mangle", "filter", "nat"]

#: linux/netfilter_ipv4.h: NF_IP_PRI_RAW, _MANGLE, _FILTER, _NAT_DST, _NAT_SRC. The order is that of switching on.
PRIORITY: dict[TableName, int] = {"raw": -300, "mangle": -150, "filter": 0, "nat": -100}
HOOKS: dict[str, Hook] = {
    "PREROUTING": "prerouting",
    "INPUT": "input",
    "FORWARD": "forward",
    "OUTPUT": "output",
    "POSTROUTING": "postrouting",
}
#: In native nftables, where ours stand in a table of their own: before or after other tables of the same kind.
NATIVE_SHIFT = 5


class Part(NamedTuple):
    """Rules for one chain, for some families. `chain` is a built-in one, or ours; `place` counts for the former."""

    table: TableName
    chain: str
    rules: tuple[Rule, ...]
    families: tuple[Family, ...]
    place: Literal["first", "last"] = "first"


def base(table: TableName, chain: str) -> Base:
    """The base chain that iptables knows by this name."""
    hook = HOOKS[chain]
    kind: ChainType = "nat" if table == "nat" else "route" if (table, hook) == ("mangle", "output") else "filter"
    priority = 100 if table == "nat" and hook in ("input", "postrouting") else PRIORITY[table]
    return Base(kind, hook, priority)


def assemble(parts: Iterable[Part], sets: Iterable[NamedSet], dialect: Dialect) -> Ruleset:
    """The parts as tables: one a family and kind in a split dialect, a single inet one elsewhere."""
    listed = tuple(parts)
    families: list[Family] = [family for family in FAMILIES if any(family in part.families for part in listed)]
    if dialect.families == "inet":
        tables: tuple[Table, ...] = (Table("inet", "netapply", _inet_chains(listed)),) if listed else ()
    else:
        tables = tuple(
            Table(family, name, chains)
            for name in PRIORITY
            for family in families
            if (chains := _split_chains(listed, name, family))
        )
    used = {
        m.set for table in tables for c in table.chains for r in c.head + c.rules for m in r.matches if m.kind == "set"
    }
    return Ruleset(tables, tuple(each for each in sorted(sets) if each.name in used))


def _split_chains(parts: tuple[Part, ...], table: TableName, family: Family) -> tuple[Chain, ...]:
    chains: dict[str, Chain] = {}
    for part in parts:
        if part.table != table or family not in part.families:
            continue
        rules = tuple(rule._replace(family=None) for rule in part.rules if rule.family in (None, family))
        chain = chains.get(part.chain) or Chain(
            part.chain, base=base(table, part.chain) if part.chain in HOOKS else None
        )
        if chain.base is not None and part.place == "first":
            chains[part.chain] = chain._replace(head=chain.head + rules)
        else:
            chains[part.chain] = chain._replace(rules=chain.rules + rules)
    return _without_empty(chains)


def _inet_chains(parts: tuple[Part, ...]) -> tuple[Chain, ...]:
    chains: dict[str, Chain] = {}
    for part in parts:
        name = inet_name(part.table, part.chain)
        built_in = part.chain in HOOKS
        only = part.families[0] if len(part.families) == 1 else None
        rules = tuple(
            rule._replace(
                family=rule.family or (only if built_in else None),
                statement=Jump(inet_name(part.table, rule.statement.chain))
                if rule.statement.kind == "jump"
                else rule.statement,
            )
            for rule in part.rules
            if rule.family is None or rule.family in part.families
        )
        chain = chains.get(name) or Chain(name, base=_inet_base(part) if built_in else None)
        chains[name] = chain._replace(rules=chain.rules + rules)
    return _without_empty(chains)


def _inet_base(part: Part) -> Base:
    kind = base(part.table, part.chain)
    shift = 0 if part.table == "raw" else NATIVE_SHIFT if part.place == "last" else -NATIVE_SHIFT
    return kind._replace(priority=kind.priority + shift)


def inet_name(table: TableName, chain: str) -> str:
    """A chain's name in the one native table: `nat-output`, `mangle-divert`."""
    return f"{table}-{chain.removeprefix('NETAPPLY_').lower().replace('_', '-')}"


def _without_empty(chains: dict[str, Chain]) -> tuple[Chain, ...]:
    """Chains without rules, and jumps to them, say nothing."""
    while True:
        empty = {name for name, chain in chains.items() if not (chain.head or chain.rules)}
        if not empty:
            return tuple(chains.values())
        for name, chain in list(chains.items()):
            if name in empty:
                del chains[name]
            else:
                head = tuple(rule for rule in chain.head if not _jumps_to(rule, empty))
                rules = tuple(rule for rule in chain.rules if not _jumps_to(rule, empty))
                chains[name] = chain._replace(head=head, rules=rules)


def _jumps_to(rule: Rule, names: set[str]) -> bool:
    return rule.statement.kind == "jump" and rule.statement.chain in names
