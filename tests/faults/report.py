"""What the rig found, in Markdown, put into a document between marks of its own."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from netapply.backend import BUILT_IN
from tests.faults.outcome import Sum

_HEAD = (
    f"| Fault | Tries | {' | '.join(BUILT_IN)} | Between at once | Lost |\n"
    f"| --- | ---: | {'---: | ' * len(BUILT_IN)}---: | ---: |\n"
)


def table(sums: Mapping[tuple[str, str], Sum]) -> str:
    """A row for each class and one for all; of each dialect how many tries ended old, new and lost."""
    faults = dict.fromkeys(fault for fault, _ in sums)
    rows = [(fault, {backend: sums.get((fault, backend)) for backend in BUILT_IN}) for fault in faults]
    rows.append(
        ("**all**", {backend: _total(s for (_, of), s in sums.items() if of == backend) for backend in BUILT_IN})
    )
    return _HEAD + "".join(_row(fault, [*found.values()]) for fault, found in rows)


def _row(fault: str, found: Sequence[Sum | None]) -> str:
    whole = _total(each for each in found if each)
    cells = " | ".join(f"{each.old} / {each.new} / {each.lost}" if each else "" for each in found)
    return f"| {fault} | {whole.tries} | {cells} | {whole.between} | {whole.lost} |\n"


def _total(found: Iterable[Sum]) -> Sum:
    return Sum(*(sum(each) for each in zip(*found, strict=True))) if (found := [*found]) else Sum(0, 0, 0, 0, 0, 0)


def conditions(command: str, seconds: float) -> str:
    """When, where and by which command it was found out, and how long that took: by the clock, and of processors."""
    used = sum(os.times()[:4])  # with children that have ended
    day = time.strftime("%Y-%m-%d")
    where = f"Linux {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} cores"
    return f"`{command}`, {day}, {where}, {seconds:.0f} s ({used:.0f} s of processor time)."


def put(document: Path, name: str, text: str) -> None:
    """Replace what is between the marks `<!-- NAME: begin -->` and `<!-- NAME: end -->`."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, found, rest = document.read_text().partition(begin)
    if not found or end not in rest:
        raise ValueError(f"{document} has no place for {name}")
    document.write_text(head + begin + text + end + rest.partition(end)[2])
