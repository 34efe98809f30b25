"""`netapply top`: what the plans decide, as it happens, in a terminal. Plain ANSI: two dozen lines want no library."""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

from netapply.cli.client import Client, quoted
from netapply.cli.output import Printer
from netapply.cli.watching import agent_of, printable
from netapply.cli.words import Arguments
from netapply.errors import NetapplyError
from netapply.values import NamedTuple

_ALTERNATE, _BACK = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_REST = "\x1b[H", "\x1b[K", "\x1b[J"
_EVERY = 1.0
#: Counters are read from so many namespaces in a round; the others' stay as they were until their turn.
_MOST = 50
_NUMBERS = ("PKT/S", "BYTE/S", "PACKETS", "BYTES")
_UNITS = ("", "k", "M", "G", "T")


class Row(NamedTuple):
    """One decision: what decided in which namespace, what it counted, and how fast."""

    namespace: str
    decision: str
    packets: int
    bytes: int
    packets_a_second: float
    bytes_a_second: float


class Rates:
    """Counters over time: each look gives rows with what came since the one before. Pure but for its memory."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[float, int, int]] = {}
        self._rows: dict[str, list[Row]] = {}

    def look(self, namespace: str, rules: Iterable[Mapping[str, Any]], now: float) -> None:
        """Note a namespace's counters, seen at the monotonic second `now`."""
        sums: dict[str, tuple[int, int]] = {}
        for rule in rules:
            decision = rule["path"] or rule["rule"]
            packets, size = sums.get(decision, (0, 0))
            sums[decision] = packets + rule["packets"], size + rule["bytes"]
        rows: list[Row] = []
        for decision, (packets, size) in sums.items():
            at, packets_then, size_then = self._seen.get((namespace, decision), (now, packets, size))
            if packets < packets_then:  # the rules were replaced
                packets_then = size_then = 0
            span = now - at or 1.0
            rates = (packets - packets_then) / span, (size - size_then) / span
            rows.append(Row(namespace, decision, packets, size, *rates))
            self._seen[namespace, decision] = now, packets, size
        self._rows[namespace] = rows

    def keep(self, namespaces: Iterable[str]) -> None:
        """Forget all other namespaces."""
        known = frozenset(namespaces)
        self._rows = {name: rows for name, rows in self._rows.items() if name in known}
        self._seen = {key: seen for key, seen in self._seen.items() if key[0] in known}

    @property
    def rows(self) -> list[Row]:
        """The busiest first."""
        found = [row for rows in self._rows.values() for row in rows]
        return sorted(found, key=lambda row: (-row.packets_a_second, -row.packets, row.namespace, row.decision))


def run_top(arguments: Arguments, printer: Printer) -> int:
    """Show it until q or Ctrl-C; without a terminal, print one look."""
    agent, rates = agent_of(arguments), Rates()
    if printer.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        found = _look(agent, rates, arguments.netns, 0)
        if printer.json:
            printer.document("top", {"decisions": [row._asdict() for row in rates.rows]})
        else:
            printer.line("\n".join(screen(found, rates.rows, 160, 10_000)))
        return 0
    with _terminal():
        turn = 0
        while True:
            found = _look(agent, rates, arguments.netns, turn)
            width, height = shutil.get_terminal_size()  # 80 by 24 where the terminal does not tell
            lines = screen(found, rates.rows, width, height)
            sys.stdout.write(_HOME + "".join(line + _CLEAR_LINE + "\r\n" for line in lines) + _CLEAR_REST)
            sys.stdout.flush()
            turn += 1
            if _quits(_EVERY):
                return 0


def _look(agent: Client, rates: Rates, only: str | None, turn: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = agent.ask("GET", "/v1/namespaces")["namespaces"]
    if only:
        found = [each for each in found if only in (each["name"], each["path"])]
        if not found:
            raise NetapplyError(f"the agent does not know {only}", next_step="see `netapply status`")
    names = [each["name"] for each in found if each["backend"] and each["state"] != "gone"]
    rates.keep(names)
    first = turn * _MOST % len(names) if names else 0
    for name in (names[first:] + names[:first])[:_MOST]:
        try:
            rates.look(name, agent.ask("GET", f"/v1/namespaces/{quoted(name)}/counters")["rules"], time.monotonic())
        except NetapplyError:
            continue  # it may be gone since: its state tells
    return found


def screen(namespaces: Iterable[Mapping[str, Any]], rows: list[Row], width: int, height: int) -> list[str]:
    """What fits on a screen of so many columns and lines. Pure."""
    states: dict[str, int] = {}
    heals = 0
    for each in namespaces:
        states[each["state"]] = states.get(each["state"], 0) + 1
        heals += each["heals"]
    told = ", ".join(f"{number} {state}" for state, number in states.items()) or "no namespace"
    head = f"netapply top   {told}   heals {heals}"
    rest = max(20, width - 1 - 8 * len(_NUMBERS))
    wide = min(max([9, *(len(row.namespace) for row in rows[:height])]), rest * 2 // 5)
    lines = [head, "", _line("NAMESPACE", "DECISION", _NUMBERS, wide, rest)]
    for row in rows[: max(0, height - len(lines) - 1)]:
        numbers = (row.packets_a_second, row.bytes_a_second, row.packets, row.bytes)
        figures = tuple(map(shortened, numbers))
        lines.append(_line(printable(row.namespace), printable(row.decision), figures, wide, rest))
    return [line[: max(1, width - 1)] for line in lines]


def _line(namespace: str, decision: str, figures: Iterable[str], wide: int, rest: int) -> str:
    names = f"{namespace[:wide]:<{wide}} {decision}"
    return f"{names[:rest]:<{rest}}" + "".join(f"{figure:>8}" for figure in figures)


def shortened(number: float) -> str:
    """Four digits at most, and a unit of thousands."""
    for unit in _UNITS:
        if number < 9999.5:
            return f"{number:.1f}{unit}" if unit and number < 99.95 else f"{number:.0f}{unit}"
        number /= 1000
    return f"{number:.0f}P"


def _quits(seconds: float) -> bool:
    """Wait; whether q was pressed."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable) and os.read(sys.stdin.fileno(), 64)[:1] in (b"q", b"Q", b"\x03", b"")


def _ended(*_: object) -> None:
    sys.exit(143)  # through `finally`


@contextmanager
def _terminal() -> Generator[None]:
    """A screen of our own, and keys without Enter; the terminal is as it was afterwards, however this ends."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    ended = signal.signal(signal.SIGTERM, _ended)
    try:
        tty.setcbreak(fd)
        sys.stdout.write(_ALTERNATE)
        yield
    except KeyboardInterrupt:
        sys.exit(0)
    finally:
        sys.stdout.write(_BACK)
        sys.stdout.flush()
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTERM, ended)
