"""What outlasts the agent: the last good state of each plan file, and what was asked for through the API."""

from __future__ import annotations

import json
import os
from typing import Any

from netapply.agent.planfiles import PlanFile, dump_plan_file, parse_plan_file
from netapply.errors import NetapplyError, PlanError
from netapply.paths import open_private_directory
from netapply.values import NamedTuple

FORMAT = 1
_NAME = "desired.json"
_LARGEST = 256 << 20


class Asked(NamedTuple):
    """A namespace that was registered or given a plan through the API: `file` has the plan, or is None.

    `back`: what stands was never confirmed, and has to go back by so many states.
    """

    key: str
    spec: str
    labels: dict[str, str]
    file: PlanFile | None
    back: int = 0


class Kept(NamedTuple):
    """All of it."""

    files: tuple[PlanFile, ...] = ()
    asked: tuple[Asked, ...] = ()


def load(directory: str) -> tuple[Kept, str]:
    """What was kept, and "", or why some of it could not be read."""
    try:
        with os.fdopen(_open(directory), "rb") as file:
            raw: Any = json.loads(file.read(_LARGEST))
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']}")
    except FileNotFoundError:
        return Kept(), ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError, NetapplyError) as error:
        return Kept(), f"{directory}/{_NAME} cannot be used: {error}"
    files: list[PlanFile] = []
    asked: list[Asked] = []
    said: list[str] = []
    for path, document in raw.get("files", {}).items():
        try:
            files.append(parse_plan_file(path, document))
        except PlanError as error:
            said.append(f"{path}: {error}")
    for each in raw.get("asked", ()):
        try:
            plan = parse_plan_file("api", each["plan"]) if each["plan"] else None
            asked.append(Asked(each["key"], each["spec"], dict(each["labels"]), plan, int(each.get("back", 0))))
        except (PlanError, KeyError, TypeError, ValueError) as error:
            said.append(f"an entry: {error}")
    return Kept(tuple(files), tuple(asked)), "; ".join(said)


def save(directory: str, kept: Kept) -> None:
    """Write it whole: what is read later is the old state or the new one. Raises NetapplyError."""
    body = {
        "format": FORMAT,
        "files": {file.path: dump_plan_file(file) for file in kept.files},
        "asked": [
            {
                "key": each.key,
                "spec": each.spec,
                "labels": each.labels,
                "plan": dump_plan_file(each.file) if each.file else None,
                "back": each.back,
            }
            for each in kept.asked
        ],
    }
    data = json.dumps(body, separators=(",", ":")).encode()
    try:
        _write(directory, data)
    except OSError as error:
        step = "make the state directory writable, or name another"
        raise NetapplyError(
            f"state directory {directory} cannot be written: {error.strerror}", next_step=step
        ) from error


def _open(directory: str) -> int:
    folder = open_private_directory(directory)
    try:
        return os.open(_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)


def _write(directory: str, data: bytes) -> None:
    folder = open_private_directory(directory)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(f"{_NAME}.new", flags, 0o600, dir_fd=folder)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(f"{_NAME}.new", _NAME, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    finally:
        os.close(folder)
