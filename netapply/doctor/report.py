"""A tarball for a bug report: what doctor found, what stands, and the machine, without what would name it."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

from netapply.doctor.finding import Finding, Sight
from netapply.errors import NetapplyError
from netapply.jsonform import plain
from netapply.planfile import dump_plan

_FILES = ("/etc/os-release", "/proc/sys/kernel/osrelease", "/etc/systemd/system/netapply.service")
_QUAD = r"(?:\d{1,3}\.){3}\d{1,3}(?![\w.])"
_V4 = rf"(?<![\w.]){_QUAD}"
_GROUP = "[0-9a-fA-F]{1,4}"
_TAIL = f"{_GROUP}(?::{_GROUP}){{0,6}}"
_V6 = rf"(?<![\w:.])(?:(?:{_GROUP}:){{7}}{_GROUP}|(?:{_GROUP}:){{1,7}}:(?:{_TAIL})?|::{_TAIL})(?![\w:])"
_HARDWARE = r"(?<![\w:])(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}(?![\w:])"
_V4_IN_V6 = rf"(?<![\w:.])::(?:[fF]{{4}}:)?{_QUAD}"
_HOME = r"/home/[^/\s\"']+"
#: As in Environment=API_TOKEN=x.
_HIDDEN = r"(?i:password|passwd|secret|token|api_?key)\s*[=:]\s*(?:\"[^\"]*\"|'[^']*'|[^\s\"',]+)"
_ANY = re.compile(
    f"(?P<hidden>{_HIDDEN})|(?P<hardware>{_HARDWARE})|(?P<address>{_V4_IN_V6}|{_V4}|{_V6})|(?P<home>{_HOME})"
)
#: Addresses that say nothing about who it is: loopback, our own ::6, unspecified.
_NOBODY = re.compile(r"127\.|0\.0\.0\.0$|255\.|::[0-9a-f]?$")


class Redactor:
    """Puts a name in the place of each address, hardware address, home, password or token, and of the machine.

    The same one every time, so that what was alike still is.
    """

    def __init__(self, machine: str) -> None:
        names = [re.escape(each) for each in (machine, machine.partition(".")[0]) if each]  # with its domain, and bare
        self._machine = re.compile(rf"(?<![\w-])(?:{'|'.join(names)})(?![\w-])") if names else None
        self._known: dict[str, str] = {}

    def redact(self, text: str) -> str:
        """The text without them."""
        text = _ANY.sub(self._replace, text)
        return self._machine.sub("this-machine", text) if self._machine else text

    def _replace(self, found: re.Match[str]) -> str:
        kind, text = str(found.lastgroup), found[0]
        if kind == "address" and _NOBODY.match(text):
            return text
        if kind == "hidden":
            return re.split(r"\s*[=:]", text)[0] + "=hidden"
        return self._known.setdefault(text.lower(), f"{kind}-{len(self._known) + 1}")


def write_report(path: str, sight: Sight, findings: Iterable[Finding]) -> tuple[str, ...]:
    """Write the tarball, for our eyes alone; the names of what is in it. Raises NetapplyError, also where it exists."""
    redactor = Redactor(os.uname().nodename)
    parts = {name: redactor.redact(text) for name, text in _parts(sight, findings).items()}
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
            for name, text in parts.items():
                data = text.encode()
                entry = tarfile.TarInfo(f"netapply-report/{name}")
                entry.size, entry.mtime, entry.mode = len(data), int(time.time()), 0o600
                tar.addfile(entry, io.BytesIO(data))
    except OSError as error:
        step = "name another file" if isinstance(error, FileExistsError) else "name one that can be written"
        raise NetapplyError(f"{path} cannot be written: {error.strerror}", next_step=step) from error
    return tuple(parts)


def _parts(sight: Sight, findings: Iterable[Finding]) -> Mapping[str, str]:
    parts = {
        "doctor.json": _json([each._asdict() for each in findings]),
        "rules.json": _json(_rules(sight)),
        "system.json": _json({"uname": list(os.uname()), "time": time.time()}),
    }
    if sight.plan is not None:
        parts["plan.json"] = _json(dump_plan(sight.plan))
    for path in _FILES:
        text = sight.read(path)
        if text:
            parts[path.strip("/").replace("/", "_")] = text
    return parts


def _rules(sight: Sight) -> Any:
    try:
        return [plain(each) for each in sight.capture.show()]
    except (NetapplyError, OSError) as error:
        return {"error": str(error)}


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, default=str) + "\n"
