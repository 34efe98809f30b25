"""Plan files of a directory: a plan as everywhere, and beside it at the top which namespaces it is for.

    apiVersion: netapply/v1
    namespaces:
      - path: pod-1                    # a path, or a name of ip-netns(8)
      - glob: /run/netns/cni-*
      - pidFile: /run/app/app.pid
      - label: app=web,tier=front      # of namespaces that were registered with labels
    backend: auto                      # and layout, and fail (open, closed): optional
    outbound: …

Every fault of a file is told at once.
"""

from __future__ import annotations

import fnmatch
import json
import os
import stat
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

from netapply.agent.held import Wanted
from netapply.backend import BUILT_IN
from netapply.compiler import LAYOUTS
from netapply.documents import LIMITS, read_document
from netapply.errors import Fault, PlanError
from netapply.fields import is_list, is_mapping
from netapply.nsfs import NAMED
from netapply.planfile import dump_plan, examine_plan, fingerprint, format_of, read_source
from netapply.values import NamedTuple

SelectorKind: TypeAlias = Literal["path", "glob", "pidFile", "label"]
SELECTORS: tuple[SelectorKind, ...] = ("path", "glob", "pidFile", "label")
ENDINGS = (".yaml", ".yml", ".json", ".toml")
MANY = 10_000

_SELECTOR = "one of path, glob, pidFile, label with a text, like {path: pod-1} or {label: app=web}"
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "backend": ("auto", *BUILT_IN),
    "layout": tuple(LAYOUTS),
    "fail": ("closed", "open"),
}


class Selector(NamedTuple):
    """Which namespaces: `value` is a path, a glob, a file with a pid, or labels that must all be there."""

    kind: SelectorKind
    value: str


class PlanFile(NamedTuple):
    """What a file says."""

    path: str
    selectors: tuple[Selector, ...]
    wanted: Wanted


def is_plan_file(name: str) -> bool:
    """Whether a file of this name is looked at: editors' and package managers' leavings are not."""
    return name.endswith(ENDINGS) and name[0] not in ".#"


def read_plan_file(path: str) -> PlanFile:
    """The file at `path`. Raises PlanError with all its faults, also where it cannot be read."""
    if not _is_file(path):
        raise PlanError((Fault(path, "no regular file", "a file with a plan, or a link to one"),))
    document = read_document(read_source(path), format_of(path), LIMITS, path)
    return parse_plan_file(path, document)


def parse_plan_file(path: str, document: Any) -> PlanFile:
    """The same of a document. Raises PlanError."""
    if not is_mapping(document):
        raise PlanError((Fault(path, "not a mapping", "a plan file begins with apiVersion: netapply/v1"),))
    rest = dict(document)
    faults: list[Fault] = []
    selectors = _selectors(rest.pop("namespaces", None), faults)
    chosen = {key: _choice(key, rest.pop(key, words[0]), faults) for key, words in _CHOICES.items()}
    try:
        text = json.dumps(rest, default=str)
        plan = examine_plan(text, format="json", source=path, beside=("namespaces", *_CHOICES)).plan
    except PlanError as error:
        raise PlanError((*faults, *error.faults)) from error
    if faults:
        raise PlanError(tuple(faults))
    fail: Literal["open", "closed"] = "open" if chosen["fail"] == "open" else "closed"
    return PlanFile(path, selectors, Wanted(plan, chosen["backend"], chosen["layout"], fingerprint(plan), path, fail))


def dump_plan_file(file: PlanFile) -> dict[str, Any]:
    """As a document that `parse_plan_file` takes."""
    wanted = file.wanted
    return {
        **dump_plan(wanted.plan),
        "namespaces": [{each.kind: each.value} for each in file.selectors],
        "backend": wanted.backend,
        "layout": wanted.layout,
        "fail": wanted.fail,
    }


def _selectors(raw: Any, faults: list[Fault]) -> tuple[Selector, ...]:
    entries = raw if is_list(raw) else []
    if not 0 < len(entries) <= MANY:
        faults.append(Fault("namespaces", _shown(raw), f"a list of 1 to {MANY} entries, each {_SELECTOR}"))
    found: list[Selector] = []
    for index, entry in enumerate(entries[:MANY]):
        selector = _selector(entry)
        if selector is None:
            faults.append(Fault(f"namespaces[{index}]", _shown(entry), _SELECTOR))
        else:
            found.append(selector)
    return tuple(found)


def _selector(entry: Any) -> Selector | None:
    if not is_mapping(entry) or len(entry) != 1:
        return None
    key, value = next(iter(entry.items()))
    if key == "label" and is_mapping(value):
        value = ",".join(f"{name}={text}" for name, text in value.items())
    if key not in SELECTORS or not isinstance(value, str) or not value or "\0" in value:
        return None
    if key == "label" and not all(part.partition("=")[0] and "=" in part for part in value.split(",")):
        return None
    if key == "pidFile" and not value.startswith("/"):
        return None
    return Selector(key, value)


def _choice(key: str, value: Any, faults: list[Fault]) -> str:
    if value in _CHOICES[key]:
        return str(value)
    faults.append(Fault(key, _shown(value), f"one of {', '.join(_CHOICES[key])}"))
    return ""


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, default=str)[:80]


# --- which namespaces ----------------------------------------------------------------------------------------


def matches_labels(value: str, labels: Mapping[str, str]) -> bool:
    """Whether all of "k=v,k=v" are among the labels."""
    wanted = (part.strip().partition("=") for part in value.split(","))
    return all(labels.get(key.strip()) == text.strip() for key, _, text in wanted)


def found_by(selector: Selector) -> tuple[str, ...]:
    """The specs that a selector by path, glob or pid file names now. Labels are the agent's to know."""
    match selector.kind:
        case "path":
            return (selector.value,)
        case "glob":
            directory, pattern = os.path.split(_placed(selector.value))
            try:
                names = os.listdir(directory)
            except OSError:
                return ()
            return tuple(os.path.join(directory, name) for name in sorted(fnmatch.filter(names, pattern)))
        case "pidFile":
            if not _is_file(selector.value):
                return ()
            try:
                with open(selector.value, encoding="ascii") as file:
                    number = file.read(32).strip()
            except (OSError, ValueError):
                return ()
            return (f"pid:{number}",) if number.isdigit() else ()
        case "label":
            return ()


def _is_file(path: str) -> bool:
    """Whether reading it ends: who opens a pipe waits for its writer, and the agent's loop with him."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def directories(selectors: Iterable[Selector]) -> frozenset[str]:
    """Where files come and go that these selectors name."""
    return frozenset(os.path.dirname(_placed(each.value)) for each in selectors if each.kind != "label")


def _placed(value: str) -> str:
    return os.path.abspath(value) if "/" in value else NAMED + value
