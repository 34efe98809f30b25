"""A plan compiled once: to the rule set of a dialect, and to the routing that stands beside it.

terms        lists of the plan → matches
decisions    the plan's decisions → rules, in order
netapply_layout, …   rules → parts of chains
istio_layout  the same, as versions of Istio arrange them
layout       parts → tables of a dialect
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache

from netapply.backend import Dialect
from netapply.compiler.layout import Part, assemble
from netapply.compiler.terms import Terms
from netapply.errors import UnsupportedError
from netapply.plan import CapturePlan, path_of, plan_of
from netapply.ruleset import FAMILIES, Family, LocalAddress, LocalRoute, NamedSet, PolicyRule, Routing, Ruleset
from netapply.values import NamedTuple

#: Preference of our policy rules: before the main table (32766), and the sign by which they are known as ours.
RULE_PRIORITY = 13370


class Layout(NamedTuple):
    """An arrangement of the decisions. Names of its chains begin with `prefix` in the iptables dialects."""

    parts: Callable[[Terms], Iterator[Part]]
    prefix: str


def _netapply(terms: Terms) -> Iterator[Part]:
    from netapply.compiler.netapply_layout import parts  # only the layout that is asked for is imported

    return parts(terms)


def _istio(terms: Terms) -> Iterator[Part]:
    from netapply.compiler.istio_layout import parts

    return parts(terms)


def _istio_1_11(terms: Terms) -> Iterator[Part]:
    from netapply.compiler.istio_layout import parts_1_11

    return parts_1_11(terms)


def _istio_1_4(terms: Terms) -> Iterator[Part]:
    from netapply.compiler.istio_layout import parts_1_4

    return parts_1_4(terms)


LAYOUTS: Mapping[str, Layout] = {
    "netapply": Layout(_netapply, "NETAPPLY_"),
    "istio": Layout(_istio, "ISTIO_"),
    "istio-1.11": Layout(_istio_1_11, "ISTIO_"),
    "istio-1.4": Layout(_istio_1_4, "ISTIO_"),
}


@lru_cache(maxsize=64)
def compile_plan(plan: CapturePlan, dialect: Dialect, layout: str = "netapply") -> Ruleset:
    """The rules that make the kernel do what `decide` says, arranged by `layout`, for one kind of dialect. Pure.

    Kept for the last 64 plans: an agent compiles a plan once and applies it to as many namespaces as want it.
    """
    if layout not in LAYOUTS:
        raise UnsupportedError(f"no layout is called {layout!r}; there are {', '.join(LAYOUTS)}")
    sets: dict[str, NamedSet] = {}
    parts = tuple(_commented(plan, _arranged(plan, dialect, LAYOUTS[layout], sets)))
    return assemble(parts, sets.values(), dialect)


def _arranged(plan: CapturePlan, dialect: Dialect, layout: Layout, sets: dict[str, NamedSet]) -> Iterator[Part]:
    """The layout's parts; where IPv6 has groups of its own, for each family those of its plan."""
    if plan.for_ipv6 is None:
        yield from layout.parts(Terms(plan, dialect, sets))
        return
    plans = {family: plan_of(plan, family) for family in FAMILIES}
    tproxy = any(each.inbound.mode == "tproxy" for each in plans.values())
    for family, mine in plans.items():
        for part in layout.parts(Terms(mine, dialect, sets, tproxy=tproxy)):
            if family in part.families:
                mine_alone = (each for each in part.rules if each.family in (None, family))
                rules = (each._replace(family=family, path=path_of(plan, family, each.path)) for each in mine_alone)
                yield part._replace(rules=tuple(rules), families=(family,))


def compile_routing(plan: CapturePlan) -> Routing:
    """Policy rules, routes and addresses that the plan needs beside its rules. Pure."""
    families: tuple[Family, ...] = FAMILIES if plan.ipv6 == "capture" else ("ip",)
    rules: list[PolicyRule] = []
    routes: list[LocalRoute] = []
    addresses: list[LocalAddress] = []
    for family in families:
        proxy, inbound = plan_of(plan, family)[:2]
        if inbound.mode == "tproxy" and inbound.ports.include:  # else no packet is marked, nor has Istio a route then
            mark, table = inbound.tproxy.mark, inbound.tproxy.table
            rules.append(PolicyRule(family, mark.value, mark.mask, table, RULE_PRIORITY))
            routes.append(LocalRoute(family, table))
        addresses += (
            LocalAddress(block.packed)
            for block in proxy.passthrough_sources
            if block.family == family and block.prefix == len(block.packed) * 8 and not _on_lo_already(block.packed)
        )
    return Routing(tuple(rules), tuple(routes), tuple(addresses))


def _on_lo_already(packed: bytes) -> bool:
    """127.0.0.0/8 and ::1 are local without our doing."""
    return packed[0] == 127 if len(packed) == 4 else packed == b"\0" * 15 + b"\1"


def _commented(plan: CapturePlan, parts: Iterator[Part]) -> Iterator[Part]:
    for part in parts:
        yield part._replace(rules=tuple(r._replace(comment=r.path) for r in part.rules)) if plan.comments else part
