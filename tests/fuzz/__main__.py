"""`make fuzz`: each target for its share of the time. Exits 1 where something was found, after it was written down."""

from __future__ import annotations

import argparse
import sys

from tests.fuzz import seeds
from tests.fuzz.engine import fuzz, keep, seeds_of
from tests.fuzz.targets import TARGETS

#: How many of the inputs that reached something new are kept, of each target, by --keep.
KEPT = 12


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", help="this one, instead of all")
    parser.add_argument("--keep", action="store_true", help="keep some of the inputs that reached new code as seeds")
    parser.add_argument("--make-seeds", action="store_true", help="record the first inputs anew, and end")
    asked = parser.parse_args()
    if asked.make_seeds:
        seeds.make()
        return 0
    chosen = [target for target in TARGETS if not asked.target or target.name in asked.target]
    failed = False
    for target in chosen:
        outcome = fuzz(target, asked.seconds / len(chosen), asked.seed)
        share = f"{outcome.refused / outcome.tries:.0%} refused, {len(outcome.grown)} reached something new"
        print(f"{target.name}: {outcome.tries} inputs, {share}, {len(outcome.found)} findings", flush=True)
        for finding in outcome.found:
            failed = True
            print(f"  {finding.said[:300]}")
        small = sorted(outcome.grown, key=lambda pieces: sum(map(len, pieces)))[:KEPT] if asked.keep else []
        if outcome.found or small:
            keep(target.name, [*seeds_of(target.name), *(each.pieces for each in outcome.found), *small])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
