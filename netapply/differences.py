"""Two rule sets, rule by rule and in order: what the kernel lacks, and what it has too much."""

from __future__ import annotations

from collections.abc import Iterator

from netapply.backend import Backend
from netapply.results import Change
from netapply.ruleset import Chain, Rule, Ruleset, Table


def ruleset_changes(backend: Backend, live: Ruleset | None, desired: Ruleset | None) -> tuple[Change, ...]:
    """Every change that leads from `live` to `desired`. A rule out of its place is one removed and one added."""
    old, new = live or Ruleset(), desired or Ruleset()
    return (*_sets(old, new), *_chains(backend, old, new))


def with_paths(live: Ruleset | None, applied: Ruleset | None) -> Ruleset:
    """What stands, each rule with the plan path of its equal in the same chain of `applied`; "" where there is none."""
    paths = {
        (table.family, table.name, chain.name, rule): rule.path
        for table, chain, _, rule in (applied or Ruleset()).walk()
    }

    def known(table: Table, chain: Chain, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        where = (table.family, table.name, chain.name)
        return tuple(rule._replace(path=paths.get((*where, rule), "")) for rule in rules)

    def told(table: Table, chain: Chain) -> Chain:
        return chain._replace(head=known(table, chain, chain.head), rules=known(table, chain, chain.rules))

    found = live or Ruleset()
    tables = (table._replace(chains=tuple(told(table, chain) for chain in table.chains)) for table in found.tables)
    return found._replace(tables=tuple(tables))


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
        yield from _headers(where, was[1] if was else None, will[1] if will else None)
        yield from _rules(backend, where, table, chain, _all(was), _all(will))


def _headers(where: str, was: Chain | None, will: Chain | None) -> Iterator[Change]:
    """A chain that stands on one side only, or is called from elsewhere. What is odd about a table is a chain too."""
    if was and will and was.base == will.base:
        return
    if was:
        yield Change("remove", where, _header(was))
    if will:
        yield Change("add", where, _header(will))


def _header(chain: Chain) -> str:
    if chain.base is None:
        return "this chain"
    return f"this chain, type {chain.base.type} hook {chain.base.hook} priority {chain.base.priority}"


def _rules(
    backend: Backend, where: str, table: Table, chain: Chain, old: tuple[Rule, ...], new: tuple[Rule, ...]
) -> Iterator[Change]:
    from difflib import SequenceMatcher  # costs a cold start, and apply never compares like this

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
