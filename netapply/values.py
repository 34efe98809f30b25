"""The base of our values: `typing.NamedTuple` to type checkers, and the same at run time for a tenth of the start-up.

typing's takes 0.1 ms a class, and a one-shot command makes two hundred: it compiles a `__new__` for each and turns each
annotation into an object. Here `__new__` is a copy of one that was compiled with this file, under the fields' names
(docs/decisions/0012-cold-start.md).
"""

# ruff: noqa: ANN001, ANN003, ANN202, ANN204, ANN206 - type checkers look at the first branch, which is typing's

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take it for True; typing's own costs the import of typing
if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple  # noqa: PLC0414 - it is exported
else:
    from _collections import _tuplegetter

    _new = tuple.__new__
    _function = type(lambda: None)

    #: `__new__` of so many fields. Those of collections.namedtuple, which compiles each anew.
    _TEMPLATES = (
        lambda cls: _new(cls, ()),
        lambda cls, a: _new(cls, (a,)),
        lambda cls, a, b: _new(cls, (a, b)),
        lambda cls, a, b, c: _new(cls, (a, b, c)),
        lambda cls, a, b, c, d: _new(cls, (a, b, c, d)),
        lambda cls, a, b, c, d, e: _new(cls, (a, b, c, d, e)),
        lambda cls, a, b, c, d, e, f: _new(cls, (a, b, c, d, e, f)),
        lambda cls, a, b, c, d, e, f, g: _new(cls, (a, b, c, d, e, f, g)),
        lambda cls, a, b, c, d, e, f, g, h: _new(cls, (a, b, c, d, e, f, g, h)),
        lambda cls, a, b, c, d, e, f, g, h, i: _new(cls, (a, b, c, d, e, f, g, h, i)),
        lambda cls, a, b, c, d, e, f, g, h, i, j: _new(cls, (a, b, c, d, e, f, g, h, i, j)),
        lambda cls, a, b, c, d, e, f, g, h, i, j, k: _new(cls, (a, b, c, d, e, f, g, h, i, j, k)),
        lambda cls, a, b, c, d, e, f, g, h, i, j, k, m: _new(cls, (a, b, c, d, e, f, g, h, i, j, k, m)),
    )

    class _Value(tuple):
        """What all values do."""

        __slots__ = ()

        @classmethod
        def _make(cls, values):
            """Of an iterable of all fields' values."""
            made = _new(cls, values)
            if len(made) != len(cls._fields):
                raise TypeError(f"Expected {len(cls._fields)} arguments, got {len(made)}")
            return made

        def _replace(self, /, **fields):
            """The same with other values of these fields."""
            made = _new(type(self), map(fields.pop, self._fields, self))
            if fields:
                raise TypeError(f"Got unexpected field names: {[*fields]!r}")
            return made

        def _asdict(self):
            """The values by their fields' names."""
            return dict(zip(self._fields, self, strict=True))

        def __repr__(self):
            fields = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True))
            return f"{type(self).__name__}({fields})"

        def __getnewargs__(self):
            return tuple(self)

    class _Meta(type):
        """Turns a class body into a tuple with names."""

        def __new__(cls, name, _, body):
            fields = tuple(body.get("__annotations__", ()))
            defaults = {field: body[field] for field in fields if field in body}
            if tuple(defaults) != fields[len(fields) - len(defaults) :]:
                raise TypeError(f"{name}: a field without a default follows one that has one")
            body["__new__"] = _constructor(f"{name}.__new__", fields, tuple(defaults.values()) or None)
            for index, field in enumerate(fields):
                body[field] = _tuplegetter(index, None)
            body.update(__slots__=(), __match_args__=fields, _fields=fields, _field_defaults=defaults)
            return type(name, (_Value,), body)

    def _constructor(name, fields, defaults):
        if len(fields) < len(_TEMPLATES):
            code = _TEMPLATES[len(fields)].__code__.replace(
                co_varnames=("_cls", *fields), co_name="__new__", co_qualname=name
            )
            return _function(code, globals(), "__new__", defaults)
        names = ", ".join(fields)
        made = eval(f"lambda _cls, {names}: _new(_cls, ({names}))", globals())  # noqa: S307 - names of a class body
        made.__defaults__ = defaults
        made.__qualname__ = name
        return made

    NamedTuple = type.__new__(_Meta, "NamedTuple", (), {})
