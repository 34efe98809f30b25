"""What `netapply explain` prints: for people, and as values for JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from netapply.cli.flow_words import Told
from netapply.cli.output import Printer
from netapply.explain import Explanation, Place, Sight, Step, show_verdict
from netapply.flow import Decision, Flow
from netapply.otherwise import Otherwise
from netapply.reasons import PROTOCOLS, show_address, show_endpoint
from netapply.ruleset import FAMILIES
from netapply.traffic import Leg

#: Of a longer run of rules that did not match, these many at each end are shown.
_RUN, _ENDS = 40, 5
_HOOKS = {"output": "as it is sent", "prerouting": "as it comes in"}


def print_explanations(
    explained: Sequence[tuple[Explanation, tuple[Otherwise, ...]]], told: Told, printer: Printer
) -> None:
    """One explanation, or several behind a table of their outcomes."""
    printer.line(show_flow(told.flow))
    printer.line(printer.paint(f"assumed: {', '.join(told.assumed)}", "dim"))
    if len(explained) > 1:
        rows = [(e.backend, show_verdict(e.decision), show_way(e.decided), e.path) for e, _ in explained]
        printer.line()
        printer.table(("BACKEND", "VERDICT", "DECIDED BY", "BECAUSE OF"), rows)
    for each, others in explained:
        printer.line()
        _print_one(each, others, printer)


def _print_one(each: Explanation, others: tuple[Otherwise, ...], printer: Printer) -> None:
    printer.line(printer.paint(f"{each.backend}: {show_verdict(each.decision)}, {each.answers}", "bold"))
    printer.line(f"decided by {show_way(each.decided)}{f', because of {each.path}' if each.path else ''}")
    for note in each.notes:
        printer.line(printer.paint(f"note: {note}", "yellow"))
    for sight in each.sights:
        _print_sight(sight, printer, again=sight is not each.sights[0])
    if others:
        printer.line()
        printer.line(printer.paint("would differ if", "bold"))
        left = max(len(other.change) for other in others)
        right = max(len(show_verdict(other.decision)) for other in others)
        for other in others:
            verdict = show_verdict(other.decision)
            printer.line(f"  {other.change:{left}}  {verdict:{right}}  by {show_way(other.decided)}")


def _print_sight(sight: Sight, printer: Printer, *, again: bool) -> None:
    printer.line()
    device = "over lo, " if again else ""
    where = f"hook {sight.hook}, {device}{_HOOKS[sight.hook]}"
    to = f" to {show_endpoint(sight.flow.destination, sight.flow.dport)}" if again else ""
    printer.line(printer.paint(f"{where}{to}", "bold") + ("" if sight.steps else ": no rule of ours is there"))
    whys = [_why(step) for step in sight.steps]
    width = min(76, max(map(len, whys), default=0))
    chain = ""
    for step, why in _shortened(sight.steps, whys):
        if step is None:
            printer.line(f"        {why}")
            continue
        here = f"{step.place.table} {step.place.chain}"
        if here != chain:
            chain = here
            printer.line(f"  {chain}")
        sign, colour = {True: ("+", "green"), False: (" ", "dim"), None: ("?", "yellow")}[step.matched]
        path = printer.paint(f"  # {step.place.path}", "dim") if step.place.path else ""
        printer.line(printer.paint(f"  {sign} {step.place.position:>3}  {why:{width}}  {step.rule}", colour) + path)


def _why(step: Step) -> str:
    return f"no, {step.match}: {step.why}" if step.matched is False else step.why


def _shortened(steps: Sequence[Step], whys: Sequence[str]) -> Iterator[tuple[Step | None, str]]:
    """The steps, without the middle of long runs that did not match."""
    at = 0
    while at < len(steps):
        end = at
        while end < len(steps) and steps[end].matched is False:
            end += 1
        if end - at > _RUN:
            yield from zip(steps[at : at + _ENDS], whys[at : at + _ENDS], strict=True)
            yield None, f"… {end - at - 2 * _ENDS} more that did not match"
            at = end - _ENDS
        yield from zip(steps[at : end + 1], whys[at : end + 1], strict=True)
        at = end + 1


def show_way(way: Sequence[Place]) -> str:
    """The rules that decided, from the one that chose to the one that did it."""
    if not way:
        return "no rule: nothing takes it"
    head, *rest = way
    return " > ".join((str(head), *(f"{each.chain} {each.position}" for each in rest)))


def show_flow(flow: Flow) -> str:
    """The first packet in a line."""
    ends = f"{show_endpoint(flow.source, flow.sport)} > {show_endpoint(flow.destination, flow.dport)}"
    protocol = PROTOCOLS.get(flow.protocol, str(flow.protocol))
    marks = f", mark {flow.mark:#x}" if flow.mark else ""
    state = "" if flow.state == "new" else f", {flow.state}"
    if flow.direction == "inbound":
        return f"{protocol} {ends}, comes in by {flow.iface}{marks}{state}"
    cgroup = f", cgroup {flow.cgroup}" if flow.cgroup else ""
    return f"{protocol} {ends}, leaves by {flow.iface}, uid {flow.uid}, gid {flow.gid}{cgroup}{marks}{state}"


def print_types(rows: Sequence[tuple[Leg, list[Explanation]]], printer: Printer) -> None:
    """A table of the traffic types; a family alone where the two differ."""
    cells: dict[tuple[str, str], dict[tuple[str, ...], list[str]]] = {}
    touched = {leg.flow.family for leg, explained in rows if any(each.decided for each in explained)}
    for leg, explained in rows:
        if leg.flow.family not in touched:
            continue
        verdicts = dict.fromkeys(show_verdict(each.decision) for each in explained)
        outcome = (" or ".join(verdicts), *(_short_way(each.decided) for each in explained))
        cells.setdefault((leg.number, leg.name), {}).setdefault(outcome, []).append(leg.flow.family)
    table = [
        (*what, "both" if len(families) > 1 else families[0], *outcome)
        for what, outcomes in cells.items()
        for outcome, families in outcomes.items()
    ]
    heads = [each.backend for each in rows[0][1]] if rows else []
    printer.table(("TYPE", "FLOW", "FAMILY", "VERDICT", *(f"BY, IN {head}" for head in heads)), table)
    for family in (each for each in FAMILIES if each not in touched):
        printer.line(f"{'IPv6' if family == 'ip6' else 'IPv4'}: left alone, no rule decides about it")
    notes: dict[str, dict[str, None]] = {}
    for leg, explained in rows:
        for note in (note for each in explained for note in each.notes):
            notes.setdefault(note, {})[f"{leg.number} {leg.name}"] = None
    for note, concerned in notes.items():
        where = f"{', '.join(concerned)}: " if len(concerned) < len(cells) else ""
        printer.line(printer.paint(f"note: {where}{note}", "yellow"))


def _short_way(way: Sequence[Place]) -> str:
    """Without the family, which has a column."""
    if not way:
        return "no rule"
    return " > ".join((f"{way[0].table.split()[-1]} {way[0].chain} {way[0].position}", *_tail(way[1:])))


def _tail(way: Sequence[Place]) -> Iterator[str]:
    return (f"{each.chain} {each.position}" for each in way)


# --- JSON ----------------------------------------------------------------------------------------------------


def flow_fields(flow: Flow) -> dict[str, Any]:
    """A flow, addresses as text."""
    ends = {"source": show_address(flow.source), "destination": show_address(flow.destination)}
    return {**flow._asdict(), **ends, "protocol": PROTOCOLS.get(flow.protocol, flow.protocol)}


def explanation_fields(each: Explanation, others: tuple[Otherwise, ...]) -> dict[str, Any]:
    """An explanation with all that it holds."""
    sights = [
        {
            "hook": sight.hook,
            "flow": flow_fields(sight.flow),
            "rules": [{**step.place._asdict(), **step._asdict(), "place": str(step.place)} for step in sight.steps],
        }
        for sight in each.sights
    ]
    return {
        "backend": each.backend,
        **_decision_fields(each.decision, each.decided),
        "answers": each.answers,
        "path": each.path,
        "hooks": sights,
        "would_differ_if": [{"change": o.change, **_decision_fields(o.decision, o.decided)} for o in others],
        "notes": each.notes,
    }


def types_fields(leg: Leg, explained: list[Explanation]) -> dict[str, Any]:
    """One connection of a traffic type, with the outcome in each dialect."""
    outcomes = [
        {"backend": e.backend, **_decision_fields(e.decision, e.decided), "path": e.path, "notes": e.notes}
        for e in explained
    ]
    return {"type": leg.number, "name": leg.name, "flow": flow_fields(leg.flow), "outcomes": outcomes}


def _decision_fields(decision: Decision, decided: Sequence[Place]) -> dict[str, Any]:
    address = show_address(decision.address) if decision.address else ""
    outcome = {"verdict": decision.verdict, "port": decision.port, "address": address, "zone": decision.zone}
    return {**outcome, "decided_by": [place._asdict() for place in decided]}
