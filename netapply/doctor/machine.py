"""Checks of the machine: who else writes rules, what takes ours away, and what the agent stands on."""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator

from netapply.doctor.finding import Check, Finding, Sight
from netapply.journal import DEFAULT_DIRECTORY, Journal
from netapply.values import NamedTuple

_NET_ADMIN, _SYS_ADMIN = 12, 21  # linux/capability.h
_LOCK = "/run/xtables.lock"
_TMPFS = frozenset(("tmpfs", "ramfs"))
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
    Firewall("firewalld", "a reload flushes iptables tables, with FlushAllOnReload all of them"),
    Firewall("dockerd", "a start rewrites its chains in iptables, and sets the policy of FORWARD to DROP"),
    Firewall("kube-proxy", "it writes its chains into nat and filter again and again, and leaves others alone"),
    Firewall("calico-node", "it puts its own jumps first again whenever they are not"),
    Firewall(
        "cilium-agent", "it may answer connections by eBPF, before netfilter sees them", "see its socketLB option"
    ),
    Firewall("ufw", "a reload restores its own tables whole"),
    Firewall("fail2ban-server", "it inserts at the head of built-in chains, and leaves others alone"),
)


def privileges(_: Sight) -> Iterator[Finding]:
    """Whether this process may do what apply does: its own, whatever root the other looks have."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        found = re.search(r"^CapEff:\s*([0-9a-f]+)", file.read(), re.MULTILINE)
    effective = int(found[1], 16) if found else 0
    names = {"CAP_NET_ADMIN": _NET_ADMIN, "CAP_SYS_ADMIN": _SYS_ADMIN}
    missing = [name for name, bit in names.items() if not effective >> bit & 1]
    if missing:
        yield Finding("privileges", "notice", f"without {' and '.join(missing)}", "run as root for all that apply does")
    else:
        yield Finding("privileges", "ok", "CAP_NET_ADMIN and CAP_SYS_ADMIN")


def xtables_lock(sight: Sight) -> Iterator[Finding]:
    """Whether the lock of iptables-legacy can be taken, and who holds it."""
    path = _LOCK if sight.root != "/" else os.environ.get("XTABLES_LOCKFILE") or _LOCK
    try:
        status = os.lstat(sight.path(path))
    except FileNotFoundError:
        yield Finding("xtables lock", "ok", f"{path} is not there yet, and is made when needed")
        return
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no file"
        fix = f"rmdir {path}; and mount the host's file with type FileOrCreate, not Directory"
        yield Finding("xtables lock", "trouble", f"{path} is {kind}: iptables-legacy cannot take it", fix)
        return
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in sight.read("/proc/locks").splitlines():
        words = line.split()
        if len(words) > 5 and words[1] == "FLOCK" and words[5] == device:
            pid = words[4]
            holder = f"{sight.read(f'/proc/{pid}/comm').strip() or 'a process'} ({pid})"
            yield Finding("xtables lock", "notice", f"{holder} holds {path}", "wait for it; if it hangs, end it")
            return
    yield Finding("xtables lock", "ok", f"{path} is free")


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
    found = False
    for firewall in FIREWALLS:
        # The kernel keeps 15 letters of a name.
        pid = running.get(firewall.process[:15])
        if pid is not None:
            found = True
            yield Finding("other firewalls", "notice", f"{firewall.process} ({pid}): {firewall.habit}", firewall.fix)
    rules = sight.read("/etc/nftables.conf")
    wanted = "etc/systemd/system/sysinit.target.wants/nftables.service"
    if re.search(r"^\s*flush\s+ruleset", rules, re.MULTILINE) and os.path.lexists(sight.path(wanted)):
        found = True
        evidence = "nftables.service is enabled, and /etc/nftables.conf begins with: flush ruleset"
        fix = "flush its own tables there alone: table inet filter; flush table inet filter"
        yield Finding("other firewalls", "notice", evidence, fix)
    if re.search(r"^ENABLED=yes", sight.read("/etc/ufw/ufw.conf"), re.MULTILINE):
        found = True
        yield Finding("other firewalls", "notice", f"ufw is enabled: {FIREWALLS[5].habit}", FIREWALLS[5].fix)
    if not found:
        yield Finding("other firewalls", "ok", "none seen")


def security_modules(sight: Sight) -> Iterator[Finding]:
    """SELinux and AppArmor: whether they are in force, and whether they refused us something."""
    enforcing = sight.read("/sys/fs/selinux/enforce").strip() == "1"
    profiles = sight.read("/sys/module/apparmor/parameters/enabled").strip() == "Y"
    on = [name for name, there in (("SELinux", enforcing), ("AppArmor", profiles)) if there]
    try:
        log = sight.read("/var/log/audit/audit.log")
    except OSError:
        log = ""
    denied = [line for line in log.splitlines() if ("denied" in line or "DENIED" in line) and "netapply" in line]
    if denied:
        fix = "ausearch -m avc -c netapply | audit2allow -M netapply, and read what it would allow"
        yield Finding("security modules", "trouble", f"{len(denied)} denials: {denied[-1][:200]}", fix)
    else:
        yield Finding(
            "security modules", "ok", f"{' and '.join(on)} in force, no denial seen" if on else "none in force"
        )


def clock(_: Sight) -> Iterator[Finding]:
    """Whether the clock is before this program was made."""
    made = os.stat(__file__).st_mtime
    if time.time() < made - 86_400:
        shown = time.strftime("%Y-%m-%d", time.localtime())
        fix = "timedatectl set-ntp true; until then times in events and in the history are wrong"
        yield Finding("clock", "trouble", f"it is {shown}, before this program was installed", fix)
    else:
        yield Finding("clock", "ok", time.strftime("%Y-%m-%d %H:%M:%S %Z"))


def journal(sight: Sight) -> Iterator[Finding]:
    """Whether the journal's directory is ours alone and goes with the machine."""
    path = Journal().directory if sight.root == "/" else DEFAULT_DIRECTORY
    try:
        status = os.stat(sight.path(path))
    except FileNotFoundError:
        yield Finding("journal", "ok", f"{path} is not there yet, and is made when needed")
        return
    if status.st_uid != 0 or stat.S_IMODE(status.st_mode) & 0o022:
        fix = f"chown root:root {path}; chmod 700 {path}"
        yield Finding("journal", "trouble", f"others may write to {path}, so it cannot be believed", fix)
        return
    names = os.listdir(sight.path(path))
    bad = [name for name in names if name.endswith(".bad")]
    pending = [name for name in names if name.endswith(".pending")]
    if bad:
        yield Finding("journal", "notice", f"{len(bad)} files in {path} could not be believed", f"rm {path}/*.bad")
    if pending:
        evidence = f"{len(pending)} runs in {path} were interrupted"
        yield Finding("journal", "notice", evidence, "netapply recover, in each namespace; the agent does it by itself")
    if sight.root == "/" and _filesystem(path) not in _TMPFS:
        yield Finding(
            "journal", "notice", f"{path} is on a disk", "put it on a tmpfs: it speaks of what a start forgets"
        )
    elif not bad and not pending:
        yield Finding("journal", "ok", f"{path}: {len(names)} files, none of an interrupted run")


def _filesystem(path: str) -> str:
    """The type of the file system that a directory is on, by the longest mount point before it."""
    best, kind = "", ""
    with open("/proc/self/mounts", encoding="utf-8", errors="replace") as file:
        for line in file:
            _, point, name, *_ = line.split()
            inside = path == point or path.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best):
                best, kind = point, name
    return kind


def agent(sight: Sight) -> Iterator[Finding]:
    """Whether the agent is installed, enabled, and does its work."""
    control = sight.path("/run/netapply-agent/control.sock")
    unit = "/etc/systemd/system/netapply.service"
    running = [pid for pid, _ in sight.processes() if _is_agent(sight, pid)]
    if running:
        yield Finding("agent", "ok", f"runs as process {running[0]}")
    elif os.path.exists(control):
        yield Finding("agent", "notice", f"{control} is there, and no agent runs", "systemctl start netapply.service")
    elif sight.read(unit):
        wants = sight.path("/etc/systemd/system/multi-user.target.wants/netapply.service")
        on = "" if os.path.lexists(wants) else " and is not enabled"
        yield Finding(
            "agent", "notice", f"is installed{on}, and does not run", "systemctl enable --now netapply.service"
        )
    else:
        yield Finding("agent", "ok", "is not installed: what others flush stays flushed (netapply install-unit)")


def _is_agent(sight: Sight, pid: int) -> bool:
    words = sight.read(f"/proc/{pid}/cmdline").split("\0")
    return "agent" in words and any(os.path.basename(word) == "netapply" for word in words[: words.index("agent")])


CHECKS: tuple[Check, ...] = (
    privileges,
    xtables_lock,
    networkd,
    firewalls,
    security_modules,
    clock,
    journal,
    agent,
)
