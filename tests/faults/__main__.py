"""Every case, on as many processors as there are: `python -m tests.faults [--stride N] [--most N] [--write FILE]`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from netapply.backend import BUILT_IN
from tests.faults import answers, circumstances, kills, refusals, report
from tests.faults.outcome import Outcome, summed
from tests.faults.stage import FAMILIES, MODES, Case, Stage, warm

Unit = Callable[[], Iterator[Outcome]]


_WHOLE = (
    answers.writers,
    circumstances.torn,
    circumstances.locked,
    circumstances.jumped,
    circumstances.full,
)


def units(*, stride: int, most: int) -> list[Unit]:
    """What there is to do, in pieces that know nothing of one another."""
    cases = [Case(backend, mode, families) for families in FAMILIES for mode in MODES for backend in BUILT_IN]
    both = [case for case in cases if case.families != "IPv4"]
    return [
        *(partial(kills.kill_everywhere, case, each, stride=stride) for each in kills.OPERATIONS for case in cases),
        *(partial(refusals.refuse_everywhere, case, each, most=most) for each in refusals.REFUSALS for case in both),
        *(partial(answers.answer_everywhere, case, name, most=most) for name in answers.ANSWERS for case in both),
        *(partial(circumstances.replaced, case, most=most) for case in both),
        *(partial(work, case) for work in _WHOLE for case in both),
    ]


def _carry_out(unit: Unit) -> list[Outcome]:
    return list(unit())


def _start() -> None:
    for backend in BUILT_IN:
        stage = Stage(Case(backend, "tproxy", "IPv4"))
        warm(stage)
        stage.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--stride", type=int, default=12, help="of the calls that change nothing, each Nth")
    parser.add_argument("--most", type=int, default=12, help="calls of a kind that are refused, in each case")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="units whose name has this")
    parser.add_argument("--write", type=Path, help="put the table into this document")
    arguments = parser.parse_args()
    begun = time.monotonic()
    todo = [unit for unit in units(stride=arguments.stride, most=arguments.most) if arguments.only in str(unit)]
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(arguments.jobs, initializer=_start) as pool:
        waiting = [pool.submit(_carry_out, unit) for unit in todo]
        for at, done in enumerate(as_completed(waiting), 1):
            found = done.result()
            outcomes += found
            for each in found:
                for line in each.wrong:
                    print(f"LOST {each.fault}: {each.where}: {line}", flush=True)
            if found:
                name = f"{found[0].fault}, {found[0].backend}: {len(found)} tries"
                print(f"{time.monotonic() - begun:.0f} s, {at} of {len(todo)}: {name}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - begun
    sums = summed(outcomes)
    print(report.table(sums))
    print(f"{len(outcomes)} tries in {seconds:.0f} s")
    if arguments.write:
        report.write(arguments.write, sums, seconds)
    return 1 if any(one.lost for one in sums.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
