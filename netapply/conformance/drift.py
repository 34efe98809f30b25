"""Ways in which somebody changes rules of ours. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from netapply.ruleset import Chain, PortMatch, PortRange, ProtocolMatch, Return, Rule, Ruleset, Table

_ADDED = Rule((ProtocolMatch(6), PortMatch("dst", (PortRange(7, 7),))), Return())


def drifts(ruleset: Ruleset) -> Iterator[tuple[str, Ruleset]]:
    """What was done, and the rule set after it; for the longest chain of our own of each table."""
    for table in ruleset.tables:
        chain = max((each for each in table.chains), key=lambda each: (each.base is None, len(each.rules)))
        where = f"{table.family} {table.name} {chain.name}"
        rules = chain.rules
        if not rules:
            continue
        family = rules[0].family
        yield f"the last rule of {where} is gone", _with(ruleset, table, chain, rules[:-1])
        yield f"the first rule of {where} is gone", _with(ruleset, table, chain, rules[1:])
        yield (
            f"{where} has a rule more at its end",
            _with(ruleset, table, chain, (*rules, _ADDED._replace(family=family))),
        )
        yield (
            f"{where} has a rule more at its start",
            _with(ruleset, table, chain, (_ADDED._replace(family=family), *rules)),
        )
        yield f"the last rule of {where} stands twice", _with(ruleset, table, chain, (*rules, rules[-1]))
        if len(rules) > 1 and rules[0] != rules[-1]:
            turned = (rules[-1], *rules[1:-1], rules[0])
            yield f"two rules of {where} have changed places", _with(ruleset, table, chain, turned)


def _with(ruleset: Ruleset, table: Table, chain: Chain, rules: tuple[Rule, ...]) -> Ruleset:
    chains = tuple(each._replace(rules=rules) if each is chain else each for each in table.chains)
    return ruleset._replace(
        tables=tuple(each._replace(chains=chains) if each is table else each for each in ruleset.tables)
    )
