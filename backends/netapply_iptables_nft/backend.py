"""The backend `iptables-nft`: rules that iptables-nft itself can read, check and delete, written by nfnetlink alone.

All tables of both families change in one batch, so there is no moment at which only some of them stand.
"""

from __future__ import annotations

from collections.abc import Mapping

from netapply.backend import OURS, STRANGE_RULE, Backend, Dialect, Owned, Probe, Step, is_strange
from netapply.backend import Snapshot as AnySnapshot
from netapply.kernel import Kernel
from netapply.ruleset import Chain, Rule, Ruleset, Table
from netapply_iptables_nft.operations import Change
from netapply_iptables_nft.probe import probe_kernel
from netapply_iptables_nft.snapshot import Snapshot
from netapply_iptables_nft.tables import detect_chains, read_tables
from netapply_iptables_nft.update import Batch, Steps, encode_steps
from netapply_wire.ipset import CreateSet, DestroySet, commit_set, list_sets, set_index
from netapply_wire.iptables_save import save, save_rule
from netapply_wire.nfnetlink import Operation, read_consistent, send_batch
from netapply_wire.xtables import SET_INDEX


class IptablesNft:
    """See `netapply.backend.Backend`."""

    name = "iptables-nft"
    dialect = Dialect("split", port_slots=15, sets_from=32)

    def probe(self, kernel: Kernel) -> Probe:
        """Whether nf_tables takes what iptables-nft writes. Changes nothing; the kernel may load modules."""
        return probe_kernel(kernel)

    def detect(self, kernel: Kernel, owned: Owned = OURS) -> bool:
        """Whether chains of ours stand here."""
        return detect_chains(kernel, owned.prefixes)

    def read(self, kernel: Kernel, owned: Owned = OURS) -> Snapshot:
        """The four tables of ip and ip6 as they are at one generation, and the sets of ours."""
        generation, tables = read_consistent(kernel, lambda at: (at, read_tables(kernel)))
        return Snapshot(generation, tables, list_sets(kernel, owned.sets), owned)

    def encode(self, current: AnySnapshot, desired: Ruleset | None) -> Steps:
        """New sets, one batch, old sets. Raises UnsupportedError, ConflictError."""
        if not isinstance(current, Snapshot):
            raise TypeError(f"a snapshot of another backend: {current!r}")
        return encode_steps(current, desired)

    def commit(self, kernel: Kernel, step: Step) -> None:
        """Do one step. Raises KernelError, GenerationChanged."""
        if isinstance(step, CreateSet | DestroySet):
            commit_set(kernel, step)
        elif isinstance(step, Batch):
            send_batch(kernel, _with_set_indices(kernel, step), step.generation)
        else:
            raise TypeError(f"a step of another backend: {step!r}")

    def render(self, ruleset: Ruleset) -> str:
        """What iptables-nft-save and ip6tables-nft-save print of it; see netapply_wire.iptables_save."""
        return save(ruleset, every_chain=False)

    def render_rule(self, table: Table, chain: Chain, rule: Rule) -> str:
        """One rule as iptables-nft-save prints it, without its table."""
        if is_strange(rule):
            return STRANGE_RULE
        return f"-A {chain.name}{save_rule(rule, 'ip6' if table.family == 'ip6' else 'ip')}"


def _with_set_indices(kernel: Kernel, batch: Batch) -> list[Operation]:
    """xt_set wants the number that the kernel gave to a set, which is known only now."""
    needed = {name for change in batch.changes for _, name in change.sets}
    indices = {name: set_index(kernel, name) for name in needed}
    return [_patched(change, indices) if change.sets else change.operation for change in batch.changes]


def _patched(change: Change, indices: Mapping[str, int]) -> Operation:
    body = bytearray(change.operation.body)
    for offset, name in change.sets:
        SET_INDEX.pack_into(body, offset, indices[name])
    return change.operation._replace(body=bytes(body))


BACKEND: Backend = IptablesNft()
