"""What stands in a namespace in the native dialect: read in one consistent piece, decoded when asked."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache

from netapply.backend import Counters
from netapply.errors import ConflictError, DecodeError, KernelError
from netapply.kernel import Kernel
from netapply.ruleset import Base, Chain, ChainType, Hook, Jump, NamedSet, PortRange, Rule, Ruleset, Table, TProxy
from netapply.values import NamedTuple
from netapply_nftables.decode import ANONYMOUS_SET, PortSets, decode_rule, is_fallback
from netapply_nftables.find import MEMORY, NFTA_TABLE_FLAGS, ORPHANED, OWNED, Snapshot, is_orphan, look_for_table
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
    READ_ATTEMPTS,
    Message,
    dump,
    number,
    parse_attributes,
    parse_message,
    string,
    text,
)

# linux/netfilter/nf_tables.h
NFTA_TABLE_USE = 3
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY = 1, 3, 4, 5
NFTA_CHAIN_TYPE, NFTA_CHAIN_FLAGS = 7, 10
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY = 1, 2
NFT_CHAIN_BASE = 1
#: enum nf_inet_hooks
HOOKS: tuple[Hook, ...] = ("prerouting", "input", "forward", "output", "postrouting")
CHAIN_TYPES: dict[str, ChainType] = {"nat": "nat", "filter": "filter", "route": "route"}


class Dumped(NamedTuple):
    """Our table as the kernel dumped it, as bytes for `parse_message`. `elements` go with `sets`.

    `flags` and `use` are the table's: its handle, which differs wherever it is made, is left out.
    """

    flags: int
    use: int
    chains: tuple[bytes, ...]
    rules: tuple[bytes, ...]
    sets: tuple[bytes, ...]
    elements: tuple[tuple[bytes, ...], ...]


class Contents:
    """Our table, decoded when it is asked for.

    What others did to it shows up in `ruleset` as chains, and jumps, whose names begin with "<".
    """

    def __init__(self, table: str, dumped: Dumped) -> None:
        self._table = table
        self.flags, self._use = dumped.flags, dumped.use
        self._chains, self._rules, self._set_messages = (
            tuple(map(parse_message, each)) for each in (dumped.chains, dumped.rules, dumped.sets)
        )
        self._elements = tuple(tuple(map(parse_message, each)) for each in dumped.elements)

    @cached_property
    def ruleset(self) -> Ruleset:
        """Ours: chains in the kernel's order, sets by name."""
        places = map(_place, self._chains)
        decoded = zip(self._decoded.items(), places, strict=True)  # both in the kernel's order
        chains = tuple(Chain(name, rules, base) for (name, (rules, _)), (base, _) in decoded)
        strange = tuple(Chain(f"<{oddity}>") for oddity in self.oddities)
        return Ruleset((Table("inet", self._table, chains + strange),), tuple(sorted(self.named_sets)))

    @cached_property
    def counters(self) -> Counters:
        """Packets and bytes of each of our rules."""
        return {
            ("inet", self._table, chain, index): count
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
        yield from zip(self._set_messages, self._elements, strict=True)

    def _find_oddities(self) -> Iterator[str]:
        if self.flags not in (0, OWNED, ORPHANED):
            yield f"table flags {self.flags}"
        for message in self._chains:
            if reason := _place(message)[1]:
                yield f"{reason} of chain {text(message.attributes[NFTA_CHAIN_NAME])}"
        named = {text(m.attributes[NFTA_SET_NAME]) for m in self._set_messages if not set_flags(m) & NFT_SET_ANONYMOUS}
        for name in sorted(named - {found.name for found in self.named_sets}):
            yield f"set {name}"
        # The kernel counts chains, named sets, objects and flow tables of a table, and not anonymous sets.
        if self._use != len(self._chains) + len(named):
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
        by_chain: dict[bytes, tuple[list[Rule], list[tuple[int, int]]]] = {
            message.attributes[NFTA_CHAIN_NAME]: ([], []) for message in self._chains
        }
        halves: dict[bytes, Rule] = {}  # TProxy rules whose second half should come next in their chain
        for message in self._rules:
            chain = message.attributes[NFTA_RULE_CHAIN]
            if chain not in by_chain:
                raise DecodeError(f"a rule in chain {text(chain)}, which is not there")
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
        return tuple(
            item
            for item in self._port_sets.items()
            if item[0].encode("utf-8", "surrogateescape") + b"\0" in expressions
        )


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


@lru_cache(8)
def contents_of(table: str, dumped: Dumped) -> Contents:
    """What such a dump says, decoded once for all namespaces that hold the same."""
    return Contents(table, dumped)


def read_snapshot(kernel: Kernel, name: str) -> Snapshot:
    """The table of this name at one generation, and remembered. Creates nothing.

    Raises KernelError; ConflictError when it never stands still.
    """
    at, table, snapshot = look_for_table(kernel, name)
    for _ in range(READ_ATTEMPTS):
        if snapshot is not None or table is None:
            return snapshot or Snapshot(name, at, None)
        contents = _read(kernel, name, parse_message(table))
        before = at
        at, table, snapshot = look_for_table(kernel, name)
        if contents is not None and at == before:
            snapshot = Snapshot(name, at, contents, orphan=bool(contents.flags and table and is_orphan(table)))
            # A table with an owner that does not persist goes with its process, which does not raise the generation.
            if contents.flags in (0, OWNED, ORPHANED):
                kernel.memory[MEMORY] = snapshot
    raise ConflictError("somebody keeps changing the nf_tables rules while they are read")


def _read(kernel: Kernel, name: str, table: Message) -> Contents | None:
    """The table's parts, one after another; None where it, or a set of it, went meanwhile."""
    flags, use = (number(table.attributes.get(each, b"")) for each in (NFTA_TABLE_FLAGS, NFTA_TABLE_USE))
    ours = string(1, name)  # attribute 1 names the table in each kind of request; the kernel ignores it for chains
    chains = tuple(each for each in dump(kernel, NFT_MSG_GETCHAIN, NFPROTO_INET, ours) if each.startswith(ours, 2))
    rules = dump(kernel, NFT_MSG_GETRULE, NFPROTO_INET, ours)
    # A dump more is worth it where the table counts what is not a chain, or rules name anonymous sets.
    some = use != len(chains) or any(ANONYMOUS_SET in each for each in rules)
    try:  # unlike the others, these dumps fail where what they are to list is not there
        sets = dump(kernel, NFT_MSG_GETSET, NFPROTO_INET, ours) if some else ()
        names = (text(parse_message(each).attributes[NFTA_SET_NAME]) for each in sets)
        elements = tuple(dump(kernel, NFT_MSG_GETSETELEM, NFPROTO_INET, ours + string(2, each)) for each in names)
    except KernelError as failure:
        if failure.errno != errno.ENOENT:
            raise
        return None
    return contents_of(name, Dumped(flags, use, chains, rules, sets, elements))
