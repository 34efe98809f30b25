"""All or nothing: journal, routing, rules, read back; and on any failure back to what was, by the same way.

`_converge` brings a namespace to a state, whatever it is in: new routing first, then the rules (raw, mangle, nat), and
what is no longer wanted of routing last, so that capture is on only while all of it stands. Roll-back and recovery are
the same function with another state.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from netapply import routing
from netapply.backend import Backend, Owned, Snapshot, readable
from netapply.errors import ApplyError, CancelledError, ConflictError, GenerationChanged, JournalError, NetapplyError
from netapply.journal import Entry, Files, State
from netapply.namespace import Namespace
from netapply.ruleset import Routing, Ruleset
from netapply.values import NamedTuple

#: How often the rules are read and encoded anew when somebody else changes them in between.
ATTEMPTS = 12
#: Seconds before the second attempt; each later one waits twice as long, up to a quarter of a second.
FIRST_PAUSE = 0.001


class Outcome(NamedTuple):
    """The steps that were done, by name, the routing that is ours now, and the rules that were ours before."""

    steps: tuple[str, ...]
    created: Routing
    before: Ruleset | None


class Start(NamedTuple):
    """What was there when a run began: as it was read, and in the journal."""

    snapshot: Snapshot
    standing: routing.Standing
    #: With the state to come back to.
    begun: Entry
    former: Entry | None
    #: A run before this one could be neither finished nor undone: what the journal said is of that.
    unresolved: bool


class Transaction:
    """One change of one namespace by one backend."""

    def __init__(
        self,
        namespace: Namespace,
        backend: Backend,
        owned: Owned,
        files: Files | None,
        cancelled: Callable[[], bool] = lambda: False,
        adopted: Routing = routing.NOTHING,
        proof: Callable[[], None] | None = None,
    ) -> None:
        self._namespace = namespace
        self._backend = backend
        self._owned = owned
        self._files = files
        self._adopted = adopted
        #: Whether it is known that nothing of ours stands beside the rules.
        self._rules_alone = False
        #: Asked before each step of the way forward; the way back is never cancelled.
        self._cancelled = cancelled
        #: Asked when all stands, before it counts: raises where connections do not go where they should.
        self._proof = proof
        self._step = "read what is there"
        self._done: list[str] = []

    def run(self, entry: Entry, previous: Entry | None = None, *, settle: bool = True) -> Outcome:
        """Bring the namespace to `entry.desired`. No step, and no journal, when it is there already.

        `entry.created` is the routing known as ours from before; `previous` is what the journal says now: where that
        knows of no routing of ours, none is looked for. Without `settle` the caller has the journal say what stands.
        Raises ApplyError after a roll-back.
        """
        snapshot = self._backend.read(self._namespace, self._owned)
        self._rules_alone = previous is not None and previous.created == self._adopted == routing.NOTHING
        standing = self._standing(entry.desired.routing, entry.created)
        wanted = routing.plan(standing, entry.desired.routing)
        steps = self._backend.encode(snapshot, entry.desired.ruleset)
        if not wanted and not steps:
            return Outcome((), standing.ours, entry.desired.ruleset)
        before = State(readable(snapshot.ruleset), standing.held)
        known = routing.remember(standing.ours, [step for step in wanted if step.add])
        self._namespace.verify_identity()
        begun = entry._replace(pending=True, before=before, created=known)
        start = Start(snapshot, standing, begun, None, unresolved=False)
        if self._files is not None:
            start = start._replace(former=self._files.former, unresolved=self._files.may_be_pending)
            self._files.begin(begun)
        try:
            created = self._converge(entry.desired, entry.created, (snapshot, standing))
            self._prove(entry.desired, known)
            if self._proof is not None:
                self._step = "prove that connections are captured"
                self._proof()
            self._step = "commit the journal"
            if self._cancelled():  # the last moment at which going back is not a second change
                raise CancelledError("cancelled")
            if settle:
                self._settle(begun._replace(created=created))
        except BaseException as error:  # also an interrupt is undone
            self._undo(start, error)
            raise
        return Outcome(tuple(self._done), created, before.ruleset)

    @property
    def done(self) -> tuple[str, ...]:
        """What was done, by name."""
        return tuple(self._done)

    def bring(self, state: State, record: Routing) -> Routing:
        """Bring the namespace to `state`, read it back, and return the routing that is ours then.

        A part of something larger: without a journal, and the caller undoes it.
        """
        created = self._converge(state, record)
        self._prove(state, record)
        return created

    def holds(self, state: State, record: Routing) -> bool:
        """Whether `state` stands."""
        return not self._differs(state, record)

    def restore(self, entry: Entry) -> str:
        """Finish or undo an interrupted run, and say which. Raises NetapplyError if neither held."""
        self._namespace.forget()  # what is remembered is of before the run
        if not self._differs(entry.desired, entry.created):
            created = self._standing(entry.desired.routing, entry.created).ours
            self._settle(entry._replace(created=created))
            return "found finished"
        created = self._converge(entry.before, entry.created)
        self._prove(entry.before, entry.created)
        if self._files is not None:
            self._files.discard()
        return f"undone ({'; '.join(self._done)})" if self._done else "found to have changed nothing"

    def _undo(self, start: Start, error: BaseException) -> None:
        """Back to what was. Raises ApplyError, saying whether that held; returns after an interrupt, if it did."""
        failed, self._done, self._cancelled = self._step, [], lambda: False
        try:
            created, before = start.standing.ours, start.begun.before
            with suppress(JournalError):
                if self._files is not None:
                    self._files.reopen(start.begun)
            if not self._is_as_at(start):
                created = self._converge(before, start.begun.created)
                self._prove(before, start.begun.created)
            # A journal that cannot be written still says "pending", and the next command finds nothing left to undo.
            with suppress(JournalError):
                if start.unresolved:
                    self._settle(start.begun._replace(desired=before, created=created, fingerprint=""))
                elif self._files is not None:
                    self._files.go_back(start.former)
        except BaseException as second:  # noqa: BLE001 - whatever it is, both causes are raised
            raise ApplyError(failed, error, restored=False, rollback=second) from error
        if not isinstance(error, Exception):
            return
        raise ApplyError(failed, error, restored=True) from error

    def _is_as_at(self, start: Start) -> bool:
        """Whether nothing has happened yet: then what is strange among ours can stay, too."""
        there = self._backend.read(self._namespace, self._owned)
        before = start.begun.before.routing
        standing = self._standing(before, start.begun.created)
        same = there.ruleset == start.snapshot.ruleset and standing.ours == start.standing.ours
        return same and not any(step.add for step in routing.plan(standing, before))

    def _converge(
        self, state: State, record: Routing, read: tuple[Snapshot, routing.Standing] | None = None
    ) -> Routing:
        """Bring the namespace to `state` from wherever it is; returns the routing that is ours then.

        `read` is what was just read, where somebody did.
        """
        snapshot, standing = read or (None, self._standing(state.routing, record))
        steps = routing.plan(standing, state.routing)
        done = [step for step in steps if step.add and self._route(step)]
        self._rules(state, snapshot)
        done += [step for step in steps if not step.add and self._route(step)]
        return routing.remember(standing.ours, done)

    def _standing(self, wanted: Routing, record: Routing) -> routing.Standing:
        none = wanted == record == routing.NOTHING
        if none and self._rules_alone:
            return routing.Standing()
        standing = routing.read(self._namespace, wanted, record, self._adopted)
        self._rules_alone = none and standing == routing.Standing()
        return standing

    def _route(self, step: routing.RoutingStep) -> bool:
        return bool(self._do(step.name, partial(routing.commit, self._namespace, step)))

    def _rules(self, state: State, snapshot: Snapshot | None) -> None:
        """Commit the backend's steps; when somebody else was faster, look again and go on from there."""
        pause = FIRST_PAUSE
        for attempt in range(ATTEMPTS):
            if snapshot is None:
                self._step = "read the rules"
                snapshot = self._backend.read(self._namespace, self._owned)
            self._step = "encode the rules"
            steps = self._backend.encode(snapshot, state.ruleset)
            try:
                for step in steps:
                    self._do(step.name, partial(self._backend.commit, self._namespace, step))
            except GenerationChanged:
                snapshot = None
                time.sleep(pause if attempt else 0)
                pause = min(2 * pause, 0.25)
            else:
                return
        raise ConflictError(
            f"somebody else changed the same tables {ATTEMPTS} times in a row while ours were being committed",
            next_step="find out who: `nft monitor` names the process; then apply again",
        )

    def _do(self, name: str, work: Callable[[], bool | None]) -> bool | None:
        self._step = name
        if self._cancelled():
            raise CancelledError("cancelled")
        result = work()
        if result is not False:
            self._done.append(name)
        return result

    def _prove(self, state: State, record: Routing) -> None:
        """Read back and compare. Somebody who changes ours at this very moment is put right, a few times.

        `record` has what was ours before, too, so that what should be gone is looked for.
        """
        wrong = ""
        for _ in range(ATTEMPTS):
            self._step = "read back"
            wrong = self._differs(state, record)
            if not wrong:
                return
            self._rules(state, None)
        raise NetapplyError(
            f"the kernel does not hold what it acknowledged; still to do: {wrong}",
            next_step="look for a program that rewrites these rules (`nft monitor`), or report this",
        )

    def _differs(self, state: State, record: Routing) -> str:
        """The first step from what is there to `state`; "" when it is there."""
        steps = self._backend.encode(self._backend.read(self._namespace, self._owned), state.ruleset)
        rest = routing.plan(self._standing(state.routing, record), state.routing)
        return next((step.name for step in (*steps, *rest)), "")

    def _settle(self, entry: Entry) -> None:
        if self._files is not None:
            self._files.settle(entry)
