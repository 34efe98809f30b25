"""Checks of who else programs netfilter, policy rules and routes on this machine, and what that does to ours."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from netapply.doctor.finding import Check, Finding, Sight
from netapply.values import NamedTuple

#: Where systemd-networkd reads its settings, the later ones winning (networkd.conf(5)).
_NETWORKD = ("/usr/lib/systemd/networkd.conf", "/etc/systemd/networkd.conf")
_NETWORKD_PARTS = ("/usr/lib/systemd/networkd.conf.d", "/run/systemd/networkd.conf.d", "/etc/systemd/networkd.conf.d")
_FOREIGN = ("ManageForeignRoutingPolicyRules", "ManageForeignRoutes")


class Firewall(NamedTuple):
    """A program that programs netfilter: how its process is called, and what it does to rules of others."""

    process: str
    habit: str
    fix: str = "let netapply agent hold the plan: it heals within milliseconds"


FIREWALLS = (
    Firewall("dockerd", "a start rewrites its chains in iptables, and sets the policy of FORWARD to DROP"),
    Firewall("kube-proxy", "it writes its chains into nat and filter again and again, and leaves others alone"),
    Firewall("calico-node", "it puts its own jumps first again whenever they are not"),
    Firewall(
        "cilium-agent", "it may answer connections by eBPF, before netfilter sees them", "see its socketLB option"
    ),
    Firewall("fail2ban-server", "it inserts at the head of built-in chains, and leaves others alone"),
    Firewall("libvirtd", "it writes its chains again when a network starts, and leaves others alone"),
    Firewall("tailscaled", "it puts its own jumps first, and leaves others alone"),
)
_HEALED = FIREWALLS[0].fix


class Restorer(NamedTuple):
    """A unit that loads rules from a file when it starts and is reloaded."""

    unit: str
    files: tuple[str, ...]
    #: What in the file says that others' rules go; "" where its program always does that.
    word: str
    habit: str
    fix: str


_OWN_TABLES = "flush its own tables there alone: table inet filter; flush table inet filter"
RESTORERS = (
    Restorer(
        "nftables.service",
        ("/etc/nftables.conf", "/etc/sysconfig/nftables.conf"),
        r"^\s*flush\s+ruleset",
        "has flush ruleset: a start or reload takes all rules away",
        _OWN_TABLES,
    ),
    *(
        Restorer(
            unit,
            files,
            "",
            "is restored whole at a start or reload: what is not in it goes from these tables",
            _HEALED,
        )
        for unit, files in (
            ("netfilter-persistent.service", ("/etc/iptables/rules.v4", "/etc/iptables/rules.v6")),
            ("iptables.service", ("/etc/sysconfig/iptables",)),
            ("ip6tables.service", ("/etc/sysconfig/ip6tables",)),
        )
    ),
)


def networkd(sight: Sight) -> Iterator[Finding]:
    """Whether systemd-networkd removes policy rules and routes that it did not make."""
    if not any(name == "systemd-network" for _, name in sight.processes()):
        yield Finding("systemd-networkd", "ok", "does not run")
        return
    settings: dict[str, str] = dict.fromkeys(_FOREIGN, "")
    for path in _networkd_files(sight):
        for line in sight.read(path).splitlines():
            key, equals, value = line.partition("=")
            if equals and key.strip() in settings:
                settings[key.strip()] = value.strip().lower()
    takes = [name for name, value in settings.items() if value not in ("no", "false", "off", "0")]
    if takes:
        evidence = (
            f"it removes what it calls foreign ({', '.join(takes)}=yes); ours bear protocol kernel, which it spares"
        )
        lines = "\\n".join(f"{name}=no" for name in _FOREIGN)
        fix = f"printf '[Network]\\n{lines}\\n' > /etc/systemd/networkd.conf.d/foreign.conf, and restart it"
        yield Finding("systemd-networkd", "notice", evidence, fix)
    else:
        yield Finding("systemd-networkd", "ok", "leaves foreign rules and routes alone")


def _networkd_files(sight: Sight) -> Iterator[str]:
    yield from _NETWORKD
    parts: dict[str, str] = {}
    for directory in _NETWORKD_PARTS:
        try:
            names = os.listdir(sight.path(directory))
        except OSError:
            continue
        parts.update((name, f"{directory}/{name}") for name in names if name.endswith(".conf"))
    yield from (parts[name] for name in sorted(parts))


def firewalls(sight: Sight) -> Iterator[Finding]:
    """Who else programs netfilter here, and what that does to rules of others."""
    running = {name: pid for pid, name in sight.processes()}
    found = [*_firewalld(sight, running.get("firewalld", 0)), *_restorers(sight)]
    for firewall in FIREWALLS:
        pid = running.get(firewall.process[:15])  # the kernel keeps 15 letters of a name
        if pid is not None:
            evidence = f"{firewall.process} ({pid}): {firewall.habit}"
            found.append(Finding("other firewalls", "notice", evidence, firewall.fix))
    if re.search(r"^ENABLED=yes", sight.read("/etc/ufw/ufw.conf"), re.MULTILINE):
        found.append(
            Finding("other firewalls", "notice", "ufw is enabled: a reload restores its own tables whole", _HEALED)
        )
    yield from found or [Finding("other firewalls", "ok", "none seen")]


def _firewalld(sight: Sight, pid: int) -> Iterator[Finding]:
    """Its reload runs -F and -X on every table that its backend has (firewall/core: build_flush_rules)."""
    if not pid:
        return
    backend = re.search(r"^FirewallBackend=(\w+)", sight.read("/etc/firewalld/firewalld.conf"), re.MULTILINE)
    if backend and backend[1] == "iptables":
        habit = "FirewallBackend=iptables: a reload flushes every chain of every iptables table"
        fix = "set FirewallBackend=nftables in /etc/firewalld/firewalld.conf, or let netapply agent hold the plan"
    else:
        habit = (
            "FirewallBackend=nftables: a reload flushes its own table, and iptables tables where it has direct rules"
        )
        fix = _HEALED
    yield Finding("other firewalls", "notice", f"firewalld ({pid}), {habit}", fix)


def _restorers(sight: Sight) -> Iterator[Finding]:
    enabled = _enabled(sight)
    for each in RESTORERS:
        for path in each.files if each.unit in enabled else ():
            text = sight.read(path)
            if text and re.search(each.word, text, re.MULTILINE):
                evidence = f"{each.unit} is enabled, and {path} {each.habit}"
                yield Finding("other firewalls", "notice", evidence, each.fix)


def _enabled(sight: Sight) -> frozenset[str]:
    """The units that some target wants."""
    units = "/etc/systemd/system"
    try:
        wants = [name for name in os.listdir(sight.path(units)) if name.endswith(".wants")]
        return frozenset(unit for each in wants for unit in os.listdir(sight.path(f"{units}/{each}")))
    except OSError:
        return frozenset()


CHECKS: tuple[Check, ...] = (networkd, firewalls)
