"""Rule sets as iptables-save(8) and ip6tables-save(8) print them.

The text is theirs, rule by rule and table by table, for tables that hold nothing but ours, without the lines of date
and version, and with counters at zero. Each family is a section of its own that the line `# iptables-restore` or
`# ip6tables-restore` begins, and that this program accepts. Sets come before them, after `# ipset restore`.
"""

from __future__ import annotations

import re
from typing import assert_never

from netapply.errors import UnsupportedError
from netapply.ruleset import (
    FAMILIES,
    Accept,
    AddressMatch,
    CgroupMatch,
    Chain,
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
    NamedSet,
    OwnerMatch,
    PortMatch,
    PortRange,
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
    SynMatch,
    Table,
    TProxy,
)
from netapply.sockets import socket
from netapply_wire.xtables import ALL_BITS, ALL_PORTS, STATE_BITS

#: The built-in chains of each table, in the order of their hooks.
BUILT_IN: dict[str, tuple[str, ...]] = {
    "raw": ("PREROUTING", "OUTPUT"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
}
RESTORE: dict[Family, str] = {"ip": "iptables-restore", "ip6": "ip6tables-restore"}

#: Names that every /etc/protocols has; others are printed as numbers.
PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 33: "dccp", 58: "ipv6-icmp", 132: "sctp", 136: "udplite"}

_PLAIN = re.compile(r"[-_0-9A-Za-z]+")
_ESCAPED = re.compile(r"([\"\\'])")
_STATES = ("invalid", "new", "related", "established", "untracked")  # the order of libxt_conntrack.c
_LIMIT_UNITS = (("day", 864000000), ("hour", 36000000), ("min", 600000), ("sec", 10000))


def save(ruleset: Ruleset, *, every_chain: bool) -> str:
    """The whole rule set: sets, then each family that has tables.

    `every_chain`: print all built-in chains of a table, as iptables-legacy has them, or only those that the rule set
    names, which are those that we create in iptables-nft. Raises UnsupportedError for an inet table.
    """
    sections = ["# ipset restore\n" + "".join(map(_set, ruleset.sets))] if ruleset.sets else []
    for family in FAMILIES:
        tables = [table for table in ruleset.tables if table.family == family]
        if tables:
            text = "".join(save_table(table, every_chain=every_chain) for table in tables)
            sections.append(f"# {RESTORE[family]}\n{text}")
    return "".join(sections)


def save_table(table: Table, *, every_chain: bool) -> str:
    """One table, from `*nat` to `COMMIT`."""
    family = family_of(table)
    chains = {chain.name: chain for chain in table.chains}
    built_in = [name for name in BUILT_IN[table.name] if every_chain or name in chains]
    own = [name for name in chains if name not in built_in]
    lines = [f"*{table.name}"]
    lines += [f":{name} ACCEPT [0:0]" for name in built_in]
    lines += [f":{name} - [0:0]" for name in own]
    for name in (*built_in, *own):
        chain = chains.get(name, Chain(name))
        lines += [f"-A {name}{save_rule(rule, family)}" for rule in chain.head + chain.rules]
    return "\n".join([*lines, "COMMIT", ""])


def family_of(table: Table) -> Family:
    """The family of a table of iptables. Raises UnsupportedError for an inet one."""
    if table.family == "inet":
        raise UnsupportedError("iptables has no inet tables")
    return table.family


def save_rule(rule: Rule, family: Family) -> str:
    """What follows `-A CHAIN`, beginning with a blank. iptables prints addresses before interfaces."""
    protocol = next((match.protocol for match in rule.matches if isinstance(match, ProtocolMatch)), 0)
    places = {"src": 0, "dst": 1, "in": 2, "out": 3}
    header = {4: f" -p {PROTOCOLS.get(protocol, protocol)}"} if protocol else {}
    words: list[str] = []
    for match in rule.matches:
        match match:
            case AddressMatch():
                header[places[match.side]] = f"{_not(match)} -{match.side[0]} {match.cidr}"
            case IfaceMatch() if match.name != "+" or match.negate:  # of any interface iptables says nothing
                header[places[match.direction]] = f"{_not(match)} -{match.direction[0]} {match.name}"
            case _:
                words.append(_match(match, protocol))
    comment = f" -m comment --comment {_quoted(rule.comment)}" if rule.comment else ""
    front = "".join(header[place] for place in sorted(header))
    return front + "".join(words) + comment + f" -j {_statement(rule.statement, family)}"


def _match(match: Match, protocol: int) -> str:
    match match:
        case IfaceMatch() | AddressMatch() | ProtocolMatch():
            return ""
        case PortMatch():
            return _ports(match, protocol)
        case SynMatch():
            return " -m tcp --tcp-flags FIN,SYN,RST,ACK SYN"
        case SetMatch():
            return f" -m set{_not(match)} --match-set {match.set} {match.side}"
        case OwnerMatch():
            return f" -m owner{_not(match)} --{match.id}-owner {PortRange(match.first, match.last)}"
        case CgroupMatch():
            return f" -m cgroup{_not(match)} --path {_quoted(match.path)}"
        case MarkMatch():
            return f" -m mark{_not(match)} --mark {_masked(match.value, match.mask)}"
        case ConnmarkMatch():
            return f" -m connmark{_not(match)} --mark {_masked(match.value, match.mask)}"
        case StateMatch():
            return " -m conntrack --ctstate " + ",".join(s.upper() for s in _STATES if s in match.states)
        case SocketMatch():
            return " -m socket --transparent" if match.transparent else " -m socket"
        case LimitMatch():
            burst = "" if match.burst == 5 else f" --limit-burst {match.burst}"
            return f" -m limit --limit {_rate(match.rate)}{burst}"
        case _:
            assert_never(match)


def _ports(match: PortMatch, protocol: int) -> str:
    option = match.side[0] + "port"
    text = ",".join(str(each).replace("-", ":") for each in match.ranges)
    if len(match.ranges) == 1 and match.ranges[0] != ALL_PORTS:
        return f" -m {PROTOCOLS[protocol]}{_not(match)} --{option} {text}"
    return f" -m multiport{_not(match)} --{option}s {text}"


def _statement(statement: Statement, family: Family) -> str:
    match statement:
        case Jump():
            return statement.chain
        case Return() | Accept() | Drop():
            return statement.kind.upper()
        case Redirect():
            return f"REDIRECT --to-ports {statement.port}"
        case Dnat(address=address):
            host = socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)
            return f"DNAT --to-destination {host if len(address) == 4 else f'[{host}]'}:{statement.port}"
        case TProxy():
            to = "0.0.0.0" if family == "ip" else "::"  # noqa: S104 - prints "any", binds nothing
            mark = f"0x{statement.mark:x}/0x{statement.mask:x}"
            return f"TPROXY --on-port {statement.port} --on-ip {to} --tproxy-mark {mark}"
        case SetMark():
            return f"MARK --set-xmark 0x{statement.value:x}/0x{statement.mask:x}"
        case SetConnmark():
            return f"CONNMARK --set-xmark 0x{statement.value:x}/0x{statement.mask:x}"
        case SaveMark() | RestoreMark():
            return f"CONNMARK --{statement.kind} --nfmask 0xffffffff --ctmask 0xffffffff"
        case SetZone():
            return f"CT --zone {statement.zone}" if statement.zone else "CT"
        case Log():
            return f"LOG --log-prefix {_quoted(statement.prefix)}" if statement.prefix else "LOG"
        case _:
            assert_never(statement)


def _not(
    match: AddressMatch | IfaceMatch | PortMatch | SetMatch | OwnerMatch | CgroupMatch | MarkMatch | ConnmarkMatch,
) -> str:
    return " !" if match.negate else ""


def _masked(value: int, mask: int) -> str:
    return f"0x{value:x}" if mask == ALL_BITS else f"0x{value:x}/0x{mask:x}"


def _rate(rate: int) -> str:
    """As print_rate of libxt_limit.c: the largest unit in which the interval is nearly whole."""
    interval = 600000 // rate
    shown = _LIMIT_UNITS[0]
    for unit in _LIMIT_UNITS[1:]:
        if interval > unit[1] or unit[1] // interval < unit[1] % interval:
            break
        shown = unit
    return f"{shown[1] // interval}/{shown[0]}"


def _quoted(text: str) -> str:
    """As xtables_save_string of libxtables."""
    if _PLAIN.fullmatch(text):
        return text
    escaped = _ESCAPED.sub(r"\\\1", text)
    return f'"{escaped}"'


def _set(named: NamedSet) -> str:
    family = "inet" if named.family == "ip" else "inet6"
    head = f"create {named.name} hash:net family {family} maxelem {max(65536, len(named.elements))}\n"
    return head + "".join(f"add {named.name} {cidr}\n" for cidr in named.elements)


assert set(_STATES) == set(STATE_BITS)
