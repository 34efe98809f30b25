"""Journals that an interrupted run left of living namespaces that no plan names: resolved when the agent starts."""

from __future__ import annotations

import os
from collections.abc import Collection

from netapply.errors import NetapplyError
from netapply.journal import Journal
from netapply.namespace import Namespace
from netapply.nsfs import NAMED
from netapply.recovery import recover
from netapply.values import NamedTuple

_PENDING = ".pending"


class Resolved(NamedTuple):
    """What became of one."""

    name: str
    said: str


def resolve_interrupted(journal: Journal, kept: Collection[str], lock_timeout: float) -> tuple[Resolved, ...]:
    """Finish or undo what was interrupted in namespaces that ip-netns(8) has a name for, but for the paths `kept`.

    A namespace that is kept is resolved by what brings it to its plan.
    """
    try:
        pending = {_file_of(name) for name in os.listdir(journal.directory) if name.endswith(_PENDING)}
        names = sorted(os.listdir(NAMED)) if pending else []
    except OSError:
        return ()
    found: list[Resolved] = []
    for name in names:
        try:
            status = os.stat(NAMED + name)
            if (str(status.st_dev), str(status.st_ino)) not in pending or NAMED + name in kept:
                continue
            with Namespace.open(NAMED + name, lock_timeout=lock_timeout) as namespace:
                result = recover(namespace, journal=journal)
        except (NetapplyError, OSError) as error:
            found.append(Resolved(name, f"an interrupted run could not be undone ({error})"))
        else:
            found.append(Resolved(name, result.reason))
    return tuple(found)


def _file_of(name: str) -> tuple[str, str]:
    """Device and inode, of which the names of journals are made."""
    device, _, rest = name.partition("-")
    return device, rest.partition("-")[0]
