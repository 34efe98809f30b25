"""A backend by somebody else: it writes nft(8)'s text, and libnftables does the rest. See docs/writing-a-backend.md.
What it wants stands beside the rules, as comments; the rules are that, as long as nft lists them as the text says.
"""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import nftables  # type: ignore[import-untyped]  # pip-nftables has no types

from netapply.backend import OURS, STRANGE, Counters, Dialect, Owned, Probe, find_backend
from netapply.errors import KernelError
from netapply.kernel import Kernel
from netapply.record import hexed, ruleset_from_json, ruleset_to_json
from netapply.ruleset import Chain, Rule, Ruleset, Table

RECORD, PIECE = "zz-record", 120  # bytes of a comment: nft takes 128
STRANGER = Ruleset((Table("inet", "netapply", (Chain(f"{STRANGE}changed"),)),))


class Snapshot(NamedTuple):  # of the table `name`
    name: str
    ruleset: Ruleset | None
    counters: Counters
    foreign: object


class Step(NamedTuple):  # one batch
    name: str
    text: str


class NftText:
    """The dialect of nft's text."""

    name = "nft-text"
    dialect = Dialect("inet", port_slots=0, sets_from=2)

    def probe(self, kernel: Kernel) -> Probe:
        """As native nftables, without cgroups: libnftables looks for them in one place alone."""
        found = find_backend("nftables").probe(kernel)
        return found._replace(missing={**found.missing, "cgroups": "nothing adds it to this backend"}, in_use=False)

    def detect(self, kernel: Kernel, owned: Owned = OURS) -> bool:
        """Whether our table is there."""
        return bool(_listed(kernel, f"list table inet {_table(owned)}"))

    def read(self, kernel: Kernel, owned: Owned = OURS) -> Snapshot:
        """Our table, and the text of all others."""
        name = _table(owned)
        text = _listed(kernel, f"list table inet {name}")
        others = [each.strip() for each in re.split(r"\n(?=table )", _listed(kernel, "list ruleset"))]
        others = [each for each in others if not each.startswith(f"table inet {name} ")]
        if not text:
            return Snapshot(name, None, {}, others)
        wanted = _recorded(text)
        as_meant = wanted is not None and _plain(text) == _plain(_rendered(name, wanted))
        found = json.loads(_listed(kernel, f"list table inet {name}", as_json=True))
        return Snapshot(name, wanted if as_meant else STRANGER, dict(_counters(found)), others)

    def encode(self, current: Snapshot, desired: Ruleset | None) -> tuple[Step, ...]:
        """One batch: the old table goes, the new one comes."""
        wanted = desired if desired and desired.tables else None
        gone = f"delete table inet {current.name}\n" if current.ruleset else ""
        text = gone + (_whole(current.name, wanted) if wanted else "")
        return () if wanted == current.ruleset else (Step(f"table inet {current.name}", text),)

    def commit(self, kernel: Kernel, step: Step) -> None:
        """Have libnftables do it."""
        status, _, error = _run(kernel, step.text)
        if status:
            raise KernelError(f"{step.name}: libnftables says {error.strip()}", 22)

    def render(self, ruleset: Ruleset) -> str:
        """What nft lists."""
        return _rendered(_table(OURS), ruleset)

    def render_rule(self, table: Table, chain: Chain, rule: Rule) -> str:
        """As nft lists it."""
        return find_backend("nftables").render_rule(table, chain, rule)


def _table(owned: Owned) -> str:
    return f"{owned.table}-text"


def _rendered(name: str, ruleset: Ruleset) -> str:
    return find_backend("nftables").render(ruleset).replace("table inet netapply {", f"table inet {name} {{")


def _plain(text: str) -> list[str]:
    """Sets and chains in one order, without counters and the record; a priority that only nft 1.1 names as a number."""
    text = re.sub(r"counter packets \d+ bytes \d+", "counter", text)
    text = text.replace("tcp flags syn / fin,syn,rst,ack", "tcp flags & (fin | syn | rst | ack) == syn")  # of nft 1.0
    text = re.sub(r"(?<=hook output priority )dstnat ([+-]) 5", lambda sign: "-95" if sign[1] == "+" else "-105", text)
    blocks = (re.sub(r"\s+", " ", each).rstrip("} ") for each in re.split(r"\n(?=\t(?:set|chain) )", text))
    return sorted(block for block in blocks if RECORD not in block)


def _whole(name: str, ruleset: Ruleset) -> str:
    """The table with its record."""
    packed = base64.b64encode(zlib.compress(json.dumps(ruleset_to_json(ruleset), default=hexed).encode(), 9)).decode()
    record = "\n".join(f'\t\treturn comment "{packed[at : at + PIECE]}"' for at in range(0, len(packed), PIECE))
    return _rendered(name, ruleset).rstrip().removesuffix("}") + f"\n\tchain {RECORD} {{\n{record}\n\t}}\n}}\n"


def _recorded(text: str) -> Ruleset | None:
    """The rule set that the record in a listing speaks of."""
    chain = re.search(rf"\tchain {RECORD} {{(.*?)\n\t}}", text, re.DOTALL)
    try:
        packed = "".join(re.findall(r'return comment "(.*?)"', chain[1] if chain else ""))
        return ruleset_from_json(json.loads(zlib.decompress(base64.b64decode(packed))))
    except (ValueError, zlib.error):
        return None


def _counters(found: Any) -> Iterator[tuple[tuple[str, str, str, int], tuple[int, int]]]:
    """What rules counted. The second half of a TPROXY rule, which drops, has no counter."""
    at: dict[str, int] = {}
    for rule in (each["rule"] for each in found["nftables"] if "rule" in each):
        for counter in (each["counter"] for each in rule["expr"] if "counter" in each):
            place = at[rule["chain"]] = at.get(rule["chain"], -1) + 1
            yield ("inet", "netapply", rule["chain"], place), (counter["packets"], counter["bytes"])


def _listed(kernel: Kernel, command: str, *, as_json: bool = False) -> str:
    """What nft lists, without counters unless in JSON; "" where there is no such thing."""
    status, output, _ = _run(kernel, command, as_json=as_json)
    return "" if status else output


def _run(kernel: Kernel, text: str, *, as_json: bool = False) -> tuple[int, str, str]:
    def work() -> tuple[int, str, str]:
        context = nftables.Nftables()
        context.set_json_output(as_json)
        context.set_stateless_output(not as_json)
        status, *said = context.cmd(text.encode())
        return status, said[0].decode(), said[1].decode()

    return kernel.inside(work)


BACKEND = NftText()
