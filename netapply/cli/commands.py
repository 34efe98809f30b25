"""Each command: read its input, call one operation, print the outcome, return the exit code."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from netapply.api import Capture, open_capture
from netapply.cli.output import Printer, print_result
from netapply.cli.words import Arguments
from netapply.errors import NetapplyError
from netapply.results import Diff, Result

if TYPE_CHECKING:
    from netapply.canary import Canary
    from netapply.cli.client import Client
    from netapply.plan import CapturePlan
    from netapply.trial import Waiter

CHANGES, DRIFT = 2, 3


def open_named(arguments: Arguments) -> Capture:
    """The namespace that the command line names. Raises NamespaceError."""
    return open_capture(
        arguments.netns,
        host=arguments.host,
        lock_timeout=arguments.lock_timeout,
        state_directory=arguments.state_dir,
    )


def apply(arguments: Arguments, printer: Printer) -> int:
    """Apply a plan."""
    from netapply.lint import lint
    from netapply.planfile import examine_plan, fingerprint, format_of, read_source

    loaded = examine_plan(read_source(arguments.plan), format=format_of(arguments.plan), source=arguments.plan)
    plan, warnings = loaded.plan, lint(*loaded)
    agent = _agent(arguments)
    canaries: list[Canary] = []
    if agent is not None:
        from netapply.cli import delegation

        if arguments.probe:
            with open_named(arguments) as capture:
                proof = partial(_send, capture, canaries)
                result, said, waits = delegation.apply(agent, arguments, plan, proof)
        else:
            result, said, waits = delegation.apply(agent, arguments, plan)
        if arguments.confirm:
            result = result._replace(notes=(*result.notes, _on_trial(arguments, waits=waits), *said))
    else:
        waiter = _waiter(arguments) if arguments.confirm else None
        with open_named(arguments) as capture:
            tried = plan if waiter is None else waiter.sparing(capture, plan, arguments.backend, arguments.layout)
            put = partial(
                capture.apply,
                tried,
                backend=arguments.backend,
                layout=arguments.layout,
                fingerprint=fingerprint(tried),
                proof=_proof(capture, tried, canaries) if arguments.probe else None,
                flush=arguments.flush_conntrack,
                reason=arguments.reason,
            )
            result = _kept(capture, put) if waiter is None else put()
            if waiter is not None:
                waits = waiter.wait(capture, arguments.confirm) is not None
                result = result._replace(notes=(*result.notes, _on_trial(arguments, waits=waits), *waiter.said))
    if printer.json:
        told = {"canaries": _told(canaries)} if arguments.probe else {}
        printer.document("apply", {**result._asdict(), "warnings": [each._asdict() for each in warnings], **told})
        return 0
    if not arguments.quiet:
        print_result(result, printer)
        _print_canaries(canaries, printer)
    for warning in warnings:
        printer.note(f"warning: {warning.path}: {warning.message}; {warning.advice}")
    return 0


def _kept(capture: Capture, put: Callable[[], Result]) -> Result:
    """Apply for good: what is on trial is not any more, also where it is this very plan."""
    if not capture.journal.seems_on_trial(capture.namespace.identity):
        return put()
    from netapply import trial

    result = put()
    if result.changed:
        return result
    if not trial.keep(capture):  # it has gone back meanwhile
        return put()
    return result._replace(notes=(*result.notes, "this was on trial; it is not any more, and stays"))


def _waiter(arguments: Arguments) -> Waiter:
    from netapply.trial import start

    return start(lambda: open_named(arguments))


def _on_trial(arguments: Arguments, *, waits: bool) -> str:
    if not waits:
        return "nothing is on trial: the state that stands is the one that stood before"
    where = f" -N {arguments.netns}" if arguments.netns else " --host" if arguments.host else ""
    return f"on trial for {arguments.confirm:g} s: it goes back unless `netapply confirm{where}` comes"


def _proof(capture: Capture, plan: CapturePlan, sent: list[Canary]) -> Callable[[], None]:
    """Canary connections that the plan decides about; `sent` has the last of them."""
    return partial(_send, capture, sent, plan)


def _send(capture: Capture, sent: list[Canary], plan: CapturePlan) -> None:
    from netapply.canary import prove

    sent[:] = prove(capture.namespace, plan)


def _told(canaries: list[Canary]) -> list[dict[str, object]]:
    return [{**each._asdict(), "expected": each.expected._asdict(), "right": each.right} for each in canaries]


def _print_canaries(canaries: list[Canary], printer: Printer) -> None:
    for each in canaries:
        printer.line(f"probe {each}")


def clean(arguments: Arguments, printer: Printer) -> int:
    """Remove all that is ours."""
    agent, result = _agent(arguments), None
    if agent is not None:
        from netapply.cli import delegation

        result = delegation.clean(agent, arguments)
    if result is None:
        with open_named(arguments) as capture:
            result = capture.clean(backend=arguments.backend, layout=arguments.layout, reason=arguments.reason)
    if printer.json:
        printer.document("clean", result._asdict())
    else:
        print_result(result, printer)
    return 0


def confirm(arguments: Arguments, printer: Printer) -> int:
    """Keep what is on trial."""
    from netapply import trial

    with open_named(arguments) as capture:
        confirmed = trial.confirm(capture)
    if not confirmed:
        agent = _agent(arguments)
        if agent is None:
            raise trial.nothing_is_on_trial()
        from netapply.cli import delegation

        delegation.confirm(agent, arguments)
    if printer.json:
        printer.document("confirm", {})
    else:
        printer.line("confirmed")
    return 0


def extend(arguments: Arguments, printer: Printer) -> int:
    """Give what is on trial more time."""
    from netapply import trial

    with open_named(arguments) as capture:
        extended = trial.extend(capture, arguments.seconds)
    if not extended:
        agent = _agent(arguments)
        if agent is None:
            raise trial.nothing_is_on_trial()
        from netapply.cli import delegation

        delegation.extend(agent, arguments)
    if printer.json:
        printer.document("extend", {"seconds": arguments.seconds})
    else:
        printer.line(f"on trial for {arguments.seconds:g} s from now")
    return 0


def _agent(arguments: Arguments) -> Client | None:
    """The agent, where one keeps this machine's namespaces; another journal than its own is none of its business."""
    path = os.environ.get("NETAPPLY_AGENT")
    if path is None:
        elsewhere = arguments.state_dir or os.environ.get("NETAPPLY_STATE_DIR")
        path = "" if elsewhere else "/run/netapply-agent/control.sock"
    if not path or getattr(arguments, "alone", False) or not os.path.exists(path):
        return None
    from netapply.cli.delegation import find_agent

    return find_agent(path)


def recover(arguments: Arguments, printer: Printer) -> int:
    """Finish or undo an interrupted run."""
    with open_named(arguments) as capture:
        result = capture.recover()
    if printer.json:
        printer.document("recover", result._asdict())
    else:
        print_result(result, printer)
    return 0


def migrate(arguments: Arguments, printer: Printer) -> int:
    """Bring ours to another dialect."""
    from netapply.planfile import fingerprint, read_plan

    plan, agent = read_plan(arguments.plan), _agent(arguments)
    canaries: list[Canary] = []
    if agent is not None:
        from netapply.cli import delegation

        delegation.refuse(agent, arguments)
    with open_named(arguments) as capture:
        adopt = None
        if arguments.adopt:
            from netapply.dropin.run import whatever_istio_left

            adopt = whatever_istio_left(capture)
        result = capture.migrate(
            plan,
            arguments.to,
            layout=arguments.layout,
            adopt=adopt,
            fingerprint=fingerprint(plan),
            proof=None if arguments.no_probe else _proof(capture, plan, canaries),
            reason=arguments.reason,
        )
    if printer.json:
        printer.document("migrate", {**result._asdict(), "canaries": _told(canaries)})
    else:
        print_result(result, printer)
        _print_canaries(canaries, printer)
    return 0


def rollback(arguments: Arguments, printer: Printer) -> int:
    """Bring back an earlier state."""
    agent = _agent(arguments)
    if agent is not None:
        from netapply.cli import delegation

        delegation.refuse(agent, arguments)
    with open_named(arguments) as capture:
        result = capture.rollback(arguments.back, reason=arguments.reason)
    if printer.json:
        printer.document("rollback", result._asdict())
    else:
        print_result(result, printer)
    return 0


def history(arguments: Arguments, printer: Printer) -> int:
    """Print the changes that were made: those of the namespace that is named, or of all."""
    from netapply.cli.past import print_history

    return print_history(arguments, printer)


def render(arguments: Arguments, printer: Printer) -> int:
    """Print the rules of a plan."""
    from netapply.backend import find_backend
    from netapply.cli.rendering import rendering
    from netapply.planfile import read_plan

    backend = find_backend(arguments.backend)
    made = rendering(read_plan(arguments.plan), backend, arguments.layout)
    if printer.json:
        printer.document("render", {"backend": backend.name, **made._asdict()})
    else:
        printer.line(made.lines)
    return 0


def diff(arguments: Arguments, printer: Printer) -> int:
    """Compare the live kernel with a plan."""
    from netapply.planfile import read_plan

    plan = read_plan(arguments.plan)
    with open_named(arguments) as capture:
        found = capture.diff(plan, backend=arguments.backend, layout=arguments.layout)
    _print_diff("diff", found, printer, "nothing to do: the kernel holds the plan")
    return 0 if found.same else CHANGES


def verify(arguments: Arguments, printer: Printer) -> int:
    """Compare the live kernel with what was applied."""
    from netapply.planfile import read_plan

    plan = read_plan(arguments.plan) if arguments.plan else None
    if arguments.probe and plan is None:
        raise NetapplyError("only a plan says where connections should go", next_step="netapply verify PLAN --probe")
    canaries: list[Canary] = []
    with open_named(arguments) as capture:
        found = capture.verify(plan, backend=arguments.backend, layout=arguments.layout)
        if arguments.deep:
            from netapply.ownership import ownership
            from netapply.reader import deep_changes

            deep = deep_changes(capture.namespace, found.backend, ownership(arguments.layout))
            found = found._replace(changes=found.changes + deep)
        if plan is not None and arguments.probe and found.same:
            _proof(capture, plan, canaries)()
    _print_diff("verify", found, printer, f"holds, in {found.backend}", canaries if arguments.probe else None)
    return 0 if found.same else DRIFT


def _print_diff(command: str, found: Diff, printer: Printer, good: str, canaries: list[Canary] | None = None) -> None:
    if printer.json:
        body: dict[str, object] = {"backend": found.backend, "reason": found.reason, "same": found.same}
        if canaries is not None:
            body["canaries"] = _told(canaries)
        printer.document(command, {**body, "changes": [change._asdict() for change in found.changes]})
        return
    if found.same:
        printer.line(printer.paint(good, "green"))
    _print_canaries(canaries or [], printer)
    where = ""
    for change in found.changes:
        if change.where != where:
            where = change.where
            printer.line(printer.paint(where, "bold"))
        sign, colour = ("+", "green") if change.kind == "add" else ("-", "red")
        reason = f"  # {change.path}" if change.path else ""
        printer.line(printer.paint(f"  {sign} {change.what}", colour) + printer.paint(reason, "dim"))


def show(arguments: Arguments, printer: Printer) -> int:
    """Print live rules."""
    with open_named(arguments) as capture:
        if arguments.all:
            from netapply.reader import list_ruleset

            printer.line(list_ruleset(capture.namespace, as_json=printer.json).rstrip("\n"))
            return 0
        rules = capture.show(backend=arguments.backend, layout=arguments.layout)
    if printer.json:
        printer.document("show", {"rules": [rule._asdict() for rule in rules]})
        return 0
    if not rules:
        printer.line("nothing of ours is here")
    where = ("", "", "")
    for rule in rules:
        if where != (rule.family, rule.table, rule.chain):
            where = (rule.family, rule.table, rule.chain)
            printer.line(printer.paint(" ".join(where), "bold"))
        printer.line(f"{rule.packets:>10} {rule.bytes:>12}  {rule.rule}")
    return 0


def detect(arguments: Arguments, printer: Printer) -> int:
    """Print the candidates."""
    with open_named(arguments) as capture:
        found = capture.detect(layout=arguments.layout)
    if printer.json:
        body = {"chosen": found.chosen, "reason": found.reason}
        printer.document("detect", {**body, "candidates": [each._asdict() for each in found.candidates]})
        return 0 if found.chosen else 1
    rows = [
        (each.backend, each.status, "yes" if each.ours else "-", "yes" if each.in_use else "-", each.reason)
        for each in found.candidates
    ]
    printer.table(("BACKEND", "STATUS", "OURS", "IN USE", "REASON"), rows)
    for each in found.candidates:
        for feature, remedy in each.missing:
            printer.line(f"{each.backend} lacks {feature}: {remedy}")
    printer.line(f"auto: {found.chosen or 'none'} ({found.reason})")
    return 0 if found.chosen else 1


def explain(arguments: Arguments, printer: Printer) -> int:
    """Tell why a packet goes where it goes."""
    from netapply.cli.explain import run_explain

    return run_explain(arguments, printer)


def graph(arguments: Arguments, printer: Printer) -> int:
    """Draw the rules."""
    from netapply.cli.graph import run_graph

    return run_graph(arguments, printer)


def schema(_: Arguments, printer: Printer) -> int:
    """Print the JSON Schema of plan files."""
    import json

    from netapply.schema import json_schema

    printer.line(json.dumps(json_schema(), indent=2))
    return 0


def import_settings(arguments: Arguments, printer: Printer) -> int:
    """Print another tool's settings as a plan file."""
    from netapply.cli import imports

    return imports.import_settings(arguments, printer)


def agent(arguments: Arguments, printer: Printer) -> int:
    """Run the agent."""
    from netapply.cli.service import run_agent

    return run_agent(arguments, printer)


def status(arguments: Arguments, printer: Printer) -> int:
    """Print what the agent keeps."""
    from netapply.cli import watching

    return watching.status(arguments, printer)


def watch(arguments: Arguments, printer: Printer) -> int:
    """Print what the agent does."""
    from netapply.cli import watching

    return watching.watch(arguments, printer)


def top(arguments: Arguments, printer: Printer) -> int:
    """Show live counters."""
    from netapply.cli.top import run_top

    return run_top(arguments, printer)


def demo(arguments: Arguments, printer: Printer) -> int:
    """Send real packets."""
    from netapply.cli.demo import Mode, run_demo

    modes: tuple[Mode, ...] = ("redirect", "tproxy") if arguments.mode == "both" else (arguments.mode,)
    return run_demo(printer, backends=tuple(arguments.backend or ()), modes=modes, keep=arguments.keep)


def conform(arguments: Arguments, printer: Printer) -> int:
    """Run the conformance suite, or have it prove itself."""
    if arguments.mutations:
        from netapply.cli.prove import run_prove

        return run_prove(printer, backend=arguments.backend, pattern=arguments.pattern)
    from netapply.cli.conform import run_conform

    return run_conform(
        printer,
        backend=arguments.backend,
        level=arguments.level,
        pattern=arguments.pattern,
        seed=arguments.seed,
        report_to=arguments.junit,
        only_list=arguments.only_list,
    )


def install_unit(arguments: Arguments, printer: Printer) -> int:
    """Write the agent's units."""
    from netapply.cli.units import install

    return install(arguments, printer)


def doctor(arguments: Arguments, printer: Printer) -> int:
    """Look for what could keep capture from working."""
    from netapply.cli.doctor import run_doctor

    return run_doctor(arguments, printer)


def completion(arguments: Arguments, printer: Printer) -> int:
    """Print a shell's completion script."""
    shtab: Any = __import__("shtab")  # Any: it is typed, but only this command needs it
    from netapply.cli.arguments import build_parser

    printer.line(shtab.complete(build_parser(), arguments.shell))
    return 0


COMMANDS: Mapping[str, Callable[[Arguments, Printer], int]] = {
    "apply": apply,
    "clean": clean,
    "recover": recover,
    "rollback": rollback,
    "migrate": migrate,
    "history": history,
    "render": render,
    "diff": diff,
    "verify": verify,
    "show": show,
    "explain": explain,
    "graph": graph,
    "detect": detect,
    "schema": schema,
    "import": import_settings,
    "agent": agent,
    "status": status,
    "watch": watch,
    "top": top,
    "confirm": confirm,
    "extend": extend,
    "demo": demo,
    "conform": conform,
    "install-unit": install_unit,
    "doctor": doctor,
    "completion": completion,
}
