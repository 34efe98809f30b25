"""What the rules cost those who live under them: processor time of a client for one connect(2).

Client and listener are one thread, and the connection is captured: SYN, SYN-ACK and ACK pass inside connect(2), through
all rules of the hooks, and nobody else's work is counted.
"""

from __future__ import annotations

import socket
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

import netapply
from bench import places
from bench.measure import Spread, interleaved
from bench.plans import RULES, excluding_cidrs
from netapply.backend import BUILT_IN
from netapply.lab import Place
from netapply.plan import CapturePlan

#: Connects of one turn. Their mean is one time.
CONNECTS = 200
_ELSEWHERE = ("192.0.2.1", 80)  # RFC 5737, behind a device that leads nowhere
_HERE = (places.ADDRESS, RULES.proxy.outbound_port)  # without rules nothing else leads to the listener
_ABORT = struct.pack("=ii", 1, 0)  # struct linger: close by RST, so that no TIME-WAIT is left


def name(backend: str, rules: str) -> str:
    """The name of a figure."""
    return f"{backend} {rules}"


def measure(count: int, rounds: int) -> dict[str, Spread]:
    """Seconds of processor time a connect, without exclusions and with `count` of them, by `name`."""
    plans: Mapping[str, CapturePlan] = {"without": RULES, "with": excluding_cidrs(count)}
    with ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        turns: dict[str, Callable[[], float]] = {"no rules": _client(stack, _HERE)[1]}
        for backend in BUILT_IN:
            for rules, plan in plans.items():
                spot, turns[name(backend, rules)] = _client(stack, _ELSEWHERE)
                with netapply.open(spot.fd, state_directory=state) as capture:
                    capture.apply(plan, backend=backend)
        return interleaved([turns], rounds)


def _client(stack: ExitStack, target: tuple[str, int]) -> tuple[Place, Callable[[], float]]:
    spot = stack.enter_context(places.place())
    spot.inside(places.wire)
    listener = spot.inside(_listen)
    stack.callback(listener.close)
    return spot, partial(spot.inside, partial(_connect, listener, target))


def _listen() -> socket.socket:
    listener = socket.socket()
    listener.bind(("", RULES.proxy.outbound_port))
    listener.listen()
    return listener


def _connect(listener: socket.socket, target: tuple[str, int]) -> float:
    spent = 0
    for _ in range(CONNECTS):
        with socket.socket() as client:
            begun = time.thread_time_ns()
            client.connect(target)
            spent += time.thread_time_ns() - begun
            accepted, _ = listener.accept()
            accepted.close()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
    return spent / CONNECTS / 1e9
