"""Where a namespace is looked for, and what it is called: by a name of ip-netns(8), a path, a process, a descriptor."""

from __future__ import annotations

import fcntl
import os

from netapply.errors import NamespaceError
from netapply.nsfs import NAMED
from netapply.values import NamedTuple


class Place(NamedTuple):
    """One place. `key` tells it from all others; `spec` is what Namespace.open takes; `name` is for people.

    `path` can be watched ("" where there is none), `process` is the pid that it belongs to (0 for none), `fd` a
    descriptor of ours (-1 for none).
    """

    key: str
    spec: str | int
    name: str
    path: str = ""
    process: int = 0
    fd: int = -1


def find_place(spec: str | int) -> Place:
    """The place that `spec` names. A descriptor is duplicated, and the copy is the caller's. Raises NamespaceError."""
    if isinstance(spec, int):
        return _of_descriptor(spec)
    scheme, colon, number = spec.partition(":")
    if colon and scheme in ("pid", "fd"):
        if not (number.isascii() and number.isdigit() and len(number) <= 10):
            raise NamespaceError(f"{spec!r}: {number!r} is not a number", next_step="write pid:1234 or fd:5")
        return _of_descriptor(int(number)) if scheme == "fd" else Place(spec, spec, spec, process=int(number))
    if "/" in spec:
        path = os.path.abspath(spec)
        name = path.removeprefix(NAMED)
        return Place(path, path, path if "/" in name else name, path)
    if not spec:
        raise NamespaceError("no namespace is named", next_step="give a name, a path, pid:N or a descriptor")
    return Place(NAMED + spec, spec, spec, NAMED + spec)


def _of_descriptor(fd: int) -> Place:
    try:
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError as error:
        raise NamespaceError(f"fd:{fd} is not an open descriptor") from error
    status = os.fstat(own)
    key = f"ns-{status.st_dev}-{status.st_ino}"
    return Place(key, own, key, fd=own)
