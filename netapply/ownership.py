"""What of the kernel's rules is ours: by the layout that is asked for, and by the rule sets that we know of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from netapply.backend import OURS, Direct, Owned
from netapply.compiler import LAYOUTS, compile_plan, compile_routing
from netapply.plan import CapturePlan
from netapply.ruleset import Routing, Rule, Ruleset
from netapply.values import NamedTuple

#: Of every layout: a rule set of any of them may stand in a namespace.
PREFIXES = tuple(dict.fromkeys(layout.prefix for layout in LAYOUTS.values()))


class Adopted(NamedTuple):
    """What another program left that is taken over: rules in built-in chains, and routing.

    A policy rule of priority 0 stands for one of any priority.
    """

    direct: tuple[Direct, ...] = ()
    routing: Routing = Routing()


NOTHING = Adopted()

#: Asked for when there is something to take over: it costs the compilation of several plans.
Adoption: TypeAlias = Callable[[], Adopted]


def ownership(layout: str, rulesets: Iterable[Ruleset | None] = (), adopted: Adopted = NOTHING) -> Owned:
    """The layout's own, and those of the rule sets: their chains, and their rules in built-in chains."""
    known = [ruleset for ruleset in rulesets if ruleset is not None]
    names = {chain.name for ruleset in known for table in ruleset.tables for chain in table.chains}
    wanted = {*OURS.prefixes, *([LAYOUTS[layout].prefix] if layout in LAYOUTS else ())}
    prefixes = tuple(
        prefix for prefix in PREFIXES if prefix in wanted or any(name.startswith(prefix) for name in names)
    )
    # Each as often as the rule set that has it most often: several know of the same rule.
    direct: dict[tuple[Direct, int], None] = {}
    for found in (*map(_direct, known), adopted.direct):
        seen: dict[Direct, int] = {}
        for each in found:
            seen[each] = seen.get(each, 0) + 1
            direct[each, seen[each]] = None
    return OURS._replace(prefixes=prefixes, direct=tuple(each for each, _ in direct))


def leftovers(plans: Iterable[tuple[CapturePlan, str]]) -> Adopted:
    """What a program leaves that programs these plans, each in its layout: see `Adopted`."""
    from netapply.backend import find_backend

    dialect = find_backend("iptables-nft").dialect
    direct: dict[Direct, None] = {}
    routings: list[Routing] = []
    for plan, layout in plans:
        direct.update(dict.fromkeys(_direct(compile_plan(plan, dialect, layout))))
        routings.append(compile_routing(plan))
    rules = {rule._replace(priority=0) for routing in routings for rule in routing.rules}
    routes = {route for routing in routings for route in routing.routes}
    addresses = {address for routing in routings for address in routing.addresses}
    return Adopted(tuple(direct), Routing(tuple(sorted(rules)), tuple(sorted(routes)), tuple(sorted(addresses))))


def _direct(ruleset: Ruleset) -> Iterator[Direct]:
    """The rules that stand straight in built-in chains and do not lead to chains of ours."""
    for table in ruleset.tables:
        if table.family == "inet":
            continue
        for chain in table.chains:
            if chain.base is not None:
                for rule in chain.head + chain.rules:
                    if not _leads_to_ours(rule):
                        yield table.family, table.name, chain.name, rule


def _leads_to_ours(rule: Rule) -> bool:
    return rule.statement.kind == "jump" and rule.statement.chain.startswith(PREFIXES)
