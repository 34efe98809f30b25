"""An apply on trial, without the agent: what was before comes back unless somebody confirms in time.

A process of ours waits: forked before the apply, in a session of its own and without a terminal, so that it outlives
the caller's. The time is that since the machine started, suspended or not (CLOCK_BOOTTIME): nobody's setting of the
clock counts. What is on trial stands in a file beside the journal, under the journal's lock: `confirm` removes it,
`extend` gives it more time, and the waiter goes back if it is still there, and the state is still the one on trial.

A caller who dies between has confirmed nothing: then it goes back at once.

Where the caller is logged in through the namespace itself, what is on trial leaves that alone (`netapply.logins`), and
the file says what is meant: `confirm` puts that in its place.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

from netapply import core, history
from netapply.api import Capture
from netapply.errors import ConflictError, JournalError, NamespaceError, NetapplyError
from netapply.journal import KEPT, Files
from netapply.logins import find_logins, spare, told_of
from netapply.plan import CapturePlan
from netapply.recovery import recover
from netapply.values import NamedTuple

#: Seconds between two looks at the file and the clock.
PAUSE = 0.25
#: How often the waiter tries to go back where it cannot: the lock is held, or the kernel refuses.
ATTEMPTS = 40
#: Seconds that confirming may take, where something is to be put in the place of what is on trial.
CONFIRMING = 60.0

Opener: TypeAlias = Callable[[], Capture]


class Meant(NamedTuple):
    """What is to stand once it is confirmed: a plan as `dump_plan` has it."""

    plan: dict[str, Any]
    backend: str
    layout: str


class Trial(NamedTuple):
    """What is on trial: the number of the state, and until when (CLOCK_BOOTTIME, in seconds).

    `before` is the number of the state that comes back: -1 where there was none.
    """

    number: int
    until: float
    before: int
    #: None: what stands.
    meant: Meant | None = None


class Waiter:
    """The process that waits, and the pipe by which it is told. Before `wait` or `dismiss` it knows of no trial."""

    def __init__(self, pipe: int, stood: int, before: int) -> None:
        self._pipe = pipe
        #: The state that stood when it began, -1 where there was none.
        self.stood = stood
        #: The state that comes back: another one where that one was on trial, too, and confirmed by nobody.
        self.before = before
        #: What there is to say of what stands on trial in the place of what is meant.
        self.said: tuple[str, ...] = ()
        self._meant: Meant | None = None

    def sparing(self, capture: Capture, plan: CapturePlan, backend: str, layout: str) -> CapturePlan:
        """The plan to put on trial: it leaves alone by what the caller is logged in here, unless it stands already."""
        logins = find_logins(capture.namespace)
        spared = spare(plan, logins, layout)
        if spared == plan or capture.diff(plan, backend=backend, layout=layout).same:
            return plan
        from netapply.planfile import dump_plan

        self._meant = Meant(dump_plan(plan), backend, layout)
        self.said = tuple(map(told_of, logins))
        return spared

    def wait(self, capture: Capture, seconds: float) -> Trial | None:
        """Put what stands on trial; None where it is what was before. Raises JournalError."""
        with _files(capture) as files:
            entry = files.load()
            changed = entry is not None and files.number != self.stood
            if not changed and _read(files, capture) is None:
                self.dismiss()
                return None
            trial = Trial(files.number, _now() + seconds, self.before, self._meant)
            _write(files, capture, trial)
        # Who puts on trial what is on trial gives it more time, and who waits for that goes on.
        self._tell({"number": trial.number if changed else None})
        return trial

    def dismiss(self) -> None:
        """Nothing is on trial."""
        self._tell({"number": None})

    def _tell(self, told: dict[str, object]) -> None:
        os.write(self._pipe, json.dumps(told).encode())
        os.close(self._pipe)


def start(opener: Opener) -> Waiter:
    """Fork the waiter. Call it before anything has started a thread. Raises NetapplyError where there is no journal."""
    with opener() as capture:
        recover(capture.namespace, journal=capture.journal)  # so that the state that stands is a known one
        with _files(capture) as files:
            stood = files.number if files.load() is not None else -1
            earlier = _read(files, capture)
            before = stood if earlier is None else earlier.before
        identity = history.identity_of(capture.namespace.identity)
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(reading)
        os.waitpid(child, 0)
        return Waiter(writing, stood, before)
    try:
        os.close(writing)
        os.setsid()
        if os.fork() == 0:
            _detach(keep=reading)
            _watch(opener, reading, stood, before, identity)
    finally:
        os._exit(0)


def confirm(capture: Capture) -> bool:
    """Keep what is on trial, or put what is meant in its place; False where nothing is.

    Raises NetapplyError; then it is on trial as before.
    """
    with _files(capture) as files:
        trial = _read(files, capture)
        if trial is None:
            return False
        if trial.meant is None:
            os.unlink(_name(capture), dir_fd=files.directory)
            return True
        _write(files, capture, trial._replace(until=max(trial.until, _now() + CONFIRMING)))
    try:
        _put_in_place(capture, trial.meant, trial.number)
    except BaseException:
        with _files(capture) as files:
            if _read(files, capture) is not None:
                _write(files, capture, trial)
        raise
    with _files(capture) as files, suppress(FileNotFoundError):
        os.unlink(_name(capture), dir_fd=files.directory)
    return True


def keep(capture: Capture) -> bool:
    """Keep what stands, and nothing else in its place; False where nothing is on trial. Raises NetapplyError."""
    with _files(capture) as files:
        trial = _read(files, capture)
        if trial is not None:
            os.unlink(_name(capture), dir_fd=files.directory)
        return trial is not None


def _put_in_place(capture: Capture, meant: Meant, number: int) -> None:
    from netapply.planfile import fingerprint, load_plan

    plan = load_plan(json.dumps(meant.plan), format="json", source="what is on trial")
    core.apply(
        capture.namespace,
        plan,
        backend=meant.backend,
        layout=meant.layout,
        journal=capture.journal,
        fingerprint=fingerprint(plan),
        replaces=number,
        reason="confirmed",
    )


def extend(capture: Capture, seconds: float) -> bool:
    """Have it wait so long from now; False where nothing is on trial. Raises NetapplyError."""
    with _files(capture) as files:
        trial = _read(files, capture)
        if trial is None:
            return False
        _write(files, capture, trial._replace(until=_now() + seconds))
        return True


def _watch(opener: Opener, pipe: int, stood: int, before: int, identity: str) -> None:
    told = os.read(pipe, 4096)
    os.close(pipe)
    if told and json.loads(told)["number"] is None:
        return
    number: int = json.loads(told)["number"] if told else stood + 1
    failed, due = 0, not told
    while failed < ATTEMPTS:
        try:
            with opener() as capture:
                if history.identity_of(capture.namespace.identity) != identity:
                    return  # it is gone, and another has its name
                if due := due or _is_over(capture, number):
                    _go_back(capture, number, before)
                    return
        except (_Ended, NamespaceError, ConflictError):
            return
        except NetapplyError:  # somebody holds the lock, or the kernel refuses: once more
            failed += 1
        time.sleep(PAUSE)


class _Ended(Exception):  # noqa: N818 - an event, and no error
    """The trial ended otherwise."""


def _is_over(capture: Capture, number: int) -> bool:
    with _files(capture) as files:
        trial = _read(files, capture)
        if trial is None or trial.number != number:
            raise _Ended
        over = trial.until <= _now()
        if over:  # from here on nothing is on trial that could be confirmed
            os.unlink(_name(capture), dir_fd=files.directory)
        return over


def _go_back(capture: Capture, number: int, before: int) -> None:
    """Go back if the state is the one on trial: who applied something else meanwhile meant that."""
    recover(capture.namespace, journal=capture.journal)
    with _files(capture) as files:
        stands = files.number if files.load() is not None else -1
    if stands == number:
        back = number - before if before < 0 else min(number - before, KEPT)
        core.rollback(capture.namespace, back, journal=capture.journal, state=number, reason="nobody confirmed in time")


def _detach(keep: int) -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    nowhere = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(nowhere, fd)
    last = os.sysconf("SC_OPEN_MAX")
    os.closerange(3, keep)
    os.closerange(keep + 1, last)


@contextmanager
def _files(capture: Capture) -> Generator[Files]:
    namespace = capture.namespace
    files = capture.journal.acquire(namespace.identity, namespace.lock_timeout, namespace.memory)
    try:
        yield files
    finally:
        files.close()


def _name(capture: Capture) -> str:
    return f"{history.identity_of(capture.namespace.identity)}.trial"


def _read(files: Files, capture: Capture) -> Trial | None:
    """What is on trial and still stands; the file of another state is removed."""
    trial = _told(files, capture)
    if trial is not None and (files.load() is None or files.number != trial.number):
        os.unlink(_name(capture), dir_fd=files.directory)
        return None
    return trial


def _told(files: Files, capture: Capture) -> Trial | None:
    with suppress(FileNotFoundError):
        fd = os.open(_name(capture), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=files.directory)
        with open(fd, encoding="ascii") as file:
            try:
                body = json.load(file)
                meant = Meant(**body["meant"]) if body.get("meant") else None
                return Trial(int(body["number"]), float(body["until"]), int(body["before"]), meant)
            except (ValueError, KeyError, TypeError) as error:
                raise JournalError(
                    f"{_name(capture)} cannot be trusted: {error}", next_step="remove it, and apply what you want"
                ) from error
    return None


def _write(files: Files, capture: Capture, trial: Trial) -> None:
    name = _name(capture)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(f"{name}.new", flags, 0o600, dir_fd=files.directory)
        with open(fd, "w", encoding="ascii") as file:
            json.dump({**trial._asdict(), "meant": trial.meant and trial.meant._asdict()}, file)
        os.rename(f"{name}.new", name, src_dir_fd=files.directory, dst_dir_fd=files.directory)
    except OSError as error:
        raise JournalError(f"the trial cannot be written: {error.strerror}") from error


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def nothing_is_on_trial() -> NetapplyError:
    """What confirm and extend say then."""
    return NetapplyError(
        "nothing is on trial here: it was confirmed, or has gone back, or something else was applied",
        next_step="netapply history tells which",
    )
