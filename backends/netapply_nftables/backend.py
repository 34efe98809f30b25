"""The backend "nftables": the `netapply.backend.Backend` of the native dialect.

To look whether ours is there costs nothing but this file: what reads and writes rules is imported when it is used.
"""

from __future__ import annotations

from errno import EPERM
from typing import TYPE_CHECKING, Literal

from netapply.backend import OURS, STRANGE_RULE, Dialect, Owned, Probe, is_strange
from netapply.errors import KernelError
from netapply.kernel import Kernel
from netapply.remembered import remembered
from netapply.ruleset import Chain, Rule, Ruleset, Table
from netapply.values import NamedTuple
from netapply_nftables.find import Snapshot, look_for_table
from netapply_wire.nfnetlink import Batch, encode_batch, send_batch

if TYPE_CHECKING:
    from netapply_nftables.snapshot import Contents


class Step(NamedTuple):
    """One batch, good for the generation that it was made from."""

    name: str
    batch: Batch
    generation: int
    #: Whether the table has an owner, who alone may do this.
    guarded: bool = False


class Nftables:
    """The native dialect. It owns the whole of its table, and never looks into another."""

    name = "nftables"
    dialect = Dialect("inet", port_slots=0, sets_from=2)

    def probe(self, kernel: Kernel) -> Probe:
        """Whether this kernel takes our rules, by a batch that it checks and throws away."""
        from netapply_nftables.probe import probe

        return probe(kernel)

    def can_own(self, kernel: Kernel) -> bool:
        """Whether `Owned.exclusive` can be had."""
        from netapply_nftables.owner import can_own

        return can_own(kernel)

    def is_owned(self, current: Snapshot) -> bool:
        """Whether somebody owns the table."""
        return bool(current.contents and current.contents.flags and not current.orphan)

    def detect(self, kernel: Kernel, owned: Owned = OURS) -> bool:
        """Whether our table is there. Raises KernelError."""
        _, table, _ = look_for_table(kernel, owned.table)
        return table is not None

    def read(self, kernel: Kernel, owned: Owned = OURS) -> Snapshot:
        """Our table at one generation."""
        from netapply_nftables.snapshot import read_snapshot

        found = read_snapshot(kernel, owned.table)
        return found._replace(exclusive=True) if owned.exclusive else found

    def encode(self, current: Snapshot, desired: Ruleset | None) -> tuple[Step, ...]:
        """One batch, or () when all is as it should be. Raises UnsupportedError."""
        wanted = desired if desired and desired.tables else None
        batch = _change(current.contents, wanted, current.table, _claim(current))
        if batch is None:
            return ()
        name = f"batch table inet {current.table}"
        return (Step(name, batch, current.generation, guarded=self.is_owned(current)),)

    def commit(self, kernel: Kernel, step: Step) -> None:
        """Send the batch. Raises KernelError; GenerationChanged where the rules are no longer those that were read."""
        try:
            send_batch(kernel, step.batch, step.generation)
        except KernelError as error:
            if error.errno != EPERM or not step.guarded:
                raise
            from netapply_nftables.owner import refused_by_owner

            raise refused_by_owner(kernel, step.name, error) from error

    def render(self, ruleset: Ruleset) -> str:
        """What `nft list table inet netapply` prints for it, all counters 0."""
        from netapply_nftables.render import render

        return render(ruleset)

    def render_rule(self, table: Table, chain: Chain, rule: Rule) -> str:  # noqa: ARG002 - a rule says it all here
        """One rule as `nft` prints it, without its counter."""
        if is_strange(rule):
            return STRANGE_RULE
        from netapply_nftables.render import render_rule

        return render_rule(rule)[0].replace("counter packets 0 bytes 0 ", "", 1)


def _claim(current: Snapshot) -> Literal["", "own", "adopt"]:
    return "" if not current.exclusive else "adopt" if current.orphan else "own"


@remembered(16)
def _change(
    current: Contents | None, desired: Ruleset | None, table: str, claim: Literal["", "own", "adopt"]
) -> Batch | None:
    """One batch from these contents to these rules, which need not be objects that others are equal to."""
    if current is None and desired is None:
        return None
    from netapply_nftables.changes import adopt_table, check, create_table, delete_table, update_table

    first, exclusive = adopt_table(table) if claim == "adopt" else [], claim != ""
    if desired is None:
        return encode_batch(delete_table(table))
    if current is not None and current.ruleset == desired._replace(sets=tuple(sorted(desired.sets))):
        return encode_batch(first) if first else None
    check(desired)
    if current is None:
        return encode_batch(create_table(desired, exclusive=exclusive))
    if current.oddities:
        return encode_batch([*delete_table(table), *create_table(desired, exclusive=exclusive)])
    update = update_table(current.ruleset, desired._replace(sets=tuple(sorted(desired.sets))))
    return encode_batch([*first, *update])
