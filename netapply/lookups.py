"""What a plan file asks of the machine: ids of names, resolv.conf's servers, inode numbers of cgroups.

The loader gets these as a value, so that it stays pure and a test can answer instead of the machine.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from netapply.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

#: A resolver reads three servers (MAXNS of resolv.h); a file of this size has other trouble.
_RESOLV_CONF_BYTES = 65536


class Lookups(NamedTuple):
    """Questions that only the machine can answer.

    `uid` and `gid` give the number of a user's or group's name, None where there is none. `servers` gives the
    name servers of resolv.conf as text, and raises OSError where it cannot be read. `cgroup` gives the inode number
    of a cgroup v2 directory by its path below the root, 0 where there is none.
    """

    uid: Callable[[str], int | None]
    gid: Callable[[str], int | None]
    servers: Callable[[], tuple[str, ...]]
    cgroup: Callable[[str], int]


def system_lookups(*, resolv_conf: str = "/etc/resolv.conf", cgroup_root: str = "") -> Lookups:
    """What the machine answers. `cgroup_root` is where cgroup v2 is mounted; found by itself when empty."""

    def servers() -> tuple[str, ...]:
        return read_servers(resolv_conf)

    def cgroup(path: str) -> int:
        return cgroup_id(path, cgroup_root or _cgroup_root())

    return Lookups(_uid, _gid, servers, cgroup)


def read_servers(path: str) -> tuple[str, ...]:
    """The `nameserver` addresses of a resolv.conf(5), without zone ids, in order. Raises OSError."""
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(_RESOLV_CONF_BYTES)
    words = [line.split() for line in text.splitlines()]
    servers = [word[1].partition("%")[0] for word in words if len(word) > 1 and word[0] == "nameserver"]
    return tuple(servers)


def cgroup_id(path: str, root: str) -> int:
    """The inode number of the cgroup's directory, which is the kernel's id of it; 0 where there is none."""
    try:
        return os.stat(f"{root}/{path}").st_ino
    except OSError:
        return 0


def _cgroup_root() -> str:
    # systemd's hybrid hierarchy keeps v2 beside the v1 controllers.
    hybrid = "/sys/fs/cgroup/unified"
    return hybrid if os.access(f"{hybrid}/cgroup.controllers", os.F_OK) else "/sys/fs/cgroup"


def _uid(name: str) -> int | None:
    import pwd

    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def _gid(name: str) -> int | None:
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


SYSTEM = system_lookups()
