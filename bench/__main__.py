"""`python -m bench`: measure, print tables and which bars are met, and write JSON where asked to."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from bench.figures import FULL, PARTS, QUICK, measure


def main() -> int:
    """Run; returns 0, or with --strict 1 where a bar is not met."""
    arguments = _parsed()
    effort = {part: each for part, each in (QUICK if arguments.quick else FULL).items() if part in arguments.only}
    if os.geteuid():
        sys.stderr.write("bench: network namespaces are made as root\n")
        return 1
    with tempfile.TemporaryDirectory(dir="/dev/shm") as private:
        os.environ["XTABLES_LOCKFILE"] = f"{private}/xtables.lock"  # the machine's is shared by all namespaces
        figures = measure(effort)
    from bench import report
    from bench.bars import bars

    judged = bars(figures)
    sys.stdout.write(report.text(figures, judged) + "\n")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(report.document(figures, judged, effort), indent=1) + "\n")
    return 1 if arguments.strict and not all(bar.met for bar in judged) else 0


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds and 100 namespaces, for a look or for CI")
    parser.add_argument("--strict", action="store_true", help="exit 1 where a bar is not met")
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("-o", "--output", metavar="FILE", help="write all figures as JSON")
    arguments = parser.parse_args()
    arguments.only = arguments.only or PARTS
    return arguments


if __name__ == "__main__":
    sys.exit(main())
