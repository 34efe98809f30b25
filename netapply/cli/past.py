"""`netapply history`: the changes that were made, the newest last."""

from __future__ import annotations

import time

from netapply import history
from netapply.api import open_capture
from netapply.cli.output import Printer
from netapply.cli.words import Arguments
from netapply.journal import Journal


def print_history(arguments: Arguments, printer: Printer) -> int:
    """All that the state directory has, or what was done to the namespace that is named."""
    wanted = ""
    if arguments.netns is not None or arguments.host:
        with open_capture(arguments.netns, host=arguments.host) as capture:
            wanted = history.identity_of(capture.namespace.identity)
    events = history.events(Journal(arguments.state_dir), wanted)
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
