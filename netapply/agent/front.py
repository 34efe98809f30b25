"""The sockets of an agent: one for everything, one for reading, and an address for Prometheus, as its config says.

async with Agent(config) as agent, Front(agent):
    ...
"""

from __future__ import annotations

import grp
import os
import secrets
import socket
import stat
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Self

from netapply.agent.application import AgentLike, Application
from netapply.agent.http import Deadlines, Server
from netapply.agent.policy import Meter, Policy, Quota
from netapply.agent.prometheus import Decisions
from netapply.errors import NetapplyError

_BACKLOG = 128
_LOOPBACK = ("127.", "::1")


class Front:
    """Answers for an agent while it is entered. Sockets in `inherited` (control, read, metrics) are not made anew.

    The control socket is its owner's and, to connect to, the reading group's; what each may is for `Policy` to say.
    """

    def __init__(
        self,
        agent: AgentLike,
        *,
        inherited: Mapping[str, socket.socket] | None = None,
        quota: Quota | None = None,
        deadlines: Deadlines | None = None,
    ) -> None:
        self._agent = agent
        self._inherited = dict(inherited or {})
        self._quota = quota or Quota()
        self._deadlines = deadlines
        self._servers: list[Server] = []
        self._made: list[tuple[str, os.stat_result]] = []
        #: Where metrics are answered, once entered: the port may have been 0. ("", 0) for nowhere.
        self.metrics_address: tuple[str, int] = ("", 0)

    async def __aenter__(self) -> Self:
        try:
            self._open()
        except BaseException:
            await self.close()
            raise
        for server in self._servers:
            server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def _open(self) -> None:
        config = self._agent.config
        owner, readers = os.geteuid(), group_of(config.read_group)
        meter, decisions = Meter(self._quota), Decisions()
        places = (("control", config.socket, False), ("read", config.read_socket, True))
        for name, path, read_only in places:
            listener = self._inherited.get(name) or (self._unix(path, readers) if path else None)
            if listener is not None:
                policy = Policy(owner, readers, read_only=read_only)
                self._serve(listener, Application(self._agent, policy, meter, decisions), meter)
        listener = self._inherited.get("metrics") or (loopback(config.metrics) if config.metrics else None)
        if listener is not None:
            self.metrics_address = listener.getsockname()[:2]
            meter = Meter(self._quota)  # who scrapes has no name, and must not take the others' places
            policy = Policy(owner, read_only=True, anybody=True)
            self._serve(listener, Application(self._agent, policy, meter, decisions, public_only=True), meter)

    def _serve(self, listener: socket.socket, application: Application, meter: Meter) -> None:
        self._servers.append(Server(listener, application, meter, self._deadlines))

    def _unix(self, path: str, readers: int) -> socket.socket:
        listener = unix_socket(path, readers)
        self._made.append((path, os.stat(path)))
        return listener

    async def close(self) -> None:
        """End all connections, and take away the sockets that were made. Idempotent."""
        while self._servers:
            await self._servers.pop().close()
        while self._made:
            path, made = self._made.pop()
            with suppress(OSError):
                if os.path.samestat(os.stat(path), made):  # or else the next agent's stands there already
                    os.unlink(path)


def group_of(name: str) -> int:
    """The gid of a group that is named or given as a number; -1 for "". Raises NetapplyError."""
    if not name:
        return -1
    if name.isascii() and name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise NetapplyError(f"there is no group {name}", next_step=f"groupadd --system {name}") from None


def unix_socket(path: str, readers: int = -1) -> socket.socket:
    """A listening unix socket at `path`, for its owner and the group `readers`. Raises NetapplyError.

    A socket that a killed agent left is replaced; one that answers is not, nor is a file of another kind.
    """
    try:
        os.makedirs(os.path.dirname(path) or ".", 0o755, exist_ok=True)
        _refuse_living(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # Made under another name: nobody connects before its mode is right, and a rename replaces at once.
            new = f"{path}.{secrets.token_hex(4)}"
            listener.bind(new)
            try:
                os.chmod(new, 0o600)
                if readers >= 0:
                    os.chown(new, -1, readers)
                    os.chmod(new, 0o660)
                listener.listen(_BACKLOG)
                os.rename(new, path)
            except BaseException:
                os.unlink(new)
                raise
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise NetapplyError(
            f"no socket can be made at {path}: {error.strerror or error}",
            next_step="name another with --socket and --read-socket, or run as root",
        ) from error
    return listener


def _refuse_living(path: str) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise NetapplyError(f"{path} is there and is no socket", next_step="remove it, or name another place")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except OSError:
            pass  # its queue is full: somebody lives there
    raise NetapplyError(f"an agent answers at {path} already", next_step="stop it, or name another socket")


def loopback(address: str) -> socket.socket:
    """A listening TCP socket at "127.0.0.1:PORT" or "[::1]:PORT". Raises NetapplyError for any other address."""
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    if not colon or not (port.isascii() and port.isdigit()) or not host.startswith(_LOOPBACK):
        step = "write 127.0.0.1:9469 or [::1]:9469; for others put a proxy in front that knows who asks"
        raise NetapplyError(f"metrics are for a loopback address, not {address!r}", next_step=step)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        raise NetapplyError(f"{address} cannot be listened on: {error}", next_step="name another port") from error
    return listener
