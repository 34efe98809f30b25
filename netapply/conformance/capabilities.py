"""What a case needs of this machine beyond the backend, and how each is found out: by doing it once."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping

from netapply.backend import Probe as BackendProbe
from netapply.conformance import cgroups, conntrack
from netapply.conformance.case import APP, PROXY, ROOT, Case, Sender
from netapply.conformance.world import World, acting_as
from netapply.features import needs
from netapply.kernel import Kernel
from netapply.plan import CapturePlan
from netapply.values import NamedTuple


class Capability(NamedTuple):
    """Something that can be missing: its name, and how it is tried."""

    name: str
    tried: str


OWNERS = Capability("owners", "opened a socket with file system ids 1337:1337")
GROUPS = Capability("groups", "opened a socket with supplementary group 1337")
CGROUPS = Capability("sockets in cgroups", "made a cgroup v2 and opened a socket in it")
CONNTRACK = Capability("conntrack listing", "dumped the namespace's connection tracking table")
IP6 = Capability("IPv6", "brought up an IPv6 address in a namespace")
RAW = Capability("raw sockets", "opened a raw socket")


def needed(case: Case, plan: CapturePlan) -> tuple[tuple[str, ...], tuple[Capability, ...]]:
    """The features of the plan that a backend must have, in plan words, and what probes need besides."""
    probes = (*case.probes, *case.after)
    features = tuple(feature for feature in needs(plan) if feature not in plan.prefer)
    found = {
        # An application is somebody, whoever that is; the answers of the proxy's resolver are known by its uid.
        OWNERS: "dns.zones" in features or any(probe.sender[:2] not in (APP[:2], ROOT[:2]) for probe in probes),
        GROUPS: any(probe.sender.groups for probe in probes),
        CGROUPS: any(probe.sender.cgroup for probe in probes) or "cgroups" in needs(plan),
        CONNTRACK: case.all_replied or case.story == "older",
        IP6: any(probe.family == "ip6" for probe in probes),
        RAW: any(probe.state == "invalid" for probe in probes),
    }
    return (*features, *case.requires), tuple(capability for capability, wanted in found.items() if wanted)


class Capabilities:
    """What is missing here; each is tried once, when first asked for."""

    def __init__(self, world: World, kernel: Kernel, backend: BackendProbe) -> None:
        self._world = world
        self._kernel = kernel
        self._backend = backend
        self._known: dict[Capability, str] = {}

    def missing(self, case: Case, plan: CapturePlan) -> str:
        """Why the case cannot run: which capability is missing and how that was found out; "" when it can."""
        features, capabilities = needed(case, plan)
        for feature in features:
            if feature in self._backend.missing:
                return f"{feature}: the backend's probe says {self._backend.missing[feature]}"
        for capability in capabilities:
            if capability not in self._known:
                self._known[capability] = self._try(capability)
            if self._known[capability]:
                return f"{capability.name}: {capability.tried}: {self._known[capability]}"
        return ""

    def _try(self, capability: Capability) -> str:
        work: Mapping[Capability, Callable[[], object]] = {
            OWNERS: lambda: self._world.pod.inside(lambda: _open(PROXY)),
            GROUPS: lambda: self._world.pod.inside(lambda: _open(Sender(0, 0, (1337,)))),
            CGROUPS: lambda: self._world.pod.inside(lambda: cgroups.opened_in("app", list[socket.socket])),
            CONNTRACK: lambda: conntrack.entries(self._kernel),
            IP6: self._has_ip6,
            RAW: lambda: self._world.remote.inside(lambda: _open(Sender(0, 0), socket.SOCK_RAW)),
        }
        try:
            work[capability]()
        except (OSError, NotImplementedError) as error:
            return getattr(error, "strerror", None) or str(error)
        return ""

    def _has_ip6(self) -> None:
        if "ip6" not in self._world.families:
            raise OSError("it is switched off, or this kernel has none")


def _open(sender: Sender, kind: socket.SocketKind = socket.SOCK_DGRAM) -> None:
    protocol = socket.IPPROTO_TCP if kind == socket.SOCK_RAW else 0
    with acting_as(sender):
        socket.socket(socket.AF_INET, kind, protocol).close()
