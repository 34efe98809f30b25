"""The write-ahead journal: one file a namespace says what was, what should be, and whether it is done.

It is written before the first change and again after the last, so that an interrupted run is finished or undone by
the next command. Everything that it speaks of lives in the kernel and ends with it, so the default place is a tmpfs.
Files are written whole to a temporary name, synced, and renamed: a reader sees the old one or the new one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
import zlib
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
    """One namespace's file. `pending` says that a run began and did not end.

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
        self._lock = _lock(directory, f"{name}.lock", timeout)

    def close(self) -> None:
        """Let others in."""
        os.close(self._lock)
        os.close(self._directory)

    def load(self) -> Entry | None:
        """The entry; None when there is none, or it is from before the machine started. Raises JournalError."""
        try:
            fd = os.open(self._name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            return None
        except OSError as error:  # a link, or something that is no file
            raise JournalError(f"journal {self._name} cannot be read: {error.strerror}") from error
        try:
            with os.fdopen(fd, "rb") as file:
                data = file.read()
        except OSError as error:
            raise JournalError(f"journal {self._name} cannot be read: {error.strerror}") from error
        return _decode(data, self._name)

    def store(self, entry: Entry) -> None:
        """Write the entry so that it is on the disk, whole, when this returns."""
        data = _encode(entry)
        temporary = f"{self._name}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(temporary, flags, 0o600, dir_fd=self._directory)
            try:
                written = 0
                while written < len(data):
                    written += os.write(fd, data[written:])
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            os.fsync(self._directory)
        except OSError as error:
            raise JournalError(
                f"the journal cannot be written: {error.strerror}",
                next_step="free space in the state directory, or name another by --state-dir",
            ) from error

    def forget(self) -> None:
        """Nothing of ours is left in the namespace: neither is its file."""
        try:
            os.unlink(self._name, dir_fd=self._directory)
        except FileNotFoundError:
            return
        except OSError as error:
            raise JournalError(f"journal {self._name} cannot be removed: {error.strerror}") from error

    def set_aside(self) -> str:
        """Rename a file that cannot be read, and return its new name."""
        name = f"{self._name}.bad"
        try:
            os.rename(self._name, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError as error:
            step = "remove it by hand: nothing else depends on it"
            raise JournalError(f"{self._name} cannot be set aside: {error.strerror}", next_step=step) from error
        return name


def _name(identity: NamespaceId) -> str:
    return f"{identity.device}-{identity.inode}-{identity.cookie}"


def _lock(directory: int, name: str, timeout: float) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(name, flags, 0o600, dir_fd=directory)
    deadline = time.monotonic() + timeout
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise LockError(
                        f"another netapply has been at work on this namespace for more than {timeout:g} s",
                        next_step="wait for it, or allow more by --lock-timeout",
                    ) from None
                time.sleep(0.005)
            else:
                return fd
    except BaseException:
        os.close(fd)
        raise


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
        "pending": entry.pending,
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


def _decode(data: bytes, name: str) -> Entry | None:
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
            bool(body["pending"]),
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
