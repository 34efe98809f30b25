"""The operation `migrate`: ours brought to another dialect. `netapply.exchange` is how.

with Namespace.open("pod-1") as namespace:
    result = migrate(namespace, plan, "nftables")
"""

from __future__ import annotations

import time
from collections.abc import Callable

from netapply.backend import find_backend
from netapply.core import attempt, compiled, refuse_waiting
from netapply.detection import holding_ours, probe
from netapply.errors import ConflictError, UnsupportedError
from netapply.exchange import Exchange
from netapply.journal import NOWHERE, Entry, Journal
from netapply.namespace import Namespace
from netapply.ownership import NOTHING, PREFIXES, Adoption
from netapply.plan import CapturePlan
from netapply.results import Result
from netapply.ruleset import Routing
from netapply.session import also_used, owned_by, take


def migrate(
    namespace: Namespace,
    plan: CapturePlan,
    to: str,
    *,
    layout: str = "netapply",
    adopt: Adoption | None = None,
    journal: Journal | None = None,
    fingerprint: str = "",
    proof: Callable[[], None] | None = None,
    reason: str = "",
) -> Result:
    """Make the namespace hold `plan` in the dialect of backend `to`, and nothing of ours in another.

    Every flow is captured once all the while: see `netapply.exchange`. `proof` is called once while both dialects
    stand and once at the end, and raises NetapplyError where connections do not go where they should. With `adopt`,
    what another program left in any layout that we know of is left behind too. Where nothing of ours stands, or only
    in this dialect, it is an apply. Raises as `apply` does; after ApplyError the old dialect holds what it held.
    """
    begun = time.perf_counter()
    refuse_waiting(plan)
    coming = find_backend(to)
    with take(namespace, journal or Journal(), "migrate", reason) as session:
        adopted = adopt() if adopt is not None else NOTHING
        found = probe(namespace, coming)
        if found.status != "usable":
            raise UnsupportedError(f"{to} is {found.status} here: {found.reason}", next_step="netapply detect")
        desired, effective, degraded = compiled(namespace, plan, coming, found.missing, layout)
        owned = owned_by(session.entry, layout, desired.ruleset, adopted)
        if adopt is not None:
            owned = owned._replace(prefixes=PREFIXES)
        held, unseen = holding_ours(namespace, owned, (*also_used(session.entry), to))
        if len(set(held)) > 1:
            raise ConflictError(
                f"rules of ours stand in {len(held)} dialects at once: {', '.join(held)}",
                dialects=held,
                next_step="`netapply clean --backend NAME` removes them from one; then migrate",
            )
        if not held or held[0] == to:
            done = attempt(
                namespace,
                session,
                plan,
                layout,
                fingerprint,
                adopted,
                coming,
                found.missing,
                count_flows=False,
                cancelled=lambda: False,
                proof=proof,
            )
            why = "holds our rules already" if held else "nothing of ours was here yet"
        else:
            known = session.entry.created if session.entry else Routing()
            entry = Entry(True, to, NOWHERE, desired, known, layout, fingerprint)
            outcome = Exchange(namespace, find_backend(held[0]), coming, owned, session.files).run(
                entry, adopted.routing, proof
            )
            why = f"from {held[0]}"
            done = Result(True, to, why, outcome.steps, session.degraded + degraded, session.notes, ipv6=effective.ipv6)
        done = session.told(done, layout, fingerprint)
    return done._replace(reason=why, degraded=unseen + done.degraded, duration=time.perf_counter() - begun)
