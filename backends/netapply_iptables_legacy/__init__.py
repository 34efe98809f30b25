"""iptables-legacy: the tables of ip_tables and ip6_tables, by socket options.

A rule set becomes one replacement per table, each atomic and of proven content, all in one go under the xtables lock.
To look whether ours is there needs little of this package: what reads and writes tables is imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from netapply.backend import OURS, STRANGE_RULE, Dialect, Probe, is_strange

if TYPE_CHECKING:
    from netapply.backend import Backend, Owned, Snapshot, Step
    from netapply.kernel import Kernel
    from netapply.ruleset import Chain, Rule, Ruleset, Table
    from netapply_iptables_legacy.encode import LegacyStep
    from netapply_iptables_legacy.snapshot import LegacySnapshot

__all__ = ["BACKEND", "LegacyBackend"]


class LegacyBackend:
    """See `netapply.backend.Backend`."""

    name = "iptables-legacy"
    dialect = Dialect("split", port_slots=15, sets_from=32)  # XT_MULTI_PORTS is 15

    def probe(self, kernel: Kernel) -> Probe:
        """Whether this dialect works here. Creates and changes nothing."""
        from netapply_iptables_legacy.probe import probe

        return probe(kernel)

    def detect(self, kernel: Kernel, owned: Owned = OURS) -> bool:
        """Whether anything of ours stands in the tables. Creates none."""
        from netapply_iptables_legacy.probe import detect

        return detect(kernel, owned)

    def read(self, kernel: Kernel, owned: Owned = OURS) -> LegacySnapshot:
        """All tables that there are, and our sets. Creates none. Raises KernelError, DecodeError."""
        from netapply_iptables_legacy.snapshot import LegacySnapshot

        return LegacySnapshot.read(kernel, owned)

    def encode(self, current: Snapshot, desired: Ruleset | None) -> tuple[LegacyStep, ...]:
        """One step for each set and one for all tables that change. Raises UnsupportedError, ConflictError."""
        from netapply_iptables_legacy.encode import encode_steps

        return encode_steps(current, desired)

    def commit(self, kernel: Kernel, step: Step) -> None:
        """Do one step. Raises KernelError; GenerationChanged where somebody else was faster; LockError."""
        from netapply_iptables_legacy.commit import commit_step

        commit_step(kernel, step)

    def render(self, ruleset: Ruleset) -> str:
        """The text of iptables-save and ip6tables-save; see `netapply_wire.iptables_save`."""
        from netapply_wire.iptables_save import save

        return save(ruleset, every_chain=True)

    def render_rule(self, table: Table, chain: Chain, rule: Rule) -> str:
        """One rule as iptables-save prints it: "-A CHAIN …"."""
        from netapply_wire.iptables_save import family_of, save_rule

        if is_strange(rule):
            return STRANGE_RULE
        return f"-A {chain.name}{save_rule(rule, family_of(table))}"


BACKEND: Backend = LegacyBackend()
