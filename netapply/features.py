"""What a plan needs of a kernel beyond the ordinary, and the plan without what it only prefers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from netapply.errors import UnsupportedError
from netapply.plan import CapturePlan, Owners, in_each_family, plan_of
from netapply.ruleset import FAMILIES


def needs(plan: CapturePlan) -> tuple[str, ...]:
    """The features, in plan words, that this plan cannot do without (or only by degrading)."""
    each = [plan_of(plan, family) for family in FAMILIES]
    found = {
        "ip6": plan.ipv6 != "skip",
        "tproxy": any(of.inbound.mode == "tproxy" for of in each),
        "dns.zones": any(of.dns.capture != "none" and of.dns.zones and not of.dns.addresses for of in each),
        "invalid": plan.invalid != "keep",
        "log": plan.log is not None,
        "comments": plan.comments,
        "cgroups": any(owners.cgroups for owners in _owners(plan)),
    }
    return tuple(name for name, wanted in found.items() if wanted)


def degrade(plan: CapturePlan, backend: str, missing: Mapping[str, str]) -> tuple[CapturePlan, tuple[str, ...]]:
    """The plan without the features that this kernel lacks and that it merely prefers, and a line for each.

    Raises UnsupportedError, naming all of them, where it lacks one that is required.
    """
    absent = [cgroup.path for owners in _owners(plan) for cgroup in owners.cgroups if not cgroup.id]
    if absent:
        missing = {**missing, "cgroups": f"there is no cgroup {absent[0]}"}
    lacking = [name for name in needs(plan) if name in missing]
    required = [name for name in lacking if name not in plan.prefer]
    if required:
        said = "; ".join(f"{name} ({missing[name]})" for name in required)
        remedies = "; ".join(_REMEDY.get(name, f"prefer: [{name}] does without") for name in required)
        raise UnsupportedError(
            f"{backend} on this kernel lacks what the plan needs: {said}",
            next_step=f"add it, or plan without: {remedies}",
        )
    for name in lacking:
        plan = in_each_family(plan, _WITHOUT[name])
    return plan, tuple(f"{name}: {_CONSEQUENCE[name]} ({missing[name]})" for name in lacking)


_WITHOUT: Mapping[str, Callable[[CapturePlan], CapturePlan]] = {
    "dns.zones": lambda plan: plan._replace(dns=plan.dns._replace(zones=False)),
    "invalid": lambda plan: plan._replace(invalid="keep"),
    "log": lambda plan: plan._replace(log=None),
    "comments": lambda plan: plan._replace(comments=False),
    "cgroups": lambda plan: _without_cgroups(plan),  # noqa: PLW0108 - the function stands below
}
#: How to plan without what cannot be preferred.
_REMEDY = {
    "ip6": "ipv6: skip leaves IPv6 alone",
    "tproxy": "inbound.mode: redirect needs no TPROXY",
    "cgroups alone": "name uids or gids beside the cgroups",
}
_CONSEQUENCE = {
    "dns.zones": "a client's query and the proxy's own share a conntrack zone",
    "invalid": "packets that conntrack finds invalid are kept",
    "log": "captured flows are not logged",
    "comments": "rules carry no comments",
    "cgroups": "owners are told by uid and gid alone",
}


def _owners(whole: CapturePlan) -> Iterator[Owners]:
    for family in FAMILIES:
        yield from _owners_of(plan_of(whole, family))


def _owners_of(plan: CapturePlan) -> Iterator[Owners]:
    include = plan.outbound.owners.include
    if not isinstance(include, str):
        yield include
    yield plan.outbound.owners.exclude
    yield from (exception.owners for exception in plan.outbound.exclude_for_owners)
    if not isinstance(plan.proxy.self_calls, str):
        yield plan.proxy.self_calls


def _without_cgroups(plan: CapturePlan) -> CapturePlan:
    outbound, owners = plan.outbound, plan.outbound.owners
    include = owners.include if isinstance(owners.include, str) else owners.include._replace(cgroups=())
    if include == Owners():
        # Whom to capture is told by cgroups alone: without them it would be nobody, and nobody would notice.
        raise UnsupportedError(
            "cgroups cannot be told here, and outbound.owners.include names nothing else: nothing would be captured",
            next_step=_REMEDY["cgroups alone"],
        )
    calls = plan.proxy.self_calls
    if not isinstance(calls, str):
        calls = calls._replace(cgroups=())
    exceptions = (each._replace(owners=each.owners._replace(cgroups=())) for each in outbound.exclude_for_owners)
    return plan._replace(
        proxy=plan.proxy._replace(self_calls="none" if calls == Owners() else calls),
        outbound=outbound._replace(
            owners=owners._replace(include=include, exclude=owners.exclude._replace(cgroups=())),
            exclude_for_owners=tuple(each for each in exceptions if each.owners != Owners()),
        ),
    )
