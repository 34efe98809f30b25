"""The independent reader: libnftables, in this process, through the binding `nftables`.

It shows everybody's rules, and `verify --deep` holds what it reads of ours against what our own decoder reads. Both
are imported and loaded by the functions here alone; where they are missing, nothing else suffers.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Any, Protocol, TypeAlias, TypeVar, assert_never, cast

from netapply.backend import OURS, Backend, find_backend
from netapply.errors import ConflictError, KernelError, NetapplyError, UnsupportedError
from netapply.kernel import NETLINK_NETFILTER, Kernel
from netapply.lookups import cgroup_id
from netapply.results import Change
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
    Ruleset,
    SaveMark,
    SetConnmark,
    SetMark,
    SetMatch,
    SetZone,
    SocketMatch,
    StateMatch,
    Statement,
    TProxy,
)

T = TypeVar("T")

#: Where something stands, and what is there, one thing a line.
Blocks: TypeAlias = Mapping[str, Sequence[str]]

LIBRARY = "libnftables.so.1"
_TRIES = 5


class _Context(Protocol):
    """`nftables.Nftables`, as far as it is used here. It is bound to the namespace that it is made in."""

    def set_json_output(self, val: bool, /) -> object: ...  # noqa: FBT001 - the binding's

    def set_numeric_proto_output(self, val: bool, /) -> object: ...  # noqa: FBT001 - the binding's

    def cmd(self, cmdline: bytes, /) -> tuple[int, bytes, bytes]: ...


def list_ruleset(namespace: Kernel, *, as_json: bool) -> str:
    """Everybody's rules, as `nft list ruleset` prints them, or `nft -j list ruleset`.

    Raises UnsupportedError where the binding or the library cannot be used, NetapplyError where it fails.
    """
    return _list(namespace, "list ruleset", as_json=as_json)[0]


def deep_changes(namespace: Kernel, backend_name: str) -> tuple[Change, ...]:
    """Where libnftables reads something else of ours than we do; () where both agree.

    "add" is what our decoder reads and libnftables does not, "remove" what only libnftables reads. Raises
    UnsupportedError where it cannot be used, or cannot see that dialect; ConflictError where the rules keep changing.
    """
    compare = _COMPARED.get(backend_name)
    if compare is None:
        raise UnsupportedError(
            f"libnftables cannot see the rules of {backend_name}",
            next_step="verify without --deep reads them back from the kernel; "
            f"{backend_name}-save, if it is installed, is a reader that is not ours",
        )
    return tuple(_changes(*compare(find_backend(backend_name), namespace)))


# --- libnftables ---------------------------------------------------------------------------------------------


def _context() -> _Context:
    """A new context in the namespace of this thread. Raises UnsupportedError, KernelError."""
    from ctypes import CDLL
    from importlib import import_module

    try:
        # The library ends the process where it gets no netlink socket.
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER).close()
    except OSError as error:
        raise KernelError("open a netlink socket", error.errno or 0) from error
    try:
        CDLL(LIBRARY)  # where this fails, the binding would leave half an object that complains on stderr
        return cast("_Context", import_module("nftables").Nftables())
    except ImportError as error:
        lacking = f"the Python module `nftables` is missing ({error})"
    except (OSError, AttributeError) as error:  # AttributeError: a symbol that the binding is too new for
        lacking = f"{LIBRARY} cannot be used ({error})"
    raise UnsupportedError(
        f"{lacking}; only --deep and --all need it",
        next_step="install pip-nftables (PyPI) and libnftables1 (Debian), 1.0.6 or later",
    )


def _list(namespace: Kernel, *commands: str, as_json: bool, numeric: bool = False) -> list[str]:
    """What each command prints, in the namespace."""

    def work() -> list[str]:
        context = _context()
        context.set_json_output(as_json)
        context.set_numeric_proto_output(numeric)
        return [_run(context, command) for command in commands]

    return namespace.inside(work)


def _run(context: _Context, command: str) -> str:
    status, output, error = context.cmd(command.encode())
    if status:
        raise NetapplyError(f"libnftables: {command}: {error.decode(errors='replace').strip() or f'status {status}'}")
    return output.decode(errors="replace")


def _read_both(backend: Backend, namespace: Kernel, look: Callable[[], T]) -> tuple[Ruleset, T]:
    """Ours as the backend decodes it, and as `look` sees it, at a time when nobody changes it."""
    before = backend.read(namespace).ruleset
    for _ in range(_TRIES):
        seen = look()
        after = backend.read(namespace).ruleset
        if after == before:
            return after or Ruleset(), seen
        before = after
    raise ConflictError("somebody keeps changing our rules while they are read", next_step="verify again")


def _changes(ours: Blocks, theirs: Blocks) -> Iterator[Change]:
    for where in {**ours, **theirs}:
        old, new = theirs.get(where, ()), ours.get(where, ())
        if list(old) == list(new):
            continue
        for operation, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            if operation != "equal":
                yield from (Change("remove", f"libnftables: {where}", line) for line in old[a:b])
                yield from (Change("add", f"libnftables: {where}", line) for line in new[c:d])


# --- native nftables: line by line ---------------------------------------------------------------------------

_COUNTER = re.compile(r"\bcounter packets \d+ bytes \d+")
_DEFAULT_BURST = re.compile(r"(limit rate \d+/\w+) burst 5 packets")
_UNNAMED_PROTOCOL = re.compile(r"\bl4proto (6|17)\b")
_CGROUP = re.compile(r'(socket cgroupv2 level \d+ (?:!= )?)"([^"]*)"')


def _compare_text(backend: Backend, namespace: Kernel) -> tuple[Blocks, Blocks]:
    ruleset, text = _read_both(backend, namespace, lambda: _list(namespace, "list ruleset inet", as_json=False)[0])
    cgroups = {match.path: match.id for *_, rule in ruleset.walk() for match in rule.matches if match.kind == "cgroup"}
    ours = _blocks(backend.render(ruleset), lambda path: cgroups.get(path, 0))
    # nft looks for the directory with this number below here, whatever is mounted there.
    return ours, _blocks(text, lambda path: cgroup_id(path, "/sys/fs/cgroup"))


def _blocks(text: str, cgroup: Callable[[str], int]) -> Blocks:
    """Chains and sets of our table, without what packets, or versions and settings of nft, change in the text."""
    table = f"inet {OURS.table}"
    found: dict[str, list[str]] = {}
    where = ""
    for line in text.splitlines():
        words = line.split()
        if words in ([], ["}"]) and line != "}":
            continue
        if not line.startswith("\t"):
            where = table if line.startswith(f"table {table} {{") else ""
        if not where or not line.startswith("\t"):
            continue
        if line.endswith(" {") and not line.startswith("\t\t"):
            block = line[1:-2]
            where = f"{table} {block[6:]}" if block.startswith("chain ") else block
        lines = found.setdefault(where, [])
        lines += _elements(line.strip()) if where.startswith("set ") else [_line(line.strip(), cgroup)]
    return found


def _elements(line: str) -> list[str]:
    """How many stand on a line is a matter of taste: here, one."""
    return line.removeprefix("elements = { ").removesuffix(" }").removesuffix(",").split(", ")


def _line(line: str, cgroup: Callable[[str], int]) -> str:
    line = _COUNTER.sub("counter", line)
    line = _DEFAULT_BURST.sub(r"\1", line)  # printed since nft 1.0.7
    # Without /etc/protocols nft has no names, and with an unknown cgroup no path.
    line = _UNNAMED_PROTOCOL.sub(lambda found: "l4proto " + {"6": "tcp", "17": "udp"}[found[1]], line)
    return _CGROUP.sub(lambda found: f"{found[1]}{cgroup(found[2])}", line)


# --- iptables-nft: rule by rule ------------------------------------------------------------------------------

_TABLES = ("raw", "mangle", "nat", "filter")
_SECONDS = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_PORT_PROTOCOLS = {6: "tcp", 17: "udp"}
_EVERY_BIT = 0xFFFFFFFF


def _compare_rules(backend: Backend, namespace: Kernel) -> tuple[Blocks, Blocks]:
    commands = [f"list ruleset {family}" for family in FAMILIES]
    ruleset, listed = _read_both(backend, namespace, lambda: _list(namespace, *commands, as_json=True, numeric=True))
    theirs: dict[str, list[str]] = {}
    for text in listed:
        theirs.update(_described(text))
    ours: dict[str, list[str]] = {}
    for table in ruleset.tables:
        family: Family = "ip6" if table.family == "ip6" else "ip"
        for chain in table.chains:
            where = f"{family} {table.name} {chain.name}"
            there = theirs.get(where, [])[1:]
            ours[where] = [_head(chain.base), *expected_lines(chain.head + chain.rules, family, there)]
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


def _described(text: str) -> dict[str, list[str]]:
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
            elif chain["name"].startswith(OURS.prefix):
                found[where] = ["chain"]
        elif rule and rule["table"] in _TABLES:
            where = f"{rule['family']} {rule['table']} {rule['chain']}"
            if where in built_in and _target(rule["expr"]).startswith(OURS.prefix):
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


_COMPARED: Mapping[str, Callable[[Backend, Kernel], tuple[Blocks, Blocks]]] = {
    "nftables": _compare_text,
    "iptables-nft": _compare_rules,
}
