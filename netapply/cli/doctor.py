"""`netapply doctor`: what could keep capture from working here, a line each, with a fix."""

from __future__ import annotations

from netapply.api import open_capture
from netapply.cli.output import Printer
from netapply.cli.words import Arguments
from netapply.doctor import Finding, Sight, examine

HEALTHY, TROUBLED = 0, 3
_COLOURS = {"ok": "green", "notice": "yellow", "trouble": "red", "unseen": "yellow"}


def run_doctor(arguments: Arguments, printer: Printer) -> int:
    """Look, print, and write the report if one is wanted; exit code 3 where something is wrong."""
    plan = None
    if arguments.plan:
        from netapply.planfile import format_of, load_plan, read_source

        plan = load_plan(read_source(arguments.plan), format=format_of(arguments.plan), source=arguments.plan)
    # Nothing is changed, so the machine's own namespace may be looked at by everybody.
    with open_capture(arguments.netns, host=True, state_directory=arguments.state_dir) as capture:
        sight = Sight(capture, plan)
        findings = tuple(examine(sight))
        written: tuple[str, ...] = ()
        if arguments.report:
            from netapply.doctor.report import write_report

            written = write_report(arguments.report, sight, findings)
    if printer.json:
        printer.document("doctor", {"findings": [each._asdict() for each in findings], "report": written})
    else:
        for finding in findings:
            _print(finding, printer)
        if written:
            printer.line(f"{arguments.report}: {', '.join(written)}; addresses and names are replaced: look through it")
    return TROUBLED if any(each.result == "trouble" for each in findings) else HEALTHY


def _print(finding: Finding, printer: Printer) -> None:
    word = printer.paint(f"{finding.result:<8}", _COLOURS[finding.result])
    printer.line(f"{word} {finding.check:<24} {_one_line(finding.evidence)}")
    if finding.fix:
        printer.line(f"{'':<8} {'':<24} {printer.paint('fix: ' + finding.fix, 'dim')}")


def _one_line(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text)
