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
    NF_ACCEPT,
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
        places = map(_place, self.contents.chains)
        decoded = zip(self._decoded.items(), places, strict=True)  # both in the kernel's order
        chains = tuple(Chain(name, rules, base) for (name, (rules, _)), (base, _) in decoded)
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
            if reason := _place(message)[1]:
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
        by_chain: dict[bytes, tuple[list[Rule], list[tuple[int, int]]]] = {
            message.attributes[NFTA_CHAIN_NAME]: ([], []) for message in self.contents.chains
        }
        halves: dict[bytes, Rule] = {}  # TProxy rules whose second half should come next in their chain
        for message in self.contents.rules:
            chain = message.attributes[NFTA_RULE_CHAIN]
            rules, counts = by_chain[chain]
            userdata = message.attributes.get(NFTA_RULE_USERDATA, b"")
            expressions, packets, octets = split_counter(message.attributes.get(NFTA_RULE_EXPRESSIONS, b""))
            looked_up = self._looked_up(expressions) if ANONYMOUS_SET in expressions else ()
            half = halves.pop(chain, None)
            if half and _is_fallback(expressions, userdata, looked_up, half):
                rules[-1] = half
                continue
            rule = _decode(expressions, userdata, looked_up)
            if isinstance(rule.statement, TProxy):
                halves[chain], rule = rule, _strange("half a tproxy rule")
            rules.append(rule)
            counts.append((packets, octets))
        return {text(chain): (tuple(rules), tuple(counts)) for chain, (rules, counts) in by_chain.items()}

    def _looked_up(self, expressions: bytes) -> PortSets:
        """The port sets that a rule names, and no others: what one rule says is remembered together with them."""
        return tuple(item for item in self._port_sets.items() if item[0].encode() + b"\0" in expressions)


_is_fallback = lru_cache(1024)(is_fallback)


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


def _place(message: Message) -> tuple[Base | None, str]:
    """Where the kernel calls a chain, and what is not as we make it; (None, "") for one that is only jumped to."""
    attributes = message.attributes
    return _decode_place(
        attributes.get(NFTA_CHAIN_HOOK, b""),
        attributes.get(NFTA_CHAIN_TYPE, b""),
        number(attributes.get(NFTA_CHAIN_POLICY, b"\1")),
        number(attributes.get(NFTA_CHAIN_FLAGS, b"")),
    )


@lru_cache(256)
def _decode_place(hook: bytes, kind: bytes, policy: int, flags: int) -> tuple[Base | None, str]:
    if flags & ~NFT_CHAIN_BASE:
        return None, "flags"
    if not hook:
        return None, ""
    place = parse_attributes(hook)
    at = number(place.get(NFTA_HOOK_HOOKNUM, b""))
    if at >= len(HOOKS):
        return None, "hook"
    known = CHAIN_TYPES.get(text(kind))
    if known is None:
        return None, "type"
    if policy != NF_ACCEPT:
        return None, "policy"
    return Base(known, HOOKS[at], int.from_bytes(place[NFTA_HOOK_PRIORITY], signed=True)), ""


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
    sets = dump(kernel, NFT_MSG_GETSET, NFPROTO_INET, ours) if _may_hold_sets(table, chains, rules) else []
    elements = tuple(
        dump(kernel, NFT_MSG_GETSETELEM, NFPROTO_INET, ours + string(2, text(m.attributes[NFTA_SET_NAME])))
        for m in sets
    )
    return Contents(table, tuple(chains), tuple(rules), tuple(sets), elements)


def _may_hold_sets(table: Message, chains: Sequence[Message], rules: Sequence[Message]) -> bool:
    """Whether it is worth a dump: the table counts what is not a chain, rules name the anonymous sets they look up."""
    if number(table.attributes.get(NFTA_TABLE_USE, b"")) != len(chains):
        return True
    return any(ANONYMOUS_SET in message.attributes.get(NFTA_RULE_EXPRESSIONS, b"") for message in rules)
