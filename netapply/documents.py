"""Plan files as plain values: YAML, JSON or TOML to dicts, lists, text, numbers, booleans and None. Pure.

Files may come from strangers, so size, number of entries and depth are capped, and YAML is read from its events:
no tags, no anchors or aliases, no merge keys, and of YAML's guesses only null, true, false and decimal numbers
(`on`, `0755`, `1:30` and `2024-01-01` stay text).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeAlias

from netapply.errors import Fault, PlanError
from netapply.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    import yaml

Format: TypeAlias = Literal["yaml", "json", "toml"]


class Repeated(NamedTuple):
    """What stands for the value of a key that a mapping holds more than once."""

    times: Literal["more than once"] = "more than once"


REPEATED = Repeated()


class Limits(NamedTuple):
    """Caps on a plan file: its bytes, the values in it (of lists and mappings, all together), and its nesting."""

    max_bytes: int = 4 * 1024 * 1024
    max_entries: int = 100_000
    max_depth: int = 16


LIMITS = Limits()

_yaml_number = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,18})")
_YAML_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
# The two that people meet: a bare * is an alias, and libyaml takes no value in [brackets] that begins with a colon.
_YAML_FORM = 'a plan is well-formed YAML (put quotes around "*", and around IPv6 addresses in brackets)'
_toml_line = re.compile(r"\[|[A-Za-z0-9_.\"' -]+=")
#: tomllib takes time in the square of a key's parts.
_toml_long_key = re.compile(r"(?<![\w-])(?:(?:[\w-]+|\"[^\"\n]*\"|'[^'\n]*')[ \t]*\.[ \t]*){32}")


def read_document(data: bytes | str, file_format: Format | None, limits: Limits, source: str) -> Any:
    """The one value of a document. Raises PlanError where it is too large, or not well-formed."""
    text = _decode(data, limits, source)
    match file_format or guess_format(text):
        case "json":
            return _read_json(text, limits, source)
        case "toml":
            return _read_toml(text, limits, source)
        case "yaml":
            return _read_yaml(text, limits, source)


def guess_format(text: str) -> Format:
    """JSON begins with a brace, TOML with a table or an assignment; all else is YAML."""
    for line in text.splitlines():
        begin = line.strip()
        if begin and not begin.startswith("#"):
            if begin.startswith("{"):
                return "json"
            return "toml" if _toml_line.match(begin) else "yaml"
    return "yaml"


def _refuse(where: str, value: str, accepted: str) -> NoReturn:
    raise PlanError((Fault(where, value, accepted),)) from None


def _decode(data: bytes | str, limits: Limits, source: str) -> str:
    # A character is a byte or more: text is measured without a copy first.
    if len(data) > limits.max_bytes or (isinstance(data, str) and len(_encode(data)) > limits.max_bytes):
        _refuse(source, "a larger file", f"a plan has at most {limits.max_bytes} bytes")
    if isinstance(data, str):
        return data.removeprefix("\ufeff")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(source, f"byte {error.start}, which is not UTF-8,", "a plan is UTF-8 text")


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _count(text: str, characters: str, limits: Limits, source: str) -> None:
    # Every entry follows one of these characters, so this bounds the number before anything is built.
    if sum(map(text.count, characters)) > limits.max_entries:
        _too_many(source, limits)


def _too_many(where: str, limits: Limits) -> NoReturn:
    _refuse(where, "a larger number of entries", f"a plan has at most {limits.max_entries} entries")


def _too_deep(where: str, limits: Limits) -> NoReturn:
    _refuse(where, "deeper nesting", f"a plan has at most {limits.max_depth} levels")


def _read_json(text: str, limits: Limits, source: str) -> Any:
    import json

    _count(text, ",[{", limits, source)
    try:
        value = json.loads(text, object_pairs_hook=_mapping)
    except json.JSONDecodeError as error:
        _refuse(f"{source}:{error.lineno}", f"({error.msg})", "a plan is well-formed JSON")
    except RecursionError:
        _too_deep(source, limits)
    except ValueError:  # a number of more digits than int() takes
        _refuse(source, "a number without end", "numbers in a plan have at most 10 digits")
    return value


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                found[key] = REPEATED
            seen.add(key)
    return found


def _read_toml(text: str, limits: Limits, source: str) -> Any:
    import tomllib

    _count(text, ",[{=", limits, source)
    if _toml_long_key.search(text):
        _too_deep(source, limits)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        _refuse(source, f"({error})", "a plan is well-formed TOML")
    except RecursionError:
        _too_deep(source, limits)
    except ValueError:
        _refuse(source, "a number without end", "numbers in a plan have at most 10 digits")


def _read_yaml(text: str, limits: Limits, source: str) -> Any:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _YamlBuilder(yaml.parse(text, loader), limits, source).document()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 0
        _refuse(f"{source}:{line}", f"({error.problem or error.context})", _YAML_FORM)
    except (yaml.YAMLError, UnicodeError) as error:
        _refuse(source, f"({str(error).splitlines()[0]})", _YAML_FORM)


class _YamlBuilder:
    """Plain values from a stream of PyYAML's events."""

    def __init__(self, events: Iterator[yaml.Event], limits: Limits, source: str) -> None:
        self._events = events
        self._limits = limits
        self._source = source
        self._entries = 0

    def document(self) -> Any:
        """The value of the only document; None for an empty file."""
        next(self._events)  # the stream's start
        if self._kind(event := next(self._events)) == "StreamEndEvent":
            return None
        value = self._value(next(self._events), 0)
        next(self._events)  # the document's end
        if self._kind(event := next(self._events)) != "StreamEndEvent":
            _refuse(self._at(event), "a second document", "a file holds one plan")
        return value

    @staticmethod
    def _kind(event: yaml.Event) -> str:
        return type(event).__name__

    def _at(self, event: Any) -> str:
        return f"{self._source}:{event.start_mark.line + 1}"

    def _value(self, event: Any, depth: int) -> Any:
        kind = self._kind(event)
        if kind == "AliasEvent" or event.anchor is not None:
            _refuse(self._at(event), "an anchor or alias", "a plan spells everything out")
        if event.tag is not None:
            _refuse(self._at(event), "a tag", "a plan has plain values only")
        self._entries += 1
        if self._entries > self._limits.max_entries:
            _too_many(self._at(event), self._limits)
        if kind == "ScalarEvent":
            return _plain(event.value) if event.implicit[0] else event.value
        if depth >= self._limits.max_depth:
            _too_deep(self._at(event), self._limits)
        if kind == "SequenceStartEvent":
            return [self._value(entry, depth + 1) for entry in self._until("SequenceEndEvent")]
        return _mapping(
            [(self._key(key), self._value(next(self._events), depth + 1)) for key in self._until("MappingEndEvent")]
        )

    def _until(self, end: str) -> Iterator[yaml.Event]:
        while self._kind(event := next(self._events)) != end:
            yield event

    def _key(self, event: Any) -> str:
        if self._kind(event) != "ScalarEvent" or event.anchor is not None or event.tag is not None:
            _refuse(self._at(event), "a key that is not plain text", "the keys of a mapping are field names")
        if event.value == "<<":
            _refuse(self._at(event), "a merge key", "a plan spells everything out")
        key: str = event.value
        return key


def _plain(text: str) -> str | int | bool | None:
    if text in _YAML_WORDS:
        return _YAML_WORDS[text]
    return int(text) if _yaml_number.fullmatch(text) else text
