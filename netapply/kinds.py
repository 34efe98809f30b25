"""The kinds of single values and of lists that the plan's fields have. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from netapply import spelling
from netapply.fields import Either, Json, Kind, Named, Scalar, Values
from netapply.spans import collapse, merge

if TYPE_CHECKING:
    from netapply.plan import Cgroup


# --- single values -------------------------------------------------------------------------------------------


def _text(pattern: str, example: str) -> Json:
    return {"type": "string", "pattern": f"^(?:{pattern})$", "examples": [example]}


def _number(low: int, high: int) -> Json:
    return {"anyOf": [{"type": "integer", "minimum": low, "maximum": high}, {"type": "string", "pattern": "^[0-9]+$"}]}


def _number_or(low: int, high: int, pattern: str, example: str) -> Json:
    return {"anyOf": [{"type": "integer", "minimum": low, "maximum": high}, _text(pattern, example)]}


def _read_rate(value: object) -> int:
    return spelling.read_number(value, 1, 600, "the rate is 1 to 600 a minute")


def _write_cgroup(cgroup: Cgroup) -> str:
    return cgroup.path


def _read_table(value: object) -> int:
    accepted = "write a routing table from 1 to 4294967295 other than 253 to 255, which are the system's"
    table = spelling.read_number(value, 1, 0xFFFFFFFF, accepted)
    if 253 <= table <= 255:  # RT_TABLE_DEFAULT, MAIN and LOCAL of linux/rtnetlink.h
        raise spelling.RefusedError(accepted)
    return table


_IDS = rf"{spelling.NUMBER}(-{spelling.NUMBER})?|{spelling.NAME}"
_ADDRESS = r"[0-9]{1,3}(\.[0-9]{1,3}){3}|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*"

PORT = Scalar(spelling.read_port, int, _number(1, 65535))
PORT_RANGE = Scalar(
    spelling.read_port_range,
    spelling.write_range,
    _number_or(1, 65535, rf"{spelling.PORT}(-{spelling.PORT})?", "8000-8100"),
)
_ID_FRAGMENT = _number_or(0, spelling.ID_MAX, rf"{spelling.NUMBER}|{spelling.NAME}", "envoy")
_ID_RANGE_FRAGMENT = _number_or(0, spelling.ID_MAX, _IDS, "2000-2999")
UID = Named(spelling.read_uid, int, _ID_FRAGMENT)
GID = Named(spelling.read_gid, int, _ID_FRAGMENT)
UID_RANGE = Named(spelling.read_uid_range, spelling.write_range, _ID_RANGE_FRAGMENT)
GID_RANGE = Named(spelling.read_gid_range, spelling.write_range, _ID_RANGE_FRAGMENT)
CGROUP = Named(spelling.read_cgroup, _write_cgroup, _text(spelling.CGROUP, "system.slice/envoy.service"))
MARK = Scalar(
    spelling.read_mark,
    spelling.write_mark,
    _number_or(1, 0xFFFFFFFF, rf"{spelling.MARK_NUMBER}(/{spelling.MARK_NUMBER})?", "0x539/0xfff"),
)
TABLE = Scalar(_read_table, int, _number(1, 0xFFFFFFFF))
CIDR = Scalar(spelling.read_cidr, spelling.write_cidr, _text(rf"({_ADDRESS})(/[0-9]{{1,3}})?", "10.0.0.0/8"))
LOOPBACK = Scalar(spelling.read_loopback, spelling.write_cidr, CIDR.fragment)
ADDRESS = Scalar(spelling.read_address, spelling.write_address, _text(_ADDRESS, "10.0.0.53"))
INTERFACE = Scalar(spelling.read_interface, str, _text(spelling.INTERFACE, "eth0"))
LOG_PREFIX = Scalar(spelling.read_log_prefix, str, _text(spelling.LOG_PREFIX, "netapply: "))
# xt_limit counts in 1/10000 s, so that only rates up to some 700 a minute are read back as they were written.
RATE = Scalar(_read_rate, int, _number(1, 600))

# --- lists and alternatives ----------------------------------------------------------------------------------


def each_once(found: list[Any]) -> tuple[Any, ...]:
    """In the order written."""
    return tuple(dict.fromkeys(found))


def sorted_once(found: list[Any]) -> tuple[Any, ...]:
    """Sorted."""
    return tuple(sorted(set(found)))


def by_family(found: list[bytes]) -> tuple[bytes, ...]:
    """Packed addresses, IPv4 first."""
    return tuple(sorted(set(found), key=lambda packed: (len(packed), packed)))


def all_or(kind: Kind, what: str) -> Either:
    """`"*"`, or a value of `kind`."""
    return Either({"*": "*"}, kind, f'write "*" for all, or {what}')


def none_or(kind: Kind, accepted: str) -> Either:
    """Null or `none` for None (TOML has no null), or a value of `kind`."""
    return Either({None: None, "none": None}, kind, accepted)


PORTS = Values(PORT_RANGE, merge)
CIDRS = Values(CIDR, collapse)
