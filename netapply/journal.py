"""The write-ahead journal: one file a namespace says what was, what should be, and whether it is done.

It is written, under a name that says pending, before the first change, and gets its own name after the last: so an
interrupted run is finished or undone by the next command. Everything that it speaks of lives in the kernel and ends
with it, so the default place is a tmpfs. Files are written whole to a temporary name, synced, and renamed: a reader
sees the old one or the new one.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
import zlib
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from typing import Any

from netapply.errors import DecodeError, JournalError, LockError
from netapply.nsfs import NamespaceId
from netapply.paths import open_private_directory
from netapply.record import hexed, routing_from_json, ruleset_from_json, ruleset_to_json
from netapply.remembered import remembered
from netapply.ruleset import Routing, Ruleset
from netapply.values import NamedTuple

DEFAULT_DIRECTORY = "/run/netapply"
FORMAT = 1
#: How many of the states before the present one can be gone back to.
KEPT = 8
#: The name under which a namespace's memory has what was written of it last.
_MEMORY = "journal"
#: … and where its files are that stay open.
_KEPT = "journal files"

_PIECE = 1 << 20
#: Of the files of a namespace; those of `netapply.trial` are among them.
_SUFFIXES = ("", ".pending", ".new", ".bad", ".trial", ".trial.new", *(f".{number}" for number in range(KEPT)))
#: What comes behind all that an entry says: by whom and when it was written.
_WRITTEN = ',"pid":'
_json = json.JSONEncoder(default=hexed, separators=(",", ":"))


class State(NamedTuple):
    """What one backend's rules and the routing are, or should be."""

    ruleset: Ruleset | None
    routing: Routing


#: Where nothing of ours stands.
NOWHERE = State(None, Routing())


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
    #: Which of the namespace's states `desired` is: each that is another than the one before is numbered.
    number: int = 0
    #: The backend whose rules are taken down by the run, where it brings ours to another dialect; `before` is its.
    leaving: str = ""


class _Written(NamedTuple):
    """A file as it was written, and what it says: whoever finds the same bytes there knows the rest."""

    data: bytes
    entry: Entry


class Journal:
    """The files of a state directory. Nothing is opened before it is used."""

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory or os.environ.get("NETAPPLY_STATE_DIR") or DEFAULT_DIRECTORY
        #: Whether somebody asked for this directory. If not, and it cannot be written, apply does without a journal.
        self.chosen = self.directory != DEFAULT_DIRECTORY

    def seems_on_trial(self, identity: NamespaceId) -> bool:
        """Whether something waits to be confirmed there (`netapply.trial`): a look without the lock."""
        return os.path.exists(os.path.join(self.directory, f"{_name(identity)}.trial"))

    def acquire(self, identity: NamespaceId, timeout: float, memory: dict[str, object] | None = None) -> Files:
        """The files of one namespace, to nobody else until they are closed. Raises JournalError, LockError.

        `memory` is that of the open namespace (`netapply.kernel.Kernel.memory`): what it knows is not decoded again.
        """
        # Taken out: who comes meanwhile, from another thread, opens files of his own and waits for this lock.
        kept = None if memory is None else memory.pop(_KEPT, None)
        try:
            if not isinstance(kept, _Kept) or not kept.is_of(self.directory):
                if isinstance(kept, _Kept):
                    kept.close()
                fd = open_private_directory(self.directory)
                kept = _Kept(fd, self.directory, os.fstat(fd))
            return Files(kept, identity, timeout, memory)
        except OSError as error:
            raise JournalError(
                f"state directory {self.directory} cannot be used: {error.strerror}",
                next_step="name a writable one on a tmpfs by --state-dir or NETAPPLY_STATE_DIR",
            ) from error


class _Kept:
    """The state directory, open, and the lock file of one namespace: both outlast a command of an open namespace."""

    def __init__(self, directory: int, path: str, status: os.stat_result) -> None:
        self.directory = directory
        self.lock = -1
        self._path = path
        self._status = _told(status)
        self._process = os.getpid()

    def is_of(self, path: str) -> bool:
        """Whether this is still the directory of that path, and as private as it was.

        A forked process opens its own: with the same open file it would share the lock.
        """
        if path != self._path or self._process != os.getpid():
            return False
        try:
            return _told(os.stat(path, follow_symlinks=False)) == self._status
        except OSError:
            return False

    def unlock(self, *, keep: bool) -> None:
        """Let others in; `keep` the file open where it will be found again."""
        if keep:
            fcntl.flock(self.lock, fcntl.LOCK_UN)
        else:
            fd, self.lock = self.lock, -1
            os.close(fd)

    def close(self) -> None:
        for fd in (self.lock, self.directory):
            if fd >= 0:
                os.close(fd)
        self.lock = self.directory = -1


def _told(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_mode, status.st_uid


class Files:
    """One namespace's journal file, below an open directory, under an exclusive lock until `close`."""

    def __init__(self, kept: _Kept, identity: NamespaceId, timeout: float, memory: dict[str, object] | None) -> None:
        name = _name(identity)
        self._kept = kept
        self._keeps = memory is not None
        self._directory = kept.directory
        self._name = name
        self._pending = f"{name}.pending"
        self._memory = {} if memory is None else memory
        self._begun: Entry | None = None
        #: What the file of the namespace's own name says; of no use while `_may_be_pending` before a `load`.
        self._former: Entry | None = None
        self._may_be_pending = True
        self._lock_is_gone = False
        # Of its inode number, which another namespace has as soon as this one is gone.
        self._lock_name = f"{identity.device}-{identity.inode}.lock"
        try:
            kept.lock = _lock(kept, self._lock_name, timeout)
            with suppress(OSError, JournalError):  # a full disk: then it is for whoever has the number next
                self._bury()
        except BaseException:
            kept.close()
            raise

    def _bury(self) -> None:
        """The lock file says of which namespace there are files: remove those of one that is gone.

        No two that live have the same inode number.
        """
        said = os.pread(self._kept.lock, 256, 0).decode("ascii", "replace")
        if said == self._name:
            return
        number, _, cookie = said.rpartition("-")
        if f"{number}.lock" == self._lock_name and cookie.isdigit():
            for suffix in _SUFFIXES:
                self._unlink(said + suffix)
        os.ftruncate(self._kept.lock, 0)
        os.pwrite(self._kept.lock, self._name.encode(), 0)

    def close(self) -> None:
        """Let others in."""
        if not self._keeps:
            self._kept.close()
            return
        self._kept.unlock(keep=not self._lock_is_gone)
        if self._memory.setdefault(_KEPT, self._kept) is not self._kept:
            self._kept.close()

    @property
    def directory(self) -> int:
        """The state directory, open."""
        return self._directory

    @property
    def former(self) -> Entry | None:
        """What the journal said before a run began; None where it said nothing, or cannot be trusted."""
        return self._former

    @property
    def may_be_pending(self) -> bool:
        """Whether a run began that was neither finished nor undone, as far as is known."""
        return self._may_be_pending

    @property
    def number(self) -> int:
        """Of the state that stands; 0 where nothing of ours does."""
        return self._former.number if self._former else 0

    def load(self) -> Entry | None:
        """The entry; None when there is none, or it is from before the machine started. Raises JournalError."""
        self._former = None
        begun = self._read(self._pending)
        self._may_be_pending = begun is not None
        if begun is None:
            self._former = self._understood(self._name, self._read(self._name))
            return self._former
        with suppress(JournalError):  # what counts is what was begun after it
            self._former = self._understood(self._name, self._read(self._name))
        return self._understood(self._pending, begun)

    def _understood(self, name: str, data: bytes | None) -> Entry | None:
        if data is None:
            return None
        pending = name == self._pending
        known = self._memory.get(_MEMORY)
        if isinstance(known, _Written) and known.data == data:
            return known.entry if known.entry.pending == pending else known.entry._replace(pending=pending)
        return _decode(data, name, pending=pending)

    def past(self, back: int) -> Entry | None:
        """The state so many before the present one; None where it is no longer kept. Raises JournalError."""
        if self._former is None or not 0 < back <= KEPT:
            return None
        number = self._former.number - back
        name = f"{self._name}.{number % KEPT}"
        entry = self._understood(name, self._read(name))
        return entry if entry is not None and entry.number == number else None

    def begin(self, entry: Entry) -> None:
        """Write the entry of a run before its first change: on the disk, whole, when this returns."""
        self._may_be_pending = True
        entry = self._numbered(entry)
        self._write(entry, self._pending)
        self._begun = entry

    def settle(self, entry: Entry) -> None:
        """The run is over, and `entry` is what stands: mostly as it began, and then only the name changes.

        So what is pending and what stands change at once: who dies here has left either.
        """
        entry = self._numbered(entry._replace(pending=True))
        self._keep(entry)
        if self._begun != entry:
            self._write(entry, self._pending)
        with _said("the journal cannot be written"):
            os.rename(self._pending, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            os.fsync(self._directory)
        self._former = entry._replace(pending=False)
        self._begun, self._may_be_pending = None, False

    def _numbered(self, entry: Entry) -> Entry:
        former = self._former
        number = 0 if former is None else former.number + is_another(former, entry)
        return entry if entry.number == number else entry._replace(number=number)

    def _keep(self, entry: Entry) -> None:
        """What stood until now stays under its number, if what stands from now on is another state."""
        former = self._former
        if former is None or not is_another(former, entry):
            return
        kept = f"{self._name}.{former.number % KEPT}"
        self._unlink(kept)
        # A link, as the file must not be gone for a moment. A lost one is a state less to go back to.
        with suppress(OSError):
            os.link(self._name, kept, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def take_number(self, number: int) -> None:
        """The present state takes an earlier one's number, which is none to go back to any more."""
        if self._former is not None:
            self._former = self._former._replace(number=number)
            self._write(self._former, self._name)

    def reopen(self, begun: Entry) -> None:
        """The run is to be undone: it is pending again, if it was settled."""
        if not self._may_be_pending:
            self.begin(begun)

    def go_back(self, former: Entry | None) -> None:
        """The run was undone: what the journal said before it began is true again, and said again if it was settled."""
        said = former
        with suppress(JournalError):
            said = self._understood(self._name, self._read(self._name))
        if said != former:
            if former is None:
                self._unlink(self._name)
            else:
                self._write(former, self._name)
        self._former = former
        self.discard()

    def discard(self) -> None:
        """The run that is pending was undone."""
        if self._may_be_pending:
            self._unlink(self._pending)
        self._begun, self._may_be_pending = None, False

    def forget(self) -> None:
        """Nothing of ours is left in the namespace: neither are its files."""
        self._unlink(f"{self._name}.trial")  # numbers begin anew, and what was on trial had one (netapply.trial)
        for number in range(min(self._former.number, KEPT) if self._former else KEPT):
            self._unlink(f"{self._name}.{number}")
        self._former = None
        self._unlink(self._name)
        self.discard()
        self._unlink(self._lock_name)
        self._lock_is_gone = True

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
        with _said("the journal cannot be read"):
            try:
                parts: list[bytes] = []
                while not parts or parts[-1]:
                    parts.append(os.read(fd, _PIECE))
                return b"".join(parts)
            finally:
                os.close(fd)

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
        self._memory[_MEMORY] = _Written(data, entry._replace(pending=name == self._pending))

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


def is_another(former: Entry, entry: Entry) -> bool:
    """Whether these are two states."""
    return former.desired != entry.desired or (former.backend, former.layout) != (entry.backend, entry.layout)


def _name(identity: NamespaceId) -> str:
    return f"{identity.device}-{identity.inode}-{identity.cookie}"


def _lock(kept: _Kept, name: str, timeout: float) -> int:
    """The lock file, open and locked. Who waited for one that `forget` has removed meanwhile takes the next."""
    deadline = time.monotonic() + timeout
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        if kept.lock < 0:
            kept.lock = os.open(name, flags, 0o600, dir_fd=kept.directory)
        while not _locked(kept.lock):
            if time.monotonic() >= deadline:
                raise LockError(
                    f"another netapply has been at work on this namespace for more than {timeout:g} s",
                    next_step="wait for it, or allow more by --lock-timeout",
                )
            time.sleep(0.005)
        with suppress(FileNotFoundError):
            there = os.stat(name, dir_fd=kept.directory, follow_symlinks=False)
            if there.st_ino == os.fstat(kept.lock).st_ino:
                return kept.lock
        fd, kept.lock = kept.lock, -1
        os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@cache
def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


def _encode(entry: Entry) -> bytes:
    _, backend, before, desired, created, layout, fingerprint, number, leaving = entry
    head = _head(backend, layout, fingerprint, created)
    states = f'"before":{_state_text(before)},"desired":{_state_text(desired)},"number":{number}'
    if leaving:
        states += f',"leaving":{_json.encode(leaving)}'
    text = f'{head},{states}{_WRITTEN}{os.getpid()},"time":{time.time():.3f}}}'.encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


@lru_cache(64)
def _head(backend: str, layout: str, fingerprint: str, created: Routing) -> str:
    """The JSON object that an entry is, as far as this goes and without its closing brace."""
    head = {"format": FORMAT, "boot": _boot(), "backend": backend, "layout": layout, "fingerprint": fingerprint}
    return _json.encode({**head, "created": created})[:-1]


def _state_text(state: State) -> str:
    return f"[{_ruleset_text(state.ruleset)},{_routing_text(state.routing)}]"


@lru_cache(64)
def _routing_text(routing: Routing) -> str:
    return _json.encode(routing)


@remembered(16)
def _ruleset_text(ruleset: Ruleset | None) -> str:
    return _json.encode(ruleset_to_json(ruleset))


def _decode(data: bytes, name: str, *, pending: bool) -> Entry | None:
    checksum, _, text = data.rstrip(b"\n").partition(b" ")
    try:
        if int(checksum, 16) != zlib.crc32(text):
            raise ValueError("the checksum does not agree")
        entry = _decoded(text.rpartition(_WRITTEN.encode())[0] + b"}")
    except (ValueError, KeyError, TypeError, RecursionError, DecodeError) as error:
        raise JournalError(f"journal {name} cannot be trusted: {error}") from error
    return entry and entry._replace(pending=pending)


@lru_cache(8)
def _decoded(text: bytes) -> Entry | None:
    """What is written without by whom and when: the same of many namespaces, so that a start reads it once."""
    body: Any = json.loads(text)
    if body["format"] != FORMAT:
        raise ValueError(f"format {body['format']} is not ours")
    if body["boot"] != _boot():
        return None
    backend, layout, fingerprint = words = [body[key] for key in ("backend", "layout", "fingerprint")]
    number, leaving, created = body.get("number", 0), body.get("leaving", ""), routing_from_json(body["created"])
    if not all(isinstance(word, str) for word in (*words, leaving)) or type(number) is not int or number < 0:
        raise ValueError("a field of another type")
    before, desired = _state(body["before"]), _state(body["desired"])
    hash((before, desired, created))  # what is there in the place of a value, at whatever depth, is a list
    return Entry(False, backend, before, desired, created, layout, fingerprint, number, leaving)


def _state(raw: Any) -> State:
    rules, routing = raw
    return State(ruleset_from_json(rules), routing_from_json(routing))
