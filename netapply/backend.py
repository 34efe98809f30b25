"""What a backend is, and how one is found by its name.

A backend spells a `Ruleset` in one dialect. It never sees a plan. It is four pure functions and three that
talk to one `Kernel`:

    probe   can this kernel do it, without side effects       (kernel)
    read    what is there, ours and everybody else's          (kernel)
    encode  the steps from what is there to what should be    pure
    commit  one step, atomic in the kernel                    (kernel)
    render  the rule set as the dialect's own tools print it  pure

`encode(snapshot, None)` is clean, and `encode(now, before.ruleset)` is roll-back: there is no second way.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Literal, Protocol, TypeAlias

from netapply.errors import UnsupportedError
from netapply.kernel import Kernel
from netapply.remembered import remembered
from netapply.ruleset import Chain, Family, Rule, Ruleset, Table
from netapply.values import NamedTuple

#: table family, table name, chain name, index in head + rules -> (packets, bytes)
Counters: TypeAlias = Mapping[tuple[str, str, str, int], tuple[int, int]]

ENTRY_POINTS = "netapply.backends"

#: The built-in ones. pyproject.toml registers the same under the entry-point group (a test compares them);
#: this table saves the 20 ms of scanning installed metadata that a one-shot command would pay.
BUILT_IN: Mapping[str, str] = {
    "nftables": "netapply_nftables:BACKEND",
    "iptables-nft": "netapply_iptables_nft:BACKEND",
    "iptables-legacy": "netapply_iptables_legacy:BACKEND",
}


class Dialect(NamedTuple):
    """What the compiler must know of a dialect, and nothing else.

    `families`: "split" has tables per family with built-in chains (nat, mangle, raw, filter of ip and ip6);
    "inet" has one table `netapply` for both, with base chains of our own.
    `port_slots`: how many ports one PortMatch may hold, a range counting two; 0 means any number.
    `sets_from`: an address list of this many blocks or more becomes a NamedSet; 0 means never.
    """

    families: Literal["split", "inet"]
    port_slots: int
    sets_from: int


#: table family, table, built-in chain, rule
Direct: TypeAlias = tuple[Family, str, str, Rule]


class Owned(NamedTuple):
    """How ours is told from everybody else's, without a plan.

    Chains whose names begin with one of `prefixes`, and jumps to them, are ours in the iptables dialects; the inet
    table `table` is in native nftables; sets whose names begin with `sets` are everywhere. A rule that a layout puts
    straight into a built-in chain bears a tag of the backend's that readers of the rules do not see.

    `direct` are such rules that may have lost the tag (iptables-restore drops it) or never had it (another program
    put them there): recognised by equality, each as often as it is named, in tables where chains of ours stand.

    `exclusive`: where native nftables makes the table anew, or finds it without its owner, whoever commits is to own
    it: then nobody else can change it, and `nft flush ruleset` passes it by (Linux 6.9; the owner is a socket).
    """

    prefixes: tuple[str, ...] = ("NETAPPLY_",)
    table: str = "netapply"
    sets: str = "netapply-"
    direct: tuple[Direct, ...] = ()
    exclusive: bool = False


OURS = Owned()

#: How what stands in ours, and cannot be read as ours, begins in a decoded rule set: a chain, or a jump to a chain,
#: of such a name. No chain is called so, so it never equals what a plan wants, and nobody encodes it.
STRANGE = "<"
#: How such a rule is shown.
STRANGE_RULE = "a rule that is not one of ours"


@remembered(16)
def readable(ruleset: Ruleset | None) -> Ruleset | None:
    """The rule set without what is strange in it: all of a damaged state that can be put back."""
    if ruleset is None:
        return None
    tables = (
        table._replace(chains=tuple(_readable(chain) for chain in table.chains if chain.name[:1] != STRANGE))
        for table in ruleset.tables
    )
    return ruleset._replace(tables=tuple(tables))


def _readable(chain: Chain) -> Chain:
    return chain._replace(
        head=tuple(rule for rule in chain.head if not is_strange(rule)),
        rules=tuple(rule for rule in chain.rules if not is_strange(rule)),
    )


def is_strange(rule: Rule) -> bool:
    """Is this a rule that somebody else put among ours?"""
    return rule.statement.kind == "jump" and rule.statement.chain[:1] == STRANGE


class Probe(NamedTuple):
    """Whether this backend can work in a namespace.

    `status` tells apart: usable; unsupported (the kernel lacks it), denied (we may not), busy (somebody holds it).
    `reason` is one line for people. `missing` are features (plan words: "cgroups", "log", "dns.zones", "sets", "ip6")
    that the kernel cannot do here; each with a module or setting that adds it where known.
    `in_use`: this dialect already holds rules in the namespace, whoever's.
    """

    status: Literal["usable", "unsupported", "denied", "busy"]
    reason: str
    missing: Mapping[str, str] = {}
    in_use: bool = False


class Step(Protocol):
    """One change. `name` says it in the field's words: "replace table ip nat"."""

    @property
    def name(self) -> str: ...


class Snapshot(Protocol):
    """What was in the namespace at one moment, as this backend sees it. Opaque to the core but for these."""

    @property
    def ruleset(self) -> Ruleset | None:
        """Ours, decoded; None when nothing of ours is there. What cannot be read is STRANGE, and never an error."""
        ...

    @property
    def counters(self) -> Counters:
        """Packets and bytes of each of our rules, at the latest when `Kernel.memory` was empty."""
        ...

    @property
    def foreign(self) -> object:
        """Everything that is not ours, in a form that compares equal when it is unchanged (packet counters apart)."""
        ...


class Backend(Protocol):
    """A dialect. Stateless: one object serves every namespace and thread."""

    @property
    def name(self) -> str: ...

    @property
    def dialect(self) -> Dialect: ...

    def probe(self, kernel: Kernel) -> Probe:
        """Whether this dialect works here. Creates and changes nothing."""
        ...

    def detect(self, kernel: Kernel, owned: Owned = OURS) -> bool:
        """Whether anything of ours stands in this dialect. Cheap, and creates nothing."""
        ...

    def read(self, kernel: Kernel, owned: Owned = OURS) -> Snapshot:
        """All there is, ours and foreign. Creates nothing, not even an empty table."""
        ...

    def encode(self, current: Snapshot, desired: Ruleset | None) -> tuple[Step, ...]:
        """The steps from `current` to `desired`; () when they are the same. Pure. Raises UnsupportedError."""
        ...

    def commit(self, kernel: Kernel, step: Step) -> None:
        """Do one step. Raises KernelError; GenerationChanged where somebody else was faster; LockError."""
        ...

    def render(self, ruleset: Ruleset) -> str:
        """The text that the dialect's own tool prints or restores. Pure."""
        ...

    def render_rule(self, table: Table, chain: Chain, rule: Rule) -> str:
        """One rule as the dialect's own tool prints it, on one line. Pure."""
        ...


def families_of(ruleset: Ruleset) -> tuple[Family, ...]:
    """The families that a rule set touches, in order."""
    both: tuple[Family, Family] = ("ip", "ip6")
    seen = {table.family for table in ruleset.tables}
    return both if "inet" in seen else tuple(family for family in both if family in seen)


@cache
def find_backend(name: str) -> Backend:
    """The backend of this name: built in, or registered under the entry-point group `netapply.backends`."""
    from importlib import import_module

    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        found: Backend = getattr(import_module(module), attribute)
        return found
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == name:
            backend: Backend = entry.load()
            return backend
    known = ", ".join([*BUILT_IN, *(e.name for e in entry_points(group=ENTRY_POINTS) if e.name not in BUILT_IN)])
    raise UnsupportedError(f"no backend is called {name!r}; there are {known}", next_step="name one of these, or auto")
