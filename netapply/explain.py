"""Why a packet goes where it goes: every chain and rule that it passes, told in a dialect's words. Pure.

backend = find_backend("nftables")
explain(backend, compile_plan(plan, backend.dialect), flow, plan).decided
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from netapply.backend import Backend, is_strange
from netapply.decide import decide
from netapply.evaluate import Trace, Visit
from netapply.flow import Decision, Flow
from netapply.plan import CapturePlan
from netapply.reasons import show_endpoint, why_not
from netapply.ruleset import Match, NamedSet, Return, Rule, Ruleset, Statement
from netapply.sights import complete, marked, outcome
from netapply.values import NamedTuple


class Place(NamedTuple):
    """A rule: its table ("ip nat"), chain, and position there, counted from 1."""

    table: str
    chain: str
    position: int
    path: str = ""

    def __str__(self) -> str:
        return f"{self.table} {self.chain} {self.position}"


class Step(NamedTuple):
    """A rule that the packet met. `matched` is None for what is not ours, so that nobody can tell.

    `why`: what the rule did, or which match did not hold (`match`, as the dialect spells it) and why.
    """

    place: Place
    rule: str
    matched: bool | None
    match: str
    why: str


class Sight(NamedTuple):
    """The packet in one hook ("output", "prerouting"), and the rules of ours that it met there, in order."""

    hook: str
    flow: Flow
    steps: tuple[Step, ...]


class Explanation(NamedTuple):
    """What becomes of the first packet of a flow, and why.

    `answers` says who answers. `decided` leads from the first jump to the rule that decided; () where none did.
    `path` is the plan path that decided, "" where it is not known. `notes` are doubts.
    """

    backend: str
    decision: Decision
    answers: str
    decided: tuple[Place, ...]
    path: str
    sights: tuple[Sight, ...]
    notes: tuple[str, ...] = ()


def explain(backend: Backend, ruleset: Ruleset, flow: Flow, plan: CapturePlan | None = None) -> Explanation:
    """What `ruleset` does to `flow`, told in the words of `backend`. `plan` is what it was compiled from, if known."""
    whole = complete(ruleset)
    result = outcome(whole, flow)
    decision, notes = result.decision, list(_doubts(whole))
    wanted = _wanted(plan, [seen for seen, _ in result.sights]) if plan is not None else None
    if wanted is not None and not _alike_in_effect(wanted, decision):
        notes.append(f"the plan wants {show_verdict(wanted)} ({wanted.path}): these rules do otherwise")
    return Explanation(
        backend.name,
        decision,
        _answers(decision, flow, plan),
        places(result.decided),
        _path(result.decided, wanted),
        tuple(_sight(backend, whole, *each, result.decided[-1:]) for each in result.sights),
        tuple(notes),
    )


def _alike_in_effect(one: Decision, other: Decision) -> bool:
    """Whether the same listener gets the packet, by REDIRECT or TPROXY."""
    to_port = ("redirect", "tproxy")
    captured = one.verdict in to_port and other.verdict in to_port
    return one[:3] == other[:3] or (captured and one.port == other.port)


def _wanted(plan: CapturePlan, seen: list[Flow]) -> Decision:
    """What the plan decides: about what is new as it is sent, about what is not again as it comes in over `lo`."""
    first, last = decide(plan, seen[0]), decide(plan, seen[-1])
    return last if seen[0].state != "new" and last.verdict != "bypass" else first


def places(way: Iterable[Visit]) -> tuple[Place, ...]:
    """Where the rules stand. The jump from the base chain is left out where it led anywhere."""
    found = tuple(_place(visit) for visit in way)
    return found[1:] or found


def show_verdict(decision: Decision) -> str:
    """The verdict with its port or address: "redirect to port 15001"."""
    match decision.verdict:
        case "redirect" | "tproxy":
            return f"{decision.verdict} to port {decision.port}"
        case "dnat":
            return f"dnat to {show_endpoint(decision.address, decision.port)}"
        case other:
            return other


def _doubts(ruleset: Ruleset) -> Iterator[str]:
    strange = sum(is_strange(rule) for *_, rule in ruleset.walk())
    if strange:
        whose = "a rule that is not ours stands" if strange == 1 else f"{strange} rules that are not ours stand"
        yield f"{whose} among ours; what is done to the packet there is not known"


def _sight(backend: Backend, ruleset: Ruleset, flow: Flow, trace: Trace, decided: tuple[Visit, ...]) -> Sight:
    sets = {each.name: each for each in ruleset.sets}
    mark, connmark, steps = flow.mark, 0, list[Step]()
    for visit in trace.visits:
        step = _step(backend, visit, flow._replace(mark=mark), connmark, sets)
        steps.append(step._replace(why="decides") if decided and visit is decided[0] else step)
        if visit.failed is None:
            mark, connmark = marked(visit.rule.statement, mark, connmark)
    return Sight("output" if flow.direction == "outbound" else "prerouting", flow, tuple(steps))


def _step(backend: Backend, visit: Visit, flow: Flow, connmark: int, sets: dict[str, NamedSet]) -> Step:
    text = backend.render_rule(visit.table, visit.chain, visit.rule)
    if is_strange(visit.rule):
        return Step(_place(visit), text, None, "", "may match, and do anything")
    if visit.failed is None:
        return Step(_place(visit), text, True, "", _did(visit.rule.statement))
    failed = _match_words(backend, visit, visit.failed)
    return Step(_place(visit), text, False, failed, why_not(visit.failed, flow, connmark, sets))


def _place(visit: Visit) -> Place:
    return Place(f"{visit.table.family} {visit.table.name}", visit.chain.name, visit.position + 1, visit.rule.path)


def _path(way: tuple[Visit, ...], wanted: Decision | None) -> str:
    """Of the rule that says what the plan says; else of the one that chose: below it that is only carried out."""
    if not way:
        return wanted.path if wanted else ""
    said = (each.rule.path for each in way if wanted and f"{each.rule.path}.".startswith(f"{wanted.path}."))
    return next(said, way[min(1, len(way) - 1)].rule.path)


def _did(statement: Statement) -> str:
    match statement.kind:
        case "jump":
            return f"on to {statement.chain}"
        case "return":
            return "left alone here"
        case "accept":
            return "accepted here"
        case "drop" | "redirect" | "dnat" | "tproxy":
            return "taken"
        case "set-zone":
            return f"conntrack zone {statement.zone}"
        case "log":
            return "logged"
        case _:
            return "marked"


def _match_words(backend: Backend, visit: Visit, match: Match) -> str:
    """One match in the dialect's words: what it adds to a rule that has all that it needs to stand beside it."""
    needed = [each for each in visit.rule.matches if each.kind == "protocol" and match.kind in ("port", "syn")]
    without = _words(backend, visit, needed)
    with_it = _words(backend, visit, [each for each in visit.rule.matches if each in (*needed, match)])
    first = _alike(with_it, without)
    last = _alike(with_it[first:][::-1], without[first:][::-1])
    return " ".join(with_it[first : len(with_it) - last])


def _words(backend: Backend, visit: Visit, matches: Iterable[Match]) -> list[str]:
    rule = Rule(tuple(matches), Return(), visit.rule.family)
    return backend.render_rule(visit.table, visit.chain, rule).split(" ")


def _alike(one: list[str], other: list[str]) -> int:
    """How many words the two begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _answers(decision: Decision, flow: Flow, plan: CapturePlan | None) -> str:
    match decision.verdict:
        case "drop":
            return "nobody answers"
        case "bypass":
            return f"{show_endpoint(flow.destination, flow.dport)} answers itself"
        case "dnat":
            return f"{show_endpoint(decision.address, decision.port)} answers"
        case _:
            return f"{listener(decision.port, plan)} answers"


def listener(port: int, plan: CapturePlan | None) -> str:
    if plan is None:
        return f"what listens on port {port} here"
    named = {plan.dns.port: "DNS", plan.proxy.inbound_port: "inbound", plan.proxy.outbound_port: "outbound"}
    tproxy = plan.inbound.tproxy.port
    kind = "inbound" if port == tproxy and port not in named else named.get(port, "")
    return f"the proxy's {kind} port" if kind else f"port {port} here"
