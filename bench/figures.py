"""All that one run measured. A part that was not asked for is empty."""

from __future__ import annotations

from typing import NamedTuple

from bench.agents import Node
from bench.measure import Spread
from bench.plans import PLANS

#: How much of each part is done: rounds, but namespaces for `namespaces` and `agent`.
Effort = dict[str, int]
FULL: Effort = {
    "operations": 40,
    "waits": 20,
    "lists": 7,
    "namespaces": 1000,
    "agent": 1000,
    "dataplane": 25,
    "coldstart": 20,
}
QUICK: Effort = {
    "operations": 8,
    "waits": 5,
    "lists": 2,
    "namespaces": 100,
    "agent": 100,
    "dataplane": 8,
    "coldstart": 5,
}
PARTS = tuple(FULL)
COUNTS = (1_000, 10_000)


class Figures(NamedTuple):
    """Times in seconds. Their names are made by the `name` of the module that measured them."""

    #: By plan.
    operations: dict[str, dict[str, Spread]]
    waits: dict[str, Spread]
    lists: dict[str, Spread]
    #: (dialect, way) → all namespaces together.
    namespaces: dict[tuple[str, str], float]
    #: Processor time of one connect.
    dataplane: dict[str, Spread]
    coldstart: dict[str, Spread]
    #: By dialect.
    agent: dict[str, Node]


def measure(effort: Effort) -> Figures:
    """Do the parts that `effort` names, as often as it says."""
    from bench import agents, coldstart, dataplane, fleet, lists, operations

    done = Figures({}, {}, {}, {}, {}, {}, {})
    if rounds := effort.get("coldstart"):
        done = done._replace(coldstart=coldstart.measure(rounds))
    if rounds := effort.get("operations"):
        done = done._replace(operations={name: operations.measure(plan, rounds) for name, plan in PLANS.items()})
    if rounds := effort.get("waits"):
        done = done._replace(waits=operations.waits(rounds))
    if rounds := effort.get("dataplane"):
        done = done._replace(dataplane=dataplane.measure(COUNTS[-1], rounds))
    if rounds := effort.get("lists"):
        done = done._replace(lists=lists.measure(COUNTS, rounds))
    if count := effort.get("namespaces"):
        done = done._replace(namespaces=fleet.measure(count))
    if count := effort.get("agent"):
        done = done._replace(agent=agents.measure(count))
    return done
