"""A case that fails, made small: what is left of its plan and flows is what it takes to fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from netapply.conformance.case import APP, Case, Probe
from netapply.fields import is_list, is_mapping

PATIENCE = 60.0  # seconds


def shrink(case: Case, fails: Callable[[Case], bool], patience: float = PATIENCE) -> Case:
    """The smallest case found by leaving out one thing at a time as long as it `fails`; within `patience` seconds."""
    deadline = time.monotonic() + patience
    smaller = next((each for each in _smaller(case) if time.monotonic() < deadline and fails(each)), None)
    while smaller is not None:
        case = smaller
        smaller = next((each for each in _smaller(case) if time.monotonic() < deadline and fails(each)), None)
    return case


def shown(case: Case) -> str:
    """The case as it stands in a table of cases."""
    fields = [repr(case.name), repr(case.level), repr(case.plan)]
    fields += [f"({', '.join(map(repr, case.probes))},)"]
    fields += [f"layout={case.layout!r}"] if case.layout != "netapply" else []
    return f"Case({', '.join(fields)})"


def _smaller(case: Case) -> Iterator[Case]:
    """One flow of many first, then a plan with less in it, then a simpler flow."""
    if len(case.probes) > 1:
        yield from (case._replace(probes=(probe,)) for probe in case.probes)
        half = len(case.probes) // 2
        yield from (case._replace(probes=part) for part in (case.probes[:half], case.probes[half:]))
        yield from (case._replace(probes=case.probes[:at] + case.probes[at + 1 :]) for at in range(len(case.probes)))
    yield from (case._replace(plan=plan) for plan in _without_one(case.plan))
    for at, probe in enumerate(case.probes):
        for simpler in _simpler(probe):
            yield case._replace(probes=(*case.probes[:at], simpler, *case.probes[at + 1 :]))


def _without_one(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The mapping without one field or list entry, the outermost first."""
    for name in content:
        yield {other: content[other] for other in content if other != name}
    for name, value in content.items():
        rest: list[Any] = []
        if is_mapping(value):
            rest = [*_without_one(value)]
        elif is_list(value) and len(value) > 1:
            rest = [value[: len(value) // 2], value[len(value) // 2 :]] if len(value) > 3 else []
            rest += [value[:at] + value[at + 1 :] for at in range(len(value))]
        yield from ({**content, name: each} for each in rest)


def _simpler(probe: Probe) -> Iterator[Probe]:
    plain: dict[str, Any] = {"sender": APP, "source": "", "sport": 0, "device": "eth0", "mark": 0, "state": "new"}
    for name, value in plain.items():
        if getattr(probe, name) != value:
            yield probe._replace(**{name: value})
