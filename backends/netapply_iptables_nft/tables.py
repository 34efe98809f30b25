"""What the kernel holds of the tables that iptables-nft manages: dumped, not yet interpreted.

Only the four tables of ip and ip6 are looked at; looking creates nothing. The state is raw: rules are kept as the
bytes of their expressions, so that what is not ours is never decoded, only compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from netapply.kernel import Kernel
from netapply.ruleset import FAMILIES, Family
from netapply_iptables_nft.builtin import BUILT_IN, TABLES
from netapply_wire.expressions import (
    NFTA_RULE_CHAIN,
    NFTA_RULE_EXPRESSIONS,
    NFTA_RULE_HANDLE,
    NFTA_RULE_TABLE,
    NFTA_RULE_USERDATA,
)
from netapply_wire.nfnetlink import (
    NFPROTO,
    NFT_MSG_GETCHAIN,
    NFT_MSG_GETRULE,
    NFT_MSG_GETTABLE,
    Message,
    dump,
    number,
    parse_attributes,
    string,
    text,
)

# enum nft_table_attributes, nft_chain_attributes, nft_hook_attributes of linux/netfilter/nf_tables.h
NFTA_TABLE_NAME, NFTA_TABLE_USE, NFTA_TABLE_USERDATA = 1, 3, 6
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY, NFTA_CHAIN_TYPE = 1, 3, 4, 5, 7
NFTA_CHAIN_USERDATA = 12
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY = 1, 2

NF_ACCEPT = 1

#: Userdata of tables and built-in chains that we created: a comment, as nft(8) stores it (type 0, length, text, NUL).
#: Kernels before 5.10 drop it, and clean then leaves the empty tables behind, as iptables-nft itself does.
MADE_BY_US = b"\0\x09netapply\0"

#: Userdata of our rules in built-in chains, of `Chain.head` and of `Chain.rules`: by it they are known as ours, and
#: told apart while no foreign rule stands between them. The type is one that neither iptables nor nft knows.
IN_FRONT, AT_THE_END = b"\x6e\x01\1", b"\x6e\x01\0"

TableKey: TypeAlias = tuple[Family, str]


class Hooked(NamedTuple):
    """Where the kernel calls a chain: its type, enum nf_inet_hooks, priority."""

    type: str
    hook: int
    priority: int


class RuleState(NamedTuple):
    """One rule: `expressions` as dumped (NFTA_RULE_EXPRESSIONS without its header), counters included."""

    handle: int
    expressions: bytes
    userdata: bytes


class ChainState(NamedTuple):
    """One chain. `base` and `policy` (NF_DROP 0, NF_ACCEPT 1) are None for a regular one. `ours`: we created it."""

    name: str
    base: Hooked | None
    policy: int | None
    ours: bool
    rules: tuple[RuleState, ...]

    @property
    def altered(self) -> bool:
        """Whether somebody gave it another policy than the one that it is created with."""
        return self.policy not in (None, NF_ACCEPT)


class TableState(NamedTuple):
    """One table. `use` counts all that is in it (chains, sets, objects, flowtables). `ours`: we created it."""

    use: int
    ours: bool
    chains: Mapping[str, ChainState]


def read_tables(kernel: Kernel) -> dict[TableKey, TableState]:
    """The tables that are there. Raises KernelError; not consistent by itself, see nfnetlink.read_consistent."""
    families: dict[int, Family] = {NFPROTO["ip"]: "ip", NFPROTO["ip6"]: "ip6"}
    tables: dict[TableKey, TableState] = {}
    for each in dump(kernel, NFT_MSG_GETTABLE, 0):
        family = families.get(each.family)
        name = text(each.attributes[NFTA_TABLE_NAME])
        if family is not None and (family, name) in _MANAGED:
            use, ours = number(each.attributes[NFTA_TABLE_USE]), _made_by_us(each, NFTA_TABLE_USERDATA)
            tables[family, name] = TableState(use, ours, {})
    for family in FAMILIES:
        if any(key[0] == family for key in tables):
            _read_chains(kernel, family, tables)
    return tables


def detect_chains(kernel: Kernel, prefixes: tuple[str, ...]) -> bool:
    """Whether a chain whose name begins with one of `prefixes` stands in one of the tables. Raises KernelError."""
    return any(
        text(each.attributes[NFTA_CHAIN_NAME]).startswith(prefixes)
        for family in FAMILIES
        for each in dump(kernel, NFT_MSG_GETCHAIN, NFPROTO[family])
        if text(each.attributes[NFTA_CHAIN_TABLE]) in BUILT_IN
    )


_MANAGED = frozenset(TABLES)


def _read_chains(kernel: Kernel, family: Family, tables: dict[TableKey, TableState]) -> None:
    found: dict[str, dict[str, ChainState]] = {name: {} for each, name in tables if each == family}
    rules = {name: _read_rules(kernel, family, name) for name in found}
    for each in dump(kernel, NFT_MSG_GETCHAIN, NFPROTO[family]):
        table = text(each.attributes[NFTA_CHAIN_TABLE])
        if table not in found:
            continue
        name, policy = text(each.attributes[NFTA_CHAIN_NAME]), each.attributes.get(NFTA_CHAIN_POLICY)
        found[table][name] = ChainState(
            name,
            _hooked(each),
            None if policy is None else number(policy),
            _made_by_us(each, NFTA_CHAIN_USERDATA),
            tuple(rules[table].get(name, ())),
        )
    for name, chains in found.items():
        tables[family, name] = tables[family, name]._replace(chains=chains)


def _read_rules(kernel: Kernel, family: Family, table: str) -> dict[str, list[RuleState]]:
    rules: dict[str, list[RuleState]] = {}
    for each in dump(kernel, NFT_MSG_GETRULE, NFPROTO[family], string(NFTA_RULE_TABLE, table)):
        found = each.attributes
        rules.setdefault(text(found[NFTA_RULE_CHAIN]), []).append(
            RuleState(
                number(found[NFTA_RULE_HANDLE]),
                found.get(NFTA_RULE_EXPRESSIONS, b""),
                found.get(NFTA_RULE_USERDATA, b""),
            )
        )
    return rules


def _hooked(chain: Message) -> Hooked | None:
    if NFTA_CHAIN_HOOK not in chain.attributes:
        return None
    hook = parse_attributes(chain.attributes[NFTA_CHAIN_HOOK])
    priority = int.from_bytes(hook[NFTA_HOOK_PRIORITY], signed=True)
    return Hooked(text(chain.attributes.get(NFTA_CHAIN_TYPE, b"")), number(hook[NFTA_HOOK_HOOKNUM]), priority)


def _made_by_us(found: Message, userdata: int) -> bool:
    return found.attributes.get(userdata) == MADE_BY_US
