"""A kernel for your unit tests: what `netapply.open` gives, with nothing behind it.

    kernel = FakeKernel()
    node_agent = Agent(open_capture=kernel.open)         # wherever your code takes `netapply.open`
    node_agent.admit("pod-1")
    assert kernel.open("pod-1").send(flow).port == 15001

    kernel.fail_next("apply", KernelError("add rule", errno.ENOMEM))
    kernel.missing["nftables"] = {"cgroups": "nft_socket, Linux 5.13"}
    kernel.probes["nftables"] = Probe("denied", "needs CAP_NET_ADMIN")
    kernel.drift("pod-1")

For asyncio: `netapply.aio.AsyncCapture(lambda: kernel.open("pod-1"))`.

Plans are compiled, compared, degraded and walked by the code that the real thing uses; results and exceptions are its
own, and tests hold them equal. Simpler here are the names of steps, the order of chains in `show`, and which counters
survive another plan. Other people's rules, settings under /proc/sys and locks are not modelled.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, Self, TypeAlias

from netapply import routing
from netapply.backend import Backend, Counters, Probe, find_backend
from netapply.compiler import compile_plan, compile_routing
from netapply.core import refuse_waiting
from netapply.detection import PREFERENCE, pick
from netapply.differences import ruleset_changes
from netapply.errors import ApplyError, CancelledError, ConflictError, NamespaceError, NetapplyError, UnsupportedError
from netapply.evaluate import evaluate
from netapply.existing import treated_otherwise
from netapply.features import degrade
from netapply.flow import Decision, Flow
from netapply.inspection import rule_counters
from netapply.journal import State
from netapply.ownership import Adoption
from netapply.plan import CapturePlan
from netapply.results import Candidate, Change, Detection, Diff, Live, Result, RuleCounter
from netapply.routing import RoutingStep, Standing
from netapply.ruleset import Routing, Rule, Ruleset
from netapply.values import NamedTuple

__all__ = ["FakeCapture", "FakeKernel", "FakeNamespace", "Operation", "Probe", "Spec"]

Spec: TypeAlias = str | int | None
Operation: TypeAlias = Literal["open", "apply", "diff", "verify", "clean", "show", "detect"]

USABLE = Probe("usable", "the fake kernel takes all our rules")
_NOTHING = State(None, Routing())


class FakeNamespace:
    """What one namespace holds. Look at it after your code ran, or change it before."""

    def __init__(self) -> None:
        #: Our rules, by the name of the backend whose dialect they stand in.
        self.rulesets: dict[str, Ruleset] = {}
        #: Our policy rules, routes and addresses.
        self.routing = Routing()
        #: Open connections, for `Result.existing_flows` to count.
        self.flows: tuple[Flow, ...] = ()
        #: What the journal knows: the backend of the last apply, and what it put there.
        self.applied: tuple[str, State] | None = None
        #: The states that were before it, the oldest first, for `rollback`.
        self.past: list[tuple[str, State]] = []
        #: (packets, bytes) by backend and place: (backend, table family, table, chain, position).
        self.counters: defaultdict[tuple[str, str, str, str, int], tuple[int, int]] = defaultdict(lambda: (0, 0))
        #: One operation at a time, as the journal's lock has it.
        self.turn = threading.Lock()

    def stands(self, backend: str, desired: State) -> None:
        """Have the journal know that this was applied."""
        if self.applied is not None and self.applied != (backend, desired):
            self.past.append(self.applied)
        self.applied = backend, desired

    def put(self, backend: str, ruleset: Ruleset | None) -> None:
        """Have `ruleset` stand in the dialect of `backend`, None for nothing. Chains that stay alike keep counting."""
        old, new = self.rulesets.pop(backend, Ruleset()), ruleset or Ruleset()
        if new.tables:
            self.rulesets[backend] = new
        kept = {key for key, _ in {*_rules_by_chain(old)} & {*_rules_by_chain(new)}}
        for place in [each for each in self.counters if each[0] == backend and each[1:4] not in kept]:
            del self.counters[place]


def _rules_by_chain(ruleset: Ruleset) -> Iterator[tuple[tuple[str, str, str], tuple[Rule, ...]]]:
    for table in ruleset.tables:
        for chain in table.chains:
            yield (table.family, table.name, chain.name), chain.head + chain.rules


class FakeKernel:
    """Any number of namespaces, made by opening them. What it can do and what fails next is yours to say."""

    def __init__(self) -> None:
        self.namespaces: defaultdict[Spec, FakeNamespace] = defaultdict(FakeNamespace)
        #: Features (plan words) that a backend lacks here, each with what would add it.
        self.missing: dict[str, dict[str, str]] = {}
        #: What a backend's probe says; USABLE for those not named. `in_use` stands for rules of somebody else.
        self.probes: dict[str, Probe] = {}
        #: Specs that lead to the machine's own namespace, which `open` refuses without `host`.
        self.initial: set[Spec] = {"pid:1"}
        self._failures: dict[Operation, Exception] = {}

    def open(
        self,
        spec: Spec = None,
        *,
        host: bool = False,
        lock_timeout: float = 10.0,  # noqa: ARG002 - the signature of netapply.open; nobody holds a lock here
        state_directory: str | None = None,  # noqa: ARG002 - likewise; the journal is FakeNamespace.applied
    ) -> FakeCapture:
        """As `netapply.open`. A namespace that was not there is made; None is one like any other."""
        self.raise_planned("open")
        if spec in self.initial and not host:
            raise NamespaceError(
                f"{spec} is the machine's own, where a mistake cuts it off",
                next_step="name the namespace of the workload, or say --host if you mean the machine",
            )
        return FakeCapture(self, str(spec), self.namespaces[spec])

    def fail_next(self, operation: Operation, error: Exception) -> None:
        """Let the next such operation fail, once.

        An apply or clean fails at the last step of the next change that it makes: it rolls back and raises ApplyError,
        `restored`, from `error`; an `error` that is an ApplyError is raised as it is. The others raise `error`.
        """
        self._failures[operation] = error

    def raise_planned(self, operation: Operation) -> None:
        """Raise what `fail_next` planned for this operation, if anything."""
        error = self._failures.pop(operation, None)
        if error is not None:
            raise error

    def drift(self, spec: Spec, position: int = -1) -> Rule:
        """Remove one of our rules behind netapply's back, and return it.

        `position` counts through all of our rules, as `show` lists them. Raises LookupError where there is none.
        """
        namespace = self.namespaces[spec]
        places = [(name, *place) for name, ruleset in namespace.rulesets.items() for place in ruleset.walk()]
        name, table, chain, index, rule = places[position]
        rest = chain._replace(head=_without(chain.head, index), rules=_without(chain.rules, index - len(chain.head)))
        cut = table._replace(chains=tuple(rest if each is chain else each for each in table.chains))
        ruleset = namespace.rulesets[name]
        namespace.put(name, ruleset._replace(tables=tuple(cut if each is table else each for each in ruleset.tables)))
        return rule

    def probe(self, backend: str) -> Probe:
        """What the backend's probe says here."""
        found = self.probes.get(backend, USABLE)
        return found._replace(missing={**found.missing, **self.missing.get(backend, {})})


def _without(rules: tuple[Rule, ...], index: int) -> tuple[Rule, ...]:
    return rules if index < 0 else rules[:index] + rules[index + 1 :]


class _Work(NamedTuple):
    """What lies between what stands and what should."""

    rules: tuple[Change, ...]
    routing: tuple[RoutingStep, ...]

    def changes(self) -> tuple[Change, ...]:
        """As `diff` tells them."""
        beside = (
            Change("add" if step.add else "remove", "routing", step.name.partition(" ")[2]) for step in self.routing
        )
        return (*self.rules, *beside)

    def steps(self) -> tuple[str, ...]:
        """As the transaction does them: new routing, sets and tables, old routing."""
        objects = (
            f"{kind} {where}" if where.startswith("set ") else f"replace table {where.rpartition(' ')[0]}"
            for kind, where, _, _ in self.rules
        )
        added = (step.name for step in self.routing if step.add)
        removed = (step.name for step in self.routing if not step.add)
        return (*added, *dict.fromkeys(objects), *removed)


class FakeCapture:
    """See `netapply.Capture`; and `send`, which is the packets. Made by `FakeKernel.open`."""

    def __init__(self, kernel: FakeKernel, label: str, namespace: FakeNamespace) -> None:
        self.kernel = kernel
        self.namespace = namespace
        self._label = label
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def apply(
        self,
        plan: CapturePlan,
        *,
        backend: str = "auto",
        layout: str = "netapply",
        adopt: Adoption | None = None,  # noqa: ARG002 - the signature of Capture; nobody else has been here
        fingerprint: str = "",  # noqa: ARG002 - the signature of Capture.apply; it is for the journal's reader alone
        cancelled: Callable[[], bool] = lambda: False,
        proof: Callable[[], None] | None = None,
        flush: bool = False,  # noqa: ARG002 - the signature of Capture.apply; nothing is tracked here
        reason: str = "",  # noqa: ARG002 - the signature of Capture.apply; it is for the history's reader alone
    ) -> Result:
        """As `Capture.apply`. Raises UnsupportedError, ConflictError; ApplyError when cancelled or told to fail."""
        begun = time.perf_counter()
        refuse_waiting(plan)
        with self._turn():
            chosen, why = self._choose(backend)
            desired, effective, degraded = self._compiled(plan, chosen, layout)
            before = self.namespace.rulesets.get(chosen.name)
            steps = self._commit("apply", chosen, desired, cancelled, proof)
            self.namespace.stands(chosen.name, desired)
        flows = treated_otherwise(self.namespace.flows, before, desired.ruleset)
        duration = time.perf_counter() - begun
        return Result(bool(steps), chosen.name, why, steps, degraded, (), True, effective.ipv6, flows, duration)

    def diff(self, plan: CapturePlan, *, backend: str = "auto", layout: str = "netapply") -> Diff:
        """As `Capture.diff`."""
        with self._turn("diff"):
            return self._diff(plan, backend, layout)

    def verify(self, plan: CapturePlan | None = None, *, backend: str = "auto", layout: str = "netapply") -> Diff:
        """As `Capture.verify`."""
        with self._turn("verify"):
            if plan is not None:
                return self._diff(plan, backend, layout)
            if self.namespace.applied is None:
                raise NetapplyError(
                    "nothing was applied to this namespace that the journal knows of",
                    next_step="give the plan: netapply verify PLAN",
                )
            name, desired = self.namespace.applied
            return Diff(name, "the last apply used it", self._work(find_backend(name), desired).changes())

    def clean(
        self,
        *,
        backend: str = "auto",
        layout: str = "netapply",  # noqa: ARG002 - the signature of Capture; nobody else has been here
        adopt: Adoption | None = None,  # noqa: ARG002 - the signature of Capture; nobody else has been here
        reason: str = "",  # noqa: ARG002 - the signature of Capture.clean; it is for the history's reader alone
    ) -> Result:
        """As `Capture.clean`."""
        begun = time.perf_counter()
        with self._turn():
            held = self._held() if backend == "auto" else (backend,)
            names = held or PREFERENCE[:1]
            steps = tuple(step for name in names for step in self._commit("clean", find_backend(name), _NOTHING))
            self.namespace.applied = None
            self.namespace.past.clear()
        why = "held our rules" if held else "nothing of ours was found in any dialect"
        return Result(bool(steps), ", ".join(held), why, steps, duration=time.perf_counter() - begun)

    def migrate(
        self,
        plan: CapturePlan,
        to: str,
        *,
        layout: str = "netapply",
        adopt: Adoption | None = None,  # noqa: ARG002 - the signature of Capture; nobody else has been here
        fingerprint: str = "",  # noqa: ARG002 - the signature of Capture.migrate; it is for the journal's reader alone
        proof: Callable[[], None] | None = None,
        reason: str = "",  # noqa: ARG002 - the signature of Capture.migrate; it is for the history's reader alone
    ) -> Result:
        """As `Capture.migrate`. Raises as `apply` does."""
        begun = time.perf_counter()
        refuse_waiting(plan)
        with self._turn():
            coming, others = find_backend(to), [name for name in self._held() if name != to]
            if len(self._held()) > 1:
                raise ConflictError(f"rules of ours stand in {len(self._held())} dialects at once")
            desired, effective, degraded = self._compiled(plan, coming, layout)
            steps = self._commit("apply", coming, desired, proof=proof)
            for name in others:
                self.namespace.put(name, None)
            self.namespace.stands(to, desired)
        duration = time.perf_counter() - begun
        return Result(
            bool(steps),
            to,
            f"from {others[0]}" if others else "",
            steps,
            degraded,
            (),
            True,
            effective.ipv6,
            None,
            duration,
        )

    def rollback(
        self,
        back: int = 1,
        *,
        reason: str = "",  # noqa: ARG002 - the signature of Capture.rollback; it is for the history's reader alone
    ) -> Result:
        """As `Capture.rollback`."""
        begun = time.perf_counter()
        with self._turn():
            past = self.namespace.past
            if self.namespace.applied is None or not 0 < back <= len(past) + 1:
                raise NetapplyError(f"there is no state {back} before the present one")
            name, desired = past[-back] if back <= len(past) else (self.namespace.applied[0], _NOTHING)
            if desired != _NOTHING and (others := [each for each in self._held() if each != name]):
                raise ConflictError(f"that state was held by {name}, and {', '.join(others)} holds ours now")
            steps = self._commit("apply", find_backend(name), desired)
            self.namespace.stands(name, desired)
        why = "nothing of ours, as before the first state" if desired == _NOTHING else f"{back} before"
        return Result(bool(steps), name, why, steps, duration=time.perf_counter() - begun)

    def recover(self) -> Result:
        """As `Capture.recover`: nobody dies here."""
        with self._turn():
            return Result(False, "", "nothing was interrupted here")

    def show(
        self,
        *,
        backend: str = "auto",
        layout: str = "netapply",  # noqa: ARG002 - the signature of Capture; nobody else has been here
    ) -> tuple[RuleCounter, ...]:
        """As `Capture.show`; counted up by `send`."""
        with self._turn("show"):
            return rule_counters(self._live(backend))

    def live(
        self,
        *,
        backend: str = "auto",
        layout: str = "netapply",  # noqa: ARG002 - the signature of Capture; nobody else has been here
    ) -> tuple[Live, ...]:
        """As `Capture.live`."""
        with self._turn("show"):
            return self._live(backend)

    def _live(self, backend: str) -> tuple[Live, ...]:
        held = self._held() if backend == "auto" else (backend,)
        return tuple(Live(name, self.namespace.rulesets.get(name, Ruleset()), self._counters(name)) for name in held)

    def _counters(self, backend: str) -> Counters:
        counted = self.namespace.counters.items()
        return {
            (family, table, chain, at): count for (name, family, table, chain, at), count in counted if name == backend
        }

    def detect(
        self,
        *,
        layout: str = "netapply",  # noqa: ARG002 - the signature of Capture; nobody else has been here
    ) -> Detection:
        """As `Capture.detect`."""
        with self._turn("detect"):
            probes = {name: self.kernel.probe(name) for name in PREFERENCE}
            held = self._held()
            candidates = tuple(
                Candidate(
                    name,
                    found.status,
                    found.reason,
                    name in held,
                    found.in_use or name in held,
                    tuple(sorted(found.missing.items())),
                )
                for name, found in probes.items()
            )
            try:
                backend, reason = self._choose("auto")
            except NetapplyError as error:
                return Detection("", str(error), candidates)
            return Detection(backend.name, reason, candidates)

    def close(self) -> None:
        """As `Capture.close`. What was applied stays."""
        self._closed = True

    def send(self, flow: Flow, *, size: int = 60) -> Decision:
        """What becomes of the first packet of `flow`, of `size` bytes; the rules that it matches count it."""
        fate = Decision("bypass")
        with self._turn():
            for name, ruleset in self.namespace.rulesets.items():
                trace = evaluate(ruleset, flow)
                for table, chain, index, _, failed in trace.visits:
                    if failed is None:
                        place = (name, table.family, table.name, chain.name, index)
                        packets, counted = self.namespace.counters[place]
                        self.namespace.counters[place] = packets + 1, counted + size
                fate = trace.decision if fate.verdict == "bypass" else fate
        return fate

    @contextmanager
    def _turn(self, operation: Operation | None = None) -> Generator[None]:
        """Be the only one at work on the namespace, and fail if that was planned."""
        if self._closed:
            raise NamespaceError(f"{self._label} is closed")
        with self.namespace.turn:
            if operation is not None:
                self.kernel.raise_planned(operation)
            yield

    def _held(self) -> tuple[str, ...]:
        return tuple(name for name in PREFERENCE if name in self.namespace.rulesets)

    def _choose(self, wanted: str) -> tuple[Backend, str]:
        """As `netapply.core.apply` ends up with one, after the probes have explained what failed."""
        held = self._held()
        chosen, reason = pick(held, wanted)
        if wanted != "auto" or held or self.kernel.probe(chosen.name).status == "usable":
            return chosen, reason
        probes = {name: self.kernel.probe(name) for name in PREFERENCE}
        for name, found in probes.items():
            if found.status == "usable":
                return find_backend(name), f"nothing of ours is here yet, and {found.reason}"
        said = "; ".join(f"{name}: {found.status}, {found.reason}" for name, found in probes.items())
        raise UnsupportedError(f"no backend works here; {said}", next_step="netapply detect")

    def _compiled(self, plan: CapturePlan, backend: Backend, layout: str) -> tuple[State, CapturePlan, tuple[str, ...]]:
        found = self.kernel.probe(backend.name)
        if found.status != "usable":
            raise UnsupportedError(
                f"{backend.name} is {found.status} here: {found.reason}", next_step="netapply detect"
            )
        effective, degraded = degrade(plan, backend.name, found.missing)
        dialect = backend.dialect._replace(sets_from=0) if "sets" in found.missing else backend.dialect
        return State(compile_plan(effective, dialect, layout), compile_routing(effective)), effective, degraded

    def _work(self, backend: Backend, desired: State) -> _Work:
        namespace = self.namespace
        present = namespace.routing._replace(sysctls=desired.routing.sysctls)
        changes = ruleset_changes(backend, namespace.rulesets.get(backend.name), desired.ruleset)
        return _Work(changes, routing.plan(Standing(present, namespace.routing), desired.routing))

    def _diff(self, plan: CapturePlan, wanted: str, layout: str) -> Diff:
        chosen, reason = self._choose(wanted)
        desired, _, _ = self._compiled(plan, chosen, layout)
        return Diff(chosen.name, reason, self._work(chosen, desired).changes())

    def _commit(
        self,
        operation: Operation,
        backend: Backend,
        desired: State,
        cancelled: Callable[[], bool] = lambda: False,
        proof: Callable[[], None] | None = None,
    ) -> tuple[str, ...]:
        """The names of the steps; all of them, or none and ApplyError. `proof` is asked before anything stands."""
        work = self._work(backend, desired)
        steps = work.steps()
        for step in (*steps, "commit the journal") if steps else ():
            if cancelled():
                error = CancelledError("cancelled")
                raise ApplyError(step, error, restored=True) from error
        if steps:
            try:
                self.kernel.raise_planned(operation)
                if proof is not None:
                    proof()
            except ApplyError:
                raise
            except Exception as error:
                raise ApplyError(steps[-1], error, restored=True) from error
            self.namespace.put(backend.name, desired.ruleset)
            self.namespace.routing = routing.remember(self.namespace.routing, work.routing)
        return steps
