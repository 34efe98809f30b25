"""Dumped rules, whoever's: what can be told of their expressions without knowing what the rules mean."""

from __future__ import annotations

from sys import byteorder

from netapply.errors import DecodeError
from netapply_wire.expressions import (
    NFTA_DATA_VERDICT,
    NFTA_VERDICT_CHAIN,
    Expression,
    expression,
    parse_expressions,
)
from netapply_wire.nfnetlink import parse_attributes, text
from netapply_wire.xtables import SET_INDEX, SET_INDEX_OFFSET

#: Expressions whose data the packets change; their names are kept.
_STATEFUL = (b"counter\0", b"quota\0", b"last\0")


def without_state(expressions: bytes) -> bytes:
    """A dumped rule without what packets change in it. Raises DecodeError.

    Equal bytes then mean an unchanged rule; that is also what makes decoding worth caching.
    """
    kept: list[bytes] = []
    start = offset = 0
    end = len(expressions)
    while offset < end:
        after = _element_end(expressions, offset)
        if expressions.startswith(_STATEFUL, offset + 8):  # behind the headers of the element and of its name
            name = expressions[offset + 8 : expressions.index(0, offset + 8)].decode()
            kept += (expressions[start:offset], expression(name))
            start = after
        offset = after
    return b"".join((*kept, expressions[start:]))


def counters_of(expressions: bytes) -> tuple[int, int]:
    """The (packets, bytes) that a dumped rule has counted. Raises DecodeError."""
    found = next((each for each in parse_expressions(expressions) if each.name == "counter"), None)
    return (found.number(2), found.number(1)) if found else (0, 0)


def _element_end(expressions: bytes, offset: int) -> int:
    size = int.from_bytes(expressions[offset : offset + 2], byteorder)
    after = offset + (size + 3 & ~3)
    if size < 8 or after > len(expressions):
        left = len(expressions) - offset
        raise DecodeError(f"an expression of {size} bytes does not fit in the {left} that are there")
    return after


def jump_target(expressions: bytes) -> str | None:
    """The chain that a rule jumps or goes to, whatever else it does; None where it goes to none. Raises DecodeError."""
    for each in parse_expressions(expressions):
        if each.name == "immediate" and NFTA_VERDICT_CHAIN in (found := verdict_of(each)):
            return text(found[NFTA_VERDICT_CHAIN])
    return None


def jump_to_ours(expressions: bytes, prefixes: tuple[str, ...]) -> str | None:
    """The chain of such a name that a rule jumps to, if it does. Most rules are settled by a search, undecoded."""
    if not any(prefix.encode() in expressions for prefix in prefixes):
        return None
    target = jump_target(expressions)
    return target if target is not None and target.startswith(prefixes) else None


def set_indices(expressions: bytes) -> list[int]:
    """The indices of the sets that a rule looks up by the match `set`, once for each use. Raises DecodeError."""
    if b"set\0" not in expressions:
        return []
    found = (each for each in parse_expressions(expressions) if each.name == "match")
    infos = (each.attributes.get(3, b"") for each in found if text(each.attributes.get(1, b"")) == "set")
    return [SET_INDEX.unpack_from(info, SET_INDEX_OFFSET)[0] for info in infos if len(info) >= SET_INDEX.size]


def verdict_of(each: Expression) -> dict[int, bytes]:
    """The NFTA_VERDICT_* attributes of an immediate expression; {} where it loads data instead."""
    data = parse_attributes(each.attributes.get(2, b""))
    return parse_attributes(data.get(NFTA_DATA_VERDICT, b""))
