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
from typing import NamedTuple

from netapply.backend import Dialect
from netapply.compiler import istio_layout, netapply_layout
from netapply.compiler.layout import Part, assemble
from netapply.compiler.terms import Terms
from netapply.errors import UnsupportedError
from netapply.plan import CapturePlan
from netapply.ruleset import FAMILIES, Family, LocalAddress, LocalRoute, PolicyRule, Routing, Ruleset

#: Preference of our policy rules: before the main table (32766), and the sign by which they are known as ours.
RULE_PRIORITY = 13370


class Layout(NamedTuple):
    """An arrangement of the decisions. Names of its chains begin with `prefix` in the iptables dialects."""

    parts: Callable[[Terms], Iterator[Part]]
    prefix: str


LAYOUTS: Mapping[str, Layout] = {
    "netapply": Layout(netapply_layout.parts, "NETAPPLY_"),
    "istio": Layout(istio_layout.parts, "ISTIO_"),
    "istio-1.11": Layout(istio_layout.parts_1_11, "ISTIO_"),
    "istio-1.4": Layout(istio_layout.parts_1_4, "ISTIO_"),
}


@lru_cache(maxsize=64)
def compile_plan(plan: CapturePlan, dialect: Dialect, layout: str = "netapply") -> Ruleset:
    """The rules that make the kernel do what `decide` says, arranged by `layout`, for one kind of dialect. Pure.

    Kept for the last 64 plans: an agent compiles a plan once and applies it to as many namespaces as want it.
    """
    if layout not in LAYOUTS:
        raise UnsupportedError(f"no layout is called {layout!r}; there are {', '.join(LAYOUTS)}")
    terms = Terms(plan, dialect)
    parts = tuple(_commented(plan, LAYOUTS[layout].parts(terms)))
    return assemble(parts, terms.sets.values(), dialect)


def compile_routing(plan: CapturePlan) -> Routing:
    """Policy rules, routes and addresses that the plan needs beside its rules. Pure."""
    families: tuple[Family, ...] = FAMILIES if plan.ipv6 == "capture" else ("ip",)
    rules: tuple[PolicyRule, ...] = ()
    routes: tuple[LocalRoute, ...] = ()
    if plan.inbound.mode == "tproxy":
        mark, table = plan.inbound.tproxy.mark, plan.inbound.tproxy.table
        rules = tuple(PolicyRule(family, mark.value, mark.mask, table, RULE_PRIORITY) for family in families)
        routes = tuple(LocalRoute(family, table) for family in families)
    addresses = tuple(
        LocalAddress(block.packed)
        for block in plan.proxy.passthrough_sources
        if block.family in families and block.prefix == len(block.packed) * 8 and not _on_lo_already(block.packed)
    )
    return Routing(rules, routes, addresses)


def _on_lo_already(packed: bytes) -> bool:
    """127.0.0.0/8 and ::1 are local without our doing."""
    return packed[0] == 127 if len(packed) == 4 else packed == b"\0" * 15 + b"\1"


def _commented(plan: CapturePlan, parts: Iterator[Part]) -> Iterator[Part]:
    for part in parts:
        yield part._replace(rules=tuple(r._replace(comment=r.path) for r in part.rules)) if plan.comments else part
