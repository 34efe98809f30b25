"""The backend `iptables-nft`: rules that iptables-nft itself can read, check and delete, written by nfnetlink alone.

All tables of both families change in one batch, so there is no moment at which only some of them stand. To look
whether ours is there needs little of this package: what reads and writes rules is imported when it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from netapply.backend import OURS, STRANGE_RULE, Backend, Dialect, Owned, Probe, Step, is_strange
from netapply.backend import Snapshot as AnySnapshot
from netapply.kernel import Kernel
from netapply.ruleset import Chain, Rule, Ruleset, Table
from netapply.values import NamedTuple
from netapply_iptables_nft.tables import Dumped, detect_chains, dump_tables, tables_of
from netapply_wire import nfnetlink
from netapply_wire.nfnetlink import UNTOUCHED, Operation, generation, read_consistent, send_batch

if TYPE_CHECKING:
    from netapply_iptables_nft.operations import Change
    from netapply_iptables_nft.snapshot import Snapshot
    from netapply_iptables_nft.update import Steps


class IptablesNft:
    """See `netapply.backend.Backend`."""

    name = "iptables-nft"
    dialect = Dialect("split", port_slots=15, sets_from=32)

    def probe(self, kernel: Kernel) -> Probe:
        """Whether nf_tables takes what iptables-nft writes. Changes nothing; the kernel may load modules."""
        from netapply_iptables_nft.probe import probe_kernel

        return probe_kernel(kernel)

    def detect(self, kernel: Kernel, owned: Owned = OURS) -> bool:
        """Whether chains of ours stand here."""
        return any(name.startswith(owned.prefixes) for name in _look(kernel).names)

    def read(self, kernel: Kernel, owned: Owned = OURS) -> Snapshot:
        """The four tables of ip and ip6 as they are at one generation, and the sets of ours."""
        from netapply_iptables_nft.snapshot import Snapshot, contents_of
        from netapply_wire.ipset import list_sets

        known = _look(kernel, ())
        dumped = known.dumped
        if dumped is None:
            known = read_consistent(kernel, lambda at: _Known(at, (), dump_tables(kernel)), known.generation)
            dumped = known.dumped or Dumped()
            names = tuple(name for table in tables_of(dumped).values() for name in table.chains)
            if not dumped.may_vanish:
                kernel.memory[self.name] = known._replace(names=names)
        return Snapshot(known.generation, contents_of(dumped, list_sets(kernel, owned.sets), owned))

    def encode(self, current: AnySnapshot, desired: Ruleset | None) -> Steps:
        """New sets, one batch, old sets. Raises UnsupportedError, ConflictError."""
        from netapply_iptables_nft.snapshot import Snapshot
        from netapply_iptables_nft.update import encode_steps

        if not isinstance(current, Snapshot):
            raise TypeError(f"a snapshot of another backend: {current!r}")
        return encode_steps(current, desired)

    def commit(self, kernel: Kernel, step: Step) -> None:
        """Do one step. Raises KernelError, GenerationChanged."""
        from netapply_iptables_nft.update import Batch
        from netapply_wire.ipset import CreateSet, DestroySet, commit_set

        if isinstance(step, CreateSet | DestroySet):
            commit_set(kernel, step)
        elif isinstance(step, Batch):
            send_batch(kernel, _encoded(kernel, step.changes), step.generation)
        else:
            raise TypeError(f"a step of another backend: {step!r}")

    def render(self, ruleset: Ruleset) -> str:
        """What iptables-nft-save and ip6tables-nft-save print of it; see netapply_wire.iptables_save."""
        from netapply_wire.iptables_save import save

        return save(ruleset, every_chain=False)

    def render_rule(self, table: Table, chain: Chain, rule: Rule) -> str:
        """One rule as iptables-nft-save prints it, without its table."""
        if is_strange(rule):
            return STRANGE_RULE
        from netapply_wire.iptables_save import save_rule

        return f"-A {chain.name}{save_rule(rule, 'ip6' if table.family == 'ip6' else 'ip')}"


class _Known(NamedTuple):
    """What stood at one generation, which nothing but a counter changes without raising: sets are another matter.

    `names` are those of all chains in our tables; `dumped` is None where nobody looked at more.
    """

    generation: int
    names: tuple[str, ...]
    dumped: Dumped | None


def _look(kernel: Kernel, names: tuple[str, ...] | None = None) -> _Known:
    """What is known of the present generation; the names of chains are asked for where none are given."""
    at = generation(kernel)
    if at == UNTOUCHED:
        return _Known(at, (), Dumped())
    known = kernel.memory.get(BACKEND.name)
    if isinstance(known, _Known) and known.generation == at:
        return known
    if names is not None:
        return _Known(at, names, None)
    # Should somebody be faster: then this is what stands at a generation that is gone, and nobody asks for it again.
    found = kernel.memory[BACKEND.name] = _Known(at, detect_chains(kernel), None)
    return found


def _encoded(kernel: Kernel, changes: tuple[Change, ...]) -> nfnetlink.Batch:
    """xt_set wants the number that the kernel gave to a set, which is known only now."""
    from netapply_iptables_nft.update import encoded

    needed = {name for change in changes for _, name in change.sets}
    if not needed:
        return encoded(changes)
    from netapply_wire.ipset import set_index

    indices = {name: set_index(kernel, name) for name in needed}
    return nfnetlink.encode_batch([_patched(each, indices) if each.sets else each.operation for each in changes])


def _patched(change: Change, indices: Mapping[str, int]) -> Operation:
    from netapply_wire.xtables import SET_INDEX

    body = bytearray(change.operation.body)
    for offset, name in change.sets:
        SET_INDEX.pack_into(body, offset, indices[name])
    return change.operation._replace(body=bytes(body))


BACKEND: Backend = IptablesNft()
