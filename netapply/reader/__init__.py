"""The independent reader: libnftables, in this process, through the binding `nftables`.

It shows everybody's rules, and `verify --deep` holds what it reads of ours against what our own decoder reads. Both
are imported and loaded by the functions here alone; where they are missing, nothing else suffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from difflib import SequenceMatcher

from netapply.backend import OURS, Backend, Owned, find_backend
from netapply.errors import UnsupportedError
from netapply.kernel import Kernel
from netapply.reader.library import Blocks, list_commands
from netapply.reader.native import compare_text
from netapply.reader.xtables import compare_rules
from netapply.results import Change


def list_ruleset(namespace: Kernel, *, as_json: bool) -> str:
    """Everybody's rules, as `nft list ruleset` prints them, or `nft -j list ruleset`.

    Raises UnsupportedError where the binding or the library cannot be used, NetapplyError where it fails.
    """
    return list_commands(namespace, "list ruleset", as_json=as_json)[0]


def deep_changes(namespace: Kernel, backend_name: str, owned: Owned = OURS) -> tuple[Change, ...]:
    """Where libnftables reads something else of ours than we do; () where both agree.

    "add" is what our decoder reads and libnftables does not, "remove" what only libnftables reads. Raises
    UnsupportedError where it cannot be used, or cannot see that dialect; ConflictError where the rules keep changing.
    """
    compare = _COMPARED.get(backend_name)
    if compare is None:
        raise UnsupportedError(
            f"libnftables cannot see the rules of {backend_name}",
            next_step="verify without --deep; iptables-legacy-save is a reader of iptables-legacy that is not ours",
        )
    return tuple(_changes(*compare(find_backend(backend_name), namespace, owned)))


def _changes(ours: Blocks, theirs: Blocks) -> Iterator[Change]:
    for where in {**ours, **theirs}:
        old, new = theirs.get(where, ()), ours.get(where, ())
        if list(old) == list(new):
            continue
        for operation, a, b, c, d in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            if operation != "equal":
                yield from (Change("remove", f"libnftables: {where}", line) for line in old[a:b])
                yield from (Change("add", f"libnftables: {where}", line) for line in new[c:d])


_COMPARED: Mapping[str, Callable[[Backend, Kernel, Owned], tuple[Blocks, Blocks]]] = {
    "nftables": compare_text,
    "iptables-nft": compare_rules,
}
