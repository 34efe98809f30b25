"""The figures as tables, and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench import agents, dataplane, fleet, lists, operations
from bench.agents import Node
from bench.bars import Bar
from bench.figures import COUNTS, Effort, Figures
from bench.measure import Spread
from bench.subjects import OPERATIONS
from netapply.backend import BUILT_IN

FORMAT = "netapply.bench/v1"


def machine() -> dict[str, Any]:
    """What was measured on. A load above what the bench makes itself (1) says that others were at work."""
    return {
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load": [round(each, 2) for each in os.getloadavg()],
    }


def text(figures: Figures, bars: Sequence[Bar]) -> str:
    """Every table, then the bars."""
    lines = [", ".join(f"{name} {value}" for name, value in machine().items())]
    for plan, times in figures.operations.items():
        lines += ["", f"apply, update, clean: {plan}; ms, median (one in ten below-above), xfloor"]
        rows = [
            (f"{backend} {operation}", _names(backend, operation)) for backend in BUILT_IN for operation in OPERATIONS
        ]
        lines += _table(times, rows, operations.WAYS)
    if figures.waits:
        lines += ["", "one RCU grace period, and updates without a rest in between; ms"]
        lines += [f"{name:34}{_cell(spread)}" for name, spread in figures.waits.items()]
    for kind in lists.KINDS if figures.lists else ():
        lines += ["", f"excluded {kind}, apply; ms, xfloor"]
        rows = [
            (f"{backend} {count:,}", [lists.name(backend, count, kind, way) for way in lists.WAYS])
            for backend in BUILT_IN
            for count in COUNTS
        ]
        lines += _table(figures.lists, rows, lists.WAYS)
    lines += _namespaces(figures.namespaces)
    lines += _agent(figures.agent)
    lines += _dataplane(figures.dataplane)
    if figures.coldstart:
        nothing = next(iter(figures.coldstart.values())).median
        lines += ["", "cold start; ms, x a Python that does nothing"]
        lines += [f"{name:26}{_cell(each)} x{each.median / nothing:.2f}" for name, each in figures.coldstart.items()]
    return "\n".join([*lines, "", *map(_bar, bars)])


def document(figures: Figures, bars: Sequence[Bar], effort: Effort) -> dict[str, Any]:
    """The same for programs; times are in milliseconds, ratios in `bars`."""
    times = {part: _json(getattr(figures, part)) for part in figures._fields if part not in ("namespaces", "agent")}
    nodes = {backend: node.json() for backend, node in figures.agent.items()}
    totals = {f"{backend} {way}": round(total * 1e3, 3) for (backend, way), total in figures.namespaces.items()}
    judged = [{**bar._asdict(), "met": bar.met} for bar in bars]
    return {
        "format": FORMAT,
        "machine": machine(),
        "effort": effort,
        **times,
        "namespaces": totals,
        "agent": nodes,
        "bars": judged,
    }


def _json(value: Spread | Mapping[str, Any]) -> Any:
    return value.json() if isinstance(value, Spread) else {name: _json(each) for name, each in value.items()}


def _names(backend: str, operation: str) -> list[str]:
    return [operations.name(backend, operation, way) for way in operations.WAYS]


def _table(times: Mapping[str, Spread], rows: Sequence[tuple[str, list[str]]], ways: Sequence[str]) -> Iterator[str]:
    """A row for each label, a column for each way, and behind each time what it is of the floor's."""
    yield f"{'':26}" + "".join(f"{way:>29}" for way in ways)
    for label, names in rows:
        floor = times[names[ways.index("floor")]].median
        cells = (
            f"{_cell(times[name])} x{times[name].median / floor:<6.2f}" if name in times else "-" for name in names
        )
        yield f"{label:26}" + "".join(f"{cell:>29}" for cell in cells)


def _cell(spread: Spread) -> str:
    return f"{spread.median * 1e3:8.3f} ({spread.low * 1e3:.2f}-{spread.high * 1e3:.2f})"


def _namespaces(totals: Mapping[tuple[str, str], float]) -> Iterator[str]:
    if not totals:
        return
    yield from ("", "apply to namespaces that nobody opened before; ms in total, xfloor")
    yield f"{'':26}" + "".join(f"{way:>20}" for way in fleet.WAYS)
    for backend in BUILT_IN:
        floor = totals[backend, "floor"]
        cells = (f"{totals[backend, way] * 1e3:.0f} x{totals[backend, way] / floor:<6.2f}" for way in fleet.WAYS)
        yield f"{backend:26}" + "".join(f"{cell:>20}" for cell in cells)


def _agent(nodes: Mapping[str, Node]) -> Iterator[str]:
    if not nodes:
        return
    yield from (
        "",
        "the agent: start with nothing and with all in place (s), quiet (% of a core, MB), from drift to healed (ms)",
    )
    for backend, node in nodes.items():
        heals = ", ".join(f"{name} {node.quantile(part) * 1e3:.1f}" for name, part in agents.QUANTILES.items())
        yield (
            f"{backend:26}{node.namespaces} namespaces: {node.start:.2f} {node.again:.2f}"
            f"    {node.share * 100:.2f} % {node.megabytes:.0f} MB, {node.descriptors} descriptors    {heals}"
        )


def _dataplane(times: Mapping[str, Spread]) -> Iterator[str]:
    if not times:
        return
    yield from ("", f"a client's processor time for one connect, with {COUNTS[-1]:,} exclusions and without; µs")
    yield f"{'no rules':26}{times['no rules'].median * 1e6:10.2f}"
    for backend in BUILT_IN:
        bare, full = (times[dataplane.name(backend, rules)] for rules in ("without", "with"))
        yield f"{backend:26}{bare.median * 1e6:10.2f}{full.median * 1e6:10.2f} x{full.median / bare.median:.3f}"


def _bar(bar: Bar) -> str:
    measured = "cannot be measured here" if bar.measured is None else f"{bar.measured:8.2f} {bar.unit}"
    return f"{'met    ' if bar.met else 'NOT met'}  {bar.name:62}{measured}, {'≥' if bar.least else '≤'} {bar.limit:g}"
