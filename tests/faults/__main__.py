"""Every case, on as many processors as there are: `python -m tests.faults [--stride N] [--most N] [--write FILE]`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

from netapply.backend import BUILT_IN
from tests.faults import answers, circumstances, kills, refusals, report
from tests.faults.outcome import Outcome, summed
from tests.faults.stage import FAMILIES, MODES, Case, Stage, warm


class Unit(NamedTuple):
    """A piece of the work that knows nothing of the others."""

    fault: str
    case: Case
    work: Callable[[], Iterator[Outcome]]


_WHOLE: dict[str, Callable[[Case], Iterator[Outcome]]] = {
    "another writer": answers.writers,
    "a torn journal": circumstances.torn,
    "a lock held for ever": circumstances.locked,
    "a clock jump": circumstances.jumped,
    "a full disk": circumstances.full,
}


def units(*, stride: int, most: int) -> list[Unit]:
    """What there is to do. `stride` and `most` as in `main`."""
    cases = [Case(backend, mode, families) for families in FAMILIES for mode in MODES for backend in BUILT_IN]
    both = [case for case in cases if case.families != "IPv4"]
    ways = [case._replace(target=target) for case in both for target in BUILT_IN if target != case.backend]
    killed = [
        # A migration makes ten times as many calls as an update, and most of them only look.
        *((kills.MIGRATE, case, partial(kills.kill_everywhere, stride=8 * stride)) for case in ways),
        *((kills.RECOVER_MIGRATE, case, partial(kills.kill_some, most=most // 2)) for case in ways),
        *((kills.PROBED, case, partial(kills.kill_some, most=most // 4)) for case in ways),
        *((each, case, partial(kills.kill_everywhere, stride=stride)) for each in kills.OPERATIONS for case in both),
        *((each, case, partial(kills.kill_everywhere, stride=stride))
          for each in kills.OPERATIONS[:4] for case in cases if case not in both),
    ]  # fmt: skip
    spoiled = {
        **{each.name: partial(refusals.refuse_everywhere, refusal=each) for each in refusals.REFUSALS},
        **{name: partial(answers.answer_everywhere, name=name) for name in answers.ANSWERS},
        "a namespace deleted or replaced": circumstances.replaced,
    }
    return [
        *(Unit(f"killed: {each.name}", case, partial(work, case, each)) for each, case, work in killed),
        *(Unit(name, case, partial(work, case, most=most)) for name, work in spoiled.items() for case in both),
        *(Unit(name, case, partial(work, case)) for name, work in _WHOLE.items() for case in both),
    ]


def _carry_out(unit: Unit) -> list[Outcome]:
    """All outcomes; a rig that cannot go on has met something that it did not expect, and that counts as lost."""
    found: list[Outcome] = []
    try:
        found.extend(unit.work())
    except Exception as error:  # noqa: BLE001 - whatever it is, the other units go on
        wrong = (f"{type(error).__name__}: {error}",)
        found.append(Outcome(unit.fault, unit.case.backend, str(unit.case), "", "", wrong))
    return found


def _start() -> None:
    for backend in BUILT_IN:
        stage = Stage(Case(backend, "tproxy", "IPv4"))
        warm(stage)
        stage.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--stride", type=int, default=32, help="of the calls that change nothing, each Nth")
    parser.add_argument("--most", type=int, default=18, help="calls of a kind that are refused, in each case")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="faults whose name has this")
    parser.add_argument("--write", type=Path, help="put the table into this document")
    arguments = parser.parse_args()
    begun = time.monotonic()
    todo = [unit for unit in units(stride=arguments.stride, most=arguments.most) if arguments.only in unit.fault]
    outcomes: list[list[Outcome]] = [[] for _ in todo]  # in this order, whoever is done first
    with ProcessPoolExecutor(arguments.jobs, initializer=_start) as pool:
        waiting = {pool.submit(_carry_out, unit): at for at, unit in enumerate(todo)}
        for count, done in enumerate(as_completed(waiting), 1):
            at = waiting[done]
            outcomes[at] = done.result()
            for each in outcomes[at]:
                for line in each.wrong:
                    print(f"LOST {each.fault}: {each.where}: {line}", flush=True)
            name = f"{todo[at].fault}, {todo[at].case}: {len(outcomes[at])} tries"
            print(f"{time.monotonic() - begun:.0f} s, {count} of {len(todo)}: {name}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - begun
    every = [each for found in outcomes for each in found]
    sums = summed(every)
    killed = sum(each.fault.startswith("killed") for each in every)
    said = f"{len(every)} tries, of which {killed} kill points. {report.conditions('make faults', seconds)}\n"
    print(f"{report.table(sums)}\n{said}")
    if arguments.write:
        report.put(arguments.write, "faults", f"{report.table(sums)}\n{said}")
    return 1 if any(one.lost for one in sums.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
