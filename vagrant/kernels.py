"""docs/kernels.md, made of the last result of each kernel: python3 vagrant/kernels.py > docs/kernels.md."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

BUILT = Path(os.environ.get("NETAPPLY_VAGRANT", Path(__file__).resolve().parent.parent / "build" / "vagrant"))
HEAD = """\
# Kernels

Made by `make vagrant`: each kernel in a machine of its own, with the wheel. Do not edit. How to run it is told in
[vagrant/README.md](../vagrant/README.md).

"""
COLUMNS = ("kernel", "nft", "iptables", "python", "netapply", "level", "date", "driver")


def load() -> list[dict[str, Any]]:
    """The results that there are, by kernel."""
    found = [json.loads(path.read_text()) for path in (BUILT / "results").glob("*/result.json")]
    return sorted(found, key=lambda each: [*map(int, each["kernel"].split("-")[0].split("+")[0].split("."))])


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    lines = [[*head], ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def said(step: dict[str, Any] | None) -> str:
    """A cell: the phrase of a step that passed; else what came of it first."""
    if step is None:
        return "not run"
    if step["state"] == "passed":
        return str(step["said"])
    return f"**{step['state']}** {step['said']}".strip() if step["state"] == "failed" else str(step["state"])


def page(results: list[dict[str, Any]]) -> str:
    """The whole page."""
    short = ["kernel " + ".".join(each["kernel"].split(".")[:2]) for each in results]
    steps = dict.fromkeys(name for each in results for name in each["steps"])
    lacking = [
        [backend, *(", ".join(each.get("missing", {}).get(backend, ())) or "nothing" for each in results)]
        for backend in dict.fromkeys(name for each in results for name in each.get("missing", {}))
    ]
    return (
        HEAD
        + table(COLUMNS, [[str(each.get(name, "")) for name in COLUMNS] for each in results])
        + "\nThe system around them is "
        + ", ".join(dict.fromkeys(each["system"] for each in results if "system" in each))
        + ". `driver` qemu is an emulated processor.\n\n## What it did\n\n"
        + table(("", *short), [[name, *(said(each["steps"].get(name)) for each in results)] for name in steps])
        + "\n`preferred` applies a plan that names a cgroup: refused where the kernel has no match for it, and applied"
        + " without where the\nplan says `prefer: [cgroups]`.\n\n## What a kernel lacks, by `netapply detect`\n\n"
        + table(("", *short), lacking)
    )


if __name__ == "__main__":
    sys.stdout.write(page(load()))
