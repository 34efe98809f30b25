"""Apply a plan to a namespace, and die at the Nth commit of rules or routing: PATH PLAN BACKEND N before|after."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import netapply
from netapply import routing
from netapply.backend import find_backend
from netapply.planfile import read_plan


def main(path: str, plan: str, backend: str, at: str, when: str) -> int:
    left = int(at)
    chosen = find_backend(backend)

    def dying(commit: Callable[..., object]) -> Callable[..., object]:
        def committed(*arguments: object) -> object:
            nonlocal left
            left -= 1
            if left < 0 and when == "before":
                os._exit(9)
            result = commit(*arguments)
            if left < 0:
                os._exit(9)
            return result

        return committed

    commit_rules = dying(chosen.commit)
    type(chosen).commit = lambda _self, *arguments: commit_rules(*arguments)  # type: ignore[method-assign]
    routing.commit = dying(routing.commit)  # type: ignore[assignment]
    with netapply.open(path) as capture:
        capture.apply(read_plan(plan), backend=backend)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
