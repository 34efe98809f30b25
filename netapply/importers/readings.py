"""Settings as they were read, with what gave each: flags, variables, or (`annotations`) a pod. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping

from netapply.errors import Fault
from netapply.importers.istio_settings import (
    ALIASES,
    ENVIRONMENT_ALONE,
    SHORT,
    TELLING_EMPTY,
    IstioSettings,
    read_command,
    spelled,
)
from netapply.values import NamedTuple

#: A longer value is left out of a comment: it stands beside it.
_SHOWN = 48
_FLAGS = frozenset(IstioSettings._fields) - ENVIRONMENT_ALONE


class Source(NamedTuple):
    """What gave a setting: its name, as in "ENVOY_PORT", and all of it, as in "ENVOY_PORT=15001"."""

    name: str
    text: str


class Reading(NamedTuple):
    """Settings as they were read, and from where.

    `given` is what gave each setting that was given. `otherwise` is by setting or by plan path: why a value that was
    not given is what it is. `of` says in a few words what was read. `faults` are what no plan can be made of.
    """

    settings: IstioSettings
    given: Mapping[str, Source]
    otherwise: Mapping[str, str] = {}
    of: str = ""
    warnings: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()


def read_flags(argv: Iterable[str], env: Mapping[str, str]) -> Reading:
    """What a command line and an environment give."""
    words, faults, notes = [*argv], list[Fault](), list[str]()
    settings, _ = read_command(words, env, {}, faults, notes)
    flags = read_command(words, {}, dict.fromkeys(_FLAGS, _anything), [], [])[1]
    given = {name: _flag(name, text, words) for name, text in flags.items()}
    for name, value in settings._asdict().items():
        if name not in given and (variable := _variable(name, value, env)):
            given[name] = Source(variable, f"{variable}={_short(env[variable])}")
    of = shlex.join(["istio-iptables", *words])
    return Reading(settings, given, of=of, warnings=tuple(notes), faults=tuple(renamed(each, given) for each in faults))


def _anything(_: str) -> str:
    return ""


def _variable(name: str, value: object, env: Mapping[str, str]) -> str:
    """The environment's name for the setting that gave this value, "" if none did."""
    for variable in (ALIASES.get(name, ""), name.upper()):
        notes: list[str] = []
        text = env.get(variable)
        if text or (text is not None and name == TELLING_EMPTY):
            alone, _ = read_command((), {variable: text}, {}, [], notes)
            if getattr(alone, name) == value and not notes:
                return variable
    return ""


def _flag(name: str, text: str, words: list[str]) -> Source:
    """As it was written: long, or with its letter."""
    flag = spelled(name)
    letter = next((short for short, long in SHORT.items() if long == name), "")
    if letter and not any(word.partition("=")[0] == flag for word in words):
        flag = f"-{letter}"
    if isinstance(IstioSettings._field_defaults[name], bool):
        return Source(flag, flag if text == "true" else f"{flag}={text}")
    return Source(flag, f"{flag} {_short(text)}")


def _short(value: str) -> str:
    return shlex.quote(value) if len(value) <= _SHOWN else "…"


def renamed(fault: Fault, given: Mapping[str, Source]) -> Fault:
    """A fault of a setting, at what gave it."""
    source = next((source for name, source in given.items() if spelled(name) == fault.path), None)
    return fault._replace(path=source.name) if source else fault
