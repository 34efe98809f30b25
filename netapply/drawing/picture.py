"""What there is to draw: hooks, chains, their rules, and where rules send packets. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, TypeAlias

from netapply.backend import Backend, is_strange
from netapply.explain import Explanation, listener, show_verdict
from netapply.flow import Decision
from netapply.plan import CapturePlan
from netapply.reasons import show_endpoint
from netapply.ruleset import Accept, Chain, Family, Hook, Return, Rule, Ruleset, Statement, Table
from netapply.sights import complete
from netapply.values import NamedTuple

#: What a flow made of a rule: did not meet it; did not match; matched; was decided by it. "" where no flow is drawn.
Fate: TypeAlias = Literal["", "unmet", "passed", "matched", "decided"]
TAKEN: frozenset[Fate] = frozenset(("matched", "decided"))
MET: frozenset[Fate] = frozenset(("passed", "matched", "decided"))
HOOKS: tuple[Hook, ...] = ("prerouting", "input", "forward", "output", "postrouting")
#: Who sends the packets of a hook, where it is the first that they meet.
SOURCES = {"prerouting": "from outside", "output": "from a process here"}
ADDRESSED = "addressed"
#: Of a longer run of rules that the packet does not match, or that nobody asks about, these many at each end are drawn.
_RUN, _ENDS = 20, 4


class Row(NamedTuple):
    """A rule, in the dialect's words: what it looks at (`when`) and what it does (`then`).

    `position` is its place in the chain from 1, or 0 where `when` says that some are left out. `path` is the plan path
    that wants it. `goes` is the id of the box or end that it sends packets to; "" where they go on.
    """

    position: int
    when: str
    then: str = ""
    path: str = ""
    goes: str = ""
    fate: Fate = ""


class Box(NamedTuple):
    """A chain. `about` says what calls it: a hook with its priority; "" for one that rules jump to."""

    id: str
    title: str
    about: str
    hook: str
    rows: tuple[Row, ...]


class End(NamedTuple):
    """Where packets end up. `reached` by the flow that is drawn."""

    id: str
    text: str
    kind: Literal["taken", "addressed", "dropped"]
    reached: bool = False


class Picture(NamedTuple):
    """One family's way. `said` is a line about the flow, "" without one; `again`: it is seen over `lo` once more."""

    title: str
    said: str
    boxes: tuple[Box, ...]
    ends: tuple[End, ...]
    hooks: tuple[str, ...]
    begins: str = ""
    again: bool = False

    @property
    def fell_through(self) -> bool:
        """Whether the flow ends where it was addressed without a rule that says so."""
        rows = (row for box in self.boxes for row in box.rows)
        ends = any(end.reached and end.kind == "addressed" for end in self.ends)
        return ends and not any(row.fate == "decided" for row in rows)


def draw(
    backend: Backend,
    ruleset: Ruleset,
    family: Family,
    seen: Explanation | None = None,
    plan: CapturePlan | None = None,
) -> Picture:
    """The rules of one family in the words of `backend`; `seen` is the flow whose way is shown, as `explain` has it."""
    whole = complete(ruleset)
    drawing = _Drawing(backend, family, _fates(seen), plan)
    boxes = tuple(drawing.boxes(whole))
    hooks = tuple(hook for hook in HOOKS if any(box.hook == hook for box in boxes))
    ends = (*drawing.ends.values(), End(ADDRESSED, "where it was addressed", "addressed"))
    reached = _end(seen.decision) if seen is not None else ""
    return Picture(
        f"{backend.name}, {'IPv4' if family == 'ip' else 'IPv6'}",
        f"{show_verdict(seen.decision)}, {seen.answers}" if seen is not None else "",
        boxes,
        tuple(end._replace(reached=end.id == reached) for end in ends),
        hooks,
        seen.sights[0].hook if seen is not None else "",
        seen is not None and len(seen.sights) > 1 and bool(seen.sights[1].steps),
    )


_At: TypeAlias = tuple[str, str, int]


def _fates(seen: Explanation | None) -> Mapping[_At, Fate]:
    if seen is None:
        return {}
    fates: dict[_At, Fate] = {}
    for sight in seen.sights:
        for step in sight.steps:
            if fates.get(step.place[:3]) != "matched":
                fates[step.place[:3]] = "matched" if step.matched else "passed"
    if seen.decided:
        fates[seen.decided[-1][:3]] = "decided"
    return fates


class _Drawing:
    """Boxes as they come; the ends that their rules send packets to are gathered on the way."""

    def __init__(self, backend: Backend, family: Family, fates: Mapping[_At, Fate], plan: CapturePlan | None) -> None:
        self.ends: dict[str, End] = {}
        self._ids: dict[tuple[str, str], str] = {}
        self._backend, self._family, self._fates, self._plan = backend, family, fates, plan

    def boxes(self, ruleset: Ruleset) -> Iterator[Box]:
        tables = [table for table in ruleset.tables if table.family in ("inet", self._family)]
        chains = [
            (table, chain) for table in tables for chain in table.chains if chain.rules + chain.head or not chain.base
        ]
        for table, chain in sorted(chains, key=_by_place):
            base = chain.base
            about = f"{base.type}, priority {base.priority}" if base else ""
            title = f"{table.name} {chain.name}"
            yield Box(self._id(table, chain.name), title, about, base.hook if base else "", self._rows(table, chain))

    def _id(self, table: Table, chain: str) -> str:
        """A number, whatever the chain is called: what DOT and Mermaid take without quotes, and no two alike."""
        return self._ids.setdefault((table.name, chain), f"chain_{len(self._ids) + 1}")

    def _rows(self, table: Table, chain: Chain) -> tuple[Row, ...]:
        rules = enumerate(chain.head + chain.rules, 1)
        rows = [self._row(table, chain, at, rule) for at, rule in rules if rule.family in (None, self._family)]
        return tuple(_shortened(rows))

    def _row(self, table: Table, chain: Chain, position: int, rule: Rule) -> Row:
        unmet: Fate = "unmet" if self._fates else ""
        fate = self._fates.get((f"{table.family} {table.name}", chain.name, position), unmet)
        if is_strange(rule):
            return Row(position, self._backend.render_rule(table, chain, rule), "?", fate=fate)
        when, then = self._words(table, chain, rule)
        return Row(position, when, then, rule.path, self._goes(table, rule.statement, fate), fate)

    def _words(self, table: Table, chain: Chain, rule: Rule) -> tuple[str, str]:
        """The rule's text, parted where another statement would make it read otherwise."""
        other = Accept() if rule.statement.kind == "return" else Return()
        text, without = (
            self._backend.render_rule(table, chain, each).split(" ") for each in (rule, rule._replace(statement=other))
        )
        alike = next(at for at, (left, right) in enumerate(zip(text, without, strict=False)) if left != right)
        if text[0] == "-A":  # the words of iptables: -A CHAIN … -j TARGET
            return " ".join(text[2 : alike - 1]), " ".join(text[alike - 1 :])
        return " ".join(text[:alike]), " ".join(text[alike:])

    def _goes(self, table: Table, statement: Statement, fate: Fate) -> str:
        match statement.kind:
            case "jump":
                return self._id(table, statement.chain)
            case "return" | "accept":
                return ADDRESSED if fate == "decided" else ""
            case "drop":
                return self._ended(Decision("drop"), "nobody: dropped")
            case "dnat":
                end = Decision("dnat", statement.port, statement.address)
                return self._ended(end, show_endpoint(statement.address, statement.port))
            case "redirect" | "tproxy":
                port = statement.port
                name = listener(port, self._plan)
                return self._ended(Decision(statement.kind, port), f"{name}\n{port}" if self._plan else name)
            case _:
                return ""

    def _ended(self, decision: Decision, text: str) -> str:
        name = _end(decision)
        self.ends.setdefault(name, End(name, text, "dropped" if decision.verdict == "drop" else "taken"))
        return name


def _end(decision: Decision) -> str:
    """Ends are told apart by who listens there, whatever brought the packet."""
    match decision.verdict:
        case "bypass":
            return ADDRESSED
        case "drop":
            return "dropped"
        case "dnat":
            return f"dnat_{decision.address.hex()}_{decision.port}"
        case _:
            return f"port_{decision.port}"


def _by_place(place: tuple[Table, Chain]) -> tuple[int, int]:
    """Base chains first, hook by hook, as the kernel calls them; the others as they come."""
    base = place[1].base
    return (HOOKS.index(base.hook), base.priority) if base is not None else (len(HOOKS), 0)


def _shortened(rows: list[Row]) -> Iterator[Row]:
    """Without the middle of long runs of rules that do the same and that no packet matched."""
    for run in _runs(rows):
        if len(run) <= _RUN:
            yield from run
        else:
            yield from run[:_ENDS]
            yield Row(0, f"… {len(run) - 2 * _ENDS} more of the kind", fate=run[_ENDS].fate)
            yield from run[-_ENDS:]


def _runs(rows: Iterable[Row]) -> list[list[Row]]:
    runs: list[list[Row]] = []
    for row in rows:
        alike = runs and (runs[-1][-1].then, runs[-1][-1].fate) == (row.then, row.fate)
        if alike and row.fate not in TAKEN:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs
