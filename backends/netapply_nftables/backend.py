"""The backend "nftables": the `netapply.backend.Backend` of the native dialect."""

from __future__ import annotations

from typing import NamedTuple

from netapply.backend import OURS, STRANGE_RULE, Dialect, Owned, Probe, is_strange
from netapply.kernel import Kernel
from netapply.ruleset import Chain, Rule, Ruleset, Table
from netapply_nftables.changes import check, create_table, delete_table, update_table
from netapply_nftables.probe import probe
from netapply_nftables.render import render, render_rule
from netapply_nftables.snapshot import Snapshot, find_table, read_snapshot
from netapply_wire.nfnetlink import Batch, encode_batch, send_batch


class Step(NamedTuple):
    """One batch, good for the generation that it was made from."""

    name: str
    batch: Batch
    generation: int


class Nftables:
    """The native dialect. It owns the whole of its table, and never looks into another."""

    name = "nftables"
    dialect = Dialect("inet", port_slots=0, sets_from=2)

    def __init__(self) -> None:
        # The last rule sets that were put into namespaces without ours: a node agent puts few into many.
        self._created: tuple[tuple[Ruleset, Batch], ...] = ()

    def probe(self, kernel: Kernel) -> Probe:
        """Whether this kernel takes our rules, by a batch that it checks and throws away."""
        return probe(kernel)

    def detect(self, kernel: Kernel, owned: Owned = OURS) -> bool:
        """Whether our table is there. Raises KernelError."""
        return find_table(kernel, owned.table) is not None

    def read(self, kernel: Kernel, owned: Owned = OURS) -> Snapshot:
        """Our table at one generation."""
        return read_snapshot(kernel, owned.table)

    def encode(self, current: Snapshot, desired: Ruleset | None) -> tuple[Step, ...]:
        """One batch, or () when all is as it should be. Raises UnsupportedError."""
        if desired is None or not desired.tables:
            batch = encode_batch(delete_table(current.table)) if current.contents else None
        elif current.contents is None:
            batch = self._creation(desired)
        else:
            batch = _change(current, desired)
        return (Step(f"batch table inet {current.table}", batch, current.generation),) if batch else ()

    def commit(self, kernel: Kernel, step: Step) -> None:
        """Send the batch. Raises KernelError; GenerationChanged where the rules are no longer those that were read."""
        send_batch(kernel, step.batch, step.generation)

    def render(self, ruleset: Ruleset) -> str:
        """What `nft list table inet netapply` prints for it, all counters 0."""
        return render(ruleset)

    def render_rule(self, table: Table, chain: Chain, rule: Rule) -> str:  # noqa: ARG002 - a rule says it all here
        """One rule as `nft` prints it, without its counter."""
        if is_strange(rule):
            return STRANGE_RULE
        return render_rule(rule)[0].replace("counter packets 0 bytes 0 ", "", 1)

    def _creation(self, desired: Ruleset) -> Batch:
        for known, batch in self._created:
            if known is desired:
                return batch
        check(desired)
        batch = encode_batch(create_table(desired))
        self._created = ((desired, batch), *self._created[:3])
        return batch


def _change(current: Snapshot, desired: Ruleset) -> Batch | None:
    standing = current.ruleset
    desired = desired._replace(sets=tuple(sorted(desired.sets)))
    if standing is None or standing == desired:
        return None
    check(desired)
    if current.oddities:
        return encode_batch([*delete_table(current.table), *create_table(desired)])
    return encode_batch(update_table(standing, desired))
