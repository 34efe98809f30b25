"""Arbitrary plans and flows, and four answers that must agree about each flow.

    decide      what the plan wants
    evaluate    what the compiled rules do, in each kind of dialect
    packets     what the prober sees
    counters    which rules counted the packet, against those that `evaluate` says match

The same seed gives the same cases. One that fails shrinks to a small plan and few flows: `netapply.conformance.shrink`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from random import Random
from typing import Any

from netapply.backend import Dialect
from netapply.compiler import compile_plan, compile_routing
from netapply.conformance import conntrack
from netapply.conformance.arbitrary import LAYOUTS, Arbitrary
from netapply.conformance.case import PROXY, Case, Probe, Sender
from netapply.conformance.counting import Place, counted, miscounted, predicted
from netapply.conformance.flows import flow_of, packed, verdict_of
from netapply.conformance.stage import Stage
from netapply.conformance.world import WIRES, is_local
from netapply.decide import DNS_PORT, decide
from netapply.evaluate import iface_matches
from netapply.fields import is_mapping
from netapply.flow import TCP, Flow
from netapply.lab.namespaces import timeout_scale
from netapply.plan import CapturePlan, plan_of
from netapply.planfile import dump_plan
from netapply.reasons import show_address
from netapply.ruleset import FAMILIES, Ruleset
from netapply.sights import outcome

#: Kinds of dialects: tables by family, with sets and without, and one inet table.
DIALECTS = (Dialect("split", 15, 3), Dialect("split", 15, 0), Dialect("inet", 0, 2))
OWN = frozenset(wire.pod(family) for wire in WIRES for family in FAMILIES)
PLANS, FLOWS = 1000, 20
PATIENCE = 0.3  # seconds until a packet that was sent is counted


def arbitrary_cases(seed: int, plans: int = PLANS, flows: int = FLOWS) -> Iterator[Case]:
    """So many arbitrary plans, in our layout and in each of Istio's, with so many flows each. Pure."""
    for number in range(plans):
        arbitrary = Arbitrary(Random(f"{seed}/{number}"))  # noqa: S311 - to be repeated
        layout = LAYOUTS[number // 2 % len(LAYOUTS)] if number % 2 else "netapply"
        plan = arbitrary.plan(layout)
        probes: dict[object, Probe] = {}
        while len(probes) < flows:
            probe = arbitrary.probe()
            taken = (probe.origin, probe.family, probe.sport) if probe.sport else len(probes)
            if taken not in probes and _foreseeable(plan, layout, probe):
                probes[taken] = probe._replace(expect=verdict_of(decide(plan, flow_of(probe))))
        found = tuple(probes.values())
        yield Case(f"model {seed}/{number}", "stress", spelled(plan), found, layout, "model", proxy=_proxy_of(plan))


def _proxy_of(plan: CapturePlan) -> Sender:
    """Somebody whom the plan takes for the proxy, where it names one."""
    uids, gids = plan.proxy.uids, plan.proxy.gids
    return Sender(uids[0] if uids else 1000 if gids else PROXY.uid, gids[0] if gids else PROXY.gid)


def spelled(plan: CapturePlan) -> Mapping[str, Any]:
    """The plan as a file says it, without what is so by default."""
    return _beyond(dump_plan(plan), dump_plan(CapturePlan()))


def _beyond(written: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in written.items():
        usual = default.get(name)
        less: Any = (_beyond(value, usual) or usual) if is_mapping(value) and is_mapping(usual) else value
        if less != usual:
            found[name] = less
    return found


def disagreements(case: Case, stage: Stage, plan: CapturePlan) -> Iterator[str]:
    """Where the four answers differ. The plan stands when this is done. Raises NetapplyError."""
    ruleset = stage.compiled(plan, case.layout)
    probes = stage.possible(case.probes)
    yield from on_paper(case, plan, probes)
    stage.apply(plan, case.layout)
    probes = tuple(_expecting(case, plan, ruleset, probe) for probe in probes)
    yield from _counted(case, stage, ruleset, [probe for probe in probes if probe.state == "new"])
    _forget(stage)
    yield from stage.send([probe for probe in probes if _answerable(case, plan, probe)])


# --- what can be told beforehand -----------------------------------------------------------------------------------


def _foreseeable(plan: CapturePlan, layout: str, probe: Probe) -> bool:
    """Whether plan and rules tell what becomes of the first packet, and not the pod's routes."""
    of = plan_of(plan, probe.family)
    mark, tproxy = of.inbound.tproxy.mark, of.inbound.mode == "tproxy"
    if tproxy and probe.mark and probe.mark & mark.mask == mark.value:
        return False  # routed to `lo`, whatever it is for
    if probe.source and probe.origin == "pod" and not is_local(probe.source):
        return any(packed(probe.source) == each.packed for each in compile_routing(plan).addresses)
    return layout == "netapply" or not tproxy or probe.state == "new"  # Istio's TPROXY takes what is not new, too


def _answerable(case: Case, plan: CapturePlan, probe: Probe) -> bool:
    """Whether what comes after the first packet gets through, so that sockets show what became of it."""
    of, layout, who = plan_of(plan, probe.family), case.layout, case.proxy
    if probe.protocol == "udp" and of.dns.capture != "none":
        if probe.sport == DNS_PORT and is_local(probe.to):
            return False  # the answer to it is taken for a query
        if probe.port == DNS_PORT and of.dns.zones and not (who.uid in of.proxy.uids or who.gid in of.proxy.gids):
            return False  # nothing tells the proxy's answers from others
    if probe.origin == "pod":
        # What leaves the pod by DNAT with a source of `lo` is nobody's to answer.
        return decide(plan, flow := flow_of(probe)).verdict != "dnat" or show_address(flow.source) in OWN
    if not is_local(probe.to) and plan.invalid != "keep":
        return False  # forwarded to the remote side, which answers itself past the pod
    # Of what Istio's TPROXY has taken REDIRECT changes the destination, too, where it is rerouted.
    rerouted = any(iface_matches(each.interface, probe.device) for each in of.interfaces.reroute)
    return layout == "netapply" or of.inbound.mode != "tproxy" or not rerouted


def _expecting(case: Case, plan: CapturePlan, ruleset: Ruleset, probe: Probe) -> Probe:
    """What sockets must show: what the plan wants, and in Istio's layouts what its rules do."""
    flow = flow_of(probe)
    if case.layout == "netapply":
        return probe._replace(expect=verdict_of(decide(plan, flow)))
    verdict = verdict_of(outcome(ruleset, flow).decision)
    return probe._replace(expect=verdict._replace(by="") if flow.iface == "lo" else verdict)


# --- the answers ---------------------------------------------------------------------------------------------------


def on_paper(case: Case, plan: CapturePlan, probes: Sequence[Probe]) -> Iterator[str]:
    """Where `decide` and `evaluate` disagree, whatever the dialect. Pure."""
    for dialect in DIALECTS:
        ruleset = compile_plan(plan, dialect, case.layout)
        for probe in probes:
            flow = flow_of(probe)
            wanted, found = decide(plan, flow), outcome(ruleset, flow)
            first = found.sights[0][1].decision
            alike = wanted[:3] == found.decision[:3]
            ours = case.layout == "netapply"  # Istio may choose other zones
            alike = alike and wanted.same_as(first) if ours else alike or _looks_twice(plan, flow)
            if not alike:
                said = f"{found.decision.verdict} {found.decision.port}, zone {first.zone}"
                yield f"{probe}: the plan wants {wanted}, and the rules ({dialect.families}) do {said}"


def _looks_twice(plan: CapturePlan, flow: Flow) -> bool:
    """Istio's TPROXY looks at what comes in over `lo` too, as no plan says."""
    return plan_of(plan, flow.family).inbound.mode == "tproxy" and flow.protocol == TCP and flow.iface == "lo"


def _counted(case: Case, stage: Stage, ruleset: Ruleset, probes: Sequence[Probe]) -> Iterator[str]:
    """Once more where they differ: what the kernel says by itself (ICMPv6) is counted too, and seldom."""
    found = _fired(case, stage, ruleset, probes)
    for _ in range(2):
        found = found and _fired(case, stage, ruleset, probes)
    yield from found


def _fired(case: Case, stage: Stage, ruleset: Ruleset, probes: Sequence[Probe]) -> list[str]:
    wanted = predicted(ruleset, map(flow_of, probes))
    before = _counters(case, stage)
    _forget(stage)
    stage.prober.fire(probes)
    deadline = time.monotonic() + PATIENCE * timeout_scale()
    while True:
        now = _counters(case, stage)
        found = [*miscounted(stage.backend, ruleset, wanted, {place: now[place] - before[place] for place in now})]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.005)


def _counters(case: Case, stage: Stage) -> Mapping[Place, int]:
    return counted(stage.capture.show(backend=stage.backend.name, layout=case.layout))


def _forget(stage: Stage) -> None:
    """Have conntrack know no connection: one with the ports of an earlier one would not be new."""
    with suppress(OSError):  # then as many as do not come again are shown
        conntrack.flush(stage.capture.namespace)
