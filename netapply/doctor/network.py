"""Checks of the namespace: which dialects work, what others left, and what of its settings is in the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from netapply.backend import BUILT_IN, OURS, Owned, find_backend
from netapply.doctor.finding import Check, Finding, Sight
from netapply.errors import KernelError
from netapply.nsfs import is_initial
from netapply.plan import Mark, TProxyRouting
from netapply.policy import PROTOCOL, read_policy
from netapply.rtnetlink import local_addresses
from netapply.values import NamedTuple

#: What brings a dialect to a kernel that lacks it.
MODULES: Mapping[str, str] = {
    "nftables": "nf_tables nft_chain_nat nft_redir nft_ct",
    "iptables-nft": "nf_tables nft_compat xt_tcpudp xt_owner xt_REDIRECT",
    "iptables-legacy": "ip_tables iptable_nat ip6_tables ip6table_nat xt_owner xt_REDIRECT",
}
_NO_CHAIN = ("<nobody's>",)
#: Other programs' rules, and what removes them.
PEERS: Mapping[str, tuple[tuple[Owned, ...], str]] = {
    "Istio": (
        (
            Owned(("ISTIO_",), "istio-proxy-nat"),
            Owned(_NO_CHAIN, "istio-proxy-mangle"),
            Owned(_NO_CHAIN, "istio-proxy-raw"),
            Owned(_NO_CHAIN, "istio-ambient-nat"),
        ),
        "netapply istio-clean-iptables",
    ),
    "Linkerd": ((Owned(("PROXY_INIT_",), ""),), "iptables-save | grep -v PROXY_INIT_ | iptables-restore"),
    "Kuma": ((Owned(("KUMA_MESH_", "MESH_"), ""),), "kumactl uninstall transparent-proxy"),
    "Consul": ((Owned(("CONSUL_",), "consul_tproxy"),), "nft delete table inet consul_tproxy, or a new namespace"),
}


_ALL = 0xFFFFFFFF


class MarkUser(NamedTuple):
    """A program that marks packets, and in which bits."""

    name: str
    mask: int


#: From their documentation; the masks are their defaults.
MARK_USERS = (
    MarkUser("kube-proxy", 0xC000),
    MarkUser("Calico", 0xFFFF0000),
    MarkUser("Tailscale", 0xFF0000),
    MarkUser("Cilium", 0x0F00),
)


def dialects(sight: Sight) -> Iterator[Finding]:
    """Whether each dialect works here, and which one would be taken."""
    found = sight.capture.detect()
    for each in found.candidates:
        name = f"dialect {each.backend}"
        modules = f"modprobe -a {MODULES[each.backend]}; for good: put them into /etc/modules-load.d/netapply.conf"
        match each.status:
            case "usable":
                without = "; ".join(f"no {word}: {fix}" for word, fix in each.missing)
                yield Finding(name, "notice" if without else "ok", without or each.reason)
            case "unsupported":
                yield Finding(name, "notice" if found.chosen else "trouble", each.reason, modules)
            case "denied":
                yield Finding(name, "unseen", each.reason, "run as root, or with CAP_NET_ADMIN in the namespace")
            case "busy":
                yield Finding(name, "notice", each.reason, "look again in a moment")
    if found.chosen:
        yield Finding("backend auto", "ok", f"{found.chosen}: {found.reason}")
    elif not any(each.status == "denied" for each in found.candidates):
        yield Finding("backend auto", "trouble", found.reason, "see the dialects above")


def residue(sight: Sight) -> Iterator[Finding]:
    """Rules of ours in two dialects, and rules of another mesh."""
    candidates = sight.capture.detect().candidates
    ours = [each.backend for each in candidates if each.ours]
    denied = [each.backend for each in candidates if each.status == "denied"]
    if denied:
        step = "run as root, or with CAP_NET_ADMIN in the namespace"
        yield Finding("our rules", "unseen", f"we may not look in {', '.join(denied)}", step)
        return
    if len(ours) > 1:
        evidence = f"rules of ours stand in {' and '.join(ours)}: each connection is captured twice"
        yield Finding("our rules", "trouble", evidence, "netapply clean, then apply")
    else:
        yield Finding("our rules", "ok", f"in {ours[0]}" if ours else "none")
    both = any(_stands(sight, name, OURS) for name in BUILT_IN)  # in a layout of Istio's, ours are like its own
    for peer, (owned, fix) in PEERS.items():
        where = [name for name in BUILT_IN if any(_stands(sight, name, each) for each in owned)]
        if where:
            evidence = f"rules like {peer}'s stand in {', '.join(where)}{', beside ours' if both else ''}"
            yield Finding(f"rules of {peer}", "trouble" if both else "notice", evidence, fix)


def _stands(sight: Sight, backend: str, owned: Owned) -> bool:
    try:
        return find_backend(backend).detect(sight.capture.namespace, owned)
    except KernelError:
        return False  # `dialects` says so


def marks(sight: Sight) -> Iterator[Finding]:
    """Policy rules of others that look at a mark of ours, and bits that others are known for."""
    plan = sight.plan
    wanted = {"inbound.tproxy.mark": plan.inbound.tproxy.mark if plan else TProxyRouting().mark}
    if plan and plan.proxy.mark:
        wanted["proxy.mark"] = plan.proxy.mark
    if plan and plan.inbound.mode != "tproxy":
        del wanted["inbound.tproxy.mark"]
    rules = read_policy(sight.capture.namespace, (), lambda _rule, _by: False).rules
    foreign = [rule for rule, by in rules.items() if by != PROTOCOL]
    clash = False
    for path, mark in wanted.items():
        for rule in foreign:
            if not rule.mask & ~mark.mask and mark.value & rule.mask == rule.mark:
                clash = True
                evidence = f"policy rule {rule.priority} (fwmark {rule.mark:#x}/{rule.mask:#x}, table {rule.table})"
                yield Finding("marks", "trouble", f"{evidence} takes packets of {path} too", _other_mark(path))
            elif rule.mask != _ALL and mark.mask & rule.mask:
                clash = True
                whose = next((user.name for user in MARK_USERS if user.mask & rule.mask), "somebody")
                evidence = (
                    f"{path} {_shown(mark)} overwrites bits of policy rule {rule.priority} ({rule.mask:#x}, {whose})"
                )
                yield Finding("marks", "notice", evidence, _other_mark(path))
    if not clash:
        yield Finding("marks", "ok", f"{len(foreign)} policy rules of others look at marks, none at ours")


def _other_mark(path: str) -> str:
    return f"set {path} to bits that nobody else uses, with a mask, like 0x539/0xfff"


def _shown(mark: Mark) -> str:
    return f"{mark.value:#x}/{mark.mask:#x}"


def reverse_path(sight: Sight) -> Iterator[Finding]:
    """Settings that drop what TPROXY delivers.

    Where the reverse path is looked up by the packet's mark, that of TPROXY leads to `local`; and a source that is
    local is refused, unless accept_local allows it and no filter is strict (net/ipv4/fib_frontend.c:
    __fib_validate_source).
    """
    tproxy = sight.plan is not None and sight.plan.inbound.mode == "tproxy"
    devices = [name for name in _devices(sight) if name != "lo"]
    strict = [name for name in devices if max(_values(sight, name, "rp_filter")) == 1]
    dropping = [
        name
        for name in devices
        if any(_values(sight, name, "src_valid_mark"))
        and (name in strict or not any(_values(sight, name, "accept_local")))
    ]
    seen = f"strict on {', '.join(strict)}" if strict else "not strict anywhere"
    if dropping and tproxy:
        evidence = f"src_valid_mark on {', '.join(dropping)}: packets with TPROXY's mark are dropped ({seen})"
        fix = "; ".join(f"sysctl -w net.ipv4.conf.{name}.src_valid_mark=0" for name in ("all", *dropping))
        yield Finding("rp_filter", "trouble", f"{evidence}; wg-quick sets it", fix)
    elif strict:
        evidence = f"{seen}: what comes in by another device than answers take is dropped"
        yield Finding("rp_filter", "ok", evidence)
    else:
        yield Finding("rp_filter", "ok", seen)


def route_localnet(sight: Sight) -> Iterator[Finding]:
    """A setting that opens what should be closed."""
    wide = [name for name in ("all", *_devices(sight)) if name != "lo" and _conf(sight, name, "route_localnet") == "1"]
    if wide:
        evidence = f"route_localnet on {', '.join(wide)}: neighbours reach what listens on 127.0.0.1"
        off = "; ".join(f"sysctl -w net.ipv4.conf.{name}.route_localnet=0" for name in wide)
        yield Finding("route_localnet", "trouble" if "all" in wide else "notice", evidence, off)
    else:
        yield Finding("route_localnet", "ok", "off")


def _devices(sight: Sight) -> list[str]:
    """What /proc/net/dev lists: two lines of heads, then a name and a colon."""
    lines = sight.capture.namespace.read_file("net/dev").splitlines()[2:]
    return [line.partition(":")[0].strip() for line in lines]


def _values(sight: Sight, device: str, name: str) -> tuple[int, int]:
    """Of all devices and of this one: the kernel takes the larger, or either (linux/inetdevice.h: IN_DEV_MAXCONF)."""
    return int(_conf(sight, "all", name) or 0), int(_conf(sight, device, name) or 0)


def _conf(sight: Sight, device: str, name: str) -> str:
    return sight.sysctl(f"net/ipv4/conf/{device}/{name}")


def ipv6(sight: Sight) -> Iterator[Finding]:
    """Whether IPv6 is there, and whether the plan knows of it."""
    off = sight.sysctl("net/ipv6/conf/all/disable_ipv6")
    addresses = [each for each in local_addresses(sight.capture.namespace) if len(each) == 16]
    wide = [each for each in addresses if each[0] & 0xE0 == 0x20 or each[0] & 0xFE == 0xFC]  # global, and fc00::/7
    if off == "":
        there = "the kernel has no IPv6"
    elif off == "1":
        there = "IPv6 is disabled"
    else:
        there = f"IPv6 is there, with {len(wide)} addresses that others reach"
    if sight.plan is None:
        yield Finding("IPv6", "ok", there)
    elif sight.plan.ipv6 == "skip" and wide:
        yield Finding("IPv6", "trouble", f"{there}, and the plan skips it: it bypasses the proxy", "set ipv6: capture")
    elif sight.plan.ipv6 == "capture" and off != "0":
        yield Finding("IPv6", "notice", f"{there}, and the plan captures it", "set ipv6: skip, or enable IPv6")
    else:
        yield Finding("IPv6", "ok", f"{there}; the plan says {sight.plan.ipv6}")


def connections(sight: Sight) -> Iterator[Finding]:
    """Room for connections: NAT needs an entry for each."""
    most, now = sight.sysctl("net/netfilter/nf_conntrack_max"), sight.sysctl("net/netfilter/nf_conntrack_count")
    if not (most.isdigit() and now.isdigit()):
        yield Finding("connection tracking", "ok", "not in use yet")
        return
    full = int(now) * 10 >= int(most) * 9
    fix = f"sysctl -w net.netfilter.nf_conntrack_max={2 * int(most)}" if full else ""
    yield Finding("connection tracking", "trouble" if full else "ok", f"{now} of {most} entries", fix)


def namespace(sight: Sight) -> Iterator[Finding]:
    """Which namespace this is."""
    seen = sight.capture.namespace
    identity = seen.identity
    what = f"inode {identity.inode}"
    if seen.visit(lambda: is_initial(identity)):
        what += ", the machine's own: apply wants --host"
    yield Finding("namespace", "ok", what)


CHECKS: tuple[Check, ...] = (
    namespace,
    dialects,
    residue,
    marks,
    reverse_path,
    route_localnet,
    ipv6,
    connections,
)
