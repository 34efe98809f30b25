"""The write-ahead journal: one file a namespace says what was, what should be, and whether it is done.

It is written, under a name that says pending, before the first change, and gets its own name after the last: so an
interrupted run is finished or undone by the next command. Everything that it speaks of lives in the kernel and ends
with it, so the default place is a tmpfs. Files are written whole to a temporary name, synced, and renamed: a reader
sees the old one or the new one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
import zlib
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from netapply.errors import DecodeError, JournalError, LockError
from netapply.nsfs import NamespaceId
from netapply.record import hexed, routing_from_json, ruleset_from_json, ruleset_to_json
from netapply.ruleset import Routing, Ruleset

DEFAULT_DIRECTORY = "/run/netapply"
FORMAT = 1


class State(NamedTuple):
    """What one backend's rules and the routing are, or should be."""

    ruleset: Ruleset | None
    routing: Routing


class Entry(NamedTuple):
    """One namespace's file. `pending` says that a run began and did not end; it is told by the file's name.

    `created` is the routing that we put up ourselves, now or before: all that clean may remove.
    """

    pending: bool
    backend: str
    before: State
    desired: State
    created: Routing = Routing()
    layout: str = "netapply"
    fingerprint: str = ""


class Journal:
    """The files of a state directory. Nothing is opened before it is used."""

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory or os.environ.get("NETAPPLY_STATE_DIR") or DEFAULT_DIRECTORY
        #: Whether somebody asked for this directory. If not, and it cannot be written, apply does without a journal.
        self.chosen = self.directory != DEFAULT_DIRECTORY

    def acquire(self, identity: NamespaceId, timeout: float) -> Files:
        """The files of one namespace, to nobody else until they are closed. Raises JournalError, LockError."""
        try:
            directory = _open_directory(self.directory)
        except OSError as error:
            raise JournalError(
                f"state directory {self.directory}: {error.strerror}",
                next_step="name a writable one on a tmpfs by --state-dir or NETAPPLY_STATE_DIR",
            ) from error
        try:
            return Files(directory, _name(identity), timeout)
        except OSError as error:
            os.close(directory)
            raise JournalError(
                f"state directory {self.directory} cannot be used: {error.strerror}",
                next_step="name a writable one on a tmpfs by --state-dir or NETAPPLY_STATE_DIR",
            ) from error
        except BaseException:
            os.close(directory)
            raise


class Files:
    """One namespace's journal file, below an open directory, under an exclusive lock until `close`."""

    def __init__(self, directory: int, name: str, timeout: float) -> None:
        self._directory = directory
        self._name = name
        self._pending = f"{name}.pending"
        self._begun: Entry | None = None
        self._lock = _lock(directory, f"{name}.lock", timeout)

    def close(self) -> None:
        """Let others in."""
        os.close(self._lock)
        os.close(self._directory)

    def load(self) -> Entry | None:
        """The entry; None when there is none, or it is from before the machine started. Raises JournalError."""
        pending = self._read(self._pending)
        data = self._read(self._name) if pending is None else pending
        return None if data is None else _decode(data, self._name, pending=pending is not None)

    def begin(self, entry: Entry) -> None:
        """Write the entry of a run before its first change: on the disk, whole, when this returns."""
        self._write(entry, self._pending)
        self._begun = entry

    def settle(self, entry: Entry) -> None:
        """The run is over, and `entry` is what stands: mostly as it began, and then only the name changes."""
        entry = entry._replace(pending=True)
        if self._begun == entry:
            with _said("the journal cannot be written"):
                os.rename(self._pending, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
                os.fsync(self._directory)
        else:
            self._write(entry, self._name)
            self._unlink(self._pending)
        self._begun = None

    def discard(self) -> None:
        """The run was undone, and what the journal said before it began is true again."""
        self._unlink(self._pending)
        self._begun = None

    def forget(self) -> None:
        """Nothing of ours is left in the namespace: neither are its files."""
        self._unlink(self._name)
        self.discard()
        self._unlink(f"{self._name}.lock")

    def set_aside(self) -> str:
        """Rename files that cannot be read, and return the new name of one."""
        with _said("the journal cannot be set aside"):
            for name in (self._name, self._pending):
                with suppress(FileNotFoundError):
                    os.rename(name, f"{self._name}.bad", src_dir_fd=self._directory, dst_dir_fd=self._directory)
        return f"{self._name}.bad"

    def _read(self, name: str) -> bytes | None:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            return None
        except OSError as error:  # a link
            raise JournalError(f"journal {name} cannot be read: {error.strerror}") from error
        with _said("the journal cannot be read"), os.fdopen(fd, "rb") as file:
            return file.read()

    def _write(self, entry: Entry, name: str) -> None:
        data = _encode(entry)
        temporary = f"{self._name}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with _said("the journal cannot be written"):
            fd = os.open(temporary, flags, 0o600, dir_fd=self._directory)
            try:
                written = 0
                while written < len(data):
                    written += os.write(fd, data[written:])
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            os.fsync(self._directory)

    def _unlink(self, name: str) -> None:
        with _said("the journal cannot be removed"), suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._directory)


@contextmanager
def _said(what: str) -> Generator[None]:
    """An OSError as a JournalError that says what could not be done."""
    try:
        yield
    except OSError as error:
        step = "free space in the state directory, or name another by --state-dir"
        raise JournalError(f"{what}: {error.strerror}", next_step=step) from error


def _name(identity: NamespaceId) -> str:
    return f"{identity.device}-{identity.inode}-{identity.cookie}"


def _lock(directory: int, name: str, timeout: float) -> int:
    """The lock file, open and locked. Who waited for one that `forget` has removed meanwhile takes the next."""
    deadline = time.monotonic() + timeout
    while True:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            while not _locked(fd):
                if time.monotonic() >= deadline:
                    raise LockError(
                        f"another netapply has been at work on this namespace for more than {timeout:g} s",
                        next_step="wait for it, or allow more by --lock-timeout",
                    )
                time.sleep(0.005)
            with suppress(FileNotFoundError):
                if os.stat(name, dir_fd=directory, follow_symlinks=False).st_ino == os.fstat(fd).st_ino:
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _open_directory(path: str) -> int:
    """The state directory, made if need be; refused unless it is ours alone."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        os.makedirs(path, 0o700, exist_ok=True)  # another thread or process may be first
        fd = os.open(path, flags)
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(fd)
        raise OSError(errno.EPERM, "must be a directory of our own with mode 0700")
    return fd


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _encode(entry: Entry) -> bytes:
    body = {
        "format": FORMAT,
        "boot": _boot(),
        "backend": entry.backend,
        "layout": entry.layout,
        "fingerprint": entry.fingerprint,
        "before": [ruleset_to_json(entry.before.ruleset), entry.before.routing],
        "desired": [ruleset_to_json(entry.desired.ruleset), entry.desired.routing],
        "created": entry.created,
        "pid": os.getpid(),
        "time": round(time.time(), 3),
    }
    text = json.dumps(body, default=hexed, separators=(",", ":")).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _decode(data: bytes, name: str, *, pending: bool) -> Entry | None:
    checksum, _, text = data.rstrip(b"\n").partition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(text):
            raise ValueError("the checksum does not agree")
        body: Any = json.loads(text)
        if body["format"] != FORMAT:
            raise ValueError(f"format {body['format']} is not ours")
        if body["boot"] != _boot():
            return None
        return Entry(
            pending,
            body["backend"],
            _state(body["before"]),
            _state(body["desired"]),
            routing_from_json(body["created"]),
            body["layout"],
            body["fingerprint"],
        )
    except (ValueError, KeyError, TypeError, DecodeError) as error:
        raise JournalError(f"journal {name} cannot be trusted: {error}") from error


def _state(raw: Any) -> State:
    rules, routing = raw
    return State(ruleset_from_json(rules), routing_from_json(routing))
