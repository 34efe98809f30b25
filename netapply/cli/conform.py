"""`netapply conform`: the conformance suite on one backend, and a table of what came of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from netapply.cli.output import Printer
from netapply.conformance.case import LEVELS, VERSION, Case, Level, Outcome
from netapply.conformance.cases import cases_of
from netapply.conformance.junit import junit
from netapply.conformance.model import arbitrary_cases
from netapply.conformance.runner import Report, Runner
from netapply.conformance.shrink import shown, shrink
from netapply.conformance.unprivileged import enter_user_namespace
from netapply.errors import NetapplyError, PlanError, UnsupportedError

SHOWN = 8  # differences of one case


def run_conform(
    printer: Printer,
    *,
    backend: str,
    level: str,
    pattern: str,
    seed: int | None,
    report_to: str | None,
    only_list: bool,
) -> int:
    """Run the suite and print the table; 1 if any case failed, or none passed."""
    chosen: Level = next(each for each in LEVELS if each == level)
    cases = [*cases_of(chosen, pattern)]
    if chosen == "stress":
        cases += [case for case in arbitrary_cases(seed or 0) if pattern in case.name]
    if not cases:
        raise NetapplyError(f"no case of level {level} is called {pattern!r}", next_step="netapply conform --list")
    if seed is not None:
        random.Random(seed).shuffle(cases)  # noqa: S311 - an order that can be repeated
    if only_list:
        return _list(cases, printer)
    note = enter_user_namespace()
    if note:
        printer.note(note)
    report = _run(backend, cases, printer)
    if report_to:
        _write(report_to, junit(report))
    if printer.json:
        printer.document("conform", _as_json(report, chosen), ok=report.good)
    else:
        _print(report, chosen, printer)
    return 0 if report.good else 1


def _run(backend: str, cases: Sequence[Case], printer: Printer) -> Report:
    with Runner(backend) as runner:
        outcomes: list[Outcome] = []
        for number, case in enumerate(cases, 1):
            printer.progress(f"{backend} {number}/{len(cases)} {case.name}")
            outcomes.append(_smaller(runner, case, runner.run(case)))
        printer.progress("")
        return runner.report(outcomes)


def _smaller(runner: Runner, case: Case, outcome: Outcome) -> Outcome:
    """With what an arbitrary case that failed shrinks to, ready for a table of cases."""
    if case.story != "model" or outcome.status != "failed":
        return outcome

    def fails(smaller: Case) -> bool:
        """Not by being no plan, or none of the layout."""
        try:
            wrong = runner.run(smaller).differences
        except PlanError:
            return False
        return any(not each.startswith(UnsupportedError.__name__) for each in wrong)

    small = shrink(case, fails)
    return outcome._replace(differences=(*outcome.differences, f"it takes no more than {shown(small)}"))


def _list(cases: Sequence[Case], printer: Printer) -> int:
    if printer.json:
        found = [{"name": each.name, "level": each.level, "since": each.since} for each in cases]
        printer.document("conform", {"suite": VERSION, "cases": found})
        return 0
    for case in cases:
        printer.line(f"{case.level:7}{case.name}")
    return 0


def topic(name: str) -> str:
    """What a case is about: its name's first word."""
    return name.replace(":", " ").replace(".", " ").split()[0]


def _print(report: Report, level: Level, printer: Printer) -> None:
    rows: list[tuple[object, ...]] = []
    for about, group in groupby(sorted(report.outcomes, key=lambda each: topic(each.case)), lambda e: topic(e.case)):
        rows.append(_row(about, [*group]))
    rows.append(_row("all", report.outcomes))
    printer.line(printer.paint(f"suite {VERSION}, level {level}: {report.backend} on {report.kernel}", "bold"))
    printer.table(("ABOUT", "CASES", "PASSED", "FAILED", "SKIPPED", "PROBES", "SECONDS"), rows)
    for outcome in report.outcomes:
        if outcome.status == "failed":
            printer.line(printer.paint(f"failed: {outcome.case}", "red"))
            for wrong in outcome.differences[-SHOWN:]:  # the last of an arbitrary case is what it shrank to
                printer.line(f"  {wrong}")
            if len(outcome.differences) > SHOWN:
                printer.line(f"  and {len(outcome.differences) - SHOWN} more")
    _print_skipped(report, printer)
    for complaint in report.complaints:
        printer.line(printer.paint(f"the kernel says: {complaint}", "yellow"))
    for unseen in report.unseen:
        printer.line(f"not looked at: {unseen}")
    _print_verdict(report, printer)


def _row(about: str, outcomes: Sequence[Outcome]) -> tuple[object, ...]:
    counts = [sum(each.status == status for each in outcomes) for status in ("passed", "failed", "skipped")]
    return (
        about,
        len(outcomes),
        *counts,
        sum(each.probes for each in outcomes),
        f"{sum(each.seconds for each in outcomes):.1f}",
    )


def _print_skipped(report: Report, printer: Printer) -> None:
    skipped = sorted((each.skipped, each.case) for each in report.outcomes if each.status == "skipped")
    for reason, group in groupby(skipped, key=lambda each: each[0]):
        names = [name for _, name in group]
        printer.line(printer.paint(f"skipped {len(names)}: {reason}", "yellow"))
        printer.line("  " + ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else ""))


def _print_verdict(report: Report, printer: Printer) -> None:
    rate = f"{report.probes} probes, {report.rate:.0f} a second while probing; {report.seconds:.1f} s in all"
    taint = f"; the kernel has new taint {report.taint:#x}" if report.taint else ""
    if report.good:
        printer.line(printer.paint(f"{report.backend} conforms: {rate}", "green"))
    elif not report.count("passed"):
        printer.line(printer.paint(f"nothing was shown: no case passed; {rate}{taint}", "red"))
    else:
        printer.line(printer.paint(f"{report.backend} does not conform: {rate}{taint}", "red"))


def _as_json(report: Report, level: Level) -> dict[str, Any]:
    body = {**report._asdict(), "outcomes": [each._asdict() for each in report.outcomes]}
    counts = {status: report.count(status) for status in ("passed", "failed", "skipped")}
    return {"suite": VERSION, "level": level, **counts, "rate": report.rate, **body}


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise NetapplyError(
            f"the JUnit report {path} cannot be written: {error.strerror}", next_step="name another place by --junit"
        ) from error
