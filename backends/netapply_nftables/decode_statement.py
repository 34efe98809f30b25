"""The statement at the end of a dumped rule: exactly what `encode` writes, and DecodeError for anything else."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from netapply.errors import DecodeError
from netapply.ruleset import (
    Accept,
    Dnat,
    Drop,
    Family,
    Jump,
    Log,
    Redirect,
    RestoreMark,
    Return,
    SaveMark,
    SetConnmark,
    SetMark,
    SetZone,
    Statement,
    TProxy,
)
from netapply_nftables.encode import ALL_BITS
from netapply_nftables.terms import NFTA_BITWISE_OP, NFTA_CT_DIRECTION, data_of
from netapply_wire import expressions as nft
from netapply_wire.expressions import Expression
from netapply_wire.nfnetlink import NFPROTO, number, parse_attributes, text

_PACKET, _CONNECTION, _ZONE = ("meta", nft.NFT_META_MARK), ("ct", nft.NFT_CT_MARK), ("ct", nft.NFT_CT_ZONE)
_STORE_REGISTER = {"meta": 3, "ct": 4}  # NFTA_META_SREG, NFTA_CT_SREG


def host_number(data: bytes) -> int:
    """A number that the kernel keeps in host order: marks, ids, zones."""
    return int.from_bytes(data, sys.byteorder)


def decode_statement(expressions: Sequence[Expression], family: Family | None) -> Statement:
    """The statement of a rule of this family. Raises DecodeError."""
    names = tuple(item.name for item in expressions)
    first = expressions[0] if expressions else Expression("", {})
    match names:
        case ("immediate",):
            return _decode_verdict(first)
        case ("immediate", "redir") if expressions[1].number(3) == nft.NF_NAT_RANGE_PROTO_SPECIFIED:
            return Redirect(number(data_of(first, 2)))
        case ("immediate", "immediate", "nat"):
            return _decode_dnat(expressions)
        case ("immediate", "tproxy", *_, "immediate"):
            return _decode_tproxy(expressions, family)
        case ("immediate" | "meta" | "ct", *_, "meta" | "ct"):
            return _decode_marking(expressions)
        case ("log",) if 1 not in first.attributes and not first.number(6) and first.number(5, 4) == 4:
            return Log(text(first.attributes.get(2, b"")))  # NFTA_LOG_GROUP, _FLAGS, _LEVEL as the kernel fills them in
        case _:
            raise DecodeError(f"a statement that netapply does not make: {' '.join(names) or 'none'}")


def _decode_verdict(item: Expression) -> Statement:
    data = parse_attributes(parse_attributes(item.attributes.get(2, b"")).get(nft.NFTA_DATA_VERDICT, b""))
    code = int.from_bytes(data.get(nft.NFTA_VERDICT_CODE, b""), signed=True)
    if not data or item.number(1):
        raise DecodeError("a constant that nothing uses")
    if code == nft.NFT_JUMP:
        return Jump(text(data.get(nft.NFTA_VERDICT_CHAIN, b"")))
    plain: dict[int, Statement] = {nft.NFT_RETURN: Return(), nft.NF_ACCEPT: Accept(), nft.NF_DROP: Drop()}
    if code not in plain:
        raise DecodeError(f"verdict {code}")
    return plain[code]


def _decode_dnat(expressions: Sequence[Expression]) -> Dnat:
    address, port, nat = expressions
    packed = data_of(address, 2)
    registers = (address.number(1), port.number(1), nat.number(3), nat.number(4, 1), nat.number(5), nat.number(6, 2))
    wanted = NFPROTO["ip" if len(packed) == 4 else "ip6"]
    if registers != (1, 2, 1, 1, 2, 2) or (nat.number(1), nat.number(2)) != (nft.NFT_NAT_DNAT, wanted):
        raise DecodeError("a nat statement that netapply does not make")
    if nat.number(7) & ~(nft.NF_NAT_RANGE_PROTO_SPECIFIED | 1):  # 1: the address is specified too
        raise DecodeError("a dnat statement with flags")
    return Dnat(packed, number(data_of(port, 2)))


def _decode_tproxy(expressions: Sequence[Expression], family: Family | None) -> TProxy:
    port, assign, *marking, verdict = expressions
    if [item.name for item in marking][-1:] != ["meta"] or len(marking) < 2:
        raise DecodeError("a tproxy statement that sets no mark")
    mark = _decode_marking(marking)
    wanted = NFPROTO[family] if family else 0
    if assign.number(1) != wanted or 2 in assign.attributes or not isinstance(mark, SetMark):
        raise DecodeError("a tproxy statement that netapply does not make")
    if _decode_verdict(verdict) != Accept():
        raise DecodeError("a tproxy statement that does not accept")
    return TProxy(number(data_of(port, 2)), mark.value, mark.mask)


def _decode_marking(expressions: Sequence[Expression]) -> Statement:
    """What loads a value, perhaps changes bits of it, and stores it as a mark or zone."""
    load, *changes, store = expressions
    loaded, stored = (load.name, load.number(2)), (store.name, store.number(2))
    found: dict[object, Statement] = {}
    if store.number(_STORE_REGISTER[store.name]) != 1 or (store.name == "ct" and NFTA_CT_DIRECTION in store.attributes):
        pass  # a load, or the mark of one direction
    elif not changes and load.name == "immediate":
        value = host_number(data_of(load, 2))
        found = {_PACKET: SetMark(value), _CONNECTION: SetConnmark(value), _ZONE: SetZone(value)}
    elif not changes and (loaded, stored) in ((_PACKET, _CONNECTION), (_CONNECTION, _PACKET)):
        found = {_CONNECTION: SaveMark(), _PACKET: RestoreMark()}
    elif [item.name for item in changes] == ["bitwise"] and loaded == stored and not changes[0].number(NFTA_BITWISE_OP):
        value, mask = host_number(data_of(changes[0], 5)), ~host_number(data_of(changes[0], 4)) & ALL_BITS
        found = {_PACKET: SetMark(value, mask), _CONNECTION: SetConnmark(value, mask)}
    if stored not in found:
        raise DecodeError("a mark statement that netapply does not make")
    return found[stored]
