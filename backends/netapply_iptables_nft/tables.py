"""What the kernel holds of the tables that iptables-nft manages: dumped, not yet interpreted.

Only the four tables of ip and ip6 are looked at; looking creates nothing. The state is raw: rules are kept as the
bytes of their expressions, so that what is not ours is never decoded, only compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TypeAlias

from netapply.errors import DecodeError
from netapply.kernel import Kernel
from netapply.ruleset import Family
from netapply.values import NamedTuple
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
    parse_message,
    string,
    text,
)

# enum nft_table_attributes, nft_chain_attributes, nft_hook_attributes of linux/netfilter/nf_tables.h
NFTA_TABLE_NAME, NFTA_TABLE_FLAGS, NFTA_TABLE_USE, NFTA_TABLE_USERDATA = 1, 2, 3, 6
NFT_TABLE_F_OWNER = 2
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


class Dumped(NamedTuple):
    """The tables as the kernel dumped them: equal where the same stands.

    `tables` are of both families: family, name, flags, use, ours; their handles, which differ wherever they are made,
    are left out. `chains` and `rules` are bytes for `parse_message`.
    """

    tables: tuple[tuple[Family, str, int, int, bool], ...] = ()
    chains: tuple[bytes, ...] = ()
    rules: tuple[bytes, ...] = ()

    @property
    def may_vanish(self) -> bool:
        """Whether a table goes with the process that owns it, which does not raise the generation."""
        return any(flags & NFT_TABLE_F_OWNER for _, _, flags, _, _ in self.tables)


def read_tables(kernel: Kernel) -> Mapping[TableKey, TableState]:
    """The tables that are there. Raises KernelError; not consistent by itself, see nfnetlink.read_consistent."""
    return tables_of(dump_tables(kernel))


def dump_tables(kernel: Kernel) -> Dumped:
    """Of the tables that are there all chains and rules. Raises KernelError; not consistent by itself."""
    tables: list[tuple[Family, str, int, int, bool]] = []
    for each in map(parse_message, dump(kernel, NFT_MSG_GETTABLE, 0)):
        family, name = _FAMILIES.get(each.family), text(each.attributes[NFTA_TABLE_NAME])
        if family is not None and (family, name) in _MANAGED:
            flags, use = (number(each.attributes.get(kind, b"")) for kind in (NFTA_TABLE_FLAGS, NFTA_TABLE_USE))
            tables.append((family, name, flags, use, _made_by_us(each, NFTA_TABLE_USERDATA)))
    rules = [
        rule
        for family, name, _, _, _ in tables
        for rule in dump(kernel, NFT_MSG_GETRULE, NFPROTO[family], string(NFTA_RULE_TABLE, name))
    ]
    families: set[Family] = {each[0] for each in tables}
    # Of both families at once, where there are tables of both: one dump less.
    asked = NFPROTO[families.pop()] if len(families) == 1 else 0
    return Dumped(tuple(tables), dump(kernel, NFT_MSG_GETCHAIN, asked) if tables else (), tuple(rules))


def detect_chains(kernel: Kernel) -> tuple[str, ...]:
    """The names of all chains in the tables. Raises KernelError."""
    return tuple(
        text(each.attributes[NFTA_CHAIN_NAME])
        for each in map(parse_message, dump(kernel, NFT_MSG_GETCHAIN, 0))  # of all families in one go
        if each.family in _FAMILIES and text(each.attributes[NFTA_CHAIN_TABLE]) in BUILT_IN
    )


_MANAGED = frozenset(TABLES)


_FAMILIES: dict[int, Family] = {NFPROTO["ip"]: "ip", NFPROTO["ip6"]: "ip6"}


@lru_cache(4)
def tables_of(dumped: Dumped) -> Mapping[TableKey, TableState]:
    """The tables that such a dump describes."""
    rules: dict[tuple[int, str, str], list[RuleState]] = {}
    for each in map(parse_message, dumped.rules):
        found = each.attributes
        place = each.family, text(found[NFTA_RULE_TABLE]), text(found[NFTA_RULE_CHAIN])
        rules.setdefault(place, []).append(_rule_state(found))
    chains: dict[tuple[int, str], dict[str, ChainState]] = {}
    for each in map(parse_message, dumped.chains):
        table, name = (text(each.attributes[kind]) for kind in (NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME))
        state = _chain_state(name, each, tuple(rules.get((each.family, table, name), ())))
        chains.setdefault((each.family, table), {})[name] = state
    return {
        (family, name): TableState(use, ours, chains.get((NFPROTO[family], name), {}))
        for family, name, _, use, ours in dumped.tables
    }


def _rule_state(found: Mapping[int, bytes]) -> RuleState:
    handle = found[NFTA_RULE_HANDLE]
    if len(handle) != 8:
        raise DecodeError(f"a rule's handle of {len(handle)} bytes")
    return RuleState(number(handle), found.get(NFTA_RULE_EXPRESSIONS, b""), found.get(NFTA_RULE_USERDATA, b""))


def _chain_state(name: str, chain: Message, rules: tuple[RuleState, ...]) -> ChainState:
    policy = chain.attributes.get(NFTA_CHAIN_POLICY)
    ours = _made_by_us(chain, NFTA_CHAIN_USERDATA)
    return ChainState(name, _hooked(chain), None if policy is None else number(policy), ours, rules)


def _hooked(chain: Message) -> Hooked | None:
    if NFTA_CHAIN_HOOK not in chain.attributes:
        return None
    hook = parse_attributes(chain.attributes[NFTA_CHAIN_HOOK])
    priority = int.from_bytes(hook[NFTA_HOOK_PRIORITY], signed=True)
    return Hooked(text(chain.attributes.get(NFTA_CHAIN_TYPE, b"")), number(hook[NFTA_HOOK_HOOKNUM]), priority)


def _made_by_us(found: Message, userdata: int) -> bool:
    return found.attributes.get(userdata) == MADE_BY_US
