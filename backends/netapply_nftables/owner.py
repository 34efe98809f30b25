"""Tables with an owner: whether the kernel has them, and who it is."""

from __future__ import annotations

import os
from contextlib import suppress

from netapply.errors import KernelError
from netapply.kernel import NETLINK_NETFILTER, Kernel
from netapply_nftables.find import NFTA_TABLE_FLAGS, NFTA_TABLE_NAME, NFTA_TABLE_OWNER, OWNED
from netapply_wire.nfnetlink import (
    NFPROTO_INET,
    NFT_MSG_GETTABLE,
    NFT_MSG_NEWTABLE,
    NLM_F_CREATE,
    Operation,
    check_batch,
    get,
    number,
    string,
    u32,
)

_PROBE = "netapply-probe"


def can_own(kernel: Kernel) -> bool:
    """Whether this kernel has tables that outlast their owner (Linux 6.9): by a batch that it checks, and drops."""
    body = string(NFTA_TABLE_NAME, _PROBE) + u32(NFTA_TABLE_FLAGS, OWNED)
    try:
        check_batch(
            kernel, [Operation(NFT_MSG_NEWTABLE, NFPROTO_INET, body, NLM_F_CREATE, "add a table with an owner")]
        )
    except KernelError:
        return False
    return True


def refused_by_owner(kernel: Kernel, operation: str, error: KernelError) -> KernelError:
    """The error for whoever may not change a table, as another owns it, with the owner's name where it can be had."""
    table = operation.rpartition(" ")[2]
    port = 0
    with suppress(KernelError):
        if found := get(kernel, NFT_MSG_GETTABLE, NFPROTO_INET, string(NFTA_TABLE_NAME, table)):
            port = number(found.attributes.get(NFTA_TABLE_OWNER, b""))
    who = _process_of(kernel, port) or f"the netlink port {port}"
    return KernelError(
        operation,
        error.errno,
        cause=f"table inet {table} belongs to {who}, who alone may change it",
        next_step="if that is the agent, ask it: the same command without --alone; or end it, and try again",
    )


def _process_of(kernel: Kernel, port: int) -> str:
    """Name and id of the process that has the netfilter socket of this port in the namespace; "" where it is hidden."""
    try:
        rows = [line.split() for line in kernel.read_file("net/netlink").splitlines()[1:]]
    except OSError:
        return ""
    inodes = {row[9] for row in rows if row[1] == str(NETLINK_NETFILTER) and row[2] == str(port)}
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if wanted & _links(f"/proc/{pid}/fd"):
            with suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8", errors="backslashreplace") as file:
                return f"{file.read().strip()} ({pid})"
    return ""


def _links(folder: str) -> set[str]:
    """Where the descriptors lead that are still open when they are looked at; none of a process that is hidden."""
    found: set[str] = set()
    with suppress(OSError):
        for fd in os.listdir(folder):
            with suppress(FileNotFoundError):
                found.add(os.readlink(f"{folder}/{fd}"))
    return found
