"""The specification and the compiled rules agree, for any plan, flow and kind of dialect."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings

from netapply.backend import Dialect
from netapply.compiler import compile_plan
from netapply.decide import decide
from netapply.evaluate import evaluate
from netapply.features import degrade
from netapply.flow import TCP, Flow
from netapply.plan import CapturePlan, Inbound, InboundPorts, Interfaces, Ipv6Groups, Reroute, TProxyRouting
from netapply.ruleset import Cidr, PortRange
from tests.strategies import flows, plans

DIALECTS = {"split": Dialect("split", 15, 3), "inet": Dialect("inet", 0, 2)}


#: TPROXY, to be decided before rerouting, would take what the interface's own blocks let pass.
BLOCKED = CapturePlan(
    inbound=Inbound("tproxy", tproxy=TProxyRouting(before_reroute=True)),
    interfaces=Interfaces(reroute=(Reroute("docker0", exclude=(Cidr(bytes(16), 0),)),)),
    ipv6="block",
)
CALL = Flow("inbound", TCP, bytes(15) + b"\2", bytes(15) + b"\3", 40000, 80, "docker0")


@pytest.mark.parametrize("kind", DIALECTS)
@settings(max_examples=400, deadline=None)
@example(plan=BLOCKED, flow=CALL)
@given(plan=plans, flow=flows())
def test_walking_the_rules_gives_what_the_plan_decides(kind: str, plan: CapturePlan, flow: Flow) -> None:
    trace = evaluate(compile_plan(plan, DIALECTS[kind]), flow)
    assert trace.decision.same_as(decide(plan, flow)), (trace.decision, decide(plan, flow), trace.decided)


@pytest.mark.parametrize("kind", DIALECTS)
def test_what_ipv6_has_of_its_own_is_named_as_that_and_nothing_else_is(kind: str) -> None:
    only_ssh = Inbound(ports=InboundPorts(include=(PortRange(22, 22),)))
    plan = CapturePlan(for_ipv6=Ipv6Groups(inbound=only_ssh), comments=True)
    plan, _ = degrade(plan._replace(prefer=("comments",)), "any", {"comments": "not here"})
    to_ssh = CALL._replace(dport=22)
    call_4 = to_ssh._replace(source=b"\x0a\0\0\2", destination=b"\x0a\0\0\3")
    outward = to_ssh._replace(direction="outbound", iface="eth0")
    for flow, path in (
        (to_ssh, "for_ipv6.inbound.ports.include"),
        (call_4, "inbound.ports.include"),
        (outward, "outbound.cidrs.include"),
    ):
        trace = evaluate(compile_plan(plan, DIALECTS[kind]), flow)
        assert (decide(plan, flow).path, trace.decision.path) == (path, path)
