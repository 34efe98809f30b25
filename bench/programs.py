"""Programs, started as cheaply as can be: what is measured is theirs, and not ours."""

from __future__ import annotations

import os


def run(command: tuple[str, ...], **environment: str) -> int:
    """Start it by vfork, which takes half of what the subprocess module does, and wait; returns its exit code.

    Its output is thrown away. It runs in the calling thread's namespace.
    """
    quiet = [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
    inherited = {**os.environ, **environment}
    inherited.pop("PYTHONDONTWRITEBYTECODE", None)  # what is installed is compiled
    _, status = os.waitpid(os.posix_spawn(command[0], command, inherited, file_actions=quiet), 0)
    return os.waitstatus_to_exitcode(status)
