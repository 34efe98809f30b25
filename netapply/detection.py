"""Which backend: looked at without side effects, each candidate with its reason, and sticky once chosen."""

from __future__ import annotations

from netapply.backend import BUILT_IN, OURS, Backend, Owned, Probe, find_backend
from netapply.errors import ConflictError, NetapplyError, UnsupportedError
from netapply.kernel import Kernel
from netapply.results import Candidate, Detection

#: In this order when nothing of ours is there: native needs no xt module, no lock and nobody else's table.
PREFERENCE = tuple(BUILT_IN)

#: What a kernel can do does not change while it runs; whether we may, does. So only good news is kept.
_usable: dict[str, Probe] = {}


def probe(kernel: Kernel, backend: Backend) -> Probe:
    """The backend's own probe; remembered where it is usable."""
    known = _usable.get(backend.name)
    if known is not None:
        return known
    found = backend.probe(kernel)
    if found.status == "usable":
        _usable[backend.name] = found
    return found


def detect(kernel: Kernel, owned: Owned = OURS) -> Detection:
    """Every built-in backend's state in this namespace, and the one that `auto` takes. Changes nothing."""
    candidates = []
    for name in PREFERENCE:
        backend = find_backend(name)
        found = backend.probe(kernel)
        missing = tuple(sorted(found.missing.items()))
        ours = backend.detect(kernel, owned)
        candidates.append(Candidate(name, found.status, found.reason, ours, found.in_use, missing))
    try:
        backend, reason = choose(kernel, "auto", owned)
    except NetapplyError as error:
        return Detection("", str(error), tuple(candidates))
    return Detection(backend.name, reason, tuple(candidates))


def holding_ours(kernel: Kernel, owned: Owned = OURS) -> tuple[str, ...]:
    """The built-in backends in whose dialect something of ours stands."""
    return tuple(name for name in PREFERENCE if find_backend(name).detect(kernel, owned))


def choose(kernel: Kernel, wanted: str, owned: Owned = OURS) -> tuple[Backend, str]:
    """The backend to use and why. Raises ConflictError when ours stands in another dialect, or in two."""
    held = holding_ours(kernel, owned)
    if len(held) > 1:
        raise ConflictError(
            f"rules of ours stand in {len(held)} dialects at once: {', '.join(held)}",
            next_step="`netapply clean` removes them from all; then apply",
        )
    if wanted != "auto":
        if held and held[0] != wanted:
            raise ConflictError(
                f"rules of ours already stand in {held[0]}, and {wanted} was asked for",
                next_step=f"`netapply clean` first, or apply with --backend {held[0]}",
            )
        return find_backend(wanted), "asked for"
    if held:
        return find_backend(held[0]), "holds our rules in this namespace already"
    said = []
    for name in PREFERENCE:
        backend = find_backend(name)
        found = probe(kernel, backend)
        if found.status == "usable":
            return backend, f"nothing of ours is here yet, and {found.reason}"
        said.append(f"{name}: {found.status}, {found.reason}")
    raise UnsupportedError("no backend works here; " + "; ".join(said), next_step="netapply detect")
