"""`netapply install-unit`: the agent's units for systemd, written; what starts them is printed, as we start nothing."""

from __future__ import annotations

import glob
import os
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Literal, TypeAlias

from netapply.cli.output import Printer
from netapply.cli.words import Arguments
from netapply.errors import NetapplyError
from netapply.values import NamedTuple

#: Each file, and where systemd looks for an administrator's (systemd.unit(5), tmpfiles.d(5), sysusers.d(5)).
PLACES: Mapping[str, str] = {
    "netapply.sysusers.conf": "etc/sysusers.d/netapply.conf",
    "netapply.tmpfiles.conf": "etc/tmpfiles.d/netapply.conf",
    "netapply.socket": "etc/systemd/system/netapply.socket",
    "netapply-read.socket": "etc/systemd/system/netapply-read.socket",
    "netapply-metrics.socket": "etc/systemd/system/netapply-metrics.socket",
    "netapply.service": "etc/systemd/system/netapply.service",
}
#: The first line of what we wrote: nothing else is replaced or removed.
MARK = "# Written by `netapply install-unit`, which writes it anew; your own settings go into a drop-in.\n"
GROUP, METRICS, STATE = "netapply", "127.0.0.1:9469", "/var/lib/netapply"

#: After some failures in a row from second to second, it is tried more and more rarely (systemd.service(5)).
_BACKOFF = "\nRestartSteps=8\nRestartMaxDelaySec=60"
_KNOWS_BACKOFF = 254
#: Where distributions have the library of systemd's that bears its version in its name.
_LIBRARIES = ("usr/lib/systemd", "usr/lib64/systemd", "usr/lib/*/systemd")

_HOMES = ("/home/", "/root/", "/run/user/")
_HIDDEN = ("/tmp/", "/var/tmp/")  # noqa: S108 - PrivateTmp= hides them from the unit
#: What `systemctl enable` makes.
_LINKS = (
    "multi-user.target.wants/netapply.service",
    *(f"sockets.target.wants/{name}.socket" for name in ("netapply", "netapply-read", "netapply-metrics")),
)
_START = "systemctl enable --now netapply.socket netapply-read.socket netapply.service"

Done: TypeAlias = Literal["written", "replaced", "unchanged", "removed"]


class Unit(NamedTuple):
    """How the agent is to be run: its command, and what the units must know of its flags."""

    command: tuple[str, ...]
    group: str = GROUP
    metrics: str = METRICS
    writable: tuple[str, ...] = ()
    home: bool = False
    backoff: bool = False


def install(arguments: Arguments, printer: Printer) -> int:
    """Write the units, or remove them; print what was done and what to run next."""
    root = os.path.abspath(arguments.root)
    unit = unit_of(sys.executable, arguments.flags)._replace(backoff=systemd_version(root) >= _KNOWS_BACKOFF)
    if arguments.only_print:
        for name in PLACES:
            printer.line(f"# {PLACES[name]}\n{render(name, unit)}")
        return 0
    done = remove(root) if arguments.remove else write(root, unit)
    steps = next_steps(done, removed=arguments.remove, metrics="--metrics" in " ".join(arguments.flags))
    if printer.json:
        printer.document("install-unit", {"files": done, "next": steps})
        return 0
    for path, what in done.items():
        printer.line(f"{what:<9}  {path}")
    for step in steps:
        printer.line(f"next: {step}")
    return 0


def unit_of(python: str, flags: Sequence[str]) -> Unit:
    """The unit that runs `netapply agent FLAGS`. Raises UsageError where the flags are wrong, NetapplyError."""
    from netapply.cli.arguments import build_parser

    chosen = build_parser(lean=True).parse_args(["agent", *flags], Arguments())
    if any(flag.startswith(("--socket", "--read-socket")) for flag in flags):
        step = "put ListenStream= into a drop-in: systemctl edit netapply.socket"
        raise NetapplyError("the sockets are those of the socket units", next_step=step)
    if python.startswith(_HIDDEN):
        step = "install netapply for good: python3 -m venv /opt/netapply, and run its netapply install-unit"
        raise NetapplyError(f"{python} lies where services see nothing (PrivateTmp=)", next_step=step)
    paths = [path for path in (chosen.plans, chosen.state, chosen.journal) if path]
    writable = tuple(path for path in (chosen.state, chosen.journal) if path and path not in (STATE, "/run/netapply"))
    words = list(flags)
    if chosen.metrics:  # the service is in no network: the socket unit listens
        words = [*_without("--metrics", words)]
    if not chosen.read_group:
        words += ["--read-group", GROUP]
    return Unit(
        command=(python, "-I", "-m", "netapply", "agent", *words),
        group=chosen.read_group or GROUP,
        metrics=chosen.metrics or METRICS,
        writable=writable,
        home=any(os.path.abspath(path).startswith(_HOMES) for path in (python, os.path.realpath(python), *paths)),
    )


def systemd_version(root: str) -> int:
    """Of the systemd that is installed below `root`; 0 where none is found."""
    paths = (path for place in _LIBRARIES for path in glob.glob(os.path.join(root, place, "libsystemd-shared-*.so")))
    return max((int(found[1]) for path in paths if (found := re.search(r"shared-(\d+)", path))), default=0)


def _without(flag: str, words: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and not word.startswith(f"{flag}="):
            kept.append(word)
        skip = word == flag and not skip
        if skip:
            kept.pop()
    return kept


def render(name: str, unit: Unit) -> str:
    """The text of one file."""
    with open(os.path.join(os.path.dirname(__file__), os.pardir, "agent", "systemd", name), encoding="utf-8") as file:
        text = file.read()
    values = {
        "COMMAND": " ".join(map(_quoted, unit.command)),
        "HOME": "read-only" if unit.home else "yes",
        "WRITABLE": "".join(f"\nReadWritePaths={_escaped(path)}" for path in unit.writable),
        "GROUP": unit.group,
        "METRICS": unit.metrics,
        "BACKOFF": _BACKOFF if unit.backoff else "",
    }
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    return MARK + text


def _quoted(word: str) -> str:
    """One word of ExecStart= (systemd.service(5), "Command lines")."""
    text = _escaped(word).replace("$", "$$")
    plain = text and all(each.isalnum() or each in "/._-:=,@%$+" for each in text)
    return text if plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _escaped(text: str) -> str:
    if not text.isprintable():
        raise NetapplyError(f"{text!r} cannot stand in a unit file", next_step="use another name")
    return text.replace("%", "%%")


def write(root: str, unit: Unit) -> dict[str, Done]:
    """Put all files below `root`; what became of each. All is looked at before any is written. Raises NetapplyError."""
    wanted = {os.path.join(root, place): render(name, unit) for name, place in PLACES.items()}
    found = {path: _read(path) for path in wanted}
    done: dict[str, Done] = {}
    for path, text in wanted.items():
        if found[path] == text:
            done[path] = "unchanged"
            continue
        try:
            os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
            _replace(path, text)
        except OSError as error:
            raise NetapplyError(f"{path} cannot be written: {error.strerror}", next_step="run as root") from error
        done[path] = "replaced" if found[path] else "written"
    return done


def remove(root: str) -> dict[str, Done]:
    """Remove what we wrote. Raises NetapplyError where a file is somebody else's; then none is removed."""
    there = [path for path in (os.path.join(root, place) for place in PLACES.values()) if _read(path)]
    links = [os.path.join(root, "etc/systemd/system", link) for link in _LINKS]
    for path in (*there, *filter(os.path.islink, links)):
        try:
            os.unlink(path)
        except OSError as error:
            raise NetapplyError(f"{path} cannot be removed: {error.strerror}", next_step="run as root") from error
    return dict.fromkeys(there, "removed")


def _read(path: str) -> str:
    """What stands there, "" for nothing. Raises NetapplyError where it is not ours."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise NetapplyError(f"{path} cannot be read: {error}", next_step="run as root") from error
    if not text.startswith(MARK[:30]):
        step = "move it away; settings of your own go into a drop-in (systemctl edit netapply)"
        raise NetapplyError(f"{path} is there, and not by netapply install-unit", next_step=step)
    return text


def _replace(path: str, text: str) -> None:
    """Whole or not at all."""
    new = f"{path}.{secrets.token_hex(4)}"
    try:
        with open(new, "x", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.rename(new, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise


def next_steps(done: Mapping[str, Done], *, removed: bool, metrics: bool) -> tuple[str, ...]:
    """What to run, in order; nothing where nothing was changed."""
    if removed:
        ended = "systemctl stop netapply.service netapply.socket netapply-read.socket netapply-metrics.socket"
        return (ended, "systemctl daemon-reload") if done else ()
    if set(done.values()) == {"unchanged"}:
        return ()
    reload = ("systemd-sysusers netapply.conf", "systemd-tmpfiles --create netapply.conf", "systemctl daemon-reload")
    if metrics:  # whose socket unit is not started beside a service that runs
        stop = ("systemctl stop netapply.service",) if "replaced" in done.values() else ()
        return (*reload, *stop, _START.replace("netapply.service", "netapply-metrics.socket netapply.service"))
    return (*reload, "systemctl restart netapply.service" if "replaced" in done.values() else _START)
