"""inotify(7), as much as the agent needs: which names of which directories were made, changed or removed, and who
closed a file.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator

_libc = ctypes.CDLL(None, use_errno=True)
_EVENT = struct.Struct("=iIII")  # struct inotify_event: watch, mask, cookie, length of the name
_CREATE, _DELETE, _MOVED_FROM, _MOVED_TO, _ATTRIB = 0x100, 0x200, 0x40, 0x80, 0x4
CLOSE_WRITE, CLOSE_NOWRITE = 0x8, 0x10
_DELETE_SELF, _MOVE_SELF, _OVERFLOW, _IGNORED, _ONLYDIR = 0x400, 0x800, 0x4000, 0x8000, 0x1000000
_GONE = _DELETE_SELF | _MOVE_SELF
_NAMES = _CREATE | _DELETE | _MOVED_FROM | _MOVED_TO | CLOSE_WRITE | _ATTRIB | _ONLYDIR


class Inotify:
    """Watched directories, or with a `mask` of others what happens to files. `read` never waits."""

    def __init__(self, mask: int = _NAMES) -> None:
        self._mask = mask | _GONE
        self._fd = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if self._fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"inotify: {os.strerror(number)}")
        self._paths: dict[int, str] = {}

    def fileno(self) -> int:
        """Readable when there is something to read."""
        return int(self._fd)

    @property
    def watched(self) -> frozenset[str]:
        """What is watched now."""
        return frozenset(self._paths.values())

    def watch(self, path: str) -> bool:
        """Watch it; False where it cannot be: it may come later."""
        watch = _libc.inotify_add_watch(self._fd, os.fsencode(path), self._mask)
        if watch >= 0:
            self._paths[watch] = path
        return bool(watch >= 0)

    def read(self) -> Iterator[tuple[str, str]]:
        """(directory, name) of each change; name "" for the directory itself, both "" where some were lost."""
        try:
            data = os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return
        offset = 0
        while offset + _EVENT.size <= len(data):
            watch, mask, _, length = _EVENT.unpack_from(data, offset)
            name = data[offset + _EVENT.size : offset + _EVENT.size + length].rstrip(b"\0")
            offset += _EVENT.size + length
            if mask & _OVERFLOW:
                yield "", ""
                continue
            directory = self._paths.get(watch, "")
            if mask & (_IGNORED | _MOVE_SELF | _DELETE_SELF):
                self._paths.pop(watch, None)
            if directory:
                yield directory, os.fsdecode(name)

    def close(self) -> None:
        """No more. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
