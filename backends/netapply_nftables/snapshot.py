"""What stands in a namespace in the native dialect: read in one consistent piece, decoded when asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

from netapply.backend import Counters
from netapply.errors import DecodeError
from netapply.kernel import Kernel
from netapply.ruleset import Base, Chain, ChainType, Hook, Jump, NamedSet, PortRange, Rule, Ruleset, Table, TProxy
from netapply_nftables.decode import ANONYMOUS_SET, PortSets, decode_rule, is_fallback
from netapply_nftables.sets import NFT_SET_ANONYMOUS, NFTA_SET_NAME, decode_named_set, decode_port_set, set_flags
from netapply_wire.expressions import (
    NFTA_RULE_CHAIN,
    NFTA_RULE_EXPRESSIONS,
    NFTA_RULE_USERDATA,
    split_counter,
)
from netapply_wire.nfnetlink import (
    NFPROTO_INET,
    NFT_MSG_GETCHAIN,
    NFT_MSG_GETRULE,
    NFT_MSG_GETSET,
    NFT_MSG_GETSETELEM,
    NFT_MSG_GETTABLE,
    Message,
    dump,
    get,
    number,
    parse_attributes,
    read_consistent,
    string,
    text,
)

# linux/netfilter/nf_tables.h
NFTA_TABLE_NAME, NFTA_TABLE_FLAGS, NFTA_TABLE_USE = 1, 2, 3
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY = 1, 3, 4, 5
NFTA_CHAIN_TYPE, NFTA_CHAIN_FLAGS = 7, 10
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY = 1, 2
NFT_CHAIN_BASE = 1
#: enum nf_inet_hooks
HOOKS: tuple[Hook, ...] = ("prerouting", "input", "forward", "output", "postrouting")
CHAIN_TYPES: dict[str, ChainType] = {"nat": "nat", "filter": "filter", "route": "route"}


class Contents(NamedTuple):
    """Our table as the kernel dumped it. `elements` go with `sets`."""

    table: Message
    chains: tuple[Message, ...]
    rules: tuple[Message, ...]
    sets: tuple[Message, ...]
    elements: tuple[Sequence[Message], ...]


class Snapshot:
    """Our table at one generation; `contents` is None where there is none.

    What others did to it shows up in `ruleset` as chains, and jumps, whose names begin with "<".
    """

    def __init__(self, table: str, generation: int, contents: Contents | None) -> None:
        self.table = table
        self.generation = generation
        self.contents = contents

    @property
    def foreign(self) -> object:
        """Always (): the table is ours alone, and others are never touched."""
        return ()

    @cached_property
    def ruleset(self) -> Ruleset | None:
        """Ours, decoded: chains in the kernel's order, sets by name."""
        if self.contents is None:
            return None
        rules = self._decoded
        chains = tuple(
            Chain(text(m.attributes[NFTA_CHAIN_NAME]), rules[text(m.attributes[NFTA_CHAIN_NAME])][0], _base(m))
            for m in self.contents.chains
        )
        strange = tuple(Chain(f"<{oddity}>") for oddity in self.oddities)
        return Ruleset((Table("inet", self.table, chains + strange),), tuple(sorted(self.named_sets)))

    @cached_property
    def counters(self) -> Counters:
        """Packets and bytes of each of our rules."""
        return {
            ("inet", self.table, chain, index): count
            for chain, (_, counts) in self._decoded.items()
            for index, count in enumerate(counts)
        }

    @cached_property
    def oddities(self) -> tuple[str, ...]:
        """What about the table, its chains and sets is not as we make them, apart from rules."""
        return tuple(self._find_oddities())

    @cached_property
    def named_sets(self) -> tuple[NamedSet, ...]:
        """The sets that are lists of address blocks, in the kernel's order."""
        found: list[NamedSet] = []
        for message, elements in self._sets():
            if not set_flags(message) & NFT_SET_ANONYMOUS:
                try:
                    found.append(decode_named_set(message, elements))
                except DecodeError:
                    continue  # named in oddities
        return tuple(found)

    def _sets(self) -> Iterator[tuple[Message, Sequence[Message]]]:
        if self.contents:
            yield from zip(self.contents.sets, self.contents.elements, strict=True)

    def _find_oddities(self) -> Iterator[str]:
        if self.contents is None:
            return
        table, chains = self.contents.table, self.contents.chains
        if flags := number(table.attributes.get(NFTA_TABLE_FLAGS, b"")):
            yield f"table flags {flags}"
        for message in chains:
            if reason := _chain_oddity(message):
                yield f"{reason} of chain {text(message.attributes[NFTA_CHAIN_NAME])}"
        named = {text(m.attributes[NFTA_SET_NAME]) for m in self.contents.sets if not set_flags(m) & NFT_SET_ANONYMOUS}
        for name in sorted(named - {found.name for found in self.named_sets}):
            yield f"set {name}"
        # The kernel counts chains, named sets, objects and flow tables of a table, and not anonymous sets.
        if number(table.attributes.get(NFTA_TABLE_USE, b"")) != len(chains) + len(named):
            yield "objects"

    @cached_property
    def _port_sets(self) -> dict[str, tuple[PortRange, ...]]:
        found: dict[str, tuple[PortRange, ...]] = {}
        for message, elements in self._sets():
            if set_flags(message) & NFT_SET_ANONYMOUS:
                try:
                    found[text(message.attributes[NFTA_SET_NAME])] = decode_port_set(message, elements)
                except DecodeError:
                    continue  # the rule that looks it up cannot be read then
        return found

    @cached_property
    def _decoded(self) -> dict[str, tuple[tuple[Rule, ...], tuple[tuple[int, int], ...]]]:
        """By chain: its rules, and their (packets, bytes)."""
        if self.contents is None:
            return {}
        by_chain: dict[str, tuple[list[Rule], list[tuple[int, int]]]] = {
            text(message.attributes[NFTA_CHAIN_NAME]): ([], []) for message in self.contents.chains
        }
        halves: dict[str, Rule] = {}  # TProxy rules whose second half should come next in their chain
        for message in self.contents.rules:
            chain = text(message.attributes[NFTA_RULE_CHAIN])
            rules, counts = by_chain[chain]
            dumped = message.attributes.get(NFTA_RULE_EXPRESSIONS, b"")
            userdata = message.attributes.get(NFTA_RULE_USERDATA, b"")
            expressions, packets, octets = split_counter(dumped)
            looked_up = tuple(self._port_sets.items()) if ANONYMOUS_SET in expressions else ()
            half = halves.pop(chain, None)
            if half and is_fallback(expressions, userdata, looked_up, half):
                rules[-1] = half
                continue
            rule = _decode(expressions, userdata, looked_up)
            if isinstance(rule.statement, TProxy):
                halves[chain], rule = rule, _strange("half a tproxy rule")
            rules.append(rule)
            counts.append((packets, octets))
        return {chain: (tuple(rules), tuple(counts)) for chain, (rules, counts) in by_chain.items()}


@lru_cache(4096)
def _decode(expressions: bytes, userdata: bytes, port_sets: PortSets) -> Rule:
    """The rule, decoded once for all namespaces that hold it; a jump to nowhere where it is not one of ours."""
    try:
        return decode_rule(expressions, userdata, port_sets)
    except DecodeError:
        import hashlib  # costs more than the rest of this module

        return _strange(f"rule {hashlib.sha256(expressions + userdata).hexdigest()[:16]}")


def _strange(what: str) -> Rule:
    return Rule((), Jump(f"<{what}>"))


def _hook(message: Message) -> dict[int, bytes]:
    return parse_attributes(message.attributes.get(NFTA_CHAIN_HOOK, b""))


def _base(message: Message) -> Base | None:
    """Where the kernel calls a chain; None for a chain that is only jumped to, or has an oddity."""
    if NFTA_CHAIN_HOOK not in message.attributes or _chain_oddity(message):
        return None
    hook = _hook(message)
    priority = int.from_bytes(hook[NFTA_HOOK_PRIORITY], signed=True)
    kind = CHAIN_TYPES[text(message.attributes[NFTA_CHAIN_TYPE])]
    return Base(kind, HOOKS[number(hook[NFTA_HOOK_HOOKNUM])], priority)


def _chain_oddity(message: Message) -> str:
    attributes = message.attributes
    if number(attributes.get(NFTA_CHAIN_FLAGS, b"")) & ~NFT_CHAIN_BASE:
        return "flags"
    if NFTA_CHAIN_HOOK not in attributes:
        return ""
    if number(_hook(message).get(NFTA_HOOK_HOOKNUM, b"")) >= len(HOOKS):
        return "hook"
    if text(attributes.get(NFTA_CHAIN_TYPE, b"")) not in CHAIN_TYPES:
        return "type"
    return "" if number(attributes.get(NFTA_CHAIN_POLICY, b"\1")) == 1 else "policy"


def find_table(kernel: Kernel, table: str) -> Message | None:
    """Our table as the kernel describes it, or None."""
    return get(kernel, NFT_MSG_GETTABLE, NFPROTO_INET, string(NFTA_TABLE_NAME, table))


def read_snapshot(kernel: Kernel, table: str) -> Snapshot:
    """Our table at one generation. Creates nothing. Raises KernelError; ConflictError when it never stands still."""
    return read_consistent(kernel, lambda generation: Snapshot(table, generation, _read(kernel, table)))


def _read(kernel: Kernel, name: str) -> Contents | None:
    table = find_table(kernel, name)
    if table is None:
        return None
    ours = string(1, name)  # attribute 1 names the table in each kind of request; the kernel ignores it for chains
    chains = [m for m in dump(kernel, NFT_MSG_GETCHAIN, NFPROTO_INET, ours) if text(m.attributes[1]) == name]
    rules = dump(kernel, NFT_MSG_GETRULE, NFPROTO_INET, ours)
    sets = dump(kernel, NFT_MSG_GETSET, NFPROTO_INET, ours)
    elements = tuple(
        dump(kernel, NFT_MSG_GETSETELEM, NFPROTO_INET, ours + string(2, text(m.attributes[NFTA_SET_NAME])))
        for m in sets
    )
    return Contents(table, tuple(chains), tuple(rules), tuple(sets), elements)
