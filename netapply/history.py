"""Who changed what, when and why: a line for each change of any namespace, in one file of the state directory.

The file is bounded: when it is full it is put in the place of the one before. Who writes holds the file's lock, so that
nobody puts it aside meanwhile, and a whole line is written or nothing. It is read without the lock, without the
namespace, and after a restart of the machine, where the directory lasts that long.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import sys
import time
from contextlib import suppress
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
#: Seconds to wait for others who write a line each.
PATIENCE = 2.0
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
    try:
        _append(files.directory, _json.encode(whole).encode() + b"\n")
    except OSError as error:
        return f"history: this change is not in it ({error.strerror})"
    return ""


def _append(directory: int, line: bytes) -> None:
    fd = _locked(directory)
    try:
        size = os.fstat(fd).st_size
        if size > LIMIT:
            os.rename(FILE, f"{FILE}.1", src_dir_fd=directory, dst_dir_fd=directory)
        if size and os.pread(fd, 1, size - 1) != b"\n":
            line = b"\n" + line  # the machine stopped in the middle of one
        if os.write(fd, line) != len(line):
            os.ftruncate(fd, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(fd)


def _locked(directory: int) -> int:
    """The file, open and locked, and still in its place. Raises OSError, after PATIENCE seconds too."""
    deadline = time.monotonic() + PATIENCE
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        fd = os.open(FILE, flags, 0o600, dir_fd=directory)
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _inode_in_place(directory) == os.fstat(fd).st_ino:
                return fd
        os.close(fd)
        if time.monotonic() >= deadline:
            raise OSError(errno.EBUSY, "somebody holds it")
        time.sleep(0.001)


def _inode_in_place(directory: int) -> int:
    """Of what FILE names now; 0 where it names nothing."""
    with suppress(FileNotFoundError):
        return os.stat(FILE, dir_fd=directory, follow_symlinks=False).st_ino
    return 0


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
        lines = _lines(fd)
    finally:
        os.close(fd)
    found = (event for line in lines if (event := _understood(line)))
    return tuple(event for event in found if namespace in ("", event.namespace))


def _lines(directory: int) -> list[bytes]:
    """Of both files, the older first, at one moment: either may be put in the place of the other while it is read."""
    for _ in range(100):
        now, inode = _content(directory, FILE)
        before, _ = _content(directory, f"{FILE}.1")
        if not inode or _inode_in_place(directory) == inode:
            return before.splitlines() + now.splitlines()
    raise JournalError(f"{FILE} is written faster than it can be read", next_step="try again")


def _content(directory: int, name: str) -> tuple[bytes, int]:
    """What a file holds, and its inode; nothing and 0 where there is none. Raises JournalError."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        with open(fd, "rb") as file:
            return file.read(), os.fstat(fd).st_ino
    except FileNotFoundError:
        return b"", 0
    except OSError as error:
        raise JournalError(f"{name} cannot be read: {error.strerror}") from error


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
