"""One command in a process of its own, from exec to exit, beside a Python that does nothing."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import netapply
from bench import places
from bench.measure import Spread, clock, interleaved, rested
from bench.programs import run
from netapply.lab import Place

#: A plan of captured connections both ways, by REDIRECT, as a file in each form.
FILES = {
    "plan.json": '{"apiVersion": "netapply/v1", "outbound": {"ports": {"exclude": [15020]}}}\n',
    "plan.yaml": "apiVersion: netapply/v1\noutbound: {ports: {exclude: [15020]}}\n",
}
NOTHING = "python -I -c pass"
DROP_IN = "istio-iptables"


def measure(rounds: int) -> dict[str, Spread]:
    """Seconds of each command, by its words; what does not work here is left out."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        command = Path(sys.executable).with_name("netapply")
        start = (str(command),) if command.exists() else (sys.executable, "-m", "netapply")
        commands: dict[str, tuple[str, ...]] = {NOTHING: (sys.executable, "-I", "-c", "pass")}
        for name, text in FILES.items():
            path = directory / name
            path.write_text(text)
            commands[f"apply {name}"] = (*start, "apply", "--quiet", str(path))
        commands[DROP_IN] = (*start, "istio-iptables")
        spot = stack.enter_context(places.place())
        spot.inside(places.wire)  # the drop-in wants an address
        turns = {
            words: _turn(spot, command, str(directory))
            for words, command in commands.items()
            if _works(spot, command, str(directory))
        }
        return interleaved([turns], rounds)


def _works(spot: Place, command: tuple[str, ...], state: str) -> bool:
    worked = spot.inside(lambda: run(command, NETAPPLY_STATE_DIR=state)) == 0
    _undo(spot, state)
    return worked


def _turn(spot: Place, command: tuple[str, ...], state: str) -> Callable[[], float]:
    def turn() -> float:
        rested(time.perf_counter())
        took = spot.inside(lambda: clock(lambda: run(command, NETAPPLY_STATE_DIR=state)))
        _undo(spot, state)
        return took

    return turn


def _undo(spot: Place, state: str) -> None:
    with netapply.open(spot.fd, state_directory=state) as capture:
        capture.clean()
