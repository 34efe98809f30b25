"""Istio's settings as a plan file for people, each line with what it comes from. Pure.

What a plan file cannot hold is the order of lists alone: they are sorted when it is read, and what others cover is
left out.
"""

from __future__ import annotations

import shlex
import textwrap

from netapply.errors import Fault, PlanError
from netapply.importers.istio import Facts, Version, plan_from_settings
from netapply.importers.provenance import explain_fields
from netapply.importers.readings import Reading, renamed
from netapply.plan import CapturePlan, TProxyRouting, in_each_family
from netapply.planfile import load_plan
from netapply.planwriter import write_plan
from netapply.spans import Spans
from netapply.values import NamedTuple

#: What has no place in a plan: how and where to apply it.
NOT_IN_A_PLAN = (
    "network_namespace", "cni_mode", "dry_run", "skip_rule_apply", "run_validation", "iptables_probe_port",
    "probe_timeout", "reconcile", "cleanup_only", "force_apply", "native_nftables", "force_iptables_binary",
)  # fmt: skip
_WIDTH = 110
_SORTED = "Lists are sorted when this is read, less what others cover, and so are their rules; nothing else changes."


class Imported(NamedTuple):
    """A plan, as its file is read, the file's text, and by plan path what each field that was written comes from."""

    plan: CapturePlan
    text: str
    comments: dict[str, str]


def import_plan(reading: Reading, version: Version, facts: Facts) -> Imported:
    """The plan file that decides as this version of Istio does with these settings.

    Raises PlanError with all that Istio refuses, or else with all that a plan file does.
    """
    made = _plan(reading, version, facts)
    plan = in_each_family(made, _without_idle_entries)
    comments = explain_fields(plan, version, reading)
    path = "outbound.ports.include"
    if plan.outbound.ports != made.outbound.ports and path in comments:
        comments[path] += "; what is excluded below is left out"
    try:
        loaded = load_plan(write_plan(plan, {}), format="yaml")
    except PlanError as error:
        raise PlanError(tuple(_of_file(fault, comments) for fault in error.faults)) from error
    text = write_plan(plan, comments, head=_head(reading, version, in_order=loaded == plan))
    return Imported(loaded, text, comments)


def _plan(reading: Reading, version: Version, facts: Facts) -> CapturePlan:
    refused: tuple[Fault, ...] = ()
    try:
        made = plan_from_settings(reading.settings, version, facts)
    except PlanError as error:
        refused, made = error.faults, CapturePlan()
    # A setting may be wrong to both who read it and who makes the plan of it.
    faults = dict.fromkeys((*reading.faults, *(renamed(fault, reading.given) for fault in refused)))
    if faults:
        raise PlanError(tuple(faults))
    return made


def _without_idle_entries(plan: CapturePlan) -> CapturePlan:
    """The plan without what decides nothing, and what a plan file refuses for that: Istio has rules for it."""
    inbound, outbound, interfaces = plan.inbound, plan.outbound, plan.interfaces
    if inbound.mode != "tproxy":
        inbound = inbound._replace(tproxy=TProxyRouting(inbound.tproxy.mark, inbound.tproxy.table))
    excluded = Spans(outbound.ports.exclude)
    included = tuple(each for each in outbound.ports.include if not excluded.cover(*each))
    outbound = outbound._replace(ports=outbound.ports._replace(include=included))
    interfaces = interfaces._replace(reroute=tuple(dict.fromkeys(interfaces.reroute)))
    return plan._replace(inbound=inbound, outbound=outbound, interfaces=interfaces)


def _of_file(fault: Fault, comments: dict[str, str]) -> Fault:
    """A fault of the plan file, with what the field came from."""
    field = fault.path.partition("[")[0]
    source = comments.get(field)
    return fault._replace(path=f"{fault.path} ({source})") if source else fault


def _head(reading: Reading, version: Version, *, in_order: bool) -> list[str]:
    lines = [
        f"Imported from {reading.of}",
        f"It decides as {'Istio' if version == 'istio' else version.replace('istio-', 'Istio ')} does.",
    ]
    apart = [reading.given[name].text for name in NOT_IN_A_PLAN if name in reading.given]
    if apart:
        lines.append(f"Not of a plan: {', '.join(apart)}")
    if not in_order:
        lines.append(_SORTED)
    wrapper = textwrap.TextWrapper(_WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    wrapped = [line for text in lines for line in wrapper.wrap(text)]
    return [*wrapped, "", f"netapply apply PLAN --layout {version} --backend {_backend(reading)}{_namespace(reading)}"]


def _backend(reading: Reading) -> str:
    """The dialects that istio-iptables would use."""
    forced = reading.settings.force_iptables_binary
    return "nftables" if reading.settings.native_nftables else f"iptables-{forced}" if forced else "iptables"


def _namespace(reading: Reading) -> str:
    path = reading.settings.network_namespace
    return f" -N {shlex.quote(path)}" if path else ""
