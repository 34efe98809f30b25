"""The table of fault classes, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.faults.outcome import Sum

_BEGIN, _END = "<!-- faults: begin -->\n", "<!-- faults: end -->"
_HEAD = (
    "| Fault | Dialect | Tries | Between at once | Old | New | Lost |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: |\n"
)


def table(sums: Mapping[tuple[str, str], Sum]) -> str:
    """A row for each class and dialect, and one for all."""
    lines = [
        f"| {fault} | {backend} | {one.tries} | {one.between} | {one.old} | {one.new} | {one.lost} |\n"
        for (fault, backend), one in sorted(sums.items())
    ]
    whole = [sum(each) for each in zip(*sums.values(), strict=True)] if sums else [0] * 6
    tries, between, old, new, lost, _ = whole
    lines.append(f"| **all** | | **{tries}** | **{between}** | **{old}** | **{new}** | **{lost}** |\n")
    return _HEAD + "".join(lines)


def write(document: Path, sums: Mapping[tuple[str, str], Sum], seconds: float) -> None:
    """Put the table between its marks."""
    head, _, rest = document.read_text().partition(_BEGIN)
    tail = rest.partition(_END)[2]
    killed = sum(one.tries for (fault, _), one in sums.items() if fault.startswith("killed"))
    said = f"\n{killed} kill points; all of it took {seconds:.0f} s.\n"
    document.write_text(head + _BEGIN + table(sums) + said + _END + tail)
