"""`netapply history`: the changes that were made, the newest last."""

from __future__ import annotations

import time

from netapply import history
from netapply.api import open_capture
from netapply.cli.output import Printer
from netapply.cli.words import Arguments
from netapply.errors import NamespaceError
from netapply.journal import Journal


def print_history(arguments: Arguments, printer: Printer) -> int:
    """All that the state directory has, or what was done to the namespace that is named."""
    events = _events(arguments)
    if printer.json:
        printer.document("history", {"events": [event._asdict() for event in events]})
        return 0
    if not events:
        printer.line("no change is known")
        return 0
    printer.table(
        ("WHEN", "NAMESPACE", "STATE", "WHAT", "RESULT", "BACKEND", "PLAN", "WHO", "WHY"),
        [_row(event) for event in events],
    )
    return 0


def _events(arguments: Arguments) -> tuple[history.Event, ...]:
    journal = Journal(arguments.state_dir)
    if arguments.netns is None and not arguments.host:
        return history.events(journal)
    try:
        with open_capture(arguments.netns, host=arguments.host) as capture:
            return history.events(journal, history.identity_of(capture.namespace.identity))
    except NamespaceError:  # one that is gone is told by the name that it had
        events = tuple(event for event in history.events(journal) if event.name == arguments.netns)
        if not events:
            raise
        return events


def _row(event: history.Event) -> tuple[object, ...]:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    who = f"{event.sudo_user or f'uid {event.uid}'} (process {event.pid})"
    why = event.reason or event.command
    return (
        when,
        event.name,
        event.state,
        event.operation,
        event.result,
        event.backend,
        event.fingerprint[:12],
        who,
        "".join(letter if letter.isprintable() else "?" for letter in why),
    )
