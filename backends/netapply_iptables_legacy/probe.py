"""What the kernel can do for iptables-legacy, and whether anything of ours is there. Creates and changes nothing."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Literal

from netapply.backend import Probe
from netapply.errors import KernelError
from netapply.ruleset import FAMILIES
from netapply.values import NamedTuple
from netapply_iptables_legacy.sockopt import (
    ORDER,
    SO_GET_REVISION_MATCH,
    SO_GET_REVISION_TARGET,
    has_extension,
    read_info,
    table_names,
)

if TYPE_CHECKING:
    from netapply.backend import Owned
    from netapply.kernel import Kernel
    from netapply.ruleset import Family
    from netapply_iptables_legacy.sockopt import Place


class _Needs(NamedTuple):
    """An extension that a feature of a plan needs, and the module that has it."""

    feature: str
    kind: Literal["match", "target"]
    name: str
    revision: int
    module: str


#: Without these there is no capture at all.
_ALWAYS = (
    _Needs("", "match", "tcp", 0, "x_tables"),
    _Needs("", "match", "multiport", 1, "xt_multiport"),
    _Needs("", "match", "owner", 1, "xt_owner"),
    _Needs("", "target", "REDIRECT", 0, "xt_REDIRECT"),
)
_FEATURES = (
    _Needs("comments", "match", "comment", 0, "xt_comment"),
    _Needs("log", "target", "LOG", 0, "xt_LOG"),
    _Needs("log", "match", "limit", 0, "xt_limit"),
    _Needs("dns.zones", "target", "CT", 2, "xt_CT"),
    _Needs("invalid", "match", "conntrack", 3, "xt_conntrack"),
    _Needs("cgroups", "match", "cgroup", 2, "xt_cgroup"),
    _Needs("sets", "match", "set", 4, "xt_set"),
    _Needs("tproxy", "target", "TPROXY", 1, "xt_TPROXY"),
    _Needs("tproxy", "match", "socket", 3, "xt_socket"),
    _Needs("tproxy", "target", "CONNMARK", 2, "xt_connmark"),
    _Needs("tproxy", "target", "MARK", 2, "xt_mark"),
)


def probe(kernel: Kernel) -> Probe:
    """Whether this dialect works here. Which tables the kernel has shows only by creating them, so it is not asked."""
    try:
        lacking = [needs for needs in _ALWAYS if not _has(kernel, "ip", needs)]
        if lacking:
            names = ", ".join(f"{needs.kind} {needs.name} ({needs.module})" for needs in lacking)
            return Probe("unsupported", f"the kernel has no {names}")
        missing = {needs.feature: f"modprobe {needs.module}" for needs in _FEATURES if not _has(kernel, "ip", needs)}
        missing.update(_without_ip6(kernel))
        return Probe("usable", "the kernel has ip_tables", missing, in_use=_in_use(kernel))
    except KernelError as error:
        return _unusable(error.errno)


def _has(kernel: Kernel, family: Family, needs: _Needs) -> bool:
    option = SO_GET_REVISION_MATCH if needs.kind == "match" else SO_GET_REVISION_TARGET
    return has_extension(kernel, family, option, needs.name, needs.revision)


def _without_ip6(kernel: Kernel) -> dict[str, str]:
    try:
        return {} if _has(kernel, "ip6", _ALWAYS[0]) else {"ip6": "modprobe ip6_tables"}
    except KernelError as error:
        if error.errno not in (errno.ENOPROTOOPT, errno.EAFNOSUPPORT):
            raise
        return {"ip6": "modprobe ip6_tables"}


def _unusable(number: int) -> Probe:
    if number in (errno.EPERM, errno.EACCES):
        return Probe("denied", "ip_tables needs CAP_NET_ADMIN")
    if number == errno.ENOPROTOOPT:
        return Probe("unsupported", "the kernel has no ip_tables: modprobe ip_tables")
    return Probe("unsupported", f"ip_tables: {errno.errorcode.get(number, number)}")


def _in_use(kernel: Kernel) -> bool:
    """Whether a table holds a rule or a chain, whoever's: more entries than policies and the end."""
    infos = (read_info(kernel, family, name) for family, name in _tables(kernel))
    return any(info.entries > info.valid_hooks.bit_count() + 1 for info in infos)


def detect(kernel: Kernel, owned: Owned) -> bool:
    """Whether anything of ours stands in a table. Looks for our names in the bytes before it takes them apart."""
    if not _tables(kernel):
        return False
    from netapply_iptables_legacy.snapshot import LegacySnapshot, read_tables

    last = LegacySnapshot.last(kernel)
    seen = read_tables(kernel, last.seen if last else {})
    if not any(each.table.mentions(owned.prefixes) for each in seen.values()):
        return False
    parts = LegacySnapshot.read(kernel, owned, seen).content.parts.values()
    return any(part.ours or part.head or part.rules for table in parts for part in table)


def _tables(kernel: Kernel) -> list[Place]:
    """The tables that there are, of those that we write into."""
    return [(family, name) for family in FAMILIES for name in table_names(kernel, family) if name in ORDER]
