"""A rule set as nft(8) 1.0.6 lists it, counters at zero: `nft -f` takes the text as it is.

Flags of TCP apart, which 1.0 lists in a form of its own that 0.9.8 does not take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import assert_never

from netapply.ruleset import (
    Accept,
    AddressMatch,
    Base,
    CgroupMatch,
    Chain,
    Cidr,
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
    TProxy,
)
from netapply.sockets import socket
from netapply_nftables.encode import ALL_BITS, STATE_BITS

_PROTOCOLS = {
    1: "icmp",
    6: "tcp",
    17: "udp",
    33: "dccp",
    50: "esp",
    51: "ah",
    58: "ipv6-icmp",
    132: "sctp",
    136: "udplite",
}
_NFPROTO: dict[Family, str] = {"ip": "ipv4", "ip6": "ipv6"}
_SET_TYPES: dict[Family, str] = {"ip": "ipv4_addr", "ip6": "ipv6_addr"}
_DEFAULT_BURST = 5
_NEXT_ROW = ",\n\t\t\t     "
#: Priorities that have names, each for these hooks (any, if none): `std_prios` of nft's rule.c.
_PRIORITIES: tuple[tuple[int, str, str], ...] = (
    (-300, "raw", ""),
    (-150, "mangle", ""),
    (-100, "dstnat", "prerouting"),
    (0, "filter", ""),
    (50, "security", ""),
    (100, "srcnat", "postrouting"),
)


def render(ruleset: Ruleset) -> str:
    """The text of `nft list table` for each table. Sets come first, as in a table that was made in one go."""
    return "".join(f"{line}\n" for line in _lines(ruleset))


def _lines(ruleset: Ruleset) -> Iterator[str]:
    for table in ruleset.tables:
        yield f"table {table.family} {table.name} {{"
        blocks = [*map(_set_lines, ruleset.sets), *map(_chain_lines, table.chains)]
        for index, block in enumerate(blocks):
            if index:
                yield ""
            yield from block
        yield "}"


def _set_lines(named: NamedSet) -> Iterator[str]:
    yield f"\tset {named.name} {{"
    yield f"\t\ttype {_SET_TYPES[named.family]}"
    yield "\t\tflags constant,interval"
    # nft prints two IPv4 elements a line, and one IPv6 element.
    per_line = 2 if named.family == "ip" else 1
    words = [_block(cidr) for cidr in named.elements]
    rows = [", ".join(words[start : start + per_line]) for start in range(0, len(words), per_line)]
    if rows:
        yield f"\t\telements = {{ {_NEXT_ROW.join(rows)} }}"
    yield "\t}"


def _chain_lines(chain: Chain) -> Iterator[str]:
    yield f"\tchain {chain.name} {{"
    if chain.base:
        yield f"\t\ttype {chain.base.type} hook {chain.base.hook} priority {_priority(chain.base)}; policy accept;"
    for rule in chain.head + chain.rules:
        yield from (f"\t\t{line}" for line in render_rule(rule))
    yield "\t}"


def _priority(base: Base) -> str:
    for number, name, hook in _PRIORITIES:
        offset = base.priority - number
        if -10 <= offset <= 10 and hook in ("", base.hook):
            return name if not offset else f"{name} {'+' if offset > 0 else '-'} {abs(offset)}"
    return str(base.priority)


def render_rule(rule: Rule) -> list[str]:
    """The rule's line, or two lines for a TProxy: the second drops what nobody listens for."""
    matches = list(_match_words(rule))
    comment = [f'comment "{rule.comment}"'] if rule.comment else []
    first = " ".join([*matches, "counter packets 0 bytes 0", _statement(rule.statement, rule.family), *comment])
    return [first, " ".join([*matches, "drop", *comment])] if isinstance(rule.statement, TProxy) else [first]


def _match_words(rule: Rule) -> Iterator[str]:
    # nft leaves out what another match implies: the family before an address or ICMP, the protocol before a port.
    protocol = ""
    guarded = rule.family is None or any(_implies_family(match, rule.family) for match in rule.matches)
    implied = any(isinstance(match, PortMatch | SynMatch) for match in rule.matches)
    for match in rule.matches:
        if not guarded and not isinstance(match, IfaceMatch):
            yield f"meta nfproto {_NFPROTO[rule.family]}" if rule.family else ""
            guarded = True
        if isinstance(match, ProtocolMatch):
            protocol = _PROTOCOLS.get(match.protocol, str(match.protocol))
            if implied:
                continue
        yield _match(match, rule.family, protocol)
    if not guarded and rule.family:
        yield f"meta nfproto {_NFPROTO[rule.family]}"


def _implies_family(match: Match, family: Family) -> bool:
    icmp = 1 if family == "ip" else 58
    return isinstance(match, AddressMatch | SetMatch) or (isinstance(match, ProtocolMatch) and match.protocol == icmp)


def _match(match: Match, family: Family | None, protocol: str) -> str:
    match match:
        case IfaceMatch():
            return _iface(match)
        case AddressMatch():
            return f"{family} {match.side[0]}addr {_not(match.negate)}{_block(match.cidr)}"
        case SetMatch():
            return f"{family} {match.side[0]}addr {_not(match.negate)}@{match.set}"
        case ProtocolMatch():
            return f"meta l4proto {protocol}"
        case PortMatch():
            ports = ", ".join(map(str, match.ranges))
            listed = f"{{ {ports} }}" if len(match.ranges) > 1 else ports
            return f"{protocol} {match.side[0]}port {_not(match.negate)}{listed}"
        case SynMatch():
            return "tcp flags & (fin | syn | rst | ack) == syn"
        case OwnerMatch():
            last = "" if match.first == match.last else f"-{match.last}"
            return f"meta sk{match.id} {_not(match.negate)}{match.first}{last}"
        case CgroupMatch():
            return f'socket cgroupv2 level {match.path.count("/") + 1} "{match.path}"'
        case MarkMatch():
            return f"meta mark {_masked(match)}"
        case ConnmarkMatch():
            return f"ct mark {_masked(match)}"
        case StateMatch():
            return f"ct state {','.join(state for state in STATE_BITS if state in match.states)}"
        case SocketMatch():
            return "socket transparent 1"
        case LimitMatch():
            burst = "" if match.burst == _DEFAULT_BURST else f" burst {match.burst} packets"
            return f"limit rate {match.rate}/minute{burst}"
        case _:
            assert_never(match)


def _not(negate: bool) -> str:  # noqa: FBT001 - a word of the grammar
    return "!= " if negate else ""


def _iface(match: IfaceMatch) -> str:
    if match.name == "+":
        return f'{match.direction[0]}ifname {_not(not match.negate)}""'
    name = f"{match.name[:-1]}*" if match.name.endswith("+") else match.name
    return f'{match.direction[0]}ifname {_not(match.negate)}"{name}"'


def _block(cidr: Cidr) -> str:
    length = len(cidr.packed)
    address = socket.inet_ntop(socket.AF_INET if length == 4 else socket.AF_INET6, cidr.packed)
    return address if cidr.prefix == length * 8 else f"{address}/{cidr.prefix}"


def _masked(match: MarkMatch | ConnmarkMatch) -> str:
    if match.mask == ALL_BITS:
        return f"{_not(match.negate)}0x{match.value:08x}"
    if match.mask == ALL_BITS << (32 - match.mask.bit_count()) & ALL_BITS:
        return f"{_not(match.negate)}0x{match.value:08x}/{match.mask.bit_count()}"  # leading bits, as of an address
    return f"& 0x{match.mask:08x} {'!=' if match.negate else '=='} 0x{match.value:08x}"


def _statement(statement: Statement, family: Family | None) -> str:
    match statement:
        case Jump():
            return f"jump {statement.chain}"
        case Return() | Accept() | Drop():
            return statement.kind
        case Redirect():
            return f"redirect to :{statement.port}"
        case Dnat():
            return _dnat(statement)
        case TProxy():
            to = f"tproxy {family} to" if family else "tproxy to"
            return f"{to} :{statement.port} meta mark set {_bits('meta mark', statement.mark, statement.mask)} accept"
        case SetMark():
            return f"meta mark set {_bits('meta mark', statement.value, statement.mask)}"
        case SaveMark():
            return "ct mark set meta mark"
        case RestoreMark():
            return "meta mark set ct mark"
        case SetConnmark():
            return f"ct mark set {_bits('ct mark', statement.value, statement.mask)}"
        case SetZone():
            return f"ct zone set {statement.zone}"
        case Log():
            return f'log prefix "{statement.prefix}"'
        case _:
            assert_never(statement)


def _dnat(statement: Dnat) -> str:
    if len(statement.address) == 4:
        return f"dnat ip to {socket.inet_ntop(socket.AF_INET, statement.address)}:{statement.port}"
    return f"dnat ip6 to [{socket.inet_ntop(socket.AF_INET6, statement.address)}]:{statement.port}"


def _bits(old: str, value: int, mask: int) -> str:
    """(old & ~mask) ^ value as nft writes it: bits that are cleared and set are or-ed, others flipped."""
    if mask == ALL_BITS:
        return f"0x{value:08x}"
    ored, flipped = value & mask, value & ~mask
    kept = ~mask & ALL_BITS | ored
    words: Sequence[str] = (
        f" & 0x{kept:08x}" if kept != ALL_BITS else "",
        f" ^ 0x{flipped:08x}" if flipped else "",
        f" | 0x{ored:08x}" if ored else "",
    )
    return old + "".join(words)
