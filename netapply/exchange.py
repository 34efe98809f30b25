"""From one dialect to another, so that each flow is captured once at every moment.

First the old rule set stands alone, then both, then the new one alone. That neither misses a flow nor takes it twice:

- NAT is decided once for a connection: the kernel's hook for NAT (net/netfilter/nf_nat_core.c: nf_nat_inet_fn) asks the
  nat chains of all dialects by priority, and asks no more once one has said where to. Whichever is first says what the
  other would have said; where the two would say otherwise, as their plans differ, the old or the new answer holds.
- TPROXY, the marks, zones, returns and drops do the same if they are done twice. A zone that is set stays.
- What is left is that one dialect sees a packet that the other has marked. Where inbound is TPROXY, the mark says "from
  the proxy, in the client's name" when it comes in by `lo`, and is then saved for the connection. So while both stand
  only what comes in by `lo` has its mark saved (`beside`): whatever else is marked was marked by the other.

Routing serves both, and what only the old one needs goes last. Undoing is the same the other way round.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeAlias

from netapply import routing
from netapply.backend import Backend, Owned, find_backend, readable
from netapply.compiler.terms import rule
from netapply.errors import ApplyError, JournalError
from netapply.journal import Entry, Files, State
from netapply.namespace import Namespace
from netapply.ownership import PREFIXES, ownership
from netapply.ruleset import Chain, IfaceMatch, Routing, Rule, Ruleset, Sysctl
from netapply.transaction import Outcome, Transaction

FROM_LO = IfaceMatch("in", "lo")
#: Is asked whether connections go where they should, and raises NetapplyError where they do not.
Proof: TypeAlias = Callable[[], None] | None


def beside(ruleset: Ruleset | None) -> Ruleset | None:
    """The rule set that means the same with another dialect's at its side. Pure."""
    if ruleset is None:
        return None
    tables = (table._replace(chains=tuple(map(_beside, table.chains))) for table in ruleset.tables)
    return ruleset._replace(tables=tuple(tables))


def _beside(chain: Chain) -> Chain:
    return chain._replace(head=tuple(map(_saving, chain.head)), rules=tuple(map(_saving, chain.rules)))


def _saving(each: Rule) -> Rule:
    """Saves marks in hook prerouting only; rules there may ask where a packet came in."""
    saves = each.statement.kind in ("set-connmark", "save-mark")
    if not saves or any(match.kind == "iface" for match in each.matches):
        return each
    return each._replace(matches=rule(each.path, each.statement, FROM_LO, *each.matches).matches)


class Exchange:
    """One way from one dialect to another, in one namespace."""

    def __init__(
        self, namespace: Namespace, leaving: Backend, coming: Backend, owned: Owned, files: Files | None
    ) -> None:
        self._namespace = namespace
        self._leaving = leaving
        self._coming = coming
        self._owned = owned
        self._files = files
        self._step = "read what is there"

    def run(self, entry: Entry, adopted: Routing, proof: Proof) -> Outcome:
        """Go all the way to `entry.desired`, or raise ApplyError after going back."""
        ruleset = readable(self._leaving.read(self._namespace, self._owned).ruleset)
        standing = routing.read(self._namespace, entry.desired.routing, entry.created, adopted)
        wanted = routing.plan(standing, entry.desired.routing)
        created = routing.remember(standing.ours, [step for step in wanted if step.add])
        before = State(ruleset, standing.held)
        begun = entry._replace(pending=True, before=before, created=created, leaving=self._leaving.name)
        former = self._files.former if self._files is not None else None
        self._namespace.verify_identity()
        if self._files is not None:
            self._files.begin(begun)
        done: list[str] = []
        try:
            known = self._exchange(
                self._leaving, before, self._coming, entry.desired, standing.ours, adopted, proof, done
            )
            self._step = "prove that connections are captured"
            if proof is not None:
                proof()
            self._step = "commit the journal"
            if self._files is not None:
                self._files.settle(begun._replace(created=known, leaving=""))
        except BaseException as error:  # also an interrupt is undone
            self._undo(begun, former, adopted, error)
            raise
        return Outcome(tuple(done), known, ruleset)

    def _exchange(
        self,
        old: Backend,
        from_state: State,
        new: Backend,
        to: State,
        known: Routing,
        adopted: Routing,
        proof: Proof,
        done: list[str],
    ) -> Routing:
        """Have `new` hold `to` and `old` nothing; returns the routing that is ours then."""
        both = _union(from_state.routing, to.routing)
        stages: tuple[tuple[Backend, State], ...] = (
            (old, State(beside(from_state.ruleset), both)),
            (new, State(beside(to.ruleset), both)),
            (old, State(None, both)),
            (new, to),
        )
        for number, (backend, state) in enumerate(stages):
            if number == 0 and state.ruleset == from_state.ruleset:
                continue
            self._step = f"bring {backend.name} to stage {number + 1} of {len(stages)}"
            transaction = Transaction(self._namespace, backend, self._owned, None, adopted=adopted)
            known = transaction.bring(state, known)
            done += [f"{backend.name}: {step}" for step in transaction.done]
            if number == 1 and proof is not None:
                self._step = "prove that connections are captured while both stand"
                proof()
        return known

    def _undo(self, begun: Entry, former: Entry | None, adopted: Routing, error: BaseException) -> None:
        failed = self._step
        try:
            with suppress(JournalError):
                if self._files is not None:
                    self._files.reopen(begun)
            self._back(begun, adopted)
            # A journal that cannot be written still says "pending", and the next command finds nothing left to undo.
            with suppress(JournalError):
                if self._files is not None:
                    self._files.go_back(former)
        except BaseException as second:  # noqa: BLE001 - whatever it is, both causes are raised
            raise ApplyError(failed, error, restored=False, rollback=second) from error
        if isinstance(error, Exception):
            raise ApplyError(failed, error, restored=True) from error

    def _back(self, begun: Entry, adopted: Routing) -> Routing:
        self._namespace.forget()
        known = begun.created
        desired, before = begun.desired, begun.before
        # From wherever it is: the old stands whole before anything of the new goes.
        old = Transaction(self._namespace, self._leaving, self._owned, None, adopted=adopted)
        both = _union(before.routing, desired.routing)
        known = old.bring(State(beside(before.ruleset), both), known)
        return self._exchange(
            self._coming, State(None, desired.routing), self._leaving, before, known, adopted, None, []
        )

    def restore(self, entry: Entry) -> str:
        """Finish or undo an interrupted run, and say which. Raises NetapplyError if neither held."""
        self._namespace.forget()
        coming = Transaction(self._namespace, self._coming, self._owned, None)
        gone = self._leaving.read(self._namespace, self._owned).ruleset is None
        if gone and coming.holds(entry.desired, entry.created):
            standing = routing.read(self._namespace, entry.desired.routing, entry.created)
            if self._files is not None:
                self._files.settle(entry._replace(created=standing.ours, leaving=""))
            return "found finished"
        self._back(entry, entry.before.routing)
        if self._files is not None:
            self._files.discard()
        return f"undone (back to {self._leaving.name})"


def restore(namespace: Namespace, entry: Entry, files: Files) -> str:
    """`Exchange.restore` of what the journal says."""
    owned = ownership("netapply", (entry.before.ruleset, entry.desired.ruleset))._replace(prefixes=PREFIXES)
    return Exchange(namespace, find_backend(entry.leaving), find_backend(entry.backend), owned, files).restore(entry)


def _union(first: Routing, second: Routing) -> Routing:
    settings = {**dict(first.sysctls), **dict(second.sysctls)}
    return Routing(
        tuple(dict.fromkeys((*first.rules, *second.rules))),
        tuple(dict.fromkeys((*first.routes, *second.routes))),
        tuple(dict.fromkeys((*first.addresses, *second.addresses))),
        tuple(Sysctl(name, value) for name, value in settings.items()),
    )
