"""A torn journal, a namespace deleted or replaced, locks that are held for ever, a clock that jumps."""

from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from netapply.namespace import Namespace
from tests import netns
from tests.faults import pictures, tracing
from tests.faults.kills import Interrupt, interruption, named, spread
from tests.faults.outcome import Outcome
from tests.faults.refusals import judge
from tests.faults.stage import Case, Stage, command_line
from tests.faults.tracing import CALLS, Call, Child, Fault

#: What becomes of the file that says pending.
_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "half": lambda data: data[: len(data) // 2],
    "all but the end": lambda data: data[:-3],
    "a bit in the checksum": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "a bit in the middle": lambda data: data.replace(b'"before"', b'"befora"'),
    "zeros": lambda data: bytes(len(data)),
    "twice": lambda data: data + data,
    "of another format": lambda data: b"00000000 {}\n",
}  # fmt: skip


def torn(case: Case, *, most: int = len(_DAMAGES)) -> Iterator[Outcome]:
    """A journal that cannot be trusted is set aside, and told; the next apply gets there, and clean leaves nothing.

    `most` of the ways in which it can be torn are tried.
    """
    stage = Stage(case)
    try:
        halfway = interruption(stage, ("clean",), "apply a")
        new = stage.reset("clean", "apply a")
        for name, damage in [*_DAMAGES.items()][:most]:
            for pending in (True, False):
                for at, command in enumerate(("apply b", "recover")):
                    if pending:
                        old = stage.reset("clean")
                        stage.fail("apply a", Interrupt(stage, halfway))
                    else:
                        old = stage.reset("clean", "apply a")
                    files = [stage.state / each for each in stage.pending()] if pending else stage.journal()
                    at_once = named(stage.picture(), old, new)
                    for path in files:
                        path.write_bytes(damage(path.read_bytes()))
                    ended = stage.run(command)
                    wrong = [] if "set aside" in ended.output else [f"{command} did not tell: {ended.output}"]
                    if ended.code != at:
                        wrong.append(f"{command} ended with {ended.code}: {ended.output}")
                    then = stage.reset("apply a")
                    if then.state != new.state:
                        wrong.append(f"not new after apply: {pictures.difference(then, new)}")
                    wrong += pictures.lost(stage.empty, then, legacy_counters=False)
                    left = stage.reset("clean")
                    if left.state != stage.empty.state:
                        wrong.append(f"left after clean: {pictures.difference(left, stage.empty)}")
                    where = f"{case}: {name}, {'pending' if pending else 'settled'}, then {command}"
                    yield Outcome("a torn journal", case.backend, where, at_once or "between", "new", tuple(wrong))
    finally:
        stage.close()


class _At(Fault):
    """Does something at one system call, counted from the first visit to the namespace: before, any name is right."""

    curious = True

    def __init__(self, at: int, work: Callable[[], None]) -> None:
        self._at = at
        self._work = work
        self.visited = 0

    def entering(self, child: Child, call: Call) -> int:
        if self.visited or call.number == CALLS["setns"]:
            self.visited += 1
        if self.visited == self._at + 1 and not self.hit:
            self.hit = True
            self._work()
        return 0


def replaced(case: Case, *, most: int) -> Iterator[Outcome]:
    """The name leads nowhere, or to another namespace, from the middle of an apply on. The other is never touched."""
    stage = Stage(case)
    other = netns.make()
    place = stage.directory / "pod"
    place.touch()
    try:
        new = stage.reset("apply b")
        old = stage.reset("apply a")
        with Namespace.open(other.path) as theirs, _bound(stage.netns.path, place):
            untouched = pictures.take(theirs)
            counted = _At(1 << 30, lambda: None)
            stage.fail("apply b", counted, where=str(place))
            stage.reset("apply a")
            for name, source in (("a namespace deleted", ""), ("a namespace replaced", other.path)):
                for at in spread(counted.visited, most):
                    fault = _At(at, partial(_rebind, place, source))
                    ended = stage.fail("apply b", fault, where=str(place))
                    if not fault.hit:
                        continue
                    outcome = judge(stage, name, f"{case}: {name} at call {at}", ended, old, new)
                    yield outcome
                    _rebind(place, stage.netns.path)
                    stage.reset("apply a")
                    if pictures.take(theirs).state != untouched.state:
                        yield outcome._replace(wrong=("the other namespace was changed",))
                        stage.run("clean", where=other.path)  # type: ignore[arg-type]
    finally:
        other.close()
        stage.close()


@contextmanager
def _bound(source: str, place: Path) -> Iterator[None]:
    _rebind(place, source)
    try:
        yield
    finally:
        _rebind(place, "")


def _rebind(place: Path, source: str) -> None:
    subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)
    if source:
        subprocess.run(["mount", "--bind", source, str(place)], check=True)


def locked(case: Case) -> Iterator[Outcome]:
    """Somebody holds a lock and never lets go: an error in time, and nothing touched."""
    stage = Stage(case)
    try:
        new = stage.reset("apply b")
        old = stage.reset("apply a")
        (ours,) = stage.state.glob("*.lock")
        for path in (ours, stage.lock) if case.backend == "iptables-legacy" else (ours,):
            for command in ("apply b", "clean", "recover", "verify"):
                if path == stage.lock and command in ("recover", "verify"):
                    continue
                with path.open() as held:
                    fcntl.flock(held, fcntl.LOCK_EX)
                    ended = stage.run(command, lock_timeout=0.3)
                where = f"{case}: {path.name.rpartition('.')[0] or path.name} held, {command}"
                outcome = judge(stage, "a lock held for ever", where, ended, old, new)
                if ended.code != 1 or ended.seconds > 5:
                    outcome = outcome._replace(wrong=(*outcome.wrong, f"{ended}"))
                yield outcome
    finally:
        stage.close()


def jumped(case: Case) -> Iterator[Outcome]:
    """The clocks jump, forward and back, whenever they are looked at."""
    stage = Stage(case)
    try:
        new = stage.reset("apply b")
        for jump in (86400.0, -86400.0, 1e9, -1e9):
            for name in ("time", "monotonic"):
                old = stage.reset("apply a")
                ended = tracing.run(partial(_jumping, stage.words("apply b"), name, jump))
                yield judge(stage, "a clock jump", f"{case}: {name} by {jump:g} s", ended, old, new)
    finally:
        stage.close()


def _jumping(words: list[str], name: str, jump: float) -> int:
    clock, looks = getattr(time, name), iter(range(1 << 30))
    setattr(time, name, lambda: clock() + jump * (next(looks) % 2))
    return command_line(words)


def full(case: Case) -> Iterator[Outcome]:
    """A state directory on a file system that has no room left; the error says so, and nothing is changed."""
    stage = Stage(case)
    try:
        new = stage.reset("apply b")
        stage.reset("apply a")
        for room in range(0, 40, 4):
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={40}k,mode=700", "none", str(stage.state)], check=True)
            try:
                old = stage.reset("apply a")
                filler = stage.state / "filler"
                with filler.open("wb", buffering=0) as file:
                    try:
                        while True:
                            file.write(bytes(4096))
                    except OSError:
                        os.ftruncate(file.fileno(), max(0, file.tell() - room * 1024))
                ended = stage.run("apply b")
                filler.unlink()
                yield judge(stage, "a full disk", f"{case}: {room} KiB left", ended, old, new)
            finally:
                subprocess.run(["umount", "-l", str(stage.state)], check=True)
    finally:
        stage.close()
