"""Where a case runs: a world, a prober, and the pod opened as any user of the library would open it."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

from netapply.api import Capture, open_capture
from netapply.backend import Backend
from netapply.conformance import cgroups, conntrack
from netapply.conformance.capabilities import Capabilities
from netapply.conformance.case import Case, Probe, Seen, difference
from netapply.conformance.picture import Picture, picture
from netapply.conformance.prober import Prober
from netapply.conformance.world import World
from netapply.core import compiled
from netapply.detection import lacking
from netapply.errors import NetapplyError
from netapply.lab.namespaces import timeout_scale
from netapply.ownership import ownership
from netapply.plan import API_VERSION, CapturePlan, plan_of
from netapply.planfile import load_plan
from netapply.ruleset import FAMILIES, Ruleset
from netapply.values import NamedTuple

#: Cgroups that the plans of cases name, below `cgroups.NAME`.
CGROUPS = ("app", "app/inner", "batch")
#: Uses every table, so that a dialect whose tables stay once they are there has them all.
_EVERY_TABLE = {
    "inbound": {"mode": "tproxy"},
    "dns": {"capture": "all"},
    "invalid": "drop",
    "ipv6": "capture",
}


class Standing(NamedTuple):
    """Rules that stand, for readers that are not ours: where, whose, and what they should be."""

    path: str
    backend: str
    layout: str
    plan: CapturePlan
    ruleset: Ruleset


#: Reads what stands with tools of its own, and says what is otherwise than it should be, a phrase each.
Reader: TypeAlias = Callable[[Standing], Sequence[str]]


class Stage:
    """One world with its prober. Cases run on it one after the other, as long as each leaves it as it was.

    `found` is what the backend's probe says; no case can run unless it is usable. `blank` is what is there without us.
    """

    blank: Picture

    def __init__(self, world: World, prober: Prober, capture: Capture, backend: Backend) -> None:
        self.world, self.prober, self.capture, self.backend = world, prober, capture, backend
        #: Something stays there that no clean takes away: the stage is of no use to another case.
        self.spoiled = False
        self.found = backend.probe(capture.namespace)
        self.capabilities = Capabilities(world, capture.namespace, self.found)
        if self.found.status != "usable":
            return
        with suppress(NetapplyError):
            self.apply(plan_from(_EVERY_TABLE))
        capture.clean(backend=backend.name)
        self.blank = self.picture()

    def apply(self, plan: CapturePlan, layout: str = "netapply") -> bool:
        """Apply by this backend; whether anything was changed. Raises NetapplyError."""
        return self.capture.apply(plan, backend=self.backend.name, layout=layout).changed

    def compiled(self, plan: CapturePlan, layout: str) -> Ruleset:
        """What should stand."""
        namespace = self.capture.namespace
        state, _, _ = compiled(namespace, plan, self.backend, lacking(namespace, self.backend, plan), layout)
        return state.ruleset or Ruleset()

    def picture(self, layout: str = "netapply") -> Picture:
        """All but our rules."""
        return picture(self.capture.namespace, self.backend, layout)

    def arrange(self, case: Case, plan: CapturePlan) -> None:
        """Have the listeners of the plan's proxy, and no flows of before in conntrack."""
        self.prober.arrange(ports_of(plan), case.proxy, case.absent)
        with suppress(OSError):  # source ports are not used again soon, either
            conntrack.flush(self.capture.namespace)

    def send(self, probes: Sequence[Probe]) -> Iterator[str]:
        """Send probes; every difference in a phrase."""
        probes = self.possible(probes)
        yield from differences(probes, self.prober.send(probes))

    def possible(self, probes: Sequence[Probe]) -> tuple[Probe, ...]:
        """Those of families that work here."""
        return tuple(probe for probe in probes if probe.family in self.world.families)

    def read(self, layout: str) -> Ruleset | None:
        """Our rules as the backend decodes them."""
        return self.backend.read(self.capture.namespace, ownership(layout)).ruleset


@contextmanager
def stage(backend: Backend, directory: str) -> Generator[Stage]:
    """A new stage with namespaces of its own; the journal is in `directory`. Raises NetapplyError."""
    with World() as world, Prober(world) as prober:
        patience = 10.0 * timeout_scale()
        with open_capture(world.pod.path, state_directory=directory, lock_timeout=patience) as capture:
            yield Stage(world, prober, capture, backend)


def plan_from(content: Mapping[str, Any]) -> CapturePlan:
    """The plan of a case, by the loader. Raises PlanError."""
    return load_plan(json.dumps({"apiVersion": API_VERSION, **content}), format="json", source="case")


def make_cgroups() -> None:
    """Have the cgroups that plans name; where they cannot be had the cases that need them are skipped."""
    with suppress(OSError):
        for path in CGROUPS:
            cgroups.create(path)


def ports_of(plan: CapturePlan) -> tuple[int, ...]:
    """The proxy's listeners that a plan leads to."""
    found: list[int] = []
    for each in (plan_of(plan, family) for family in FAMILIES):
        found += [each.proxy.outbound_port, each.proxy.inbound_port]
        found += [each.inbound.tproxy.port] if each.inbound.tproxy.port else []
        found += [each.dns.port] if each.dns.capture != "none" else []
    return tuple(dict.fromkeys(found))


def differences(probes: Sequence[Probe], seen: Sequence[Seen]) -> Iterator[str]:
    """What was otherwise than expected."""
    for probe, each in zip(probes, seen, strict=True):
        if wrong := difference(probe, each):
            yield wrong
