"""Checks of the proxy that a plan names: does it listen, and who else goes by its uid."""

from __future__ import annotations

import os
from collections.abc import Iterator

from netapply.doctor.finding import Check, Finding, Sight

_LISTEN = "0A"  # TCP_LISTEN of net/tcp_states.h, as /proc/net/tcp writes it


def ports(sight: Sight) -> Iterator[Finding]:
    """Whether the proxy listens where the plan sends connections."""
    plan = sight.plan
    if plan is None:
        return
    wanted = {"proxy.outbound_port": plan.proxy.outbound_port}
    if plan.inbound.mode != "none":
        inbound = plan.proxy.inbound_port
        tproxy = plan.inbound.mode == "tproxy" and plan.inbound.tproxy.port
        wanted["proxy.inbound_port"] = tproxy or inbound
    open_ports = _listening(sight)
    closed = [f"{path} {port}" for path, port in wanted.items() if port not in open_ports]
    if closed:
        fix = "start the proxy first, or apply by the agent with activation on-listen"
        yield Finding("proxy", "notice", f"nobody listens on {', '.join(closed)}: what is captured is refused", fix)
    else:
        yield Finding("proxy", "ok", f"somebody listens on {', '.join(map(str, wanted.values()))}")


def _listening(sight: Sight) -> frozenset[int]:
    found: set[int] = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = sight.capture.namespace.read_file(f"net/{name}").splitlines()[1:]
        except FileNotFoundError:  # without IPv6
            continue
        for line in lines:
            words = line.split()
            if words[3] == _LISTEN:
                found.add(int(words[1].rpartition(":")[2], 16))
    return frozenset(found)


def owners(sight: Sight) -> Iterator[Finding]:
    """Programs that run with an exempt uid in this namespace: all but the proxy bypass it unseen."""
    plan = sight.plan
    if plan is None:
        return
    inode = sight.capture.namespace.identity.inode
    programs: dict[int, dict[str, int]] = {uid: {} for uid in plan.proxy.uids}
    for pid, name in sight.processes():
        uid = _uid(sight, pid)
        if uid in programs and _namespace(sight, pid) == inode:
            programs[uid].setdefault(name, pid)
    for uid, found in programs.items():
        shown = ", ".join(f"{name} ({pid})" for name, pid in sorted(found.items())[:8])
        if len(found) > 1:
            fix = "give each program but the proxy a uid of its own"
            yield Finding("exempt uid", "trouble", f"uid {uid} is exempt, and is that of {shown}", fix)
        else:
            yield Finding("exempt uid", "ok", f"uid {uid}: {shown or 'nobody yet'}")


def _uid(sight: Sight, pid: int) -> int:
    for line in sight.read(f"/proc/{pid}/status").splitlines():
        if line.startswith("Uid:"):
            return int(line.split()[4])  # of the file system, which is what owner matches see
    return -1


def _namespace(sight: Sight, pid: int) -> int:
    try:
        return os.stat(sight.path(f"/proc/{pid}/ns/net")).st_ino
    except OSError:  # it has ended, or is not ours to see
        return 0


CHECKS: tuple[Check, ...] = (ports, owners)
