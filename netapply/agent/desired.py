"""Which namespace should hold what: by the plan files, and by what was asked for through the API."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from netapply.agent import store
from netapply.agent.held import Wanted
from netapply.agent.places import Place, find_place
from netapply.agent.planfiles import (
    PlanFile,
    Selector,
    directories,
    found_by,
    is_plan_file,
    matches_labels,
    read_plan_file,
)
from netapply.agent.trials import Before
from netapply.errors import Fault, NamespaceError, PlanError
from netapply.values import NamedTuple

#: Seconds in which a file's times may stay the same though it changes.
_YOUNG = 2.0


class Request(NamedTuple):
    """A namespace that the API knows: with a plan, or with labels alone."""

    place: Place
    labels: Mapping[str, str]
    wanted: Wanted | None


class FileChange(NamedTuple):
    """What became of one plan file: `faults` where it is rejected, else `fingerprint` ("" where it is gone)."""

    path: str
    fingerprint: str = ""
    faults: tuple[Fault, ...] = ()


class Desired:
    """All wishes. It touches files, and no kernel."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        #: The last good state of each file.
        self.files: dict[str, PlanFile] = {}
        self.requests: dict[str, Request] = {}
        self._rejected: dict[str, tuple[Fault, ...]] = {}
        #: What tells a file that was read from one that was changed since.
        self._marks: dict[str, tuple[int, ...]] = {}

    def read_files(self) -> tuple[FileChange, ...]:
        """Read the directory; what is new, and what is wrong and was not told yet."""
        changes: list[FileChange] = []
        if not self._directory:
            return ()
        try:
            names = sorted(filter(is_plan_file, os.listdir(self._directory)))
        except FileNotFoundError:
            names = []
        except OSError as error:
            fault = Fault(self._directory, error.strerror or str(error), "a directory that can be read")
            return self._reject(self._directory, (fault,))
        paths = [os.path.join(self._directory, name) for name in names]
        marks = {path: _mark(path) for path in paths}
        for path in paths:
            if not marks[path] or marks[path] != self._marks.get(path):
                changes += self._read_file(path)
        self._marks = marks
        for path in [path for path in self.files if path not in marks]:
            del self.files[path]
            changes.append(FileChange(path))
        self._rejected = {path: faults for path, faults in self._rejected.items() if path in marks}
        return tuple(changes)

    def _read_file(self, path: str) -> tuple[FileChange, ...]:
        try:
            file = read_plan_file(path)
        except PlanError as error:
            return self._reject(path, error.faults)
        self._rejected.pop(path, None)
        before, self.files[path] = self.files.get(path), file
        return () if before == file else (FileChange(path, file.wanted.fingerprint),)

    def _reject(self, path: str, faults: tuple[Fault, ...]) -> tuple[FileChange, ...]:
        if self._rejected.get(path) == faults:
            return ()
        self._rejected[path] = faults
        return (FileChange(path, faults=faults),)

    @property
    def rejected(self) -> int:
        """How many files are wrong as they are now."""
        return len(self._rejected)

    def directories(self) -> frozenset[str]:
        """All that is to be watched for names that come and go."""
        watched = set(directories(self._selectors()))
        watched |= {os.path.dirname(each.place.path) for each in self.requests.values() if each.place.path}
        return frozenset(watched | ({self._directory} if self._directory else set()))

    def lists(self, directory: str) -> bool:
        """Whether names that appear in this directory may be new namespaces of a glob or a pid file."""
        return any(each.kind in ("glob", "pidFile") and directory in directories((each,)) for each in self._selectors())

    def is_plans(self, directory: str) -> bool:
        """Whether this is where the plan files are."""
        return bool(self._directory) and directory == self._directory

    def resolve(self, known: Iterable[tuple[Place, Mapping[str, str]]]) -> dict[str, tuple[Place, Wanted]]:
        """By key: the namespaces that exist or are named, each with what it should hold.

        `known` are those with labels. What the API was asked for comes first, then files by their names.
        """
        found = {key: (each.place, each.wanted) for key, each in self.requests.items() if each.wanted is not None}
        labelled = list(known)
        for _, file in sorted(self.files.items()):
            for place in _places(file, labelled):
                found.setdefault(place.key, (place, file.wanted))
        return found

    def kept(self, before: Mapping[str, Before]) -> store.Kept:
        """What is to outlast the agent. `before` is what comes back where an apply waits to be confirmed."""
        asked: list[store.Asked] = []
        for key, (place, labels, wanted) in self.requests.items():
            if place.process:
                continue  # its pid may be another's the next time
            meant, back = before.get(key, Before(wanted))
            file = PlanFile("api", (Selector("path", key),), meant) if meant else None
            asked.append(store.Asked(key, place.path, dict(labels), file, 0 if meant else back))
        return store.Kept(tuple(self.files.values()), tuple(asked))

    def restore(
        self, kept: store.Kept, descriptors: Mapping[str, int], unconfirmed: Callable[[str, Before], None]
    ) -> tuple[tuple[str, str], ...]:
        """Take up what was kept; the keys of those that cannot be found any more, each with the reason.

        `unconfirmed` is called with what has to go back.
        """
        lost: list[tuple[str, str]] = []
        self.files.update((file.path, file) for file in kept.files)
        for key, spec, labels, file, back in kept.asked:
            try:
                place = find_place(spec or descriptors[key])
            except (NamespaceError, KeyError) as error:
                lost.append((key, str(error) if spec else "its descriptor was not kept"))
                continue
            wanted = file.wanted._replace(source="api") if file else None
            self.requests[place.key] = Request(place, labels, wanted)
            if back:
                unconfirmed(place.key, Before(None, back))
        return tuple(lost)

    def _selectors(self) -> Iterator[Selector]:
        for file in self.files.values():
            yield from file.selectors


def _mark(path: str) -> tuple[int, ...]:
    """What changes with a file; () where it is so young that another change might not show."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ()
    if time.time() - status.st_ctime <= _YOUNG:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _places(file: PlanFile, labelled: Iterable[tuple[Place, Mapping[str, str]]]) -> Iterator[Place]:
    for selector in file.selectors:
        if selector.kind == "label":
            yield from (place for place, labels in labelled if matches_labels(selector.value, labels))
        for spec in found_by(selector):
            try:
                yield find_place(spec)
            except NamespaceError:
                continue
