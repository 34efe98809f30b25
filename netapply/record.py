"""Rule sets and routing as JSON and back, for the journal. Named tuples become arrays that end in their `kind`."""

from __future__ import annotations

from typing import Any

from netapply import ruleset as rs
from netapply.errors import DecodeError

_MATCHES: dict[str, type[Any]] = {
    "iface": rs.IfaceMatch,
    "address": rs.AddressMatch,
    "set": rs.SetMatch,
    "protocol": rs.ProtocolMatch,
    "port": rs.PortMatch,
    "syn": rs.SynMatch,
    "owner": rs.OwnerMatch,
    "cgroup": rs.CgroupMatch,
    "mark": rs.MarkMatch,
    "connmark": rs.ConnmarkMatch,
    "state": rs.StateMatch,
    "socket": rs.SocketMatch,
    "limit": rs.LimitMatch,
}
_STATEMENTS: dict[str, type[Any]] = {
    "jump": rs.Jump,
    "return": rs.Return,
    "accept": rs.Accept,
    "drop": rs.Drop,
    "redirect": rs.Redirect,
    "dnat": rs.Dnat,
    "tproxy": rs.TProxy,
    "set-mark": rs.SetMark,
    "save-mark": rs.SaveMark,
    "restore-mark": rs.RestoreMark,
    "set-connmark": rs.SetConnmark,
    "set-zone": rs.SetZone,
    "log": rs.Log,
}


def hexed(value: object) -> str:
    """`default` of json.dumps: bytes are written in hex. Everything else in a rule set is JSON already."""
    if isinstance(value, bytes):
        return value.hex()
    raise TypeError(f"{type(value).__name__} has no place in a record")


def ruleset_to_json(ruleset: rs.Ruleset | None) -> object:
    """What json.dumps writes with `default=hexed`. A set's elements are one string: they may be many thousands."""
    if ruleset is None:
        return None
    sets = [(s.name, s.family, b"".join([e.packed + bytes((e.prefix,)) for e in s.elements])) for s in ruleset.sets]
    return {"tables": ruleset.tables, "sets": sets}


def ruleset_from_json(raw: Any) -> rs.Ruleset | None:
    """The inverse. Raises DecodeError."""
    if raw is None:
        return None
    try:
        return rs.Ruleset(tuple(_table(each) for each in raw["tables"]), tuple(_set(each) for each in raw["sets"]))
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DecodeError(f"a recorded rule set is not well-formed: {error!r}") from error


def routing_from_json(raw: Any) -> rs.Routing:
    """What json.dumps wrote of a Routing. Raises DecodeError."""
    try:
        rules, routes, addresses, sysctls = raw
        return rs.Routing(
            tuple(rs.PolicyRule(*each) for each in rules),
            tuple(rs.LocalRoute(*each) for each in routes),
            tuple(rs.LocalAddress(bytes.fromhex(packed)) for (packed,) in addresses),
            tuple(rs.Sysctl(*each) for each in sysctls),
        )
    except (TypeError, ValueError) as error:
        raise DecodeError(f"a recorded routing is not well-formed: {error!r}") from error


def _table(raw: Any) -> rs.Table:
    family, name, chains = raw
    return rs.Table(family, name, tuple(_chain(each) for each in chains))


def _chain(raw: Any) -> rs.Chain:
    name, rules, base, head = raw
    where = None if base is None else rs.Base(*base)
    return rs.Chain(name, tuple(_rule(each) for each in rules), where, tuple(_rule(each) for each in head))


def _rule(raw: Any) -> rs.Rule:
    matches, statement, family, comment, path = raw
    return rs.Rule(tuple(_match(each) for each in matches), _statement(statement), family, comment, path)


def _match(raw: Any) -> rs.Match:
    kind = _MATCHES[raw[-1]]
    if kind is rs.AddressMatch:
        side, (packed, prefix), *rest = raw
        return rs.AddressMatch(side, rs.Cidr(bytes.fromhex(packed), prefix), *rest)
    if kind is rs.PortMatch:
        side, ranges, *rest = raw
        return rs.PortMatch(side, tuple(rs.PortRange(*each) for each in ranges), *rest)
    if kind is rs.StateMatch:
        return rs.StateMatch(tuple(raw[0]))
    match: rs.Match = kind(*raw)
    return match


def _statement(raw: Any) -> rs.Statement:
    kind = _STATEMENTS[raw[-1]]
    statement: rs.Statement = rs.Dnat(bytes.fromhex(raw[0]), raw[1]) if kind is rs.Dnat else kind(*raw)
    return statement


def _set(raw: Any) -> rs.NamedSet:
    name, family, packed = raw
    data, size = bytes.fromhex(packed), 5 if family == "ip" else 17
    parts = (data[at : at + size] for at in range(0, len(data), size))
    return rs.NamedSet(name, family, tuple(rs.Cidr(part[:-1], part[-1]) for part in parts))
