"""Native nftables: what libnftables prints of our table against what our own renderer prints, line by line."""

from __future__ import annotations

import re
from collections.abc import Callable

from netapply.backend import OURS, Backend, Owned
from netapply.kernel import Kernel
from netapply.lookups import cgroup_id
from netapply.reader.library import Blocks, list_commands, read_both

_COUNTER = re.compile(r"\bcounter packets \d+ bytes \d+")
_DEFAULT_BURST = re.compile(r"(limit rate \d+/\w+) burst 5 packets")
_UNNAMED_PROTOCOL = re.compile(r"\bl4proto (6|17)\b")
_SYN = "tcp flags syn / fin,syn,rst,ack"  # of nft 0.9.9 to 1.0
_CGROUP = re.compile(r'(socket cgroupv2 level \d+ (?:!= )?)"([^"]*)"')


def compare_text(backend: Backend, namespace: Kernel, owned: Owned) -> tuple[Blocks, Blocks]:
    ruleset, text = read_both(
        backend, namespace, owned, lambda: list_commands(namespace, "list ruleset inet", as_json=False)[0]
    )
    cgroups = {match.path: match.id for *_, rule in ruleset.walk() for match in rule.matches if match.kind == "cgroup"}
    ours = _blocks(backend.render(ruleset), lambda path: cgroups.get(path, 0))
    # nft looks for the directory with this number below here, whatever is mounted there.
    return ours, _blocks(text, lambda path: cgroup_id(path, "/sys/fs/cgroup"))


def _blocks(text: str, cgroup: Callable[[str], int]) -> Blocks:
    """Chains and sets of our table, without what packets, or versions and settings of nft, change in the text."""
    table = f"inet {OURS.table}"
    found: dict[str, list[str]] = {}
    where = ""
    for line in text.splitlines():
        words = line.split()
        if words in ([], ["}"]) and line != "}":
            continue
        if not line.startswith("\t"):
            where = table if line.startswith(f"table {table} {{") else ""
        if not where or not line.startswith("\t"):
            continue
        if line.endswith(" {") and not line.startswith("\t\t"):
            block = line[1:-2]
            where = f"{table} {block[6:]}" if block.startswith("chain ") else block
        lines = found.setdefault(where, [])
        lines += _elements(line.strip()) if where.startswith("set ") else [_line(line.strip(), cgroup)]
    return found


def _elements(line: str) -> list[str]:
    """How many stand on a line is a matter of taste: here, one."""
    return line.removeprefix("elements = { ").removesuffix(" }").removesuffix(",").split(", ")


def _line(line: str, cgroup: Callable[[str], int]) -> str:
    line = _COUNTER.sub("counter", line).replace(_SYN, "tcp flags & (fin | syn | rst | ack) == syn")
    line = _DEFAULT_BURST.sub(r"\1", line)  # printed since nft 1.0.7
    # Without /etc/protocols nft has no names, and with an unknown cgroup no path.
    line = _UNNAMED_PROTOCOL.sub(lambda found: "l4proto " + {"6": "tcp", "17": "udp"}[found[1]], line)
    return _CGROUP.sub(lambda found: f"{found[1]}{cgroup(found[2])}", line)
