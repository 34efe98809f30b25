"""Names that come and go: of namespaces and of plan files, by inotify(7), and by a look where that cannot be had."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

from netapply.agent.desired import Desired
from netapply.agent.inotify import Inotify
from netapply.agent.keeper import Keeper


class Names:
    """The directories that plan files and requests speak of. Nothing here waits, or is for another thread."""

    def __init__(
        self,
        desired: Desired,
        keepers: Mapping[str, Keeper],
        *,
        plans_changed: Callable[[], None],
        resolve: Callable[[], None],
    ) -> None:
        self._desired = desired
        self._keepers = keepers
        self._plans_changed = plans_changed
        self._resolve = resolve
        self._inotify = Inotify()
        self._directories: frozenset[str] = frozenset()

    def fileno(self) -> int:
        """Readable when `read` has something to do."""
        return self._inotify.fileno()

    def watch(self) -> None:
        """What is desired has changed: watch all directories of which it speaks, and no name slips through."""
        self._directories = self._desired.directories()
        self._watch_missing()

    def watch_for(self, keeper: Keeper) -> None:
        """One namespace more."""
        if keeper.directory and keeper.directory not in self._directories:
            self._directories |= {keeper.directory}
            self._watch_missing()

    def _watch_missing(self) -> tuple[str, ...]:
        """Watch what is not watched yet; the directories that are there by now, with names that nobody told of."""
        missing = self._directories - self._inotify.watched
        return tuple(directory for directory in missing if self._inotify.watch(directory))

    def read(self) -> None:
        """Answer what has happened to names."""
        listed = plans = False
        for directory, name in self._inotify.read():
            if not directory:  # some were lost
                listed = plans = True
                for keeper in list(self._keepers.values()):
                    _look_again(keeper)
                continue
            plans |= self._desired.is_plans(directory)
            listed |= self._desired.lists(directory)
            named = self._keepers.get(os.path.join(directory, name))
            if named is not None:
                named.appeared()
        if plans:
            self._plans_changed()
        elif listed:
            self._resolve()

    def look(self) -> None:
        """Look at names that nobody tells of: in directories that cannot be watched, and where a mount came late."""
        late = self._watch_missing()
        if any(map(self._desired.is_plans, late)):
            self._plans_changed()
        elif any(map(self._desired.lists, late)):
            self._resolve()
        watched = self._inotify.watched
        for keeper in list(self._keepers.values()):
            if keeper.busy or not keeper.directory:
                continue
            if keeper.directory not in watched:
                _look_again(keeper)
            elif keeper.state == "gone" and os.path.exists(keeper.place.path):
                keeper.appeared()

    def close(self) -> None:
        """No more. Idempotent."""
        self._inotify.close()


def _look_again(keeper: Keeper) -> None:
    if keeper.held is None:
        keeper.appeared()
    else:
        keeper.recheck()
