"""Whether a kernel takes our rules: batches that it validates and throws away, one feature at a time where needed."""

from __future__ import annotations

import errno

from netapply.backend import Probe
from netapply.errors import KernelError
from netapply.kernel import Kernel
from netapply.ruleset import (
    AddressMatch,
    Base,
    CgroupMatch,
    Chain,
    ChainType,
    Cidr,
    ConnmarkMatch,
    Family,
    Hook,
    IfaceMatch,
    LimitMatch,
    Log,
    Match,
    NamedSet,
    OwnerMatch,
    PortMatch,
    PortRange,
    ProtocolMatch,
    Redirect,
    Return,
    Rule,
    Ruleset,
    SaveMark,
    SetMatch,
    SetZone,
    SocketMatch,
    StateMatch,
    Statement,
    Table,
    TProxy,
)
from netapply_nftables.changes import create_table
from netapply_wire.nfnetlink import NFT_MSG_GETTABLE, check_batch, dump, text

_SET = NamedSet("netapply-4-probe", "ip", (Cidr(b"\n\0\0\0", 8),))
_TCP = ProtocolMatch(6)
_PORTS = PortMatch("dst", (PortRange(53, 53), PortRange(80, 90)))
#: Tables of these names in ip and ip6 may be iptables-nft's as well.
_IPTABLES = {"raw", "mangle", "nat", "filter", "security"}
#: Errors of a kernel that has no nf_tables at all.
_ABSENT = {errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL}


def _one_rule(
    kind: ChainType, hook: Hook, statement: Statement, *matches: Match, family: Family | None = None, comment: str = ""
) -> Ruleset:
    chain = Chain("probe", (Rule(matches, statement, family, comment),), Base(kind, hook, 0))
    sets = (_SET,) if any(isinstance(match, SetMatch) for match in matches) else ()
    return Ruleset((Table("inet", "netapply-probe", (chain,)),), sets)


_LOOPBACK = (IfaceMatch("out", "lo"), AddressMatch("dst", Cidr(b"\x7f\0\0\1", 32), negate=True))
#: What every plan needs.
_BASIC = _one_rule("nat", "output", Redirect(15001), *_LOOPBACK, _TCP, _PORTS, family="ip")
#: Plan words, a rule that needs the feature, and what adds it to a kernel.
_FEATURES: tuple[tuple[str, Ruleset, str], ...] = (
    (
        "ip6",
        _one_rule("nat", "output", Redirect(15001), _TCP, family="ip6"),
        "nft_redir with IPv6 (CONFIG_NF_NAT, IPV6)",
    ),
    ("owners", _one_rule("nat", "output", Return(), OwnerMatch("uid", 0, 0)), "nft_meta"),
    ("sets", _one_rule("nat", "output", Return(), SetMatch("dst", _SET.name), family="ip"), "nft_set_rbtree"),
    ("cgroups", _one_rule("nat", "output", Return(), CgroupMatch("a", 1)), "nft_socket, Linux 5.13"),
    ("log", _one_rule("filter", "output", Log("probe"), LimitMatch(1)), "nft_log, nft_limit, nf_log_syslog"),
    ("comments", _one_rule("nat", "output", Return(), comment="probe"), "Linux 3.15"),
    ("invalid", _one_rule("filter", "prerouting", Return(), StateMatch(("invalid",))), "nft_ct, nf_conntrack"),
    ("dns.zones", _one_rule("filter", "output", SetZone(1)), "nft_ct (CONFIG_NF_CONNTRACK_ZONES)"),
    ("marks", _one_rule("route", "output", SaveMark(), ConnmarkMatch(1)), "nft_ct (CONFIG_NF_CONNTRACK_MARK)"),
    (
        "tproxy",
        _one_rule("filter", "prerouting", TProxy(15006, 1), _TCP, SocketMatch()),
        "nft_tproxy, nft_socket, Linux 5.10",
    ),
)


def probe(kernel: Kernel) -> Probe:
    """Whether the native dialect works here, and which features the kernel lacks. Changes nothing."""
    try:
        tables = dump(kernel, NFT_MSG_GETTABLE, 0)
        check_batch(kernel, create_table(_BASIC))
    except KernelError as failure:
        return _unusable(failure)
    in_use = any(m.family not in (2, 10) or text(m.attributes[1]) not in _IPTABLES for m in tables)
    missing = {word: remedy for word, ruleset, remedy in _FEATURES if not _works(kernel, ruleset)}
    reason = f"nf_tables takes our rules, but for {', '.join(missing)}" if missing else "nf_tables takes all our rules"
    return Probe("usable", reason, missing, in_use)


def _unusable(failure: KernelError) -> Probe:
    if failure.errno in (errno.EPERM, errno.EACCES):
        return Probe("denied", f"nf_tables needs CAP_NET_ADMIN in the namespace ({failure})")
    if failure.errno in _ABSENT:
        return Probe("unsupported", f"the kernel has no nf_tables, or not enough of it ({failure})")
    if failure.errno in (errno.EBUSY, errno.EAGAIN):
        return Probe("busy", f"nf_tables is busy ({failure})")
    return Probe("unsupported", str(failure))


def _works(kernel: Kernel, ruleset: Ruleset) -> bool:
    try:
        check_batch(kernel, create_table(ruleset))
    except KernelError:
        return False
    return True
