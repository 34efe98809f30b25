"""What the command prints: text for people, JSON for programs. Colour only on a terminal, and never with NO_COLOR."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from netapply.errors import NetapplyError, PlanError
from netapply.results import RESULT_VERSION, Result

_COLOURS = {"red": "31", "green": "32", "yellow": "33", "dim": "2", "bold": "1"}


_CODES = frozenset((*_COLOURS.values(), "0"))


class Printer:
    """One command's output. `form` is "text" or "json": one object on standard output, also for errors."""

    def __init__(self, form: str, out: TextIO, err: TextIO) -> None:
        self.json = form == "json"
        self._out = out
        self._err = err
        self._colour = out.isatty() and "NO_COLOR" not in os.environ

    def line(self, text: str = "") -> None:
        """One line of text."""
        self._write(self._safe(text) + "\n")

    def flush(self) -> None:
        """Write what is left. Raises NetapplyError where it cannot be written."""
        self._write("", flush=True)

    def _safe(self, text: str) -> str:
        """Without what a terminal would obey or cannot show: in a namespace anybody may have named a chain."""
        if not self._colour:
            return _shown(text)
        first, *painted = text.split("\x1b[")
        return _shown(first) + "".join(
            f"\x1b[{_shown(each)}" if each.partition("m")[0] in _CODES else _shown(f"\x1b[{each}") for each in painted
        )

    def _write(self, text: str, *, flush: bool = False) -> None:
        try:
            self._out.write(text)
            if flush:
                self._out.flush()
        except BrokenPipeError:
            # The reader has gone (`netapply show | head`): what was done is done, and nobody is left to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())
            raise NetapplyError(f"the output cannot be written: {error.strerror}") from error

    def note(self, text: str) -> None:
        """A line beside the output: a warning, or progress."""
        self._err.write(f"netapply: {_shown(text)}\n")

    def progress(self, text: str) -> None:
        """What is going on, on a terminal alone; the next one replaces it, and "" takes it away."""
        if self._err.isatty():
            self._err.write(f"\r\x1b[K{text}")
            self._err.flush()

    def paint(self, text: str, colour: str) -> str:
        """The text in a colour, on a terminal."""
        return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m" if self._colour else text

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Columns with their heads, aligned; numbers to the right."""
        cells = [[str(cell) for cell in row] for row in rows]
        kinds = [[isinstance(cell, int) for cell in row] for row in rows] if isinstance(rows, Sequence) else []
        widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
        self.line(self.paint(_row(head, widths, []), "bold").rstrip())
        for at, row in enumerate(cells):
            self.line(_row(row, widths, kinds[at] if kinds else []).rstrip())

    def document(self, command: str, body: dict[str, Any], *, ok: bool = True) -> None:
        """One JSON object with its version."""
        whole = {"version": RESULT_VERSION, "command": command, "ok": ok, **body}
        self.line(json.dumps(whole, indent=2, default=_plain))

    def error(self, command: str, error: NetapplyError, *, faulty: str = "the plan has") -> None:
        """What failed, where, why, and what to do next. `faulty` is where a PlanError's faults are."""
        if self.json:
            from netapply.jsonform import error_fields

            self.document(command, {"error": error_fields(error)}, ok=False)
            return
        if isinstance(error, PlanError):
            count = len(error.faults)
            self.note(f"{command}: {faulty} {count} fault{'s' if count > 1 else ''}; nothing was touched")
            for fault in error.faults:
                self._err.write(f"  {fault}\n")
        else:
            self.note(f"{command}: {error}")
        if error.next_step:
            self._err.write(f"  next: {error.next_step}\n")


def print_result(result: Result, printer: Printer) -> None:
    """What an apply or clean did, as text."""
    changed = printer.paint("changed" if result.changed else "unchanged", "yellow" if result.changed else "green")
    where = f" by {result.backend}" if result.backend else ""
    printer.line(f"{changed}{where} ({result.reason}) in {result.duration * 1000:.1f} ms")
    for step in result.steps:
        printer.line(f"  {step}")
    if result.ipv6:
        effective = "yes, read back from the kernel" if result.effective else "no"
        printer.line(f"effective: {effective}; IPv6: {result.ipv6}")
    if result.existing_flows:
        printer.line(
            f"{result.existing_flows} open connections stay as they were: NAT decides on a flow's first packet"
        )
    for text in (*result.notes, *(f"degraded: {each}" for each in result.degraded)):
        printer.note(text)


def _row(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    padded = (
        cell.rjust(width) if i < len(right) and right[i] else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join(padded)


def _plain(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _shown(text: str) -> str:
    """Lines of text, with escapes for what is neither printable nor a space between words."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
