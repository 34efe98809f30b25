"""Which rules of a built-in chain are ours: those that bear our tag, and those of ours that have lost it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")


def claim(
    rules: Sequence[T], tagged: Sequence[bool], key: Callable[[T], Hashable], lost: Iterable[Hashable]
) -> list[bool]:
    """For each rule of a built-in chain whether it is ours.

    `tagged` are ours for certain. `lost` are keys of ours that may stand there without a tag: each is claimed as often
    as it is named, tagged ones counted, from the end of the chain, where a layout appends.
    """
    mine = list(tagged)
    wanted = Counter(lost)
    if not wanted:
        return mine
    wanted.subtract(key(rule) for rule, is_mine in zip(rules, tagged, strict=True) if is_mine)
    for place in reversed(range(len(rules))):
        if not mine[place] and wanted[found := key(rules[place])] > 0:
            wanted[found] -= 1
            mine[place] = True
    return mine
