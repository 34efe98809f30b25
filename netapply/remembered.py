"""What a pure function gave for the last few objects that it was asked about, known by their identity.

A node agent puts few plans into many namespaces: the rule set of one, its bytes and its JSON are made once, and known
again by the object alone, as comparing two costs more than most of what is remembered.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def remembered(limit: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator for a pure function of immutable objects, given by position: its last `limit` results are kept.

    So are the arguments, so that no other object gets the identity of one. May be called from any thread.
    """

    def decorate(work: Callable[P, R]) -> Callable[P, R]:
        known: dict[tuple[int, ...], tuple[object, R]] = {}
        writing = threading.Lock()

        @wraps(work)
        def again(*arguments: P.args, **options: P.kwargs) -> R:
            if options:  # not told apart below
                return work(*arguments, **options)
            key = tuple(map(id, arguments))
            found = known.get(key)
            if found is not None:
                return found[1]
            result = work(*arguments, **options)
            with writing:
                if len(known) >= limit:
                    del known[next(iter(known))]  # the oldest
                known[key] = arguments, result
            return result

        return again

    return decorate
