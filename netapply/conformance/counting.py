"""Which rules count a packet: those that `evaluate` says match, and no others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

from netapply.backend import Backend
from netapply.flow import Flow
from netapply.results import RuleCounter
from netapply.ruleset import Ruleset
from netapply.sights import outcome

#: Table family, table, chain, index there: a rule.
Place: TypeAlias = tuple[str, str, str, int]
#: Statements and matches that switch conntrack on for their family (nf_ct_netns_get in xt_*.c).
TRACKING = frozenset(("redirect", "dnat", "set-zone", "set-connmark", "save-mark", "restore-mark", "state", "connmark"))


def predicted(ruleset: Ruleset, flows: Iterable[Flow]) -> Counter[Place]:
    """How often each rule counts the first packets of these flows. Pure."""
    tracked = _tracked(ruleset)
    return Counter(
        (visit.table.family, visit.table.name, visit.chain.name, visit.position)
        for flow in flows
        for _, trace in outcome(ruleset, flow).sights
        for visit in trace.visits
        if visit.failed is None and (visit.table.name != "nat" or visit.table.family in tracked)
    )


def _tracked(ruleset: Ruleset) -> set[str]:
    """Families whose packets conntrack sees: in iptables some rule has to ask for that, or nat looks at none."""
    return {
        table.family
        for table, _, _, rule in ruleset.walk()
        if rule.statement.kind in TRACKING or any(match.kind in TRACKING for match in rule.matches)
    }


def counted(shown: Iterable[RuleCounter]) -> Counter[Place]:
    """How often each rule has counted, by what `Capture.show` says."""
    return Counter({(each.family, each.table, each.chain, each.position): each.packets for each in shown})


def miscounted(
    backend: Backend, ruleset: Ruleset, wanted: Mapping[Place, int], found: Mapping[Place, int]
) -> Iterator[str]:
    """Each rule that did not count what was predicted, in a phrase. A rule with a limit may count less."""
    for table, chain, index, rule in ruleset.walk():
        place = (table.family, table.name, chain.name, index)
        limited = any(match.kind == "limit" for match in rule.matches) and found[place] <= wanted[place]
        if found[place] != wanted[place] and not limited:
            text = backend.render_rule(table, chain, rule)
            where = f"{table.family} {table.name} {chain.name} {index + 1}"
            yield f"{where} counted {found[place]} packets and not {wanted[place]}: {text}"
