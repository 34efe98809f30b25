"""The ways to bring a namespace to a plan and back, all with the same rules.

whole     `netapply.open` once, then `Capture.apply` and `clean` as anybody calls them: detection, journal, reading
          before and after, open connections counted
entered   the backend alone, and the way in and out as well: enter, open a socket, read, encode, commit, let go
backend   the backend alone over a namespace that stays open: read, encode, commit. No journal, no proof. What it has
          put somewhere before it knows in bytes, and what it has read while nothing changed
floor     kept bytes over kept sockets, and nothing else (`bench.replay`)
exec      the dialect's own tool, started with the text of the same rules; both families where it takes two
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import netapply
from bench.measure import clock
from bench.programs import run
from bench.recording import Cycle
from bench.replay import Sockets, play
from netapply.backend import Backend, find_backend
from netapply.compiler import compile_plan
from netapply.lab import Place
from netapply.namespace import Namespace
from netapply.plan import CapturePlan
from netapply.ruleset import Ruleset

Operation: TypeAlias = Literal["apply", "update", "clean"]
OPERATIONS: tuple[Operation, ...] = ("apply", "update", "clean")

#: The tools of each dialect, with the line of our text that says for which of them the rest is.
TOOLS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "nftables": {"": ("nft", "-f")},
    "iptables-nft": {
        "# ipset restore\n": ("ipset", "restore", "-file"),
        "# iptables-restore\n": ("iptables-nft-restore",),
        "# ip6tables-restore\n": ("ip6tables-nft-restore",),
    },
    "iptables-legacy": {
        "# ipset restore\n": ("ipset", "restore", "-file"),
        "# iptables-restore\n": ("iptables-legacy-restore",),
        "# ip6tables-restore\n": ("ip6tables-legacy-restore",),
    },
}


class Subject(Protocol):
    """One way, at work on a namespace of its own."""

    def do(self, operation: Operation) -> float:
        """Do it, and say how long it took, in seconds."""
        ...

    def close(self) -> None:
        """Let go of the namespace."""
        ...


class Whole:
    """The library as it is called."""

    def __init__(self, place: Place, state: str, backend: str, first: CapturePlan, second: CapturePlan) -> None:
        self._capture = netapply.open(place.fd, state_directory=state)
        self._backend = backend
        self._plans = {"apply": first, "update": second}

    def take(self, plan: CapturePlan) -> None:
        """Have `apply` put up this plan from now on."""
        self._plans["apply"] = plan

    def do(self, operation: Operation) -> float:
        if operation == "clean":
            return clock(self._capture.clean)
        return clock(lambda: self._capture.apply(self._plans[operation], backend=self._backend))

    def close(self) -> None:
        self._capture.close()


class BackendAlone:
    """Read, encode, commit."""

    def __init__(self, place: Place, backend: str, first: CapturePlan, second: CapturePlan) -> None:
        self._namespace = Namespace.open(place.fd)
        self._backend: Backend = find_backend(backend)
        dialect = self._backend.dialect
        self._wanted = {"apply": compile_plan(first, dialect), "update": compile_plan(second, dialect), "clean": None}

    def take(self, plan: CapturePlan) -> None:
        """Have `apply` put up this plan from now on."""
        self._wanted["apply"] = compile_plan(plan, self._backend.dialect)

    def do(self, operation: Operation) -> float:
        return clock(lambda: bring(self._backend, self._namespace, self._wanted[operation]))

    def close(self) -> None:
        self._namespace.close()


class Entered:
    """The same in a namespace that is opened for it."""

    def __init__(self, place: Place, backend: str, first: CapturePlan, second: CapturePlan) -> None:
        self._fd = place.fd
        self._backend: Backend = find_backend(backend)
        dialect = self._backend.dialect
        self._wanted = {"apply": compile_plan(first, dialect), "update": compile_plan(second, dialect), "clean": None}

    def do(self, operation: Operation) -> float:
        return clock(lambda: self._bring(operation))

    def _bring(self, operation: Operation) -> None:
        with Namespace.open(self._fd) as namespace:
            bring(self._backend, namespace, self._wanted[operation])

    def close(self) -> None:
        """Nothing is open."""


def bring(backend: Backend, namespace: Namespace, wanted: Ruleset | None) -> None:
    """Have the namespace hold these rules of ours."""
    for step in backend.encode(backend.read(namespace), wanted):
        backend.commit(namespace, step)


class Floor:
    """What the kernel takes."""

    def __init__(self, place: Place, cycle: Cycle) -> None:
        self._sockets = place.inside(lambda: Sockets([*cycle.apply, *cycle.update, *cycle.clean]))
        self._calls = {operation: self._sockets.calls(getattr(cycle, operation)) for operation in OPERATIONS}

    def do(self, operation: Operation) -> float:
        return clock(lambda: play(self._calls[operation]))

    def close(self) -> None:
        self._sockets.close()


class Exec:
    """The dialect's own tool, or two of them, one after another."""

    def __init__(self, place: Place, backend: str, texts: dict[Operation, str]) -> None:
        self._place = place
        self._directory = tempfile.TemporaryDirectory(dir="/dev/shm")
        self._commands = {operation: self._written(backend, operation, text) for operation, text in texts.items()}

    def do(self, operation: Operation) -> float:
        commands = self._commands[operation]
        return self._place.inside(lambda: clock(lambda: _run(commands)))

    def close(self) -> None:
        self._directory.cleanup()

    def _written(self, backend: str, operation: Operation, text: str) -> list[tuple[str, ...]]:
        commands: list[tuple[str, ...]] = []
        for number, (tool, part) in enumerate(sections(backend, text)):
            path = Path(self._directory.name, f"{operation}-{number}")
            path.write_text(part)
            commands.append((*tool, str(path)))
        return commands


def exec_texts(backend: str, first: CapturePlan, second: CapturePlan, *, linear: bool = False) -> dict[Operation, str]:
    """For each operation, what the tool reads. A restore without --noflush replaces the tables that it names.

    `linear`: a rule for each block, and no set.
    """
    chosen = find_backend(backend)
    dialect = chosen.dialect._replace(sets_from=0) if linear else chosen.dialect
    one, two = (chosen.render(compile_plan(plan, dialect)) for plan in (first, second))
    if backend == "nftables":
        gone = "delete table inet netapply\n"
        return {"apply": one, "update": gone + two, "clean": gone}
    empty = "".join(f"{line}*nat\nCOMMIT\n" for line in TOOLS[backend] if "ipset" not in line)
    return {"apply": one, "update": two, "clean": empty}


def sections(backend: str, text: str) -> list[tuple[tuple[str, ...], str]]:
    """Our text, cut into what each tool reads: (tool with its options, text)."""
    tools = TOOLS[backend]
    if "" in tools:
        return [(_found(tools[""]), text)]
    cut = re.split("(" + "|".join(tools) + ")", text)
    return [(_found(tools[line]), part) for line, part in zip(cut[1::2], cut[2::2], strict=True)]


def _found(tool: Sequence[str]) -> tuple[str, ...]:
    path = shutil.which(tool[0])
    if path is None:
        raise FileNotFoundError(f"{tool[0]} is not on PATH: `make oracles` installs what is compared with")
    return (path, *tool[1:])


def _run(commands: Sequence[tuple[str, ...]]) -> None:
    for command in commands:
        if code := run(command):
            raise RuntimeError(f"{' '.join(command)} ended with {code}")
