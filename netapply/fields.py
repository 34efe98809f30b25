"""The kinds of fields that a plan file is made of: each reads a value, writes it, and gives its JSON Schema. Pure.

    Scalar, Named     one value; the reader of a Named one may ask the machine (`Lookups`)
    Choice, Flag      one of a few words; true or false
    Values            a list of scalars, normalised
    Groups            a list of groups
    Either            a word that stands for a value, or another kind
    Group             a mapping of fields, and what is made of them

`parse` returns the typed value, or FAULTY after it has noted a fault, so that one pass finds them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, TypeGuard

from netapply.documents import REPEATED, Repeated
from netapply.errors import Fault
from netapply.spelling import RefusedError
from netapply.values import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from netapply.lookups import Lookups

Json: TypeAlias = dict[str, Any]


class Faulty(NamedTuple):
    """What stands for a value with faults."""

    kind: str = "faulty"


FAULTY: Final = Faulty()
_GUESSES = 100


class Redundant(NamedTuple):
    """An entry of a list that changes nothing, because others say the same. `value` is as written, shortened."""

    path: str
    value: str


class Check:
    """What one reading of a plan finds on its way."""

    def __init__(self, lookups: Lookups, beside: tuple[str, ...] = ()) -> None:
        self.lookups = lookups
        #: Fields of the file that are not the plan's, and were read already.
        self.beside = beside
        self.faults: list[Fault] = []
        self.redundant: list[Redundant] = []

    def refuse(self, path: str, value: object, accepted: str) -> Faulty:
        """Note a fault."""
        self.faults.append(Fault(path, shorten(value), accepted))
        return FAULTY


def shorten(value: object) -> str:
    """A value as people wrote it, on one line and at most some 60 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return ascii(value if len(value) <= 48 else f"{value[:45]}...")
    if isinstance(value, int) and abs(value) < 10**20:
        return str(value)
    named: dict[type, str] = {
        list: "a list",
        dict: "a mapping",
        Repeated: "the field given twice",
        int: "a larger number",
    }
    return named.get(type(value), f"a {type(value).__name__}")


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """A list, of a document."""
    return isinstance(value, list)


def is_mapping(value: Any) -> TypeGuard[dict[str, Any]]:
    """A mapping, of a document: its keys are text."""
    return isinstance(value, dict)


class Kind(Protocol):
    """How a field is read, written and described."""

    def parse(self, value: Any, at: str, check: Check) -> Any:
        """The typed value, or FAULTY. `at` is the plan path."""
        ...

    def write(self, value: Any) -> Any:
        """The value as a plan file spells it, JSON-able. `parse` reads it back to the same."""
        ...

    def schema(self) -> Json:
        """A JSON Schema that admits whatever `parse` accepts."""
        ...


class Scalar(NamedTuple):
    """One value. `read` raises RefusedError."""

    read: Callable[[Any], Any]
    spell: Callable[[Any], Any]
    fragment: Json

    def reader(self, lookups: Lookups) -> Callable[[Any], Any]:  # noqa: ARG002 - as of Named
        """`read`, for one reading of a plan."""
        return self.read

    def parse(self, value: Any, at: str, check: Check) -> Any:
        return _parse_one(self.read, value, at, check)

    def write(self, value: Any) -> Any:
        return self.spell(value)

    def schema(self) -> Json:
        return self.fragment


class Named(NamedTuple):
    """One value that may be a name which the machine knows."""

    read: Callable[[Any, Lookups], Any]
    spell: Callable[[Any], Any]
    fragment: Json

    def reader(self, lookups: Lookups) -> Callable[[Any], Any]:
        """`read`, for one reading of a plan."""
        return lambda value: self.read(value, lookups)

    def parse(self, value: Any, at: str, check: Check) -> Any:
        return _parse_one(self.reader(check.lookups), value, at, check)

    def write(self, value: Any) -> Any:
        return self.spell(value)

    def schema(self) -> Json:
        return self.fragment


def _parse_one(read: Callable[[Any], Any], value: Any, at: str, check: Check) -> Any:
    try:
        return read(value)
    except RefusedError as refused:
        return check.refuse(at, value, str(refused))


class Choice(NamedTuple):
    """One of a few words."""

    words: tuple[str, ...]

    def reader(self, lookups: Lookups) -> Callable[[Any], Any]:  # noqa: ARG002 - as of Named
        """The word itself."""
        return self._read

    def _read(self, value: Any) -> str:
        if not isinstance(value, str) or value not in self.words:
            raise RefusedError(f"write {_one_of(self.words)}")
        return value

    def parse(self, value: Any, at: str, check: Check) -> Any:
        return _parse_one(self._read, value, at, check)

    def write(self, value: Any) -> Any:
        return value

    def schema(self) -> Json:
        return {"enum": list(self.words)}


class Flag(NamedTuple):
    """true or false."""

    def parse(self, value: Any, at: str, check: Check) -> Any:
        return value if isinstance(value, bool) else check.refuse(at, value, "write true or false")

    def write(self, value: Any) -> Any:
        return value

    def schema(self) -> Json:
        return {"type": "boolean"}


class Values(NamedTuple):
    """A list of `item`, which `normalise` sorts and frees from repetitions."""

    item: Scalar | Named | Choice
    normalise: Callable[[list[Any]], tuple[Any, ...]]

    def parse(self, value: Any, at: str, check: Check) -> Any:
        if not is_list(value):
            return check.refuse(at, value, "write a list")
        read = self.item.reader(check.lookups)
        found: list[Any] = []
        for index, entry in enumerate(value):
            try:
                found.append(read(entry))
            except RefusedError as refused:
                check.refuse(f"{at}[{index}]", entry, str(refused))
        kept = self.normalise(found)
        if len(found) < len(value):
            return FAULTY
        if len(kept) < len(found):
            self._note(found, kept, value, at, check)
        return kept

    @staticmethod
    def _note(found: list[Any], kept: tuple[Any, ...], entries: list[Any], at: str, check: Check) -> None:
        new = set(kept)
        for index, item in enumerate(found):
            if item not in new:
                check.redundant.append(Redundant(f"{at}[{index}]", shorten(entries[index])))
            new.discard(item)

    def write(self, value: Any) -> Any:
        return [self.item.write(entry) for entry in value]

    def schema(self) -> Json:
        return {"type": "array", "items": self.item.schema()}


class Groups(NamedTuple):
    """A list of `item`, in the order written."""

    item: Kind

    def parse(self, value: Any, at: str, check: Check) -> Any:
        if not is_list(value):
            return check.refuse(at, value, "write a list")
        found = [self.item.parse(entry, f"{at}[{index}]", check) for index, entry in enumerate(value)]
        return FAULTY if FAULTY in found else tuple(found)

    def write(self, value: Any) -> Any:
        return [self.item.write(entry) for entry in value]

    def schema(self) -> Json:
        return {"type": "array", "items": self.item.schema()}


class Either(NamedTuple):
    """One of `words`, each of which stands for a value, or `kind`. None as a word is written null."""

    words: Mapping[str | None, Any]
    kind: Kind
    accepted: str

    def parse(self, value: Any, at: str, check: Check) -> Any:
        if (value is None or isinstance(value, str)) and value in self.words:
            return self.words[value]
        if not isinstance(value, (list, dict)) and not isinstance(self.kind, Scalar):
            return check.refuse(at, value, self.accepted)
        return self.kind.parse(value, at, check)

    def write(self, value: Any) -> Any:
        for word, meaning in self.words.items():
            if value == meaning:
                return word
        return self.kind.write(value)

    def schema(self) -> Json:
        return {"anyOf": [{"enum": list(self.words)}, self.kind.schema()]}


class Field(NamedTuple):
    """A field of a group: its kind, and what it means in a sentence."""

    kind: Kind
    about: str


class Group(NamedTuple):
    """A mapping of `fields`. Those without a default are required.

    `make` gets what was found without fault, by field name, and may return FAULTY; `take` is its inverse.
    `defaults` are typed values.
    """

    fields: Mapping[str, Field]
    defaults: Mapping[str, Any]
    make: Callable[[dict[str, Any], str, Check], Any]
    take: Callable[[Any], Mapping[str, Any]]

    def parse(self, value: Any, at: str, check: Check) -> Any:
        if not is_mapping(value):
            return check.refuse(at or "the plan", value, f"write a mapping of fields: {', '.join(self.fields)}")
        found: dict[str, Any] = {}
        for name, entry in value.items():
            where = f"{at}.{name}" if at else name
            if name not in self.fields:
                self._unknown(name, at, check)
            elif entry is REPEATED:
                check.refuse(where, entry, "write each field once")
            elif (result := self.fields[name].kind.parse(entry, where, check)) is not FAULTY:
                found[name] = result
        for name, field in self.fields.items():
            if name not in self.defaults and name not in value:
                where = f"{at}.{name}" if at else name
                check.faults.append(Fault(where, "leaving it out", f"the field is required: {field.about}"))
        return self.make(found, at, check)

    def _unknown(self, name: str, at: str, check: Check) -> None:
        from difflib import get_close_matches

        # A guess takes a good part of a millisecond: a file of nothing but unknown fields gets a few.
        known = [*self.fields, *(() if at else check.beside)]
        close = get_close_matches(name[:64].lower(), known, 1) if len(check.faults) < _GUESSES else []
        hint = f"did you mean {close[0]}?" if close else f"the fields here are {', '.join(known)}"
        shown = name if name and name.isprintable() and len(name) <= 40 else shorten(name)
        check.faults.append(Fault(f"{at}.{shown}" if at else shown, "an unknown field", hint))

    def write(self, value: Any) -> Any:
        entries = self.take(value)
        return {name: field.kind.write(entries[name]) for name, field in self.fields.items()}

    def schema(self) -> Json:
        properties: Json = {}
        for name, field in self.fields.items():
            properties[name] = {"description": field.about, **field.kind.schema()}
            if name in self.defaults and not isinstance(field.kind, Group):
                properties[name]["default"] = field.kind.write(self.defaults[name])
        required = [name for name in self.fields if name not in self.defaults]
        shape: Json = {"type": "object", "properties": properties, "additionalProperties": False}
        return {**shape, "required": required} if required else shape


class Short(NamedTuple):
    """A text that stands for `group` with nothing but `field`, or the group itself."""

    group: Group
    field: str

    def parse(self, value: Any, at: str, check: Check) -> Any:
        return self.group.parse({self.field: value} if isinstance(value, str) else value, at, check)

    def write(self, value: Any) -> Any:
        return self.group.write(value)

    def schema(self) -> Json:
        return {"anyOf": [self.group.fields[self.field].kind.schema(), self.group.schema()]}


def _one_of(words: tuple[str, ...]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last
