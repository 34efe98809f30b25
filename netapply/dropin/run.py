"""One run: settings of istio-iptables become a plan, and the plan what stands in the namespace."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from contextlib import suppress
from functools import partial

from netapply.api import Capture
from netapply.backend import Backend, find_backend
from netapply.detection import IPTABLES, choose
from netapply.dropin.facts import BOTH_FAMILIES, read_facts, without_kernel
from netapply.dropin.leftovers import istio_leftovers
from netapply.errors import ConflictError, KernelError, NetapplyError
from netapply.importers.istio import VERSIONS, Facts, Version, plan_from_settings
from netapply.importers.istio_settings import IstioSettings
from netapply.ownership import Adopted, Adoption, ownership
from netapply.plan import CapturePlan
from netapply.results import Result
from netapply.ruleset import Routing
from netapply.values import NamedTuple

_FORCED = {"legacy": "iptables-legacy", "nft": "iptables-nft"}
_IPTABLES = ("iptables-nft", "iptables-legacy")
_LOCK = "XTABLES_LOCKFILE"


class Job(NamedTuple):
    """What was asked for. `backend` is a name or "auto"; `layout` one of Istio's versions, or "netapply"."""

    settings: IstioSettings
    layout: str = "istio"
    backend: str = "auto"

    @property
    def version(self) -> Version:
        """Whose decisions are meant: with layout netapply today's, arranged otherwise."""
        named: dict[str, Version] = {each: each for each in VERSIONS}
        return named.get(self.layout, "istio")

    @property
    def dialect(self) -> str:
        """The backend to ask for. "iptables" is the dialect of iptables that is in use in the namespace."""
        if self.backend != "auto":
            return self.backend
        if self.settings.native_nftables:
            return "nftables"
        return _FORCED.get(self.settings.force_iptables_binary, IPTABLES)


def plan_of(job: Job, facts: Facts, notes: list[str]) -> CapturePlan:
    """The plan; `notes` gets what Istio would warn of. Raises PlanError."""
    plan = plan_from_settings(job.settings, job.version, facts)
    if job.settings.redirect_dns and plan.dns.capture == "none":
        notes.append("DNS is not captured: /etc/resolv.conf names no server, and --capture-all-dns was not given")
    return plan


def apply(capture: Capture, job: Job, plan: CapturePlan, facts: Facts) -> Result:
    """Make the namespace hold the plan, and take over what Istio left there. Raises NetapplyError."""
    adopt = partial(istio_leftovers, job.settings, facts)
    do = partial(capture.apply, plan, backend=job.dialect, layout=job.layout, adopt=adopt)
    try:
        return do()
    except ConflictError as error:
        steps = _leave_one_dialect(capture, job, adopt, error.dialects)
        if not steps:
            if error.dialects:
                error.next_step = "netapply istio-clean-iptables removes them; then run this again"
            raise
    done = do()
    note = "rules stood in several dialects, as istio-iptables leaves them; they stand in one now"
    return done._replace(changed=True, steps=(*steps, *done.steps), notes=(*done.notes, note))


def _leave_one_dialect(capture: Capture, job: Job, adopt: Adoption, held: tuple[str, ...]) -> tuple[str, ...]:
    """Where rules stand in several dialects (`held`), clear all but the one to be used; what was done.

    Istio's choice of dialect leaves a trace that the next choice falls for, so two runs may leave rules in both.
    """
    kept = job.dialect if job.dialect in held else next((name for name in _IPTABLES if name in held), "")
    if len(held) < 2 or (job.dialect not in (kept, IPTABLES)):
        return ()
    rules_alone = partial(_without_routing, adopt)  # the dialect that is kept needs the routing
    others = [name for name in held if name != kept]
    return tuple(
        step for name in others for step in capture.clean(backend=name, layout="istio", adopt=rules_alone).steps
    )


def _without_routing(adopt: Adoption) -> Adopted:
    return adopt()._replace(routing=Routing())


def clean(capture: Capture, job: Job) -> Result:
    """Remove what any version of Istio or netapply left, in every dialect unless one was named."""
    return capture.clean(backend=job.backend, layout="istio", adopt=whatever_istio_left(capture, job.settings))


def whatever_istio_left(capture: Capture, settings: IstioSettings | None = None) -> Adoption:
    """Asked for what any version of Istio, with these settings or its own, left here."""
    meant = settings or IstioSettings()
    facts = without_kernel(meant)
    with suppress(NetapplyError):  # without resolv.conf, rules that name its servers are not recognised
        facts = read_facts(capture.namespace, meant._replace(redirect_dns=True, capture_all_dns=False))
    return partial(istio_leftovers, meant, facts._replace(addresses=BOTH_FAMILIES))


def backend_of(capture: Capture, job: Job) -> tuple[Backend, str]:
    """The backend that `apply` would take, and why. Where we may not look, that of a namespace without rules."""
    if job.dialect != IPTABLES:
        return find_backend(job.dialect), "asked for"
    try:
        backend, reason, _ = choose(capture.namespace, IPTABLES, ownership(job.layout))
    except KernelError as error:
        return find_backend("iptables-nft"), f"we may not look which is in use: {error}"
    return backend, reason


def choose_lock(settings: IstioSettings, env: MutableMapping[str, str]) -> None:
    """Name the xtables lock where the host's is not meant, or cannot be had: by `XTABLES_LOCKFILE`, as iptables does.

    Istio's CNI mode locks the pod's namespace instead of the node. A container whose root cannot be written has no
    /run/xtables.lock, and shares its tables with nobody outside.
    """
    if env.get(_LOCK):
        return
    if settings.cni_mode and os.path.isfile(settings.network_namespace):
        env[_LOCK] = settings.network_namespace
    elif not os.access("/run/xtables.lock", os.R_OK) and not os.access("/run", os.W_OK):
        env[_LOCK] = "/dev/shm/xtables.lock"  # noqa: S108 - opened without following links
