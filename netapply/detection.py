"""Which backend: looked at without side effects, each candidate with its reason, and sticky once chosen."""

from __future__ import annotations

import errno
from collections.abc import Mapping

from netapply.backend import BUILT_IN, OURS, Backend, Owned, Probe, find_backend
from netapply.errors import ConflictError, KernelError, NetapplyError, UnsupportedError
from netapply.kernel import Kernel
from netapply.plan import CapturePlan
from netapply.results import Candidate, Detection
from netapply.values import NamedTuple

#: As the name of a backend: the dialect of iptables that is in use in the namespace.
IPTABLES = "iptables"

#: In this order when nothing of ours is there: native needs no xt module, no lock and nobody else's table.
PREFERENCE = tuple(BUILT_IN)

#: What kernels answer to a dialect, table, chain type, expression or extension that they do not have.
UNSUPPORTED = frozenset(
    (errno.ENOENT, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.ENOPROTOOPT, errno.EINVAL)
)

_NOTHING: Mapping[str, str] = {}

#: What a kernel can do does not change while it runs; whether we may, does. So only good news is kept.
_usable: dict[str, Probe] = {}


def probe(kernel: Kernel, backend: Backend) -> Probe:
    """The backend's own probe; remembered where it is usable."""
    return _usable.get(backend.name) or _probe_anew(kernel, backend)


def _probe_anew(kernel: Kernel, backend: Backend) -> Probe:
    """Whether the dialect is in use, too, is another matter in each namespace."""
    found = backend.probe(kernel)
    if found.status == "usable" and not found.missing:  # a missing module may be loaded any time
        _usable[backend.name] = found
    return found


def detect(kernel: Kernel, owned: Owned = OURS) -> Detection:
    """Every built-in backend's state in this namespace, and the one that `auto` takes. Changes nothing."""
    candidates: list[Candidate] = []
    for name in PREFERENCE:
        backend = find_backend(name)
        found = backend.probe(kernel)
        missing = tuple(sorted(found.missing.items()))
        ours = found.status == "usable" and backend.detect(kernel, owned)
        candidates.append(Candidate(name, found.status, found.reason, ours, found.in_use, missing))
    try:
        backend, reason, _ = choose(kernel, "auto", owned)
        if not any(each.ours for each in candidates):
            backend, reason = next_usable(kernel)
    except NetapplyError as error:
        return Detection("", str(error), tuple(candidates))
    return Detection(backend.name, reason, tuple(candidates))


class Held(NamedTuple):
    """The backends in whose dialect something of ours stands, and a line for each where we could not look."""

    names: tuple[str, ...]
    unseen: tuple[str, ...]


def holding_ours(kernel: Kernel, owned: Owned = OURS, also: tuple[str, ...] = ()) -> Held:
    """Look in the dialects of all backends, built in or named by `also`.

    Raises KernelError where we may look in none or not in one of `also`, or a look failed: a dialect that was not seen
    is not an empty one.
    """
    names: list[str] = []
    unseen: dict[str, KernelError] = {}
    every = tuple(dict.fromkeys((*PREFERENCE, *also)))
    for name in every:
        try:
            if find_backend(name).detect(kernel, owned):
                names.append(name)
        except KernelError as error:
            if error.errno in (errno.EPERM, errno.EACCES):
                unseen[name] = error
            elif error.errno not in UNSUPPORTED:  # those hold nothing in that dialect
                raise
    if len(unseen) == len(every) or not unseen.keys().isdisjoint(also):
        denied = unseen[next((name for name in also if name in unseen), every[0])]
        denied.next_step = denied.next_step or "run as root, or with CAP_NET_ADMIN in the namespace"
        raise denied
    return Held(
        tuple(names), tuple(f"{name}: we may not look for rules of ours there ({unseen[name]})" for name in unseen)
    )


def choose(
    kernel: Kernel, wanted: str, owned: Owned = OURS, also: tuple[str, ...] = ()
) -> tuple[Backend, str, tuple[str, ...]]:
    """The backend to use, why, and where we could not look for ours.

    Raises ConflictError when ours stands in another dialect, or in two.
    """
    named = () if wanted in ("auto", IPTABLES, *PREFERENCE, *also) else (find_backend(wanted).name,)
    held = holding_ours(kernel, owned, also + named)
    if wanted == IPTABLES and not held.names:
        return (*_iptables_in_use(kernel), held.unseen)
    return (*pick(held.names, "auto" if wanted == IPTABLES else wanted), held.unseen)


def _iptables_in_use(kernel: Kernel) -> tuple[Backend, str]:
    """The dialect of iptables that somebody uses here. Unlike iptables-wrappers and Istio, looking leaves no trace."""
    legacy, nft = (find_backend(name) for name in ("iptables-legacy", "iptables-nft"))
    if not _probe_anew(kernel, nft).in_use and _probe_anew(kernel, legacy).in_use:
        return legacy, "iptables-legacy alone holds rules here"
    return nft, "no rules here are of iptables-legacy alone"


def pick(held: tuple[str, ...], wanted: str) -> tuple[Backend, str]:
    """The backend to use and why, where `held` are those that hold ours already. Pure. Raises ConflictError.

    Where nothing of ours is there, "auto" takes native nftables without asking the kernel for every feature: that
    would cost an RCU grace period, several times what the apply does. `next_usable` is for when it fails.
    """
    if len(held) > 1:
        raise ConflictError(
            f"rules of ours stand in {len(held)} dialects at once: {', '.join(held)}",
            dialects=held,
            next_step="`netapply clean` removes them from all; then apply",
        )
    if wanted != "auto":
        if held and held[0] != wanted:
            raise ConflictError(
                f"rules of ours already stand in {held[0]}, and {wanted} was asked for",
                dialects=held,
                next_step=f"`netapply clean` first, or apply with --backend {held[0]}",
            )
        return find_backend(wanted), "asked for"
    if held:
        return find_backend(held[0]), "holds our rules in this namespace already"
    return find_backend(PREFERENCE[0]), "nothing of ours is here yet, and it needs no table of anybody else's"


def next_usable(kernel: Kernel) -> tuple[Backend, str]:
    """The first backend whose probe says that it works, with why those before it do not. Raises UnsupportedError."""
    said: list[str] = []
    for name in PREFERENCE:
        backend = find_backend(name)
        found = probe(kernel, backend)
        if found.status == "usable":
            return backend, "; ".join((*said, found.reason))
        said.append(f"{name} is {found.status}: {found.reason}")
    raise UnsupportedError("no backend works here; " + "; ".join(said), next_step="netapply detect")


def lacking(kernel: Kernel, backend: Backend, plan: CapturePlan) -> Mapping[str, str]:
    """What the kernel lacks of what the backend can do: asked where it is cheap, or where the plan leaves a choice."""
    if not plan.prefer and backend.dialect.families == "inet":
        return _NOTHING
    found = probe(kernel, backend)
    if found.status != "usable":
        raise UnsupportedError(f"{backend.name} is {found.status} here: {found.reason}", next_step="netapply detect")
    return found.missing
