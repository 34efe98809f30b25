"""Whether the kernel can do what this dialect needs.

nf_tables would validate a batch and throw it away, but then waits for an RCU grace period (8 ms on Linux 6.18).
Asking nft_compat for each extension, as iptables-nft does itself, takes microseconds and is as good.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Literal

from netapply.backend import Probe
from netapply.errors import KernelError
from netapply.kernel import NETLINK_NETFILTER, Kernel
from netapply.ruleset import Family
from netapply.values import NamedTuple
from netapply_iptables_nft.tables import read_tables
from netapply_wire.nfnetlink import NFPROTO, NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR, string, u32

# linux/netfilter/nfnetlink.h, nf_tables_compat.h
NFNL_SUBSYS_NFT_COMPAT, NFNL_MSG_COMPAT_GET = 11, 0
NFTA_COMPAT_NAME, NFTA_COMPAT_REV, NFTA_COMPAT_TYPE = 1, 2, 3
KIND: dict[Literal["match", "target"], int] = {"match": 0, "target": 1}

_HEADER = struct.Struct("=IHHIIBBH")  # nlmsghdr and nfgenmsg
_ANSWER = struct.Struct("=IHHIIi")  # nlmsghdr and nlmsgerr's error


class Needed(NamedTuple):
    """An extension that a feature of a plan needs ("" for all plans), and the module that has it."""

    feature: str
    kind: Literal["match", "target"]
    name: str
    revision: int
    module: str
    family: Family = "ip"


NEEDED = (
    Needed("", "match", "tcp", 0, "x_tables"),
    Needed("", "match", "udp", 0, "x_tables"),
    Needed("", "match", "multiport", 1, "xt_multiport"),
    Needed("", "match", "owner", 1, "xt_owner"),
    Needed("", "target", "REDIRECT", 0, "xt_REDIRECT"),
    Needed("ip6", "match", "tcp", 0, "ip6_tables", "ip6"),
    Needed("ip6", "target", "REDIRECT", 0, "xt_REDIRECT", "ip6"),
    Needed("comments", "match", "comment", 0, "xt_comment"),
    Needed("log", "target", "LOG", 0, "xt_LOG"),
    Needed("dns.zones", "target", "CT", 2, "xt_CT"),
    Needed("invalid", "match", "conntrack", 3, "xt_conntrack"),
    Needed("cgroups", "match", "cgroup", 2, "xt_cgroup"),
    Needed("sets", "match", "set", 4, "xt_set"),
    Needed("tproxy", "target", "TPROXY", 1, "xt_TPROXY"),
    Needed("tproxy", "match", "socket", 3, "xt_socket"),
    Needed("tproxy", "match", "mark", 1, "xt_mark"),
    Needed("tproxy", "match", "connmark", 1, "xt_connmark"),
    Needed("tproxy", "target", "MARK", 2, "xt_mark"),
    Needed("tproxy", "target", "CONNMARK", 2, "xt_connmark"),
)


def probe_kernel(kernel: Kernel) -> Probe:
    """Whether iptables-nft's tables can be written here. Changes nothing; the kernel may load modules."""
    try:
        in_use = any(chain.rules for table in read_tables(kernel).values() for chain in table.chains.values())
        absent = tuple(missing_extensions(kernel, NEEDED))
    except KernelError as failure:
        return _unusable(failure)
    if required := [needed for needed in absent if not needed.feature]:
        names = ", ".join(f"{needed.kind} {needed.name} ({needed.module})" for needed in required)
        return Probe("unsupported", f"the kernel has no {names}", in_use=in_use)
    missing = {needed.feature: f"modprobe {needed.module}" for needed in absent}
    lacks = f", but for {', '.join(missing)}" if missing else ""
    return Probe("usable", f"nf_tables takes the rules of iptables-nft{lacks}", missing, in_use)


def _unusable(failure: KernelError) -> Probe:
    if failure.errno in (errno.EPERM, errno.EACCES):
        return Probe("denied", f"nf_tables needs CAP_NET_ADMIN in the namespace ({failure})")
    return Probe("unsupported", f"the kernel has no nf_tables with nft_compat ({failure})")


def missing_extensions(kernel: Kernel, needed: Sequence[Needed]) -> Iterator[Needed]:
    """Those that the kernel has not. Raises KernelError where it cannot be asked."""
    try:
        answers = kernel.netlink(NETLINK_NETFILTER, _questions(tuple(needed)))
    except OSError as failure:
        raise KernelError("ask for xt extensions", failure.errno or errno.EIO) from failure
    for answer in answers:
        offset = 0
        while offset + _ANSWER.size <= len(answer):
            size, kind, _, sequence, _, code = _ANSWER.unpack_from(answer, offset)
            if kind == NLMSG_ERROR and -code == errno.ENOENT:
                yield needed[sequence - 1]
            elif kind == NLMSG_ERROR and code:
                raise KernelError("ask for xt extensions", -code)
            offset += max(size + 3 & ~3, 16)


@cache
def _questions(needed: tuple[Needed, ...]) -> bytes:
    """One NFNL_MSG_COMPAT_GET for each, numbered from 1: the kernel answers them all at once."""
    kind, flags = NFNL_SUBSYS_NFT_COMPAT << 8 | NFNL_MSG_COMPAT_GET, NLM_F_REQUEST | NLM_F_ACK
    messages: list[bytes] = []
    for sequence, each in enumerate(needed, 1):
        about = string(NFTA_COMPAT_NAME, each.name) + u32(NFTA_COMPAT_REV, each.revision)
        body = about + u32(NFTA_COMPAT_TYPE, KIND[each.kind])
        messages.append(_HEADER.pack(20 + len(body), kind, flags, sequence, 0, NFPROTO[each.family], 0, 0) + body)
    return b"".join(messages)
