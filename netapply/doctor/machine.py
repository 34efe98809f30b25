"""Checks of the machine: what we may, what stands in the way, and what the agent stands on."""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import suppress

from netapply.doctor.finding import Check, Finding, Sight
from netapply.journal import DEFAULT_DIRECTORY

_NET_ADMIN, _SYS_ADMIN = 12, 21  # linux/capability.h
_LOCK = "/run/xtables.lock"
_TMPFS = frozenset(("tmpfs", "ramfs"))
_STATE = "/var/lib/netapply"
_ROOM = 1 << 20  # bytes: plans are small, and a journal of a namespace is some 30 KiB


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


def security_modules(sight: Sight) -> Iterator[Finding]:
    """SELinux and AppArmor: whether they are in force, and whether they refused us something."""
    enforcing = sight.read("/sys/fs/selinux/enforce").strip() == "1"
    profiles = sight.read("/sys/module/apparmor/parameters/enabled").strip() == "Y"
    on = [name for name, there in (("SELinux", enforcing), ("AppArmor", profiles)) if there]
    ours = ["netapply", *(f" pid={pid} " for pid in agents(sight))]  # the agent's process is called python
    denied = [line for line in _denials(sight) if any(word in line for word in ours)]
    if denied:
        fix = "ausearch -m avc -c netapply | audit2allow -M netapply, and read what it would allow"
        if "apparmor=" in denied[-1]:
            fix = "aa-logprof, and read what it would allow"
        yield Finding("security modules", "trouble", f"{len(denied)} denials: {denied[-1][:200]}", fix)
    else:
        yield Finding(
            "security modules", "ok", f"{' and '.join(on)} in force, no denial seen" if on else "none in force"
        )


def _denials(sight: Sight) -> Iterator[str]:
    """Where auditd writes, and where the kernel's messages go without it."""
    for path in ("/var/log/audit/audit.log", "/var/log/kern.log", "/var/log/syslog"):
        with suppress(OSError):
            yield from (line for line in sight.read_end(path).splitlines() if "denied" in line or "DENIED" in line)
    if sight.root == "/":
        yield from (line for line in _kernel_messages() if "avc:  denied" in line or 'apparmor="DENIED"' in line)


def _kernel_messages() -> Iterator[str]:
    """What the kernel still has of its log: one record a read, and an end where nothing is left (Documentation/ABI)."""
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # a container has none, and not everybody may read it
        return
    try:
        for _ in range(1 << 16):
            with suppress(BrokenPipeError):  # overwritten meanwhile: the next one is there
                yield os.read(fd, 1 << 13).decode("utf-8", "replace")
    except OSError:
        return
    finally:
        os.close(fd)


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
    """Whether the journal's directory is ours alone, has room, and goes with the machine."""
    path = sight.capture.journal.directory if sight.root == "/" else DEFAULT_DIRECTORY
    wrong = _directory(sight, "journal", path)
    if wrong:
        yield wrong
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


def state(sight: Sight) -> Iterator[Finding]:
    """Whether the agent's own memory is ours alone, has room, and can be read."""
    wrong = _directory(sight, "state directory", _STATE)
    if wrong:
        yield wrong
        return
    kept = f"{_STATE}/desired.json"
    try:
        text = sight.read(kept)
        size = len(text)
        if text and size < 1 << 20:  # of a longer one this is the beginning
            json.loads(text)
    except ValueError as error:
        fix = f"mv {kept} {kept}.bad, restart netapply.service, and ask the API again for what was asked of it"
        yield Finding("state directory", "trouble", f"{kept} is damaged: {error}", fix)
        return
    yield Finding("state directory", "ok", f"{_STATE}: {kept if text else 'nothing is kept yet'}")


def _directory(sight: Sight, check: str, path: str) -> Finding | None:
    """What is wrong with a directory that must be root's alone and writable; None if nothing is."""
    place = sight.path(path)
    try:
        status, room = os.stat(place), os.statvfs(place)
    except FileNotFoundError:
        return Finding(check, "ok", f"{path} is not there yet, and is made when needed")
    if status.st_uid != 0 or stat.S_IMODE(status.st_mode) & 0o022:
        fix = f"chown root:root {path}; chmod 700 {path}"
        return Finding(check, "trouble", f"others may write to {path}, so it cannot be believed", fix)
    if room.f_flag & os.ST_RDONLY:
        return Finding(check, "trouble", f"{path} is on a file system that is read-only", f"mount -o remount,rw {path}")
    if room.f_bavail * room.f_frsize < _ROOM or (room.f_files and not room.f_favail):
        evidence = f"{room.f_bavail * room.f_frsize >> 10} KiB and {room.f_favail} files are left where {path} is"
        return Finding(check, "trouble", evidence, f"make room: du -xsh {path}/..")
    return None


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
    running = agents(sight)
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


def agents(sight: Sight) -> list[int]:
    """The process ids of agents."""
    return [pid for pid, _ in sight.processes() if _is_agent(sight, pid)]


def _is_agent(sight: Sight, pid: int) -> bool:
    words = sight.read(f"/proc/{pid}/cmdline").split("\0")
    return "agent" in words and any(os.path.basename(word) == "netapply" for word in words[: words.index("agent")])


CHECKS: tuple[Check, ...] = (
    privileges,
    xtables_lock,
    security_modules,
    clock,
    journal,
    state,
    agent,
)
