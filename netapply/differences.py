"""Two rule sets, rule by rule and in order: what the kernel lacks, and what it has too much."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import SequenceMatcher

from netapply.backend import Backend
from netapply.results import Change
from netapply.ruleset import Chain, Rule, Ruleset, Table


def ruleset_changes(backend: Backend, live: Ruleset | None, desired: Ruleset | None) -> tuple[Change, ...]:
    """Every change that leads from `live` to `desired`. A rule out of its place is one removed and one added."""
    old, new = live or Ruleset(), desired or Ruleset()
    return (*_sets(old, new), *_chains(backend, old, new))


def _sets(old: Ruleset, new: Ruleset) -> Iterator[Change]:
    for each in new.sets:
        if each not in old.sets:
            yield Change("add", f"set {each.name}", f"{len(each.elements)} address blocks")
    for each in old.sets:
        if each not in new.sets:
            yield Change("remove", f"set {each.name}", f"{len(each.elements)} address blocks")


def _chains(backend: Backend, old: Ruleset, new: Ruleset) -> Iterator[Change]:
    before, after = _by_chain(old), _by_chain(new)
    for key in [*after, *(key for key in before if key not in after)]:
        where = " ".join(key)
        table, chain = (after.get(key) or before[key])[:2]
        was, will = before.get(key), after.get(key)
        if was and will and was[1].base != will[1].base:
            yield Change("remove", where, f"base {was[1].base}")
            yield Change("add", where, f"base {will[1].base}")
        yield from _rules(backend, where, table, chain, _all(was), _all(will))


def _rules(
    backend: Backend, where: str, table: Table, chain: Chain, old: tuple[Rule, ...], new: tuple[Rule, ...]
) -> Iterator[Change]:
    for operation, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if operation != "equal":
            for rule in old[a:b]:
                yield Change("remove", where, backend.render_rule(table, chain, rule))
            for rule in new[c:d]:
                yield Change("add", where, backend.render_rule(table, chain, rule), rule.path)


def _by_chain(ruleset: Ruleset) -> dict[tuple[str, str, str], tuple[Table, Chain]]:
    return {
        (table.family, table.name, chain.name): (table, chain) for table in ruleset.tables for chain in table.chains
    }


def _all(found: tuple[Table, Chain] | None) -> tuple[Rule, ...]:
    return found[1].head + found[1].rules if found else ()
