"""iptables-nft: what libnftables can tell of our rules against what it should, rule by rule."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, assert_never

from netapply.backend import Backend, Owned
from netapply.errors import UnsupportedError
from netapply.kernel import Kernel
from netapply.reader.library import Blocks, list_commands, read_both
from netapply.ruleset import (
    FAMILIES,
    Accept,
    AddressMatch,
    Base,
    CgroupMatch,
    ConnmarkMatch,
    Dnat,
    Drop,
    Family,
    IfaceMatch,
    Jump,
    LimitMatch,
    Log,
    MarkMatch,
    Match,
    OwnerMatch,
    PortMatch,
    ProtocolMatch,
    Redirect,
    RestoreMark,
    Return,
    Rule,
    SaveMark,
    SetConnmark,
    SetMark,
    SetMatch,
    SetZone,
    SocketMatch,
    StateMatch,
    Statement,
    SynMatch,
    TProxy,
)

_TABLES = ("raw", "mangle", "nat", "filter")
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_PORT_PROTOCOLS = {6: "tcp", 17: "udp"}
_EVERY_BIT = 0xFFFFFFFF
_TCP_FLAGS = {"fin": 1, "syn": 2, "rst": 4, "ack": 16}


def compare_rules(backend: Backend, namespace: Kernel, owned: Owned) -> tuple[Blocks, Blocks]:
    """Rules that stand straight in built-in chains are left out: libnftables does not tell whose they are."""
    commands = [f"list ruleset {family}" for family in FAMILIES]
    ruleset, listed = read_both(
        backend, namespace, owned, lambda: list_commands(namespace, *commands, as_json=True, numeric=True)
    )
    theirs: dict[str, list[str]] = {}
    for text in listed:
        theirs.update(_described(text, owned.prefixes))
    ours: dict[str, list[str]] = {}
    for table in ruleset.tables:
        family: Family = "ip6" if table.family == "ip6" else "ip"
        for chain in table.chains:
            where = f"{family} {table.name} {chain.name}"
            there = theirs.get(where, [])[1:]
            rules = chain.head + chain.rules
            if chain.base:
                rules = tuple(rule for rule in rules if rule.statement.kind == "jump")
            if rules or not chain.base:
                ours[where] = [_head(chain.base), *expected_lines(rules, family, there)]
    return ours, theirs


def _head(base: Base | None) -> str:
    return f"type {base.type} hook {base.hook} priority {base.priority}" if base else "chain"


def expected_lines(rules: Sequence[Rule], family: Family, there: Sequence[str] = ()) -> list[str]:
    """What libnftables can tell of these rules of an ip or ip6 table, a line each. Pure.

    Of an xt extension it knows the name alone. `there` are the lines that it gave: iptables from 1.8.8 on, when it
    saves and restores our rules, writes ports and marks as native expressions, and a rule may be spelled in either way.
    """
    lines: list[str] = []
    for rule, seen in zip_longest(rules, there[: len(rules)]):
        restored = _rule_line(rule, family, restored=True)
        lines.append(restored if restored == seen else _rule_line(rule, family, restored=False))
    return lines


def _rule_line(rule: Rule, family: Family, *, restored: bool) -> str:
    protocol = next((match.protocol for match in rule.matches if match.kind == "protocol"), 0)
    words = [_match_word(match, family, protocol, restored=restored) for match in rule.matches]
    if rule.comment:
        words.append("match comment")
    return _joined([*words, "counter"], _statement_word(rule.statement))


def _joined(words: Sequence[str], statement: str) -> str:
    """In one order: iptables has another one for the header's fields, and our own decoder has looked at the rest."""
    return ", ".join([*sorted(words), statement])


def _match_word(match: Match, family: Family, protocol: int, *, restored: bool) -> str:
    match match:
        case IfaceMatch():
            name = f"{match.name[:-1]}*" if match.name.endswith("+") else match.name
            return f"{match.direction[0]}ifname {_operator(match.negate)} {name}"
        case AddressMatch():
            full = f"/{len(match.cidr.packed) * 8}"
            return f"{family} {match.side[0]}addr {_operator(match.negate)} {str(match.cidr).removesuffix(full)}"
        case ProtocolMatch():
            return f"l4proto == {match.protocol}"
        case PortMatch():
            name = _PORT_PROTOCOLS.get(protocol, "")
            ports = ", ".join(map(str, match.ranges))
            if len(match.ranges) != 1 or ports == "0-65535":
                return "match multiport"
            return f"{name} {match.side[0]}port {_operator(match.negate)} {ports}" if restored else f"match {name}"
        case SynMatch():
            return "tcp flags & 23 == 2" if restored else "match tcp"
        case MarkMatch() if restored:
            masked = f" & {match.mask}" if match.mask != _EVERY_BIT else ""
            return f"mark{masked} {_operator(match.negate)} {match.value}"
        case SetMatch() | OwnerMatch() | CgroupMatch() | MarkMatch() | ConnmarkMatch() | SocketMatch():
            return f"match {match.kind}"
        case StateMatch():
            return "match conntrack"
        case LimitMatch():
            return f"limit {match.rate}/minute burst {match.burst}"
        case _:
            assert_never(match)


def _operator(negate: bool) -> str:  # noqa: FBT001 - a word of the grammar
    return "!=" if negate else "=="


def _statement_word(statement: Statement) -> str:
    match statement:
        case Jump():
            return f"jump {statement.chain}"
        case Return() | Accept() | Drop():
            return statement.kind
        case Redirect() | Dnat() | TProxy() | Log():
            return f"target {statement.kind.upper()}"
        case SetMark():
            return "target MARK"
        case SaveMark() | RestoreMark() | SetConnmark():
            return "target CONNMARK"
        case SetZone():
            return "target CT"
        case _:
            assert_never(statement)


def _described(text: str, prefixes: tuple[str, ...]) -> dict[str, list[str]]:
    """Our chains in nft's JSON of a family, and our rules in built-in ones, a line each; see libnftables-json(5)."""
    try:
        items: list[Any] = json.loads(text)["nftables"]
    except ValueError as error:
        raise UnsupportedError(
            "libnftables printed no JSON; it may be built without", next_step="install libnftables1 of Debian"
        ) from error
    built_in: dict[str, str] = {}
    found: dict[str, list[str]] = {}
    for item in items:
        chain, rule = item.get("chain"), item.get("rule")
        if chain and chain["table"] in _TABLES:
            where = f"{chain['family']} {chain['table']} {chain['name']}"
            if "hook" in chain:
                built_in[where] = f"type {chain['type']} hook {chain['hook']} priority {chain['prio']}"
            elif chain["name"].startswith(prefixes):
                found[where] = ["chain"]
        elif rule and rule["table"] in _TABLES:
            where = f"{rule['family']} {rule['table']} {rule['chain']}"
            if where in built_in and _target(rule["expr"]).startswith(prefixes):
                found.setdefault(where, [built_in[where]])
            elif where in built_in or where not in found:
                continue
            found[where].append(_described_rule(rule["expr"]))
    return found


def _target(expressions: list[Any]) -> str:
    """The chain that a rule jumps or goes to, or ""."""
    jumps = (each.get("jump") or each.get("goto") for each in expressions)
    return next((jump["target"] for jump in jumps if jump), "")


def _described_rule(expressions: list[Any]) -> str:
    words = [_word(each) for each in expressions]
    for number, name in _PORT_PROTOCOLS.items():
        # nft leaves out a protocol that a native port match implies.
        if any(word.startswith(f"{name} ") for word in words) and f"l4proto == {number}" not in words:
            words.insert(0, f"l4proto == {number}")
    return _joined(words[:-1], words[-1]) if words else "nothing"


def _word(expression: Any) -> str:
    match expression:
        case {"match": {"op": operator, "left": left, "right": {"prefix": {"addr": int(value), "len": length}}}}:
            # The leading bits of a mark, spelled as those of an address.
            return f"{_value(left)} & {_EVERY_BIT << (32 - length) & _EVERY_BIT} {operator} {value}"
        case {"match": {"op": operator, "left": {"&": [{"payload": {"field": "flags"}}, mask]}, "right": right}}:
            return f"tcp flags & {_flags(mask)} {operator} {_flags(right)}"
        case {"match": {"op": operator, "left": left, "right": right}}:
            return f"{_value(left)} {operator} {_value(right)}"
        case {"xt": {"type": kind, "name": name}}:
            return f"{kind} {name}"
        case {"limit": {"rate": rate, "burst": burst, "per": per, **more}} if per in _SECONDS and not more:
            return f"limit {rate * 60 / _SECONDS[per]:.12g}/minute burst {burst}"
        case {"jump": {"target": chain}}:
            return f"jump {chain}"
        case {"counter": _}:
            return "counter"
        case {"return": None} | {"accept": None} | {"drop": None}:
            return str(next(iter(expression)))
        case _:
            return json.dumps(expression)


def _flags(value: Any) -> int:
    """TCP flags by their names, as a number or as a list, which nft since 1.0.7 says is joined by "or"."""
    match value:
        case {"|": values} | [*values]:
            return sum(map(_flags, values))
        case str():
            return _TCP_FLAGS.get(value, 0)
        case _:
            return int(value)


def _value(value: Any) -> str:
    match value:
        case {"meta": {"key": key}}:
            return str(key)
        case {"payload": {"protocol": protocol, "field": field}}:
            return f"{protocol} {field}"
        case {"&": [left, int(mask)]}:
            return f"{_value(left)} & {mask}"
        case {"prefix": {"addr": address, "len": length}}:
            return f"{address}/{length}"
        case {"range": [int(first), int(last)]}:
            return f"{first}-{last}"
        case str() | int():
            return str(value)
        case _:
            return json.dumps(value)
