"""The two namespaces of a run: the pod, which holds the plan, and a remote side that is everybody else.

They are joined by four wires, so that there are devices to exclude and to reroute. Neither has a name: both are gone
with the process, however it ends.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Literal, Self, TypeAlias

from netapply import syscalls
from netapply.conformance.case import APP, Endpoint, Probe, Sender
from netapply.lab import syscalls as lab_syscalls
from netapply.lab.namespaces import Place, lab_names
from netapply.lab.network import Wire, connect
from netapply.ruleset import FAMILIES, Family

PlaceName: TypeAlias = Literal["pod", "remote"]

AF: dict[Family, socket.AddressFamily] = {"ip": socket.AF_INET, "ip6": socket.AF_INET6}
WIRES = tuple(Wire(device, number) for number, device in enumerate(("eth0", "eth1", "docker0", "br-1")))
BY_DEVICE = {wire.device: wire for wire in WIRES}
POD: dict[Family, str] = {family: WIRES[0].pod(family) for family in FAMILIES}
REMOTE: dict[Family, str] = {family: WIRES[0].remote(family) for family in FAMILIES}
LOOPBACK: dict[Family, str] = {"ip": "127.0.0.1", "ip6": "::1"}


class World:
    """A context manager. `pod` and `remote` are `netapply.lab.Place`s, `families` are those that work here.

    Raises NamespaceError where no namespace can be made, KernelError where the kernel has no veth.
    """

    pod: Place
    remote: Place
    families: tuple[Family, ...]

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        try:
            pod, remote = lab_names(("pod", "remote"))
            self.pod = self._stack.enter_context(Place(pod, publish=False))
            self.remote = self._stack.enter_context(Place(remote, publish=False))
            self.families = connect(self.pod, self.remote, WIRES)
            self.pod.inside(_forward)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stack.close()

    def place(self, name: PlaceName) -> Place:
        """By its name."""
        return self.pod if name == "pod" else self.remote


def is_local(address: str) -> bool:
    """Whether it is one of the pod's own, so that a packet from the pod to it leaves and enters by `lo`."""
    own = (wire.pod(family) for wire in WIRES for family in FAMILIES)
    return address.startswith("127.") or address == "::1" or address in own


def source_of(probe: Probe) -> str:
    """The address that a probe comes from, where the kernel has no choice; "" leaves it to the kernel."""
    if probe.source:
        return probe.source
    wire = BY_DEVICE[probe.device]
    if probe.origin == "remote":
        return wire.remote(probe.family)
    return wire.pod(probe.family) if wire.number and not is_local(probe.to) else ""


@cache
def other_users() -> bool:
    """Whether this process may open sockets for others: not in a user namespace of one user."""
    before = os.geteuid(), os.getegid()
    try:
        syscalls.set_filesystem_ids(*APP[:2])
    except PermissionError:
        return False
    finally:
        syscalls.set_filesystem_ids(*before)
    return True


@contextmanager
def acting_as(sender: Sender) -> Generator[None]:
    """What this thread opens meanwhile is the sender's, its cgroup apart. Raises PermissionError.

    Where there are no other users (a user namespace) an application is whoever this is.
    """
    if sender == APP and not other_users():
        yield
        return
    before, groups = (os.geteuid(), os.getegid()), tuple(os.getgroups())
    if sender.groups:
        lab_syscalls.set_groups(sender.groups)
    syscalls.set_filesystem_ids(sender.uid, sender.gid)
    try:
        yield
    finally:
        syscalls.set_filesystem_ids(*before)
        if sender.groups:
            lab_syscalls.set_groups(groups)


def endpoint(name: tuple[object, ...]) -> Endpoint:
    """A socket name of either family as (address, port)."""
    return str(name[0]), int(str(name[1]))


def _forward() -> None:
    """What comes in by one wire and is nobody's here goes on by another, as with a bridge of containers."""
    for name in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        try:
            Path(f"/proc/sys/net/{name}").write_text("1", "ascii")
        except OSError:  # without IPv6
            continue
