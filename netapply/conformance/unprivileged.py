"""Without root: a user namespace, where the kernel allows one. There are no other users in it, so much is skipped."""

from __future__ import annotations

import os

from netapply.errors import NamespaceError
from netapply.lab import syscalls

CLONE_NEWUSER = 0x10000000  # linux/sched.h
#: /proc/self/uid_map of the initial user namespace (user_namespaces(7)).
_EVERYBODY = ["0", "0", "4294967295"]


def enter_user_namespace() -> str:
    """Move this process into a user namespace unless it is root; what there is to say about it, "" for root.

    In a user namespace it moves into a network namespace of that, too: from the machine's own there would be no way
    back. The process must have one thread. Raises NamespaceError where the kernel does not allow it.
    """
    uid, gid = os.geteuid(), os.getegid()
    with open("/proc/self/uid_map", encoding="ascii") as file:
        everybody = file.read().split() == _EVERYBODY
    if uid == 0 and everybody:
        return ""
    try:
        if uid == 0:
            syscalls.unshare(syscalls.CLONE_NEWNET)
            return "root in a user namespace: who is not there cannot send"
        syscalls.unshare(CLONE_NEWUSER | syscalls.CLONE_NEWNET)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    except OSError as error:
        raise NamespaceError(
            f"this is not root, and a user namespace is not to be had: {error.strerror}", next_step="run it as root"
        ) from error
    return f"not root: in a user namespace, where uid {uid} is root and nobody else is there"
