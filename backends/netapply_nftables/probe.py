"""Whether a kernel takes our rules: a batch with every feature that it validates and throws away."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import chain

from netapply.backend import Probe
from netapply.errors import KernelError
from netapply.kernel import Kernel
from netapply.ruleset import (
    AddressMatch,
    Base,
    CgroupMatch,
    Chain,
    Cidr,
    ConnmarkMatch,
    Drop,
    IfaceMatch,
    LimitMatch,
    Log,
    NamedSet,
    OwnerMatch,
    PortMatch,
    PortRange,
    ProtocolMatch,
    Redirect,
    Return,
    Rule,
    Ruleset,
    SetConnmark,
    SetMark,
    SetMatch,
    SetZone,
    SocketMatch,
    StateMatch,
    Table,
    TProxy,
)
from netapply.values import NamedTuple
from netapply_nftables.changes import create_table
from netapply_wire.nfnetlink import (
    NFT_MSG_GETTABLE,
    Operation,
    check_batch,
    dump,
    encode_batch,
    parse_message,
    text,
)

_SET = NamedSet("netapply-4-probe", "ip", (Cidr(b"\n\0\0\0", 8),))
_TCP = ProtocolMatch(6)
_PORTS = PortMatch("dst", (PortRange(53, 53), PortRange(80, 90)))
_LOOPBACK = (IfaceMatch("out", "lo"), AddressMatch("dst", Cidr(b"\x7f\0\0\1", 32), negate=True))
_NAT_OUTPUT, _OUTPUT = Base("nat", "output", -100), Base("filter", "output", 0)
_PREROUTING, _REROUTE = Base("filter", "prerouting", -150), Base("route", "output", -150)
#: Tables of these names in ip and ip6 may be iptables-nft's as well.
_IPTABLES = {"raw", "mangle", "nat", "filter", "security"}
#: Errors of a kernel that has no nf_tables at all.
_ABSENT = {errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.EINVAL}


class _Feature(NamedTuple):
    """Something that a plan may need, as `netapply.features.needs` calls it: rules with it, and what brings it."""

    word: str
    remedy: str
    rules: tuple[tuple[Base, Rule], ...]
    sets: tuple[NamedSet, ...] = ()


#: What every plan needs.
_BASIC = _Feature(
    "",
    "",
    (
        (_NAT_OUTPUT, Rule((OwnerMatch("uid", 0, 0),), Return())),
        (_NAT_OUTPUT, Rule((*_LOOPBACK, _TCP, _PORTS), Redirect(15001), "ip")),
    ),
)
#: Each that a plan may do without, or that not all plans have.
FEATURES = (
    _Feature("ip6", "nft_redir with CONFIG_IPV6", ((_NAT_OUTPUT, Rule((_TCP,), Redirect(15001), "ip6")),)),
    _Feature("sets", "nf_tables_set", ((_NAT_OUTPUT, Rule((SetMatch("dst", _SET.name),), Return(), "ip")),), (_SET,)),
    _Feature("cgroups", "nft_socket, Linux 5.13", ((_NAT_OUTPUT, Rule((CgroupMatch("a", 1),), Return())),)),
    _Feature("log", "nft_log, nft_limit, nf_log_syslog", ((_OUTPUT, Rule((LimitMatch(1),), Log("probe"))),)),
    _Feature("comments", "Linux 3.15", ((_NAT_OUTPUT, Rule((), Return(), comment="probe")),)),
    _Feature("invalid", "nft_ct, nf_conntrack", ((_PREROUTING, Rule((StateMatch(("invalid",)),), Drop())),)),
    _Feature("dns.zones", "nft_ct (CONFIG_NF_CONNTRACK_ZONES)", ((_OUTPUT, Rule((), SetZone(1))),)),
    _Feature(
        "tproxy",
        "nft_tproxy, nft_socket, nft_ct (CONFIG_NF_CONNTRACK_MARK), Linux 5.10",
        (
            (_PREROUTING, Rule((_TCP, StateMatch(("new",))), TProxy(15006, 1))),
            (_PREROUTING, Rule((_TCP, SocketMatch()), SetConnmark(1))),
            (_REROUTE, Rule((_TCP, ConnmarkMatch(1)), SetMark(1))),
        ),
    ),
)


def probe(kernel: Kernel) -> Probe:
    """Whether the native dialect works here, and which features the kernel lacks. Changes nothing.

    A look at the tables tells whether we may and whether there is nf_tables. Then one batch has everything, as each
    one that is thrown away costs an RCU grace period (some 10 ms); only what it names as refused costs another.
    """
    present: tuple[_Feature, ...] = FEATURES
    missing: dict[str, str] = {}
    try:
        tables = [parse_message(each) for each in dump(kernel, NFT_MSG_GETTABLE, 0)]
        while refused := _refused(kernel, present):
            missing[refused.word] = refused.remedy
            present = tuple(feature for feature in present if feature is not refused)
    except KernelError as failure:
        return _unusable(failure)
    in_use = any(m.family not in (2, 10) or text(m.attributes[1]) not in _IPTABLES for m in tables)
    reason = f"nf_tables takes our rules, but for {', '.join(missing)}" if missing else "nf_tables takes all our rules"
    return Probe("usable", reason, missing, in_use)


def _refused(kernel: Kernel, features: tuple[_Feature, ...]) -> _Feature | None:
    """The first of these that the kernel refuses, if any. Raises KernelError when it refuses what all plans need."""
    try:
        check_batch(kernel, encode_batch([*_operations(_BASIC), *chain.from_iterable(map(_labelled, features))]))
    except KernelError as failure:
        for feature in features:
            if feature.word == failure.operation:
                return feature
        raise
    return None


def _labelled(feature: _Feature) -> Iterator[Operation]:
    """The feature's operations, each labelled with its word: the label says which one of a batch failed."""
    return (operation._replace(label=feature.word) for operation in _operations(feature))


def _operations(feature: _Feature) -> list[Operation]:
    """The feature's rules, each in a chain of its own. Anonymous sets are numbered afresh: only _BASIC has one."""
    chains = (Chain(f"{feature.word}-{i}", (rule,), base) for i, (base, rule) in enumerate(feature.rules))
    return create_table(Ruleset((Table("inet", "netapply-probe", tuple(chains)),), feature.sets))


def _unusable(failure: KernelError) -> Probe:
    if failure.errno in (errno.EPERM, errno.EACCES):
        return Probe("denied", f"nf_tables needs CAP_NET_ADMIN in the namespace ({failure})")
    if failure.errno in _ABSENT:
        return Probe("unsupported", f"the kernel has no nf_tables, or not enough of it ({failure})")
    if failure.errno in (errno.EBUSY, errno.EAGAIN):
        return Probe("busy", f"nf_tables is busy ({failure})")
    return Probe("unsupported", str(failure))
