"""What was asked for, beside what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from bench import coldstart, dataplane, lists, operations
from bench.agents import Node
from bench.figures import COUNTS, Figures
from bench.measure import Spread
from netapply.backend import BUILT_IN

#: The library's own way to bring rules somewhere that it has encoded before: nothing else offers these bytes.
CACHED = "backend"
#: Milliseconds of `istio-iptables`, from exec to exit, in 15 fresh namespaces each, on 2 cores with Linux 6.18. These
#: are quoted and not measured here, so this bar means something on a machine of that kind alone.
ISTIO = {"nftables": 22.9, "iptables-nft": 41.9, "iptables-legacy": 16.4}
#: Milliseconds from drift to healed, p50 (0.0 for none) and p99. iptables-legacy tells nothing: the bar is one poll.
HEALED = {"nftables": (5.0, 50.0), "iptables-nft": (20.0, 50.0), "iptables-legacy": (0.0, 1005.0)}


class Bar(NamedTuple):
    """`measured` is to be at most `limit` (or, with `least`, at least); None where it cannot be measured."""

    name: str
    measured: float | None
    limit: float
    unit: str = "times"
    least: bool = False

    @property
    def met(self) -> bool:
        """Whether it is."""
        if self.measured is None:
            return False
        return self.measured >= self.limit if self.least else self.measured <= self.limit


def bars(figures: Figures) -> list[Bar]:
    """Those of the parts that were measured."""
    found = [bar for backend in BUILT_IN for bar in _of_dialect(figures, backend)]
    found += [bar for backend, node in figures.agent.items() for bar in _of_agent(backend, node)]
    return [*found, *_coldstart(figures.coldstart)]


def _of_dialect(figures: Figures, backend: str) -> Iterator[Bar]:
    if figures.operations:
        alone, sidecar = figures.operations["rules alone"], figures.operations["sidecar"]
        floor = alone[operations.name(backend, "apply", "floor")].median
        cached = alone[operations.name(backend, "apply", CACHED)].median
        entered, whole = (alone[operations.name(backend, "apply", way)].median for way in ("entered", "whole"))
        in_full = sidecar[operations.name(backend, "apply", "whole")].median * 1e3
        yield Bar(f"{backend}: encode-cached apply, of the floor", cached / floor, 1.3)
        # "The whole path" has two readings: the way to the kernel and through it, and all that a caller of ours gets.
        yield Bar(f"{backend}: enter, socket, read, encode, send, of the floor", entered / floor, 3)
        yield Bar(f"{backend}: Capture.apply, of the floor", whole / floor, 3)
        yield Bar(
            f"{backend}: faster than istio-iptables ({ISTIO[backend]} ms)", ISTIO[backend] / in_full, 25, least=True
        )
    if figures.operations and figures.waits:
        update = figures.operations["rules alone"][operations.name(backend, "update", "whole")]
        # Who waits for one takes longer than the shortest.
        yield Bar(f"{backend}: update, of one RCU wait", update.median / figures.waits["grace period"].low, 1)
    if figures.lists:
        slow = figures.lists[lists.name(backend, COUNTS[-1], "CIDRs", "whole")].median
        yield Bar(f"{backend}: 10,000 CIDRs, of the best tool", slow / best_tool(figures.lists, backend, COUNTS[-1]), 1)
    if figures.namespaces:
        total = figures.namespaces[backend, CACHED] / figures.namespaces[backend, "floor"]
        yield Bar(f"{backend}: many namespaces, of the floor", total, 1.5)
    if figures.dataplane:
        times = (figures.dataplane[dataplane.name(backend, rules)].median for rules in ("with", "without"))
        yield Bar(f"{backend}: connect under 10,000 CIDRs, of without", next(times) / next(times), 1.15)


def _of_agent(backend: str, node: Node) -> Iterator[Bar]:
    yield Bar(f"{backend}: agent, {node.namespaces:,} namespaces, nothing in place, start", node.start, 1.5, "s")
    yield Bar(f"{backend}: agent, {node.namespaces:,} namespaces, all in place, start", node.again, 1.5, "s")
    yield Bar(f"{backend}: agent in quiet, of a core", node.share * 100, 1, "%")
    yield Bar(f"{backend}: agent, memory", node.megabytes, 120, "MB")
    p50, p99 = HEALED[backend]
    if p50:
        yield Bar(f"{backend}: from drift to healed, p50", node.quantile(0.5) * 1e3, p50, "ms")
    yield Bar(f"{backend}: from drift to healed, p99", node.quantile(0.99) * 1e3, p99, "ms")


def _coldstart(times: Mapping[str, Spread]) -> Iterator[Bar]:
    if not times:
        return
    nothing = times[coldstart.NOTHING].median
    for command, limit in ((f"apply {next(iter(coldstart.FILES))}", 6.0), (coldstart.DROP_IN, 5.0)):
        took = times.get(command)
        yield Bar(f"cold start of {command}, of python -I -c pass", took.median / nothing if took else None, limit)


def best_tool(times: Mapping[str, Spread], backend: str, count: int, kind: str = "CIDRs") -> float:
    """The shortest median of the tools that were exec'd, in seconds."""
    ways = (times.get(lists.name(backend, count, kind, way)) for way in lists.TOOLS)
    return min(found.median for found in ways if found)
