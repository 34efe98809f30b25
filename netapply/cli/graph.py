"""`netapply graph`: the way of packets through rules, drawn: those of a plan, or those that stand in a namespace."""

from __future__ import annotations

from netapply.cli.arguments import UsageError
from netapply.cli.explain import Subject, look_up
from netapply.cli.output import Printer
from netapply.cli.words import Arguments
from netapply.drawing import draw, to_dot, to_mermaid
from netapply.explain import explain
from netapply.flow import Flow
from netapply.ruleset import Family
from netapply.traffic import cast_of_plan, cast_of_rules, legs


def run_graph(arguments: Arguments, printer: Printer) -> int:
    """Print one picture."""
    told_here = bool(arguments.source or arguments.destination or arguments.inbound or arguments.dns)
    if told_here and arguments.flow:
        raise UsageError("--flow names a connection: leave out --from, --to, --inbound and --dns", "")
    subjects, told = look_up(arguments, with_flow=told_here)
    subject = subjects[0]
    flow = told.flow if told is not None else _named(subject, arguments) if arguments.flow else None
    family: Family = arguments.family or (flow.family if flow is not None else "ip")
    if flow is not None and flow.family != family:
        raise UsageError(f"--family {family} and a flow of family {flow.family} do not meet: leave one out", "")
    seen = explain(subject.backend, subject.ruleset, flow, subject.plan) if flow is not None else None
    picture = draw(subject.backend, subject.ruleset, family, seen, subject.plan)
    text = to_mermaid(picture) if arguments.format == "mermaid" else to_dot(picture)
    if arguments.format == "svg":
        from netapply.drawing.graphviz import to_svg

        text = to_svg(text)
    if printer.json:
        printer.document("graph", {"format": arguments.format, "family": family, "picture": text})
    else:
        for line in text.splitlines():
            printer.line(line)
    return 0


def _named(subject: Subject, arguments: Arguments) -> Flow:
    """The first connection of the traffic types that has this name, or number."""
    cast = cast_of_plan(subject.plan) if subject.plan is not None else cast_of_rules(subject.ruleset)
    known = [leg for leg in legs(cast) if leg.flow.family == (arguments.family or "ip")]
    found = [leg.flow for leg in known if arguments.flow in (leg.name, leg.number)]
    if not found:
        names = ", ".join(f"{leg.name} ({leg.number})" for leg in known)
        raise UsageError(f"no connection of the traffic types is called {arguments.flow!r}; there are: {names}", "")
    return found[0]
