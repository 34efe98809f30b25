"""iptables-legacy: the tables of ip_tables and ip6_tables, by socket options.

A rule set becomes one replacement per table; each is atomic, and goes from proven content to proven content.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netapply.backend import OURS, STRANGE_RULE, Dialect, Probe, is_strange
from netapply_iptables_legacy import probe as probing
from netapply_iptables_legacy.commit import commit_table
from netapply_iptables_legacy.encode import LegacyStep, ReplaceTable, encode_steps
from netapply_iptables_legacy.snapshot import LegacySnapshot
from netapply_wire.ipset import CreateSet, DestroySet, commit_set
from netapply_wire.iptables_save import family_of, save, save_rule
from netapply_wire.xtables import MULTIPORT_SLOTS

if TYPE_CHECKING:
    from netapply.backend import Backend, Owned, Snapshot, Step
    from netapply.kernel import Kernel
    from netapply.ruleset import Chain, Rule, Ruleset, Table

__all__ = ["BACKEND", "LegacyBackend", "LegacySnapshot", "LegacyStep", "ReplaceTable"]


class LegacyBackend:
    """See `netapply.backend.Backend`."""

    name = "iptables-legacy"
    dialect = Dialect("split", port_slots=MULTIPORT_SLOTS, sets_from=32)

    def probe(self, kernel: Kernel) -> Probe:
        """Whether this dialect works here. Creates and changes nothing."""
        return probing.probe(kernel)

    def detect(self, kernel: Kernel, owned: Owned = OURS) -> bool:
        """Whether anything of ours stands in the tables. Creates none."""
        return probing.detect(kernel, owned)

    def read(self, kernel: Kernel, owned: Owned = OURS) -> LegacySnapshot:
        """All tables that there are, and our sets. Creates none. Raises KernelError, DecodeError."""
        return LegacySnapshot.read(kernel, owned)

    def encode(self, current: Snapshot, desired: Ruleset | None) -> tuple[LegacyStep, ...]:
        """One step for each table and set that changes. Raises UnsupportedError, ConflictError."""
        if not isinstance(current, LegacySnapshot):
            raise TypeError(f"a snapshot of {self.name} is needed, not {type(current).__name__}")
        return encode_steps(current, desired)

    def commit(self, kernel: Kernel, step: Step) -> None:
        """Do one step. Raises KernelError; GenerationChanged where somebody else was faster; LockError."""
        match step:
            case ReplaceTable():
                commit_table(kernel, step)
            case CreateSet() | DestroySet():
                commit_set(kernel, step)
            case _:
                raise TypeError(f"{step.name} is not a step of {self.name}")

    def render(self, ruleset: Ruleset) -> str:
        """The text of iptables-save and ip6tables-save; see `netapply_wire.iptables_save`."""
        return save(ruleset, every_chain=True)

    def render_rule(self, table: Table, chain: Chain, rule: Rule) -> str:
        """One rule as iptables-save prints it: "-A CHAIN …"."""
        if is_strange(rule):
            return STRANGE_RULE
        return f"-A {chain.name}{save_rule(rule, family_of(table))}"


BACKEND: Backend = LegacyBackend()
