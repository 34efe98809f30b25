"""A network namespace, opened: the real `netapply.kernel.Kernel`.

A thread enters the namespace for the few microseconds that it takes to open a socket or a file there, and comes
back; sockets then work from any thread. All of them are opened on demand, kept, and closed with the namespace.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from types import TracebackType
from typing import Self, TypeVar

from netapply import syscalls
from netapply.errors import NamespaceError
from netapply.kernel import NETLINK_NETFILTER, NETLINK_ROUTE, NetlinkProtocol, Scratch
from netapply.netlink import exchange, open_netlink
from netapply.nsfs import CURRENT, NamespaceId, Source, cookie_of, is_initial, open_source, reserves_inode
from netapply.reaper import close_later
from netapply.ruleset import Family
from netapply.sockets import socket

__all__ = ["Namespace", "NamespaceId"]

T = TypeVar("T")

_LEVEL: dict[Family, int] = {"ip": socket.SOL_IP, "ip6": socket.IPPROTO_IPV6}
_FAMILY: dict[Family, int] = {"ip": socket.AF_INET, "ip6": socket.AF_INET6}
#: Any inet socket will do for nf_sockopt (net/netfilter/nf_sockopt.c); a raw one would need CAP_NET_RAW.
_DATAGRAM = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
_READ = os.O_RDONLY | os.O_CLOEXEC
_PIECE = 1 << 16
#: A read of less came to the end: fs/seq_file.c stops before a record that does not fit into the rest of a page, and
#: no record is as long as half of one.
_FULL = 2048
#: Files that stay open: those of the namespace itself, and settings of `lo`, which never goes.
_KEPT = ("net/", "sys/net/ipv6/conf/lo/")
_TABLES = ("net/ip_tables_names", "net/ip6_tables_names")
_SOCKETS = ("net/sockstat", "net/sockstat6")


class Namespace:
    """One network namespace. Its methods may be called from any thread; requests wait for one another.

    Use it as a context manager, or call `close`: an open namespace outlives the deletion of its name.
    """

    def __init__(self, source: Source, file: tuple[int, int], lock_timeout: float) -> None:
        self._source = source
        self._fd = source.fd
        self._file = file
        self._lock_timeout = lock_timeout
        self._lock = threading.Lock()
        self._netlink: dict[NetlinkProtocol, socket.socket] = {}
        self._inet: dict[Family, socket.socket] = {}
        self._files: dict[str, int] = {}
        self._memory: dict[str, object] = {}
        self._identity: NamespaceId | None = None

    @classmethod
    def open(cls, spec: str | int | None = None, *, host: bool = False, lock_timeout: float = 10.0) -> Namespace:
        """Open the namespace that `spec` names.

        None is the namespace of the calling thread; "NAME" one of ip-netns(8); a word with a slash is a path;
        "pid:1234" a process's; "fd:5", or 5, an inherited descriptor, which stays the caller's. The machine's
        initial namespace is refused unless `host` is true. `lock_timeout` is in seconds. Raises NamespaceError.
        """
        source = open_source(spec)
        namespace = cls(source, _file_of(source.fd), lock_timeout)
        try:
            namespace._refuse_the_machines(host=host)
        except BaseException:
            namespace.close()
            raise
        return namespace

    def _refuse_the_machines(self, *, host: bool) -> None:
        if host:
            return
        try:
            # Where the inode number tells there is no need to go there, and the cookie can wait.
            initial = is_initial(NamespaceId(*self._file, 0), reserved=True) if reserves_inode() else self._is_initial()
        except OSError as error:
            raise NamespaceError(f"{self._source.label} cannot be looked at: {error.strerror}") from error
        if initial:
            raise NamespaceError(
                f"{self._source.label} is the machine's own, where a mistake cuts it off",
                next_step="name the namespace of the workload, or say --host if you mean the machine",
            )

    def _is_initial(self) -> bool:
        def look() -> bool:
            sock = self._netlink[NETLINK_ROUTE] = open_netlink(NETLINK_ROUTE)
            self._identity = NamespaceId(*self._file, cookie_of(sock))
            return is_initial(self._identity)

        with self._lock:
            return self._visit(look)

    @property
    def identity(self) -> NamespaceId:
        """What tells this namespace from all others. Raises NamespaceError where it cannot be entered."""
        if self._identity is None:
            with self._lock:
                if not self._netlink:
                    self._visit(self._begin)
                self._identity = NamespaceId(*self._file, cookie_of(self._netlink_socket(NETLINK_ROUTE)))
        return self._identity

    def __repr__(self) -> str:
        return f"<Namespace {self._source.label}: inode {self._file[1]}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def label(self) -> str:
        """What the namespace was called by whoever opened it."""
        return self._source.label

    @property
    def lock_timeout(self) -> float:
        """Seconds to wait for the xtables lock."""
        return self._lock_timeout

    @property
    def memory(self) -> dict[str, object]:
        """What backends remember of this namespace; see `netapply.kernel.Kernel.memory`."""
        return self._memory

    def verify_identity(self) -> None:
        """Raise NamespaceError unless the name or path still leads to the namespace that was opened.

        While it is open its inode number cannot be given to another. None, pid and fd lead to no other by nature.
        """
        if self._fd < 0:
            raise NamespaceError(f"{self._source.label} is closed")
        if not self._source.path:
            return
        step = "nothing was changed; run the command again for the namespace that is there now"
        try:
            there = _file_of(self._source.path)
        except OSError as error:
            raise NamespaceError(f"{self._source.label} was deleted meanwhile", next_step=step) from error
        if there != self._file:
            raise NamespaceError(f"{self._source.label} is another one than it was", next_step=step)

    def netlink(self, protocol: NetlinkProtocol, request: bytes) -> list[bytes]:
        """Send one request and return every datagram of the answer; see `netapply.kernel.Kernel.netlink`."""
        with self._lock:
            sock = self._netlink_socket(protocol)
            try:
                return exchange(sock, protocol, request)
            except BaseException:
                # What is left of this answer must not be taken for the next one's.
                _close(protocol, self._netlink.pop(protocol))
                raise

    def _netlink_socket(self, protocol: NetlinkProtocol) -> socket.socket:
        sock = self._netlink.get(protocol)
        if sock is None:
            sock = self._netlink[protocol] = self._visit(lambda: open_netlink(protocol))
        return sock

    def lend(self, protocol: NetlinkProtocol) -> socket.socket:
        """The socket that requests of this protocol go by now, to be duplicated. It stays ours. Raises OSError."""
        with self._lock:
            return self._netlink_socket(protocol)

    def borrow(self, protocol: NetlinkProtocol, sock: socket.socket) -> None:
        """Have requests go by this socket, which was opened in this namespace by `netlink`, and is ours from now on."""
        with self._lock:
            before, self._netlink[protocol] = self._netlink.get(protocol), sock
        if before is not None:
            _close(protocol, before)

    def getsockopt(self, family: Family, option: int, buffer: bytes, level: int | None = None) -> bytes:
        """Get an option of a socket of this family, `buffer` being input and output. Raises OSError."""
        with self._lock:
            fd = self._inet_socket(family).fileno()
            return syscalls.getsockopt(fd, _LEVEL[family] if level is None else level, option, buffer)

    def setsockopt(self, family: Family, option: int, blob: bytes, scratch: Scratch | None = None) -> bytes:
        """Set an option of a socket of this family; returns what the kernel wrote to `scratch`. Raises OSError."""
        with self._lock:
            fd = self._inet_socket(family).fileno()
            if scratch is None:
                syscalls.setsockopt(fd, _LEVEL[family], option, blob)
                return b""
            return syscalls.setsockopt_scratch(fd, _LEVEL[family], option, blob, scratch)

    def _inet_socket(self, family: Family) -> socket.socket:
        sock = self._inet.get(family)
        if sock is None:
            sock = self._inet[family] = self._visit(lambda: socket.socket(_FAMILY[family], _DATAGRAM))
        return sock

    def _begin(self) -> None:
        """The beginning of a command, which looks at all of these."""
        self._open_ahead((NETLINK_ROUTE, NETLINK_NETFILTER), _TABLES + _SOCKETS)

    def _begin_with(self, work: Callable[[], T]) -> T:
        """The same for an agent, which need not count sockets."""
        self._open_ahead((NETLINK_ROUTE, NETLINK_NETFILTER), _TABLES)
        return work()

    def _open_ahead(
        self, protocols: tuple[NetlinkProtocol, ...], paths: tuple[str, ...], families: tuple[Family, ...] = ()
    ) -> None:
        """Open what is used soon, as a visit takes longer than opening three sockets. Who needs one meets its error."""
        with suppress(OSError):
            for protocol in protocols:
                if protocol not in self._netlink:
                    self._netlink[protocol] = open_netlink(protocol)
            for family in families:
                if family not in self._inet:
                    self._inet[family] = socket.socket(_FAMILY[family], _DATAGRAM)
            for path in paths:
                if path not in self._files:
                    self._files[path] = os.open(_proc_path(path), _READ)

    def read_file(self, path: str) -> str:
        """A file under /proc/net ("net/NAME") or /proc/sys ("sys/NAME") of this namespace. Raises OSError."""
        with self._lock:
            data = self._read_kept(path) if path.startswith(_KEPT) else self._visit(lambda: _read(_proc_path(path)))
        return data.decode("ascii", "surrogateescape")

    def _read_kept(self, path: str) -> bytes:
        """All of a file that stays open: each read from its beginning makes the kernel write it anew."""
        fd = self._files.get(path)
        if fd is None:
            fd = self._files[path] = self._visit(lambda: self._open_kept(path))
        data = part = os.pread(fd, _PIECE, 0)
        while len(part) >= _FULL:
            part = os.pread(fd, _PIECE, len(data))
            data += part
        return data

    def _open_kept(self, path: str) -> int:
        fd = os.open(_proc_path(path), _READ)
        if path == _TABLES[0]:  # iptables-legacy: tables, sets, and sockets for both
            self._open_ahead((NETLINK_NETFILTER,), _TABLES[1:], ("ip", "ip6"))
        return fd

    def write_file(self, path: str, value: str) -> None:
        """Write one under /proc/sys, as "sys/NAME". Raises OSError."""
        place = _proc_path(path)

        def write() -> None:
            with FileIO(place, "r+") as file:
                file.write(value.encode())

        with self._lock:
            self._visit(write)

    def inside(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread of its own that is in the namespace, and ends with it; returns or raises as it did."""
        with self._lock:
            fd = os.dup(self._open_fd())
        outcome: list[T] = []
        failure: list[BaseException] = []

        def run() -> None:
            try:
                if _file_of(CURRENT) != self._file:
                    self._enter(fd)
                outcome.append(work())
            except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
                failure.append(error)

        thread = threading.Thread(target=run, name="netapply-inside")
        thread.start()
        try:
            thread.join()
        finally:
            thread.join()  # interrupted: nobody may roll back while the work still goes on
            os.close(fd)
        if failure:
            raise failure[0]
        return outcome[0]

    def visit(self, work: Callable[[], T]) -> T:
        """Run short `work`, such as opening a socket of one's own, while the calling thread is in the namespace."""
        with self._lock:
            return self._visit(work if self._netlink else lambda: self._begin_with(work))

    def close(self) -> None:
        """Let go of the namespace: at once but for its netlink sockets, which follow some 30 ms later. Idempotent."""
        with self._lock:
            for protocol, netlink in self._netlink.items():
                _close(protocol, netlink)
            for raw in self._inet.values():
                raw.close()
            for file in self._files.values():
                os.close(file)
            self._netlink.clear()
            self._inet.clear()
            self._files.clear()
            fd, self._fd = self._fd, -1
        self.forget()
        if fd >= 0:
            os.close(fd)

    def forget(self) -> None:
        """Empty the memory, and close what is open in it."""
        while self._memory:
            close = getattr(self._memory.popitem()[1], "close", None)
            if close is not None:
                close()

    def _open_fd(self) -> int:
        if self._fd < 0:
            raise NamespaceError(f"{self._source.label} is closed")
        return self._fd

    def _enter(self, fd: int) -> None:
        try:
            syscalls.setns(fd)
        except OSError as error:
            step = "run as root, or with CAP_SYS_ADMIN, or as a process of that namespace"
            denied = isinstance(error, PermissionError)
            raise NamespaceError(
                f"{self._source.label} cannot be entered: {error.strerror}", next_step=step if denied else ""
            ) from error

    def _visit(self, work: Callable[[], T]) -> T:
        """Run short `work` in the calling thread while that is in the namespace."""
        fd = self._open_fd()
        home = _open_current()
        try:
            if _file_of(home) == self._file:
                return work()  # and so needs no capability: an init container has no CAP_SYS_ADMIN
            try:
                self._enter(fd)
                return work()
            finally:
                # One call of a C function, as CPython handles signals between calls: an interrupt that came during
                # the work is here already, and the next one is raised when the thread is back.
                if syscalls.raw_setns(home, syscalls.CLONE_NEWNET) and _file_of(CURRENT) != _file_of(home):
                    _abort(self._source.label)
        finally:
            os.close(home)


def _file_of(place: str | int) -> tuple[int, int]:
    status = os.stat(place)
    return status.st_dev, status.st_ino


def _read(place: str) -> bytes:
    with FileIO(place) as file:
        return file.readall()


def _open_current() -> int:
    """The calling thread's own namespace, to come back to."""
    try:
        return os.open(CURRENT, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:  # of a kind of its own: a caller may take ENOENT for what it asked about
        raise NamespaceError(f"the namespace to come back to cannot be opened: {error.strerror}") from error


def _close(protocol: NetlinkProtocol, sock: socket.socket) -> None:
    if protocol == NETLINK_NETFILTER:
        close_later(sock.detach())
    else:
        sock.close()


def _abort(label: str) -> None:
    """End the process: a thread that cannot leave a namespace would do everything after this in the wrong one."""
    os.write(2, f"netapply: a thread cannot come back from {label}; the process ends here\n".encode())
    os.abort()


def _proc_path(path: str) -> str:
    area, _, rest = path.partition("/")
    if area not in ("net", "sys") or ".." in rest.split("/"):
        raise ValueError(f"{path!r} is neither net/NAME nor sys/NAME")
    # /proc/net is a link to self/net, which is the main thread's; this thread may be in another namespace.
    return f"/proc/thread-self/{path}" if area == "net" else f"/proc/{path}"
