"""A capture plan as a YAML file for people: what differs from the defaults, each line with a comment. Pure.

    write_plan(plan, {"proxy.uids": "-u 1337"}, head=("Imported from …",))

`load_plan` reads the text back to the same plan; lists come back as the loader normalises them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from netapply.fields import Either, Group, Groups, Json, Kind, Short, is_list, is_mapping
from netapply.plan import CapturePlan
from netapply.planfile import dump_plan
from netapply.schema import PLAN
from netapply.values import NamedTuple

#: Comments stand in one column, at most this far to the right.
COLUMN = 44
#: A longer line has its comment above it.
WIDTH = 118
#: A list that is longer in [brackets] has a line for each entry.
LIST_WIDTH = 72

#: What no reader of YAML takes for anything but text.
_plain = re.compile(r"[A-Za-z_][A-Za-z0-9_./+-]*|[0-9]+(\.[0-9]+){3}(/[0-9]+)?|[0-9]+-[0-9]+")
_WORDS = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n"))


class _Line(NamedTuple):
    """A line of the file, and its comment ("" for none)."""

    text: str
    comment: str = ""


def write_plan(plan: CapturePlan, comments: Mapping[str, str], *, head: Iterable[str] = ()) -> str:
    """The plan as YAML. A field is written if it has not its default, or if `comments` has its plan path.

    Comments and the lines of `head` are text without `#`; what is not printable in them is escaped.
    """
    writer = _Writer(comments)
    lines = [*writer.group(PLAN, dump_plan(plan), dump_plan(CapturePlan()), "", "")]
    column = max((len(line.text) + 2 for line in lines if line.comment and len(line.text) + 2 <= COLUMN), default=0)
    text = [f"# {_printable(line)}".rstrip() for line in head]
    for line in lines:
        text.extend(_with_comment(line, column))
    return "\n".join(text) + "\n"


class _Writer:
    """One writing of a plan."""

    def __init__(self, comments: Mapping[str, str]) -> None:
        self._comments = comments

    def group(self, group: Group, document: Json, defaults: Json, at: str, indent: str) -> Iterator[_Line]:
        """The fields of a group that are not as in `defaults`, or have comments."""
        for name, field in group.fields.items():
            path = f"{at}.{name}" if at else name
            value, default = document[name], defaults.get(name)
            required = name not in group.defaults
            if required or value != default or self._wanted(path):
                yield from self._field(f"{indent}{name}:", field.kind, value, default, path, indent)

    def _wanted(self, path: str) -> bool:
        return any(f"{each}.".startswith(f"{path}.") for each in self._comments)

    def _field(self, key: str, kind: Kind, value: Any, default: Any, path: str, indent: str) -> Iterator[_Line]:
        comment = self._comments.get(path, "")
        inner = _group_of(kind)
        if is_mapping(value) and inner is not None:
            known = default if is_mapping(default) else _defaults(inner)
            below = [*self.group(inner, value, known, path, f"{indent}  ")]
            yield _Line(key if below else f"{key} {{}}", comment)
            yield from below
        elif is_list(value) and (inner is not None or len(f"{key} {_flow(value)}") > LIST_WIDTH):
            yield _Line(key if value else f"{key} []", comment)
            yield from self._entries(inner, value, path, f"{indent}  ")
        else:
            yield _Line(f"{key} {_flow(value) if is_list(value) else _scalar(value)}", comment)

    def _entries(self, inner: Group | None, entries: list[Any], path: str, indent: str) -> Iterator[_Line]:
        for index, entry in enumerate(entries):
            if inner is None:
                yield _Line(f"{indent}- {_scalar(entry)}")
                continue
            at = f"{path}[{index}]"
            first, *others = self.group(inner, entry, _defaults(inner), at, f"{indent}  ")
            yield first._replace(text=f"{indent}- {first.text.lstrip()}")
            yield from others


def _group_of(kind: Kind) -> Group | None:
    """The group that a mapping of this kind, or each entry of a list of it, is."""
    while isinstance(kind, (Either, Groups, Short)):
        kind = kind.kind if isinstance(kind, Either) else kind.item if isinstance(kind, Groups) else kind.group
    return kind if isinstance(kind, Group) else None


def _defaults(group: Group) -> Json:
    return {name: group.fields[name].kind.write(default) for name, default in group.defaults.items()}


def _flow(entries: list[Any]) -> str:
    return f"[{', '.join(map(_scalar, entries))}]"


def _scalar(value: Any) -> str:
    if isinstance(value, str):
        return value if _plain.fullmatch(value) and value.lower() not in _WORDS else json.dumps(value)
    return json.dumps(value)


def _with_comment(line: _Line, column: int) -> Iterator[str]:
    if not line.comment:
        yield line.text
        return
    comment = f"# {_printable(line.comment)}"
    beside = f"{line.text.ljust(column - 2)}  {comment}"
    if len(beside) <= WIDTH:
        yield beside
        return
    indent = " " * (len(line.text) - len(line.text.lstrip()))
    yield f"{indent}{comment}"
    yield line.text


def _printable(text: str) -> str:
    """One line, whatever is in the text: a comment that ended early would be read as plan."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
