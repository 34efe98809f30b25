"""What the core's operations return. Printable as they are, and JSON by `netapply.cli.output`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from netapply.values import NamedTuple

if TYPE_CHECKING:
    from netapply.backend import Counters
    from netapply.ruleset import Ruleset

#: Of the JSON that the command prints. A field is never removed or changed within one version.
RESULT_VERSION = "netapply.result/v1"

ChangeKind: TypeAlias = Literal["add", "remove"]


class Result(NamedTuple):
    """What `apply` or `clean` did to one namespace."""

    #: Whether anything was changed. A second apply of the same plan says False, and did not touch the kernel.
    changed: bool
    backend: str
    #: Why this backend was taken.
    reason: str
    #: What was done, in order, in the field's words.
    steps: tuple[str, ...] = ()
    #: What the plan prefers but the kernel or the file system could not give, each with its consequence.
    degraded: tuple[str, ...] = ()
    #: What there is to say about the plan (lint), or about what was found (a recovered journal).
    notes: tuple[str, ...] = ()
    #: Whether the rules that the kernel now holds were read back and are those of the plan.
    effective: bool = True
    #: What becomes of IPv6: capture, skip or block. "" for clean.
    ipv6: str = ""
    #: TCP connections that are open and would be treated otherwise if they began now; None where it was not counted.
    existing_flows: int | None = None
    #: Seconds from the first look at the kernel to the proof by read-back.
    duration: float = 0.0


class Change(NamedTuple):
    """One difference between the kernel and the plan: `add` is missing in the kernel, `remove` is too much there."""

    kind: ChangeKind
    #: "ip nat NETAPPLY_OUTBOUND", "set netapply-4-…", "routing".
    where: str
    #: The rule as the dialect's tool prints it, or the object.
    what: str
    #: The plan path that wants it; "" for what the plan knows nothing of.
    path: str = ""


class Diff(NamedTuple):
    """All differences, in the order of the tables. Empty: the kernel holds the plan."""

    backend: str
    reason: str
    changes: tuple[Change, ...] = ()

    @property
    def same(self) -> bool:
        """Whether there is nothing to do."""
        return not self.changes


class Candidate(NamedTuple):
    """One backend as `detect` sees it."""

    backend: str
    status: Literal["usable", "unsupported", "denied", "busy"]
    reason: str
    #: Our rules stand in this dialect.
    ours: bool
    #: Somebody's rules stand in this dialect.
    in_use: bool
    #: Plan words that this kernel cannot do in this dialect, with what would add them.
    missing: tuple[tuple[str, str], ...] = ()


class Detection(NamedTuple):
    """Which backend `auto` takes in a namespace, and every candidate with its reason."""

    chosen: str
    reason: str
    candidates: tuple[Candidate, ...]


class Live(NamedTuple):
    """Our rules that stand in one dialect, each with the plan path that the journal knows ("" where it knows none)."""

    backend: str
    ruleset: Ruleset
    #: Packets and bytes by table family, table, chain and index of the rule.
    counters: Counters


class RuleCounter(NamedTuple):
    """One of our live rules with what it counted."""

    family: str
    table: str
    chain: str
    position: int
    rule: str
    packets: int
    bytes: int
    path: str = ""
