"""From what stands to what should: the operations of one batch.

A kept chain is flushed and filled again in the batch; the kernel swaps all its rules by one generation bit that it
reads once for each packet, so no packet meets half of either. Chains and sets whose content stays are left alone,
and keep their counters. Where others left something in the table that no difference of rule sets can undo, the whole
table is replaced: in one batch too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count

from netapply.backend import STRANGE
from netapply.errors import UnsupportedError
from netapply.ruleset import Chain, Jump, NamedSet, PortRange, Rule, Ruleset, SetMatch, Table
from netapply_nftables.encode import encode_rule
from netapply_nftables.find import NFTA_TABLE_FLAGS, NFTA_TABLE_NAME, OWNED
from netapply_nftables.sets import add_named_set, add_port_set
from netapply_nftables.snapshot import (
    HOOKS,
    NFTA_CHAIN_HOOK,
    NFTA_CHAIN_NAME,
    NFTA_CHAIN_POLICY,
    NFTA_CHAIN_TABLE,
    NFTA_CHAIN_TYPE,
    NFTA_HOOK_HOOKNUM,
    NFTA_HOOK_PRIORITY,
)
from netapply_wire.expressions import NF_ACCEPT
from netapply_wire.nfnetlink import (
    NFPROTO_INET,
    NFT_MSG_DELCHAIN,
    NFT_MSG_DELRULE,
    NFT_MSG_DELSET,
    NFT_MSG_DELTABLE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWTABLE,
    NLM_F_APPEND,
    NLM_F_CREATE,
    Operation,
    nested,
    string,
    u32,
)


def delete_table(table: str) -> list[Operation]:
    """Remove the table with all that is in it, whoever put it there."""
    return [Operation(NFT_MSG_DELTABLE, NFPROTO_INET, string(NFTA_TABLE_NAME, table), 0, f"delete table inet {table}")]


def adopt_table(table: str) -> list[Operation]:
    """Own a table that has outlived its owner."""
    body = string(NFTA_TABLE_NAME, table) + u32(NFTA_TABLE_FLAGS, OWNED)
    return [Operation(NFT_MSG_NEWTABLE, NFPROTO_INET, body, 0, f"own table inet {table}")]


def create_table(ruleset: Ruleset, *, exclusive: bool = False) -> list[Operation]:
    """All of a rule set in a table that is not there yet. Raises UnsupportedError for one that inet cannot hold."""
    table = only_table(ruleset)
    body = string(NFTA_TABLE_NAME, table.name) + (u32(NFTA_TABLE_FLAGS, OWNED) if exclusive else b"")
    created = [Operation(NFT_MSG_NEWTABLE, NFPROTO_INET, body, NLM_F_CREATE, f"add table inet {table.name}")]
    return [*created, *_additions(table, ruleset.sets, table.chains, table.chains)]


def update_table(current: Ruleset, desired: Ruleset) -> list[Operation]:
    """The difference of two rule sets of one table. Raises UnsupportedError as create_table does."""
    old, new = only_table(current), only_table(desired)
    kept = _kept_chains(old.chains, new.chains)
    gone, added = old.chains[kept:], new.chains[kept:]
    dropped = [named for named in current.sets if named not in desired.sets]
    leaving = {chain.name for chain in gone} | {named.name for named in dropped}
    pairs = zip(old.chains, new.chains[:kept], strict=False)
    changed = [after for before, after in pairs if before.rules != after.rules or _refers_to(after, leaving)]
    operations = [_flush(old.name, chain) for chain in (*changed, *gone)]
    operations += [_delete_chain(old.name, chain) for chain in gone]
    operations += [_delete_set(old.name, named) for named in dropped]
    new_sets = [named for named in desired.sets if named not in current.sets]
    return [*operations, *_additions(new, new_sets, added, (*changed, *added))]


def only_table(ruleset: Ruleset) -> Table:
    """The rule set's one table, checked. Raises UnsupportedError."""
    if len(ruleset.tables) != 1 or ruleset.tables[0].family != "inet":
        raise UnsupportedError("native nftables takes one inet table")
    return ruleset.tables[0]


def check(ruleset: Ruleset) -> None:
    """Raise UnsupportedError unless all that rules refer to is there and nothing in it is somebody else's."""
    table = only_table(ruleset)
    chains = {chain.name for chain in table.chains}
    sets = {named.name: named.family for named in ruleset.sets}
    for _, chain, index, rule in ruleset.walk():
        where = f"rule {index + 1} of chain {chain.name}"
        if isinstance(rule.statement, Jump) and rule.statement.chain not in chains:
            raise UnsupportedError(f"{where} jumps to {rule.statement.chain}, which is not there")
        for match in rule.matches:
            if isinstance(match, SetMatch) and sets.get(match.set) != rule.family:
                raise UnsupportedError(f"{where} wants a set {match.set} of family {rule.family}, which is not there")
    for chain in table.chains:
        if chain.head or chain.name.startswith(STRANGE):
            raise UnsupportedError(f"chain {chain.name} is not one that netapply can write to an inet table")


def _kept_chains(old: Sequence[Chain], new: Sequence[Chain]) -> int:
    """How many chains at the front stay: the kernel appends new ones, and the order is part of the rule set."""
    kept = 0
    for before, after in zip(old, new, strict=False):
        if (before.name, before.base) != (after.name, after.base):
            break
        kept += 1
    return kept


def _refers_to(chain: Chain, names: set[str]) -> bool:
    """Whether a rule of the chain uses a chain or set of these names, which may come back as another one."""
    for rule in chain.rules:
        if isinstance(rule.statement, Jump) and rule.statement.chain in names:
            return True
        if any(isinstance(match, SetMatch) and match.set in names for match in rule.matches):
            return True
    return False


def _additions(
    table: Table, sets: Iterable[NamedSet], chains: Iterable[Chain], filled: Iterable[Chain]
) -> Iterator[Operation]:
    """New sets, new chains, then all rules: whatever is referred to is there by then."""
    for named in sets:
        yield from add_named_set(table.name, named)
    for chain in chains:
        yield _add_chain(table.name, chain)
    numbers = count(1)
    for chain in filled:
        where = string(1, table.name) + string(2, chain.name)
        for index, rule in enumerate(chain.rules):
            yield from _add_rule(
                table.name, where, f"add rule inet {table.name} {chain.name} #{index + 1}", rule, numbers
            )


def _add_rule(table: str, where: bytes, label: str, rule: Rule, numbers: Iterator[int]) -> Iterator[Operation]:
    before: list[Operation] = []

    def port_set(ranges: tuple[PortRange, ...]) -> int:
        set_id = next(numbers)
        before.extend(add_port_set(table, set_id, ranges))
        return set_id

    bodies = encode_rule(rule, port_set)
    yield from before
    for body in bodies:
        yield Operation(NFT_MSG_NEWRULE, NFPROTO_INET, where + body, NLM_F_CREATE | NLM_F_APPEND, label)


def _add_chain(table: str, chain: Chain) -> Operation:
    body = string(NFTA_CHAIN_TABLE, table) + string(NFTA_CHAIN_NAME, chain.name)
    if chain.base:
        kind, hook, priority = chain.base
        place = u32(NFTA_HOOK_HOOKNUM, HOOKS.index(hook)) + u32(NFTA_HOOK_PRIORITY, priority)
        body += nested(NFTA_CHAIN_HOOK, place) + u32(NFTA_CHAIN_POLICY, NF_ACCEPT) + string(NFTA_CHAIN_TYPE, kind)
    return Operation(NFT_MSG_NEWCHAIN, NFPROTO_INET, body, NLM_F_CREATE, f"add chain inet {table} {chain.name}")


def _flush(table: str, chain: Chain) -> Operation:
    body = string(1, table) + string(2, chain.name)  # DELRULE without a handle takes every rule of the chain
    return Operation(NFT_MSG_DELRULE, NFPROTO_INET, body, 0, f"flush chain inet {table} {chain.name}")


def _delete_chain(table: str, chain: Chain) -> Operation:
    body = string(NFTA_CHAIN_TABLE, table) + string(NFTA_CHAIN_NAME, chain.name)
    return Operation(NFT_MSG_DELCHAIN, NFPROTO_INET, body, 0, f"delete chain inet {table} {chain.name}")


def _delete_set(table: str, named: NamedSet) -> Operation:
    body = string(1, table) + string(2, named.name)
    return Operation(NFT_MSG_DELSET, NFPROTO_INET, body, 0, f"delete set inet {table} {named.name}")
