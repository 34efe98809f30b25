"""The loop: change an input, run the target, keep what reached code that nothing had reached, report what it broke."""

from __future__ import annotations

import base64
import json
import random
import signal
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

from tests.fuzz.mutations import mutate
from tests.fuzz.tapes import Input

SEEDS = Path(__file__).parent.parent / "data" / "fuzz"
#: Seconds that one input may take. The slowest of a thousand takes some hundredths of this.
PATIENCE = 5
#: Of so many inputs one is watched for what it reaches.
WATCHED = 4
OURS = ("/netapply/", "/netapply_")

Arc = tuple[CodeType, int, int]


class Target(NamedTuple):
    """`run` refuses an input by one of `refusals`, and raises nothing else. `words` are what inputs are made of."""

    name: str
    run: Callable[[Input], object]
    refusals: tuple[type[Exception], ...]
    words: tuple[bytes, ...] = ()


class Finding(NamedTuple):
    """An input that broke the target, and how."""

    target: str
    pieces: Input
    said: str


class Outcome(NamedTuple):
    """`found` has one input for each place where the target broke; `grown` those that reached something new."""

    tries: int
    refused: int
    found: tuple[Finding, ...]
    grown: tuple[Input, ...]


class TooSlow(BaseException):
    """An input took longer than `PATIENCE`; no handler of the target's catches it."""


def seeds_of(name: str) -> list[Input]:
    """The kept inputs of a target: each piece compressed, in base64."""
    raw = json.loads((SEEDS / f"{name}.json").read_text())
    return [tuple(zlib.decompress(base64.b64decode(piece)) for piece in pieces) for pieces in raw]


def keep(name: str, inputs: list[Input]) -> None:
    """Write the inputs of a target, one a line."""
    lines = ",\n".join(
        json.dumps([base64.b64encode(zlib.compress(piece, 9)).decode() for piece in pieces]) for pieces in inputs
    )
    (SEEDS / f"{name}.json").write_text(f"[\n{lines}\n]\n")


def attempt(target: Target, pieces: Input) -> tuple[bool, str]:
    """Run it once: whether the input was refused, and what else went wrong, by the place ("" where nothing did)."""
    try:
        with _bounded():
            target.run(pieces)
    except target.refusals:
        return True, ""
    except (Exception, TooSlow) as error:  # noqa: BLE001 - whatever it is, it is a finding
        *_, last = traceback.extract_tb(error.__traceback__)
        ours = [f for f in traceback.extract_tb(error.__traceback__) if any(part in f.filename for part in OURS)]
        where = ours[-1] if ours else last
        return False, f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno} ({where.name}): {error}"
    return False, ""


def fuzz(target: Target, seconds: float, seed: int, *, guided: bool = True) -> Outcome:
    """Try neighbours of the kept inputs for so long. The same seed makes the same choices."""
    chance = random.Random(seed)
    corpus = seeds_of(target.name)
    grown: list[Input] = []
    found: dict[str, Finding] = {}
    seen: set[Arc] = set()
    tries = refused = 0
    guided = guided and sys.gettrace() is None  # a coverage run has its own
    deadline = time.monotonic() + seconds
    kept = list(corpus)
    pending = list(corpus)
    while pending or time.monotonic() < deadline:
        pieces = pending.pop() if pending else mutate(chance, chance.choice(corpus), corpus, target.words)
        reached: set[Arc] = set()
        # Watched, an input takes five times as long.
        with _traced(reached) if guided and (tries < len(kept) or tries % WATCHED == 0) else nullcontext():
            was_refused, said = attempt(target, pieces)
        tries += 1
        refused += was_refused
        if said:
            found.setdefault(said.partition(")")[0], Finding(target.name, pieces, said))
        if tries > len(kept) and not reached <= seen:
            corpus.append(pieces)
            grown.append(pieces)
        seen |= reached
    return Outcome(tries, refused, tuple(found.values()), tuple(grown))


@contextmanager
def _bounded() -> Generator[None]:
    def late(_number: int, _frame: FrameType | None) -> None:
        raise TooSlow(f"longer than {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _traced(reached: set[Arc]) -> Generator[None]:
    """Add the steps from line to line in code of ours."""

    def enter(frame: FrameType, _event: str, _argument: Any) -> Any:
        code = frame.f_code
        if not any(part in code.co_filename for part in OURS) or "/tests/" in code.co_filename:
            return None
        last = 0

        def step(frame: FrameType, event: str, _argument: Any) -> Any:
            nonlocal last
            if event == "line":
                reached.add((code, last, frame.f_lineno))
                last = frame.f_lineno
            return step

        return step

    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(None)
