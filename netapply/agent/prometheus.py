"""The agent's numbers as Prometheus reads them, in text exposition format 0.0.4. Names are a contract."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Protocol, TypeAlias

from netapply.agent.model import Histogram, Metrics, NamespaceStatus
from netapply.errors import NetapplyError
from netapply.results import RuleCounter
from netapply.values import NamedTuple

Labels: TypeAlias = Mapping[str, str]

_index = re.compile(r"\[\d+\]")


class Count(NamedTuple):
    """What a decision counted."""

    packets: int = 0
    bytes: int = 0


class Counted(Protocol):
    """What `Decisions` needs of an Agent."""

    async def counters(self, target: str) -> tuple[RuleCounter, ...]: ...
    def status(self) -> tuple[NamespaceStatus, ...]: ...


class Decisions:
    """Packets and bytes by the plan path that decided about them, over all namespaces, only ever growing.

    The kernel counts by rule, and from zero when a rule is replaced; so each look adds what came since the last. A look
    takes no longer than `seconds`: where there are many namespaces, those come first that were not looked at longest.
    """

    def __init__(self, seconds: float = 0.1) -> None:
        self.totals: dict[str, Count] = {}
        self._seconds = seconds
        self._seen: dict[str, dict[str, Count]] = {}
        self._looked: dict[str, float] = {}
        self._turn = asyncio.Lock()

    async def refresh(self, agent: Counted) -> None:
        """Look at the counters of as many namespaces as there is time for."""
        async with self._turn:
            names = {each.name for each in agent.status() if each.backend and each.state != "gone"}
            for gone in self._looked.keys() - names:
                self._looked.pop(gone)
                self._seen.pop(gone, None)
            until = time.monotonic() + self._seconds
            for name in sorted(names, key=lambda name: self._looked.get(name, 0.0)):
                self._looked[name] = time.monotonic()
                with suppress(NetapplyError):  # it is gone, or failing: its status tells
                    self.add(name, await agent.counters(name))
                if time.monotonic() >= until:
                    break

    def add(self, namespace: str, rules: Iterable[RuleCounter]) -> None:
        """Count what came since the last look at this namespace."""
        now: dict[str, Count] = {}
        for rule in rules:
            path = _index.sub("", rule.path)
            before = now.get(path, Count())
            now[path] = Count(before.packets + rule.packets, before.bytes + rule.bytes)
        seen = self._seen.get(namespace, {})
        for path, count in now.items():
            last = seen.get(path, Count())
            if count.packets < last.packets or count.bytes < last.bytes:
                last = Count()  # the rules were replaced
            total = self.totals.get(path, Count())
            grown = total.packets + count.packets - last.packets, total.bytes + count.bytes - last.bytes
            self.totals[path] = Count(*grown)
        self._seen[namespace] = now


def exposition(metrics: Metrics, decisions: Decisions) -> str:
    """All of it. `promtool check metrics` accepts it."""
    return "".join(line + "\n" for line in _all(metrics, decisions))


def _all(metrics: Metrics, decisions: Decisions) -> Iterator[str]:
    from netapply import __version__

    yield from _family("info", "gauge", "The version that runs.", [({"version": __version__}, 1)])
    states = [({"state": state}, number) for state, number in metrics.namespaces.items()]
    yield from _family("namespaces", "gauge", "Namespaces that are kept or known, by state.", states)
    yield from _family("applies_total", "counter", "Plans put into force, first times and changes.", metrics.applies)
    yield from _family("failures_total", "counter", "Applies, heals and removals that failed.", metrics.failures)
    heals = [({"process": process}, number) for process, number in metrics.heals.items()]
    said = 'Drift put right, by the process that caused it; "" where the kernel does not tell.'
    yield from _family("heals_total", "counter", said, heals)
    said = "From the first look to the proof by read-back."
    yield from _histogram("apply_duration_seconds", said, metrics.apply_seconds)
    said = "From the event, or the look that found drift, to the proof by read-back."
    yield from _histogram("heal_duration_seconds", said, metrics.heal_seconds)
    said = "How often a namespace drifted more than its budget allows."
    yield from _family("quarantines_total", "counter", said, metrics.quarantines)
    said = "How often a lock (the journal's, or that of xtables) was not to be had in time."
    yield from _family("lock_timeouts_total", "counter", said, metrics.lock_failures)
    said = "Interrupted runs that were finished or undone by their journal."
    yield from _family("journal_recoveries_total", "counter", said, metrics.recoveries)
    said = "Seconds in which capture was wanted and not in force, of all namespaces."
    yield from _family("fail_open_seconds_total", "counter", said, metrics.fail_open_seconds)
    said = "Messages of the kernel about changes."
    yield from _family("kernel_notifications_total", "counter", said, metrics.notifications)
    said = "Messages about changes that did not come from the kernel, and were dropped."
    yield from _family("forged_notifications_total", "counter", said, metrics.forged)
    said = "How often the kernel had more to tell than was read in time, so that all was looked at."
    yield from _family("kernel_overruns_total", "counter", said, metrics.overruns)
    said = "Plan files that are wrong as they are now."
    yield from _family("rejected_plan_files", "gauge", said, metrics.rejected_files)
    said = "Events that a subscriber did not get as it lagged."
    yield from _family("events_lost_total", "counter", said, metrics.events_lost)
    age = max(0.0, time.monotonic() - metrics.ticked)
    yield from _family("loop_age_seconds", "gauge", "Since the reconcile loop last came round.", age)
    yield from _decisions(decisions.totals)


def _decisions(totals: Mapping[str, Count]) -> Iterator[str]:
    paths = sorted(totals.items())
    said = "Packets by the plan path that decided about them."
    yield from _family("decision_packets_total", "counter", said, [({"path": p}, count.packets) for p, count in paths])
    said = "Bytes by the plan path that decided about them."
    yield from _family("decision_bytes_total", "counter", said, [({"path": p}, count.bytes) for p, count in paths])


def _family(name: str, kind: str, said: str, samples: float | Iterable[tuple[Labels, float]]) -> Iterator[str]:
    yield f"# HELP netapply_{name} {said}"
    yield f"# TYPE netapply_{name} {kind}"
    alone: Labels = {}
    for labels, value in [(alone, samples)] if isinstance(samples, (int, float)) else samples:
        yield f"netapply_{name}{_labels(labels)} {value}"


def _histogram(name: str, said: str, histogram: Histogram) -> Iterator[str]:
    yield f"# HELP netapply_{name} {said}"
    yield f"# TYPE netapply_{name} histogram"
    upto = 0
    for bound, count in zip((*histogram.bounds, None), histogram.counts, strict=True):
        upto += count
        yield f"netapply_{name}_bucket{_labels({'le': '+Inf' if bound is None else str(bound)})} {upto}"
    yield f"netapply_{name}_sum {histogram.total}"
    yield f"netapply_{name}_count {upto}"


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
