"""Each command: read its input, call one operation, print the outcome, return the exit code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from netapply.api import Capture, open_capture
from netapply.cli.output import Printer, print_result
from netapply.cli.words import Arguments
from netapply.results import Diff

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
    with open_named(arguments) as capture:
        result = capture.apply(plan, backend=arguments.backend, layout=arguments.layout, fingerprint=fingerprint(plan))
    if printer.json:
        printer.document("apply", {**result._asdict(), "warnings": [each._asdict() for each in warnings]})
        return 0
    if not arguments.quiet:
        print_result(result, printer)
    for warning in warnings:
        printer.note(f"warning: {warning.path}: {warning.message}; {warning.advice}")
    return 0


def clean(arguments: Arguments, printer: Printer) -> int:
    """Remove all that is ours."""
    with open_named(arguments) as capture:
        result = capture.clean(backend=arguments.backend, layout=arguments.layout)
    if printer.json:
        printer.document("clean", result._asdict())
    else:
        print_result(result, printer)
    return 0


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
    with open_named(arguments) as capture:
        found = capture.verify(plan, backend=arguments.backend, layout=arguments.layout)
        if arguments.deep:
            from netapply.ownership import ownership
            from netapply.reader import deep_changes

            deep = deep_changes(capture.namespace, found.backend, ownership(arguments.layout))
            found = found._replace(changes=found.changes + deep)
    _print_diff("verify", found, printer, f"holds, in {found.backend}")
    return 0 if found.same else DRIFT


def _print_diff(command: str, found: Diff, printer: Printer, good: str) -> None:
    if printer.json:
        body = {"backend": found.backend, "reason": found.reason, "same": found.same}
        printer.document(command, {**body, "changes": [change._asdict() for change in found.changes]})
        return
    if found.same:
        printer.line(printer.paint(good, "green"))
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


def demo(arguments: Arguments, printer: Printer) -> int:
    """Send real packets."""
    from netapply.cli.demo import Mode, run_demo

    modes: tuple[Mode, ...] = ("redirect", "tproxy") if arguments.mode == "both" else (arguments.mode,)
    return run_demo(printer, backends=tuple(arguments.backend or ()), modes=modes, keep=arguments.keep)


def conform(arguments: Arguments, printer: Printer) -> int:
    """Run the conformance suite."""
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


def completion(arguments: Arguments, printer: Printer) -> int:
    """Print a shell's completion script."""
    shtab: Any = __import__("shtab")  # Any: it is typed, but only this command needs it
    from netapply.cli.arguments import build_parser

    printer.line(shtab.complete(build_parser(), arguments.shell))
    return 0


COMMANDS: Mapping[str, Callable[[Arguments, Printer], int]] = {
    "apply": apply,
    "clean": clean,
    "render": render,
    "diff": diff,
    "verify": verify,
    "show": show,
    "explain": explain,
    "detect": detect,
    "schema": schema,
    "import": import_settings,
    "demo": demo,
    "conform": conform,
    "completion": completion,
}
