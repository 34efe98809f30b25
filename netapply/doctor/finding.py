"""What a check sees, and what it says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias

from netapply.api import Capture
from netapply.plan import CapturePlan
from netapply.values import NamedTuple

#: "notice" is worth knowing and may be as it should; "unseen" is what could not be looked at.
Grade: TypeAlias = Literal["ok", "notice", "trouble", "unseen"]


class Finding(NamedTuple):
    """One thing that was looked at: what it is, how it is, what says so, and one line that puts it right."""

    check: str
    result: Grade
    evidence: str
    fix: str = ""


class Sight(NamedTuple):
    """Where to look: a namespace, a plan if there is one, and the machine, whose files are below `root`."""

    capture: Capture
    plan: CapturePlan | None = None
    root: str = "/"

    def path(self, path: str) -> str:
        """The place of a file of the machine."""
        return os.path.join(self.root, path.lstrip("/"))

    def read(self, path: str) -> str:
        """A small text file of the machine; "" where there is none. Raises OSError where it may not be read."""
        try:
            with open(self.path(path), encoding="utf-8", errors="replace") as file:
                return file.read(1 << 20)
        except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
            return ""

    def read_end(self, path: str) -> str:
        """The last MiB of a log of the machine; "" where there is none. Raises OSError where it may not be read."""
        try:
            with open(self.path(path), "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 20)))
                return file.read(1 << 20).decode("utf-8", "replace")
        except (FileNotFoundError, NotADirectoryError):
            return ""

    def sysctl(self, name: str) -> str:
        """A sysctl of the namespace, as "net/ipv4/ip_forward"; "" where it has none. Raises OSError."""
        try:
            return self.capture.namespace.read_file(f"sys/{name}").strip()
        except FileNotFoundError:
            return ""

    def processes(self) -> Iterator[tuple[int, str]]:
        """The pid and the name of every process that we see."""
        for pid in sorted(int(entry) for entry in os.listdir(self.path("/proc")) if entry.isdigit()):
            name = self.read(f"/proc/{pid}/comm").strip()  # "" where it ended meanwhile
            if name:
                yield pid, name


Check: TypeAlias = Callable[[Sight], Iterator[Finding]]
