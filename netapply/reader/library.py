"""libnftables itself: loaded when first used, a context in the namespace's thread, what its commands print."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias, TypeVar, cast

from netapply.backend import Backend, Owned
from netapply.errors import ConflictError, KernelError, NetapplyError, UnsupportedError
from netapply.kernel import NETLINK_NETFILTER, Kernel
from netapply.ruleset import Ruleset

T = TypeVar("T")

#: Where something stands, and what is there, one thing a line.
Blocks: TypeAlias = Mapping[str, Sequence[str]]

LIBRARY = "libnftables.so.1"
_TRIES = 5


class _Context(Protocol):
    """`nftables.Nftables`, as far as it is used here. It is bound to the namespace that it is made in."""

    def set_json_output(self, val: bool, /) -> object: ...  # noqa: FBT001 - the binding's

    def set_numeric_proto_output(self, val: bool, /) -> object: ...  # noqa: FBT001 - the binding's

    def cmd(self, cmdline: bytes, /) -> tuple[int, bytes, bytes]: ...


def _context() -> _Context:
    """A new context in the namespace of this thread. Raises UnsupportedError, KernelError."""
    from ctypes import CDLL
    from importlib import import_module

    try:
        # The library ends the process where it gets no netlink socket.
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER).close()
    except OSError as error:
        raise KernelError("open a netlink socket", error.errno or 0) from error
    try:
        CDLL(LIBRARY)  # where this fails, the binding would leave half an object that complains on stderr
        return cast("_Context", import_module("nftables").Nftables())
    except ImportError as error:
        lacking = f"the Python module `nftables` is missing ({error})"
    except (OSError, AttributeError) as error:  # AttributeError: a symbol that the binding is too new for
        lacking = f"{LIBRARY} cannot be used ({error})"
    raise UnsupportedError(
        f"{lacking}; only --deep and --all need it",
        next_step="install pip-nftables (PyPI) and libnftables1 (Debian), 1.0.6 or later",
    )


def list_commands(namespace: Kernel, *commands: str, as_json: bool, numeric: bool = False) -> list[str]:
    """What each command prints, in the namespace."""

    def work() -> list[str]:
        context = _context()
        context.set_json_output(as_json)
        context.set_numeric_proto_output(numeric)
        return [_run(context, command) for command in commands]

    return namespace.inside(work)


def _run(context: _Context, command: str) -> str:
    status, output, error = context.cmd(command.encode())
    if status:
        raise NetapplyError(f"libnftables: {command}: {error.decode(errors='replace').strip() or f'status {status}'}")
    return output.decode(errors="replace")


def read_both(backend: Backend, namespace: Kernel, owned: Owned, look: Callable[[], T]) -> tuple[Ruleset, T]:
    """Ours as the backend decodes it, and as `look` sees it, at a time when nobody changes it."""
    before = backend.read(namespace, owned).ruleset
    for _ in range(_TRIES):
        seen = look()
        after = backend.read(namespace, owned).ruleset
        if after == before:
            return after or Ruleset(), seen
        before = after
    raise ConflictError("somebody keeps changing our rules while they are read", next_step="verify again")
