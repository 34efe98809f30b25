"""What the agent shows: `netapply status` at a glance, `netapply watch` as it happens. Dicts of JSON to text."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from netapply.cli.client import Client, quoted, reader
from netapply.cli.output import Printer
from netapply.cli.words import Arguments

HOLDS, DOES_NOT = 0, 3
_MOST_CHANGES = 8
_COLOURS = {"inplace": "green", "healing": "yellow", "dormant": "yellow", "failed": "red", "quarantined": "red"}
_EVENTS = {"healed": "green", "drifted": "yellow", "failed": "red", "quarantined": "red", "file-rejected": "red"}


def agent_of(arguments: Arguments) -> Client:
    """The agent that the command line names, or the machine's."""
    return Client(arguments.socket) if arguments.socket else reader()


def status(arguments: Arguments, printer: Printer) -> int:
    """Every namespace, or one; exit code 3 where a plan is not in force."""
    agent = agent_of(arguments)
    where = f"/{_named(arguments.netns)}" if arguments.netns else ""
    answer = agent.ask("GET", f"/v1/namespaces{where}")
    found: list[dict[str, Any]] = [answer["namespace"]] if where else answer["namespaces"]
    if printer.json:
        printer.document("status", {"namespaces": found})
    elif not found:
        printer.line("the agent keeps no namespace")
    else:
        now = time.time()
        rows = [_row(each, now) for each in found]
        printer.table(("NAMESPACE", "STATE", "BACKEND", "PLAN", "SINCE", "HEALS", "LAST CAUSE", "OPEN"), rows)
        for each in found:
            if each["error"]:
                printer.line(printer.paint(f"{each['name']}: {each['error']}", "red"))
            if each["confirm_by"]:
                left = max(0.0, each["confirm_by"] - now)
                printer.line(f"{each['name']}: on trial, goes back in {left:.0f} s unless: netapply confirm")
    return DOES_NOT if any(each["state"] in ("failed", "quarantined") for each in found) else HOLDS


def _named(spec: str) -> str:
    return quoted(os.path.abspath(spec) if "/" in spec else spec)


def _row(each: Mapping[str, Any], now: float) -> tuple[object, ...]:
    return (
        printable(each["name"]),
        each["state"],
        each["backend"] or "-",
        printable(os.path.basename(each["source"])) or "-",
        age(now - each["last_apply"]) if each["last_apply"] else "-",
        each["heals"],
        who(each["last_cause"]) or "-",
        f"{each['fail_open_seconds']:.1f} s" if each["fail_open_seconds"] else "-",
    )


def age(seconds: float) -> str:
    """A length of time in its largest unit."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def who(cause: Mapping[str, Any] | None) -> str:
    """Whom the kernel named; "" for nobody."""
    return f"{printable(cause['process'])} ({cause['pid']})" if cause else ""


def printable(text: str) -> str:
    """Text of others, without what a terminal would take for orders."""
    return "".join(each if each.isprintable() else "?" for each in text)


# --- watch ---------------------------------------------------------------------------------------------------


def watch(arguments: Arguments, printer: Printer) -> int:
    """Print events until the agent ends, or Ctrl-C."""
    agent = agent_of(arguments)
    only = f"?namespace={quoted(arguments.netns)}" if arguments.netns else ""
    try:
        for event in agent.lines(f"/v1/events{only}"):
            if printer.json:
                printer.line(json.dumps(event, separators=(",", ":")))
            else:
                _print_event(event, printer)
            printer.flush()
    except KeyboardInterrupt:
        return 0
    printer.note("watch: the agent has ended")
    return 0


def _print_event(event: Mapping[str, Any], printer: Printer) -> None:
    at = time.strftime("%H:%M:%S", time.localtime(event["at"])) + f".{int(event['at'] % 1 * 1000):03}"
    kind = str(event["kind"])
    said = _SAID.get(kind, _fields)(event)
    name = printable(event.get("namespace", "") or event.get("path", "")) or "-"
    word = printer.paint(f"{kind:<13}", _EVENTS.get(kind, "bold"))
    printer.line(f"{printer.paint(at, 'dim')}  {word} {name}{'  ' if said else ''}{printable(said)}")
    changes = event.get("changes", ())
    for change in changes[:_MOST_CHANGES]:
        sign, colour = ("+", "green") if change["kind"] == "add" else ("-", "red")
        printer.line(printer.paint(f"  {sign} {printable(change['where'])}: {printable(change['what'])}", colour))
    if len(changes) > _MOST_CHANGES:
        printer.line(printer.paint(f"  … {len(changes) - _MOST_CHANGES} more: netapply watch -o json", "dim"))
    for fault in event.get("faults", ()):
        accepted = f"{fault['path']}: {fault['value']} is not accepted; {fault['accepted']}"
        printer.line(f"  {printable(accepted)}")


def _by(event: Mapping[str, Any]) -> str:
    return f" by {who(event['cause'])}" if event.get("cause") else ""


def _milliseconds(event: Mapping[str, Any]) -> str:
    return f"{event['seconds'] * 1000:.1f} ms"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _applied(event: Mapping[str, Any]) -> str:
    changed = "changed" if event["changed"] else "unchanged"
    return f"{event['fingerprint']} by {event['backend']}, {changed}, {_milliseconds(event)}"


def _failed(event: Mapping[str, Any]) -> str:
    again = f"; again at {_clock(event['again'])}" if event["again"] else ""
    step = f"; {event['next_step']}" if event["next_step"] else ""
    return f"{event['error']}{step}{again}"


def _drifted(event: Mapping[str, Any]) -> str:
    number = len(event["changes"])
    return f"{number} difference{'' if number == 1 else 's'}{_by(event)}"


def _fields(event: Mapping[str, Any]) -> str:
    """What an event of a later version says."""
    known = ("version", "kind", "at", "namespace")
    return ", ".join(f"{name} {value}" for name, value in event.items() if name not in known and value)


_SAID: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "applied": _applied,
    "removed": lambda event: f"{len(event['steps'])} steps",
    "drifted": _drifted,
    "healed": lambda event: f"in {_milliseconds(event)}{_by(event)}",
    "failed": _failed,
    "quarantined": lambda event: f"until {_clock(event['until'])}: {event['reason']}",
    "appeared": lambda event: f"inode {event['inode']}",
    "vanished": lambda _: "",
    "file-rejected": lambda event: f"{len(event['faults'])} faults; what it said last stays in force",
    "plan-changed": lambda event: event["fingerprint"] or "gone",
    "dormant": lambda event: event["reason"],
    "listening": lambda event: f"port {event['port']}, open for {event['open_seconds']:.1f} s",
    "recovered": lambda event: event["said"],
    "unconfirmed": lambda _: "what was before is in force again",
    "lost": lambda event: f"{event['count']} events were not told here: too slow",
}
