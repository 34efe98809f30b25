"""Our named tuple is typing's, but for what it costs to make one."""

from __future__ import annotations

import copy
import pickle
import typing
from collections.abc import Callable

import pytest

from netapply import values

BODY = '''
from __future__ import annotations

class Empty(NamedTuple):
    """Nothing."""

class Port(NamedTuple):
    """A port."""

    number: int
    name: str = "any"
    note: bytes | None = None

    @property
    def following(self) -> int:
        return self.number + 1

    @classmethod
    def named(cls, name: str) -> Port:
        return cls(0, name)

    @staticmethod
    def least() -> int:
        return 1

    def __str__(self) -> str:
        return f"{self.name}:{self.number}"

class Wide(NamedTuple):
    {wide}
    last: int = 5

class Named(Port):
    """A subclass is a plain class."""
'''
WIDE = "\n    ".join(f"field{number}: int" for number in range(40))


def made(base: object) -> dict[str, typing.Any]:
    space = {"NamedTuple": base, "__name__": __name__}
    exec(BODY.replace("{wide}", WIDE), space)
    return space


OURS, THEIRS = made(values.NamedTuple), made(typing.NamedTuple)
Port = OURS["Port"]  # where pickle looks for it

SAME: list[Callable[[dict[str, typing.Any]], object]] = [
    lambda m: m["Port"](1),
    lambda m: m["Port"](1, "http", b""),
    lambda m: m["Port"](note=b"x", number=2),
    lambda m: repr(m["Port"](1, note=b"x")),
    lambda m: str(m["Port"](80, "http")),
    lambda m: m["Port"](1)._replace(number=2, note=b""),
    lambda m: type(m["Port"](1)._replace(number=2)).__name__,
    lambda m: m["Port"]._make(iter((1, "a", None))),
    lambda m: m["Port"](1)._asdict(),
    lambda m: (m["Port"]._fields, m["Port"]._field_defaults, m["Port"].__match_args__, m["Port"].__slots__),
    lambda m: (m["Port"].__doc__, m["Port"].__name__, m["Port"].__qualname__, m["Port"].__module__),
    lambda m: (m["Port"](1).following, m["Port"].named("x"), m["Port"].least()),
    lambda m: (m["Port"](1).number, m["Port"](1).name, m["Port"](1).note),
    lambda m: m["Port"](1) == (1, "any", None),
    lambda m: {m["Port"](1): 1}[m["Port"](1)],
    lambda m: m["Port"](1) < m["Port"](2),
    lambda m: tuple(m["Wide"](*range(40))),
    lambda m: m["Wide"](*range(40), last=2)._asdict(),
    lambda m: m["Empty"](),
    lambda m: repr(m["Named"](1)),
    lambda m: m["Port"](1).__getnewargs__(),
    lambda m: copy.deepcopy(m["Port"](1)),
    lambda m: hasattr(m["Port"](1), "__dict__"),
    lambda m: typing.get_type_hints(m["Port"]),
]


@pytest.mark.parametrize("of", SAME)
def test_it_does_what_typings_does(of: Callable[[dict[str, typing.Any]], object]) -> None:
    assert of(OURS) == of(THEIRS)


WRONG: list[Callable[[dict[str, typing.Any]], object]] = [
    lambda m: m["Port"](),
    lambda m: m["Port"](1, "a", None, 4),
    lambda m: m["Port"](1, nothing=2),
    lambda m: m["Port"](1, number=2),
    lambda m: m["Port"]._make((1,)),
    lambda m: m["Wide"](1),
    lambda m: setattr(m["Port"](1), "number", 2),
    lambda m: setattr(m["Port"](1), "nothing", 2),
]


@pytest.mark.parametrize("of", WRONG)
def test_it_refuses_what_typings_refuses_in_the_same_words(of: Callable[[dict[str, typing.Any]], object]) -> None:
    with pytest.raises((TypeError, AttributeError)) as theirs:
        of(THEIRS)
    with pytest.raises(type(theirs.value)) as ours:
        of(OURS)
    assert str(ours.value) == str(theirs.value)


def test_an_unknown_field_cannot_be_replaced() -> None:
    with pytest.raises(TypeError, match="'nothing'"):
        Port(1)._replace(nothing=2)


def test_a_field_without_a_default_cannot_follow_one_with() -> None:
    with pytest.raises(TypeError, match="without a default"):
        exec(
            "from __future__ import annotations\nclass Bad(NamedTuple):\n    a: int = 1\n    b: int",
            made(values.NamedTuple),
        )


def test_it_can_be_pickled() -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(Port(1, "a"), protocol))
        assert (type(again), again) == (Port, (1, "a", None))


def test_it_can_be_matched() -> None:
    match Port(7, "x"):
        case Port(number, name=name):
            assert (number, name) == (7, "x")
        case _:
            pytest.fail("no match")
