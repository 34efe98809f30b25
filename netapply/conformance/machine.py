"""What a run may do to the machine's kernel: taint it, or make it complain. Looked at before and after."""

from __future__ import annotations

import os
import platform

from netapply.values import NamedTuple

#: Levels of the kernel log (syslog(2)) that are complaints: emergency to warning.
_WARNING = 4


class Machine(NamedTuple):
    """`taint` is /proc/sys/kernel/tainted (-1: not to be read), `log` the last sequence number of /dev/kmsg."""

    taint: int
    log: int


class Since(NamedTuple):
    """What happened since: new taint bits, and complaints of the kernel. `unseen` says what could not be looked at."""

    taint: int = 0
    complaints: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()


def look() -> Machine:
    """The machine now."""
    try:
        with open("/proc/sys/kernel/tainted", encoding="ascii") as file:
            taint = int(file.read())
    except OSError:
        taint = -1
    records = _records(-1)
    return Machine(taint, records[-1][0] if records else -1)


def since(before: Machine) -> Since:
    """What is new since `before`."""
    now = look()
    records = _records(before.log)
    unseen = (*(["kernel taint"] if now.taint < 0 else []), *(["kernel log"] if records is None else []))
    complaints = tuple(text for _, level, text in records or () if level <= _WARNING)
    return Since(now.taint & ~before.taint if now.taint >= 0 else 0, complaints, unseen)


def kernel() -> str:
    """The kernel's release and the machine's kind."""
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def _records(after: int) -> list[tuple[int, int, str]] | None:
    """(sequence number, level, text) of each record of the kernel log behind `after`; None where it cannot be read."""
    try:
        fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    found: list[tuple[int, int, str]] = []
    try:
        while True:
            try:
                record = os.read(fd, 8192).decode("utf-8", "replace")
            except BrokenPipeError:  # EPIPE: the record was overwritten meanwhile; the next read goes on after it
                continue
            except OSError:  # EAGAIN: there is no more
                return found
            head, _, text = record.partition(";")
            level, number, *_ = head.split(",")
            if int(number) > after:
                found.append((int(number), int(level) & 7, text.partition("\n")[0]))
    finally:
        os.close(fd)
