"""Who changed what, when and why: a line for each change of any namespace, in one file of the state directory.

The file is bounded: when it is full it is put in the place of the one before. It is read without the lock, without the
namespace, and after a restart of the machine, where the directory lasts that long. A line that was torn is left out.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

from netapply.errors import JournalError
from netapply.journal import Files, Journal
from netapply.namespace import Namespace
from netapply.nsfs import NamespaceId
from netapply.paths import open_private_directory
from netapply.values import NamedTuple

FILE = "history"
#: Bytes of the file, and of the one before it: some thousand changes.
LIMIT = 256 << 10
#: Characters of a command line, and of a reason, that are kept.
LONGEST = 200

_json = json.JSONEncoder(separators=(",", ":"))


class Event(NamedTuple):
    """One change, or one that failed. A field is never removed."""

    #: Seconds since 1970, by the clock of the machine.
    time: float
    #: Device, inode and cookie of the namespace: the same one as long as the machine runs.
    namespace: str
    #: What the namespace was called on the command line; "" for the caller's own.
    name: str
    #: What was done: apply, migrate, clean, rollback or recover.
    operation: str
    #: "done", "unchanged", "failed, as it was", "failed, NOT restored", or what recover said.
    result: str
    backend: str = ""
    layout: str = ""
    fingerprint: str = ""
    #: Number of the state that stands now, for `netapply rollback`.
    state: int = 0
    #: Who: the user, the one who became root by sudo(8), the process and its command line.
    uid: int = 0
    sudo_user: str = ""
    pid: int = 0
    command: str = ""
    #: Why, in the words of whoever did it.
    reason: str = ""


def identity_of(identity: NamespaceId) -> str:
    """A namespace's identity as an event has it."""
    return f"{identity.device}-{identity.inode}-{identity.cookie}"


def event_of(namespace: Namespace, operation: str, reason: str) -> Event:
    """The beginning of one."""
    return Event(
        0,
        identity_of(namespace.identity),
        namespace.label.removeprefix("network namespace "),
        operation,
        "",
        reason=reason,
    )


def record(files: Files, event: Event) -> str:
    """Append it, with who does it; returns what there is to say where it cannot be written, or ""."""
    whole = event._replace(
        time=round(time.time(), 3),
        uid=os.getuid(),
        sudo_user=os.environ.get("SUDO_USER", "")[:LONGEST],
        pid=os.getpid(),
        command=" ".join(sys.argv)[:LONGEST],
        reason=event.reason[:LONGEST],
    )
    line = _json.encode(whole).encode() + b"\n"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(FILE, flags, 0o600, dir_fd=files.directory)
        try:
            if os.fstat(fd).st_size > LIMIT:
                os.rename(FILE, f"{FILE}.1", src_dir_fd=files.directory, dst_dir_fd=files.directory)
            os.write(fd, line)  # one call: lines of two processes do not mix
        finally:
            os.close(fd)
    except OSError as error:
        return f"history: this change is not in it ({error.strerror})"
    return ""


def events(journal: Journal | None = None, namespace: str = "") -> tuple[Event, ...]:
    """What is known, the oldest first; of one namespace, if `namespace` is its identity. Raises JournalError."""
    directory = (journal or Journal()).directory
    try:
        fd = open_private_directory(directory, create=False)
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise JournalError(f"state directory {directory} cannot be read: {error.strerror}") from error
    try:
        found = [event for name in (f"{FILE}.1", FILE) for event in _read(fd, name)]
    finally:
        os.close(fd)
    return tuple(event for event in found if namespace in ("", event.namespace))


def _read(directory: int, name: str) -> Iterator[Event]:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return
    except OSError as error:
        raise JournalError(f"{name} cannot be read: {error.strerror}") from error
    with open(fd, "rb") as file:
        for line in file:
            event = _understood(line)
            if event is not None:
                yield event


_EMPTY = Event(0.0, "", "", "", "")
_LATEST = 1 << 40  # seconds since 1970


def _understood(line: bytes) -> Event | None:
    """The event of a line; None where it was torn, or is of a version with other fields."""
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    try:
        event = Event._make(found) if line[:1] == b"[" else _EMPTY
    except TypeError:
        return None
    same = all(type(value) is type(model) for value, model in zip(event[1:], _EMPTY[1:], strict=True))
    is_time = type(event.time) in (int, float) and 0 < event.time < _LATEST  # neither NaN nor of 400 digits
    return event if same and is_time else None
