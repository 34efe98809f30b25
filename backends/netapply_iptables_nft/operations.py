"""The changes that a batch is made of, for one table: each is one nf_tables message."""

from __future__ import annotations

from netapply.ruleset import Base, Rule
from netapply.values import NamedTuple
from netapply_iptables_nft.builtin import HOOKS
from netapply_iptables_nft.encode import SetReference, encode_rule
from netapply_iptables_nft.tables import (
    AT_THE_END,
    IN_FRONT,
    MADE_BY_US,
    NF_ACCEPT,
    NFTA_CHAIN_HOOK,
    NFTA_CHAIN_NAME,
    NFTA_CHAIN_POLICY,
    NFTA_CHAIN_TABLE,
    NFTA_CHAIN_TYPE,
    NFTA_CHAIN_USERDATA,
    NFTA_HOOK_HOOKNUM,
    NFTA_HOOK_PRIORITY,
    NFTA_TABLE_NAME,
    NFTA_TABLE_USERDATA,
    TableKey,
)
from netapply_wire.expressions import NFTA_RULE_CHAIN, NFTA_RULE_HANDLE, NFTA_RULE_TABLE, NFTA_RULE_USERDATA
from netapply_wire.nfnetlink import (
    NFPROTO,
    NFT_MSG_DELCHAIN,
    NFT_MSG_DELRULE,
    NFT_MSG_DELTABLE,
    NFT_MSG_NEWCHAIN,
    NFT_MSG_NEWRULE,
    NFT_MSG_NEWTABLE,
    NLM_F_APPEND,
    NLM_F_CREATE,
    Operation,
    attr,
    nested,
    string,
    u32,
    u64,
)

NLM_F_NONREC = 0x100  # linux/netlink.h: refuse to delete what is not empty

_ACCEPT = u32(NFTA_CHAIN_POLICY, NF_ACCEPT)
_OUR_TABLE = attr(NFTA_TABLE_USERDATA, MADE_BY_US)
_OUR_CHAIN = attr(NFTA_CHAIN_USERDATA, MADE_BY_US)
_AT_THE_END = attr(NFTA_RULE_USERDATA, AT_THE_END)
_IN_FRONT = attr(NFTA_RULE_USERDATA, IN_FRONT)


class Change(NamedTuple):
    """One operation, and the places in its body where the index of a set belongs."""

    operation: Operation
    sets: tuple[SetReference, ...] = ()


class TableOperations:
    """Spells what can be done to one table and what is in it."""

    def __init__(self, key: TableKey) -> None:
        family, table = key
        self._family = family
        self._nfproto = NFPROTO[family]
        self._where = f"{family} {table}"
        self._table = string(NFTA_TABLE_NAME, table)
        self._chain_table = string(NFTA_CHAIN_TABLE, table)
        self._rule_table = string(NFTA_RULE_TABLE, table)

    def add_table(self) -> Change:
        """Marked as made by us, so that clean can tell."""
        return self._change(NFT_MSG_NEWTABLE, NLM_F_CREATE, f"add table {self._where}", self._table + _OUR_TABLE)

    def delete_table(self) -> Change:
        return self._change(NFT_MSG_DELTABLE, NLM_F_NONREC, f"delete table {self._where}", self._table)

    def add_chain(self, name: str) -> Change:
        """A regular chain."""
        body = self._chain_table + string(NFTA_CHAIN_NAME, name)
        return self._change(NFT_MSG_NEWCHAIN, NLM_F_CREATE, f"add chain {self._where} {name}", body)

    def add_base_chain(self, name: str, base: Base) -> Change:
        """A built-in chain with policy accept, marked as made by us."""
        hook = u32(NFTA_HOOK_HOOKNUM, HOOKS[base.hook]), u32(NFTA_HOOK_PRIORITY, base.priority)
        called = nested(NFTA_CHAIN_HOOK, *hook) + _ACCEPT + string(NFTA_CHAIN_TYPE, base.type)
        body = self._chain_table + string(NFTA_CHAIN_NAME, name) + called + _OUR_CHAIN
        return self._change(NFT_MSG_NEWCHAIN, NLM_F_CREATE, f"add chain {self._where} {name}", body)

    def delete_chain(self, name: str) -> Change:
        body = self._chain_table + string(NFTA_CHAIN_NAME, name)
        return self._change(NFT_MSG_DELCHAIN, NLM_F_NONREC, f"delete chain {self._where} {name}", body)

    def flush(self, chain: str) -> Change:
        """Delete all rules of a chain."""
        body = self._rule_table + string(NFTA_RULE_CHAIN, chain)
        return self._change(NFT_MSG_DELRULE, 0, f"flush chain {self._where} {chain}", body)

    def delete_rule(self, chain: str, handle: int) -> Change:
        body = self._rule_table + string(NFTA_RULE_CHAIN, chain) + u64(NFTA_RULE_HANDLE, handle)
        return self._change(NFT_MSG_DELRULE, 0, f"delete rule {self._where} {chain} handle {handle}", body)

    def append(self, chain: str, number: int, rule: Rule, *, at_the_end: bool = False) -> Change:
        """`number` counts from 1 in our part of the chain; `at_the_end` tags a rule of a built-in chain."""
        label = f"add rule {self._where} {chain} #{number}"
        return self._rule(label, NLM_F_CREATE | NLM_F_APPEND, chain, rule, _AT_THE_END if at_the_end else b"")

    def insert(self, chain: str, number: int, rule: Rule) -> Change:
        """Before all other rules of a built-in chain."""
        return self._rule(f"insert rule {self._where} {chain} #{number}", NLM_F_CREATE, chain, rule, _IN_FRONT)

    def _rule(self, label: str, flags: int, chain: str, rule: Rule, userdata: bytes) -> Change:
        where = self._rule_table + string(NFTA_RULE_CHAIN, chain)
        attributes, sets = encode_rule(rule, self._family)
        if sets:
            sets = tuple(SetReference(offset + len(where), name) for offset, name in sets)
        return Change(Operation(NFT_MSG_NEWRULE, self._nfproto, where + attributes + userdata, flags, label), sets)

    def _change(self, command: int, flags: int, label: str, body: bytes) -> Change:
        return Change(Operation(command, self._nfproto, body, flags, label))
