"""The suite's own proof: a backend with a mistake in it fails a case, whatever the mistake.

    for found in prove("nftables"):
        print(found.mutation, "→", found.case or "nobody noticed")

The mistaken backend stands in for the real one and reads its mistake as what was wanted, as a backend does that spells
and reads by the same wrong idea. So it is not the read-back that tells.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from netapply import core
from netapply.backend import BUILT_IN, ENTRY_POINTS, OURS, Backend, Counters, Owned, Probe, find_backend
from netapply.compiler import compile_plan, compile_routing
from netapply.conformance.case import Case
from netapply.conformance.cases import cases_of, proven
from netapply.conformance.flows import flow_of
from netapply.conformance.foreign import OWNED as FOREIGN
from netapply.conformance.mutations import Mutation, mutations
from netapply.conformance.runner import Runner
from netapply.conformance.stage import plan_from
from netapply.errors import NetapplyError
from netapply.kernel import Kernel
from netapply.plan import CapturePlan
from netapply.ruleset import Chain, Routing, Rule, Ruleset, Table
from netapply.sights import complete, outcome
from netapply.values import NamedTuple

#: Cases that are tried for one mistake, of those that its rules concern.
MOST = 60
NOTHING = Mutation("")


class Found(NamedTuple):
    """A mistake, the case that fails for it ("" for none), and the first difference that it tells."""

    mutation: str
    case: str = ""
    difference: str = ""
    #: No plan of the suite has in this dialect what the mistake is about, so that it changes nothing.
    idle: bool = False


class _Snapshot(NamedTuple):
    """A snapshot, with its rules read as they were meant."""

    inner: Any
    ruleset: Ruleset | None
    ours: bool
    counters: Counters

    @property
    def foreign(self) -> object:
        """As it is."""
        found: object = self.inner.foreign
        return found


class _Step(NamedTuple):
    """A step of the mistaken backend; `inner` None does nothing."""

    name: str
    inner: Any


class Mistaken:
    """A backend that makes the mistake `mutation`, and is otherwise `inner`."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner
        self.name, self.dialect = inner.name, inner.dialect
        self.mutation = NOTHING
        #: Whether the mistake has changed anything since somebody last said False here.
        self.made = False
        self._meant: dict[Ruleset, Ruleset] = {}

    def probe(self, kernel: Kernel) -> Probe:
        """As the real one."""
        return self._inner.probe(kernel)

    def detect(self, kernel: Kernel, owned: Owned = OURS) -> bool:
        """As the real one."""
        return self._inner.detect(kernel, owned)

    def read(self, kernel: Kernel, owned: Owned = OURS) -> _Snapshot:
        """What stands, read as it was meant."""
        found = self._inner.read(kernel, owned)
        meant = self._meant.get(found.ruleset, found.ruleset) if found.ruleset else found.ruleset
        counters: Counters = found.counters
        if self.mutation.habit == "counts nothing":
            self.made, counters = True, {}
        return _Snapshot(found, meant, owned.prefixes != FOREIGN.prefixes, counters)

    def encode(self, current: _Snapshot, desired: Ruleset | None) -> tuple[_Step, ...]:
        """The steps to the mistaken rules."""
        habit = self.mutation.habit
        if desired is not None and current.ruleset == desired and habit != "always changes":
            return ()  # by its own idea
        wanted = self._mistaken(current, desired) if desired is not None and current.ours else desired
        if desired is None and habit == "leaves a chain" and current.ours:
            left = (*current.inner.ruleset.tables[:1],) if current.inner.ruleset else ()
            wanted = Ruleset(tuple(_remains(table) for table in left)) if left else None
            self.made = True
        steps = [_Step(each.name, each) for each in self._inner.encode(current.inner, wanted)]
        if habit == "always changes" and current.ours and desired is not None and not steps:
            steps.append(_Step("change nothing", None))
            self.made = True
        if habit == "loses the last step" and len(steps) > 1:
            steps[-1] = _Step(steps[-1].name, None)
            self.made = True
        return tuple(steps)

    def commit(self, kernel: Kernel, step: _Step) -> None:
        """Do it."""
        if step.inner is not None:
            self._inner.commit(kernel, step.inner)
        if self.mutation.habit == "takes foreign rules along":
            self.made = True
            for each in self._inner.encode(self._inner.read(kernel, FOREIGN), None):
                self._inner.commit(kernel, each)

    def render(self, ruleset: Ruleset) -> str:
        """As the real one."""
        return self._inner.render(ruleset)

    def render_rule(self, table: Table, chain: Chain, rule: Rule) -> str:
        """As the real one."""
        return self._inner.render_rule(table, chain, rule)

    def _mistaken(self, current: _Snapshot, desired: Ruleset) -> Ruleset:
        change = self.mutation.rules
        wanted = change(desired) if change else desired
        if self.mutation.habit == "keeps old rules" and current.ruleset and current.ruleset != desired:
            wanted = _both(current.inner.ruleset, desired)
        if wanted != desired:
            self.made = True
            self._meant[wanted] = desired
        return wanted


def _remains(table: Table) -> Table:
    """A chain that is left of a table."""
    chain = next((each for each in table.chains if each.base is None), table.chains[0])
    return table._replace(chains=(chain._replace(head=(), rules=()),))


def _both(old: Ruleset, new: Ruleset) -> Ruleset:
    """The new rules, each chain behind those of the old one."""
    before = {(table.family, table.name, chain.name): chain for table in old.tables for chain in table.chains}

    def grown(table: Table, chain: Chain) -> Chain:
        found = before.get((table.family, table.name, chain.name))
        return chain._replace(rules=(*found.rules, *chain.rules)) if found else chain

    tables = (table._replace(chains=tuple(grown(table, chain) for chain in table.chains)) for table in new.tables)
    return complete(Ruleset(tuple(tables), tuple(sorted({*old.sets, *new.sets}))))


@contextmanager
def standing_in(backend: str) -> Generator[Mistaken]:
    """A mistaken backend in the place of the one of this name, for as long as this lasts. Not for threads."""
    mistaken = Mistaken(find_backend(backend))
    place = BUILT_IN.get(backend) or next(
        each.value for each in entry_points(group=ENTRY_POINTS) if each.name == backend
    )
    module, _, attribute = place.partition(":")
    real = getattr(import_module(module), attribute)

    def routing(plan: CapturePlan) -> Routing:
        change = mistaken.mutation.routing
        return change(compile_routing(plan)) if change else compile_routing(plan)

    setattr(import_module(module), attribute, mistaken)
    find_backend.cache_clear()
    setattr(core, "compile_routing", routing)  # noqa: B010 - it is not core's own
    try:
        yield mistaken
    finally:
        setattr(core, "compile_routing", compile_routing)  # noqa: B010 - likewise
        setattr(import_module(module), attribute, real)
        find_backend.cache_clear()


def prove(backend: str, pattern: str = "") -> Iterator[Found]:
    """Make each mistake whose name contains `pattern`, and look for the first case that fails. Raises NetapplyError."""
    with standing_in(backend) as mistaken, Runner(backend) as runner:
        cases = (
            *proven.CASES,
            *(case for case in cases_of("stress") if case not in proven.CASES),
        )  # first those that were made for mistakes
        for mutation in mutations():
            if pattern in mutation.name:
                yield _prove(mutation, mistaken, runner, cases)


def _prove(mutation: Mutation, mistaken: Mistaken, runner: Runner, cases: Sequence[Case]) -> Found:
    made = mutation.routing is not None
    for case in _concerned(mutation, mistaken, cases)[:MOST]:
        runner.ready()
        mistaken.mutation, mistaken.made = mutation, False
        found = runner.run(case)
        mistaken.mutation, made = NOTHING, made or mistaken.made
        if found.status == "failed":
            return Found(mutation.name, case.name, found.differences[0])
    return Found(mutation.name, idle=not made)


def _concerned(mutation: Mutation, mistaken: Mistaken, cases: Sequence[Case]) -> list[Case]:
    """The cases that can notice; first those whose flows the mistake leads elsewhere, of the cheaper stories."""
    found: list[tuple[int, Case]] = []
    for case in cases:
        rank = _rank(mutation, mistaken, case)
        if rank is not None:
            found.append((rank, case))
    return [case for _, case in sorted(found, key=lambda each: each[0])]


def _rank(mutation: Mutation, mistaken: Mistaken, case: Case) -> int | None:
    """How likely a case notices, the least first; None where nothing is otherwise for it."""
    if mutation.habit:
        stories = {"takes foreign rules along": "foreign", "keeps old rules": "update", "counts nothing": "model"}
        return 0 if case.story == stories.get(mutation.habit, "apply") else 9 if case.story != "apply" else 5
    ranks = [
        _rank_of_plan(mutation, mistaken, case, content)
        for content in (case.plan, case.update)
        if content or content is case.plan
    ]
    return min((rank for rank in ranks if rank is not None), default=None)


def _rank_of_plan(mutation: Mutation, mistaken: Mistaken, case: Case, content: Mapping[str, Any]) -> int | None:
    plan, later = plan_from(content), case.story != "apply"
    if mutation.routing is not None:
        same = mutation.routing(compile_routing(plan)) == compile_routing(plan)
        return None if same else 0 + later
    try:
        ruleset = compile_plan(plan, mistaken.dialect, case.layout)
    except NetapplyError:
        return None
    changed = mutation.rules(ruleset) if mutation.rules else ruleset
    if changed == ruleset:
        return None
    flows = [flow_of(probe) for probe in case.probes]
    if case.story == "older":
        flows = [flow._replace(state="picked-up") for flow in flows]
    if any(_fate(ruleset, flow) != _fate(changed, flow) for flow in flows):
        return 0 + later
    return 2 if case.story == "foreign" else 3 + later  # whose rules come first shows beside others alone


def _fate(ruleset: Ruleset, flow: Any) -> object:
    found = outcome(complete(ruleset), flow)
    return found.decision[:3], found.sights[0][1].decision.zone
