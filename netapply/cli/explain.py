"""`netapply explain`: why a packet goes where it goes, by a plan or by the rules that stand in a namespace."""

from __future__ import annotations

from contextlib import ExitStack

from netapply.api import Capture
from netapply.backend import BUILT_IN, Backend, find_backend
from netapply.cli.arguments import UsageError
from netapply.cli.commands import open_named
from netapply.cli.explain_text import explanation_fields, flow_fields, print_explanations, print_types, types_fields
from netapply.cli.flow_words import Asked, Told, protocol_of, read_flow
from netapply.cli.output import Printer
from netapply.cli.words import Arguments
from netapply.compiler import compile_plan
from netapply.detection import PREFERENCE
from netapply.explain import explain
from netapply.lookups import SYSTEM
from netapply.otherwise import otherwise
from netapply.plan import CapturePlan
from netapply.ruleset import Ruleset
from netapply.traffic import cast_of_plan, cast_of_rules, legs
from netapply.values import NamedTuple
from netapply.ways import way_to


class Subject(NamedTuple):
    """Rules to be explained: in whose words, and what they were compiled from (None where they stand in a kernel)."""

    backend: Backend
    ruleset: Ruleset
    plan: CapturePlan | None = None


def run_explain(arguments: Arguments, printer: Printer) -> int:
    """Explain one flow, or the six traffic types."""
    _refuse_contradictions(arguments)
    subjects, told = look_up(arguments, with_flow=not arguments.traffic_types, every=arguments.all)
    if told is None:
        _explain_types(subjects, printer)
    else:
        _explain_flow(subjects, told, printer)
    return 0


def look_up(arguments: Arguments, *, with_flow: bool, every: bool = False) -> tuple[tuple[Subject, ...], Told | None]:
    """The rules that the command line names, of a plan in `every` dialect if so, and the flow, if one is wanted."""
    from netapply.planfile import read_plan

    plan = read_plan(arguments.plan) if arguments.plan else None
    with ExitStack() as stack:
        capture = stack.enter_context(open_named(arguments)) if plan is None or arguments.netns is not None else None
        told = _told(_asked(arguments, plan), capture) if with_flow else None
        if plan is not None:
            return _compiled(plan, arguments, every=every), told
        return _standing(capture, arguments.backend) if capture else (), told


def _refuse_contradictions(arguments: Arguments) -> None:
    words = bool(arguments.source or arguments.destination or arguments.inbound or arguments.dns)
    if arguments.traffic_types and words:
        raise UsageError("--traffic-types has flows of its own: leave out --from, --to, --inbound and --dns", "")
    if arguments.all and not arguments.plan:
        raise UsageError(
            "--all compares dialects of a plan: name one; live rules stand in the dialect that they do", ""
        )
    if arguments.all and arguments.backend != "auto":
        raise UsageError("--all is every backend: leave out --backend", "")


def _asked(arguments: Arguments, plan: CapturePlan | None) -> Asked:
    protocol = protocol_of(tcp=arguments.tcp, udp=arguments.udp, dns=arguments.dns)
    servers = plan.dns.servers if plan is not None else ()
    server = next((each.packed for each in servers if each.prefix == 8 * len(each.packed)), b"")
    return Asked(arguments.source, arguments.destination, arguments.inbound, arguments.dns, protocol, server)


def _told(asked: Asked, capture: Capture | None) -> Told:
    if capture is None:
        return read_flow(asked, SYSTEM)
    return read_flow(asked, SYSTEM, lambda destination: way_to(capture.namespace, destination))


# --- which rules ---------------------------------------------------------------------------------------------


def _compiled(plan: CapturePlan, arguments: Arguments, *, every: bool) -> tuple[Subject, ...]:
    names = tuple(BUILT_IN) if every else (PREFERENCE[0] if arguments.backend == "auto" else arguments.backend,)
    backends = tuple(map(find_backend, names))
    return tuple(Subject(each, compile_plan(plan, each.dialect, arguments.layout), plan) for each in backends)


def _standing(capture: Capture, wanted: str) -> tuple[Subject, ...]:
    """What stands in the namespace, of any layout: chains of either name are looked for, whoever put them there."""
    found = capture.live(backend=wanted, layout="istio")
    nothing = Subject(find_backend(PREFERENCE[0]), Ruleset())
    return tuple(Subject(find_backend(each.backend), each.ruleset) for each in found) or (nothing,)


# --- what is told --------------------------------------------------------------------------------------------


def _explain_flow(subjects: tuple[Subject, ...], told: Told, printer: Printer) -> None:
    explained = [
        (explain(each.backend, each.ruleset, told.flow, each.plan), otherwise(each.ruleset, told.flow))
        for each in subjects
    ]
    if printer.json:
        fields = [explanation_fields(*each) for each in explained]
        flow = {"flow": flow_fields(told.flow), "assumed": told.assumed}
        printer.document("explain", {**flow, "explanations": fields})
    else:
        print_explanations(explained, told, printer)


def _explain_types(subjects: tuple[Subject, ...], printer: Printer) -> None:
    plan = subjects[0].plan
    cast = cast_of_plan(plan) if plan is not None else cast_of_rules(subjects[0].ruleset)
    rows = [
        (leg, [explain(each.backend, each.ruleset, leg.flow, each.plan) for each in subjects]) for leg in legs(cast)
    ]
    if printer.json:
        printer.document("explain", {"traffic_types": [types_fields(*row) for row in rows]})
    else:
        print_types(rows, printer)
