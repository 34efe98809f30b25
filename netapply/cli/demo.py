"""`netapply demo`: the main job on real packets, in throwaway namespaces, in each dialect that this kernel has.

The plan is the usual sidecar's: all inbound but 15090, 15021 and 15020, all outbound, the proxy on 15001 and 15006.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from typing import Literal, TypeAlias

from netapply.api import Capture, open_capture
from netapply.backend import BUILT_IN, find_backend
from netapply.cli.output import Printer
from netapply.compiler import compile_plan
from netapply.errors import UnsupportedError
from netapply.evaluate import evaluate
from netapply.flow import TCP, Flow
from netapply.lab import ADDRESSES, Answer, Lab, Traffic, traffic_types
from netapply.lab.network import IFACE
from netapply.plan import CapturePlan, Inbound, InboundPorts
from netapply.ruleset import PortRange, Ruleset
from netapply.values import NamedTuple

Mode: TypeAlias = Literal["redirect", "tproxy"]
DIRECT_PORTS = (PortRange(15020, 15021), PortRange(15090, 15090))


class Shown(NamedTuple):
    """One flow that was sent: what was to happen, what did, and the rule that decided about its first packet.

    The rule is the one that `evaluate` predicts; that the kernel took it is told by its counter, else it is a fault.
    """

    traffic: Traffic
    answer: Answer
    faults: tuple[str, ...]
    rule: str
    path: str
    counted: int


class Round(NamedTuple):
    """One dialect and inbound mode: its flows, or why there are none."""

    backend: str
    mode: Mode
    flows: tuple[Shown, ...] = ()
    skipped: str = ""
    apply_ms: float = 0.0
    kept: tuple[str, ...] = ()


def demo_plan(mode: Mode) -> CapturePlan:
    """The plan that the demo applies."""
    return CapturePlan(inbound=Inbound(mode=mode, ports=InboundPorts(exclude=DIRECT_PORTS)))


def run_demo(printer: Printer, *, backends: tuple[str, ...], modes: tuple[Mode, ...], keep: bool) -> int:
    """Run all rounds and print them; 1 if any flow went wrong, or if no dialect works here."""
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="netapply-demo-") as state:
        # The namespaces are ours alone: neither the machine's journal nor its xtables lock is concerned.
        os.environ["XTABLES_LOCKFILE"] = f"{state}/xtables.lock"
        for backend in backends or tuple(BUILT_IN):
            for mode in modes:
                printer.progress(f"{backend}, inbound {mode} …")
                each = asyncio.run(_round(backend, mode, state, keep=keep))
                printer.progress("")
                rounds.append(each)
                if not printer.json:
                    _print_round(each, printer)
    sent = [shown for each in rounds for shown in each.flows]
    wrong = [shown for shown in sent if shown.faults]
    if printer.json:
        printer.document("demo", {"rounds": [_as_json(each) for each in rounds]}, ok=bool(sent) and not wrong)
    else:
        verdict = f"{len(sent) - len(wrong)} of {len(sent)} flows went as expected"
        printer.line(printer.paint(verdict, "red" if wrong or not sent else "green"))
    return 1 if wrong or not sent else 0


async def _round(backend: str, mode: Mode, state: str, *, keep: bool) -> Round:
    async with Lab(keep=keep) as lab:
        with open_capture(lab.pod.path, state_directory=state) as capture:
            found = find_backend(backend).probe(capture.namespace)
            if found.status != "usable":
                return Round(backend, mode, skipped=f"{found.status}: {found.reason}")
            plan = demo_plan(mode)
            try:
                result = capture.apply(plan, backend=backend)
            except UnsupportedError as error:
                return Round(backend, mode, skipped=f"unsupported: {error}")
            ruleset = compile_plan(plan, find_backend(backend).dialect)
            flows = [await _send(lab, capture, ruleset, traffic) for traffic in traffic_types(mode, lab.families)]
            kept: tuple[str, ...] = ()
            if keep:
                kept = (lab.pod.name, lab.remote.name)
            else:
                capture.clean()
            return Round(backend, mode, tuple(flows), apply_ms=result.duration * 1000, kept=kept)


async def _send(lab: Lab, capture: Capture, ruleset: Ruleset, traffic: Traffic) -> Shown:
    decided = evaluate(ruleset, _flow(lab, traffic)).decided
    before = _packets(capture)
    answer = await lab.send(traffic.send)
    faults = traffic.expect.faults(answer)
    if decided is None:
        return Shown(traffic, answer, (*faults, "no rule decides about it"), "", "", 0)
    where = (decided.table.family, decided.table.name, decided.chain.name, decided.position)
    counted = _packets(capture).get(where, 0) - before.get(where, 0)
    if not counted:
        faults += (f"rule {decided.chain.name} {decided.position + 1} was to decide, and counted nothing",)
    rule = f"{decided.table.name} {decided.chain.name} {decided.position + 1}"
    return Shown(traffic, answer, faults, rule, decided.rule.path, counted)


def _packets(capture: Capture) -> dict[tuple[str, str, str, int], int]:
    return {(rule.family, rule.table, rule.chain, rule.position): rule.packets for rule in capture.show()}


def _flow(lab: Lab, traffic: Traffic) -> Flow:
    """The first packet of a probe, as the pod's hooks see it."""
    send, ours = traffic.send, ADDRESSES[traffic.family]
    kind = socket.AF_INET if traffic.family == "ip" else socket.AF_INET6
    destination = socket.inet_pton(kind, send.to[0])
    actor = lab.actor(send.source, uid=send.uid, gid=send.gid)
    if actor.place is lab.remote:
        return Flow("inbound", TCP, socket.inet_pton(kind, ours.remote), destination, 0, send.to[1], IFACE)
    stays = send.to[0] in (ours.pod, "127.0.0.1", "::1")
    source = destination if stays else socket.inet_pton(kind, ours.pod)
    iface = "lo" if stays else IFACE
    return Flow("outbound", TCP, source, destination, 0, send.to[1], iface, actor.identity.uid, actor.identity.gid)


def _print_round(each: Round, printer: Printer) -> None:
    title = f"{each.backend}, inbound {each.mode}"
    if each.skipped:
        printer.line(f"{printer.paint(title, 'bold')}: skipped, {each.skipped}\n")
        return
    printer.line(printer.paint(f"{title}, applied in {each.apply_ms:.1f} ms", "bold"))
    rows = [
        (
            shown.traffic.number,
            shown.traffic.name,
            shown.traffic.family,
            _way(shown.traffic.expect.via, shown.traffic.expect.who),
            _way(shown.answer.via_ports, shown.answer.who or shown.answer.error),
            shown.rule,
            shown.path,
            shown.counted,
            "ok" if not shown.faults else "WRONG: " + "; ".join(shown.faults),
        )
        for shown in each.flows
    ]
    printer.table(
        ("TYPE", "FLOW", "FAMILY", "EXPECTED", "ANSWERED", "DECIDED BY RULE", "BECAUSE OF", "COUNTED", ""), rows
    )
    if each.kept:
        pod, remote = each.kept
        printer.line(f"kept: nsenter --net=/run/netns/{pod} ip addr; and {remote}. netapply clean -N {pod}")
    printer.line()


def _way(ports: tuple[int, ...], who: str) -> str:
    return " > ".join([*map(str, ports), who])


def _as_json(each: Round) -> dict[str, object]:
    flows = [
        {
            "type": shown.traffic.number,
            "flow": shown.traffic.name,
            "family": shown.traffic.family,
            "expected": {"ports": shown.traffic.expect.via, "who": shown.traffic.expect.who},
            "answered": {"ports": shown.answer.via_ports, "who": shown.answer.who, "error": shown.answer.error},
            "decided_by": {"rule": shown.rule, "path": shown.path, "counted": shown.counted},
            "faults": shown.faults,
        }
        for shown in each.flows
    ]
    return {**each._asdict(), "flows": flows}
