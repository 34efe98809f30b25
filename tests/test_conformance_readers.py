"""Readers that are not ours agree with what stands in each case of the suite: libnftables, and the stock tools.

iptables-save of three Debian releases and nft of three; see tests/userlands.py. READERS=all takes every case of level
full; else it is one of seven of level core.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from netapply.backend import BUILT_IN, find_backend
from netapply.conformance.cases import cases_of
from netapply.conformance.runner import Runner
from netapply.conformance.stage import Standing
from netapply.namespace import Namespace
from netapply.ownership import ownership
from netapply.reader import deep_changes
from netapply.ruleset import FAMILIES
from tests import userlands
from tests.test_iptables_nft_rules import by_chain, section
from tests.test_readers import PROGRAMS, as_numbers
from tests.userlands import Userland

EVERY = bool(os.environ.get("READERS") == "all")


def output(standing: Standing, *command: str) -> str:
    entered = ["nsenter", f"--net={standing.path}", *command]
    return subprocess.run(entered, capture_output=True, text=True, timeout=30, check=True).stdout


def by_tool(userland: Userland, standing: Standing) -> Iterator[str]:
    """Whether iptables-save, or nft, prints what we render."""
    rendered = find_backend(standing.backend).render(standing.ruleset)
    if standing.backend == "nftables":
        if not standing.ruleset.tables:
            return
        text = output(standing, userland.tool("nft"), "-s", "list", "table", "inet", "netapply")
        # nft looks for the cgroup below /sys/fs/cgroup, where version 2 may be mounted on a directory of its own.
        text = text.replace('"unified/', '"')
        if blocks(as_numbers(text)) != blocks(rendered.replace(" packets 0 bytes 0", "")):
            yield f"nft of {userland.suite} lists something else:\n{text}\nrendered:\n{rendered}"
        return
    for family in FAMILIES:
        tool = f"{PROGRAMS[family]}{standing.backend.removeprefix('iptables')}-save"
        saved, wanted = by_chain(output(standing, userland.tool(tool))), by_chain(section(rendered, family))
        if saved != wanted:
            yield f"{tool} of {userland.suite} prints {saved}, and not {wanted}"


def blocks(text: str) -> list[str]:
    """Sets and chains in one order: an update leaves them in that in which they were made.

    nft 0.9.8 says of the family what looking up an address in a set says too.
    """
    text = re.sub(r"(?m)meta nfproto ipv[46] (?=.*ip6? [sd]addr (?:!= )?@)", "", text)
    return sorted(" ".join(each.split()).rstrip("} ") for each in text.replace("\tset ", "\tchain ").split("\tchain "))


def by_library(standing: Standing) -> Iterator[str]:
    """Whether libnftables reads what our decoder reads."""
    if standing.backend == "iptables-legacy":
        return
    with Namespace.open(standing.path) as namespace:
        for each in deep_changes(namespace, standing.backend, ownership(standing.layout, (standing.ruleset,))):
            yield f"{each.kind} {each.where}: {each.what}"


@pytest.mark.parametrize("backend", BUILT_IN)
def test_all_readers_agree_with_what_stands(backend: str, figure: Callable[[str], None]) -> None:
    found = [each for suite in userlands.SUITES if (each := userlands.find(suite))]
    if len(found) < len(userlands.SUITES) and os.environ.get("CI"):
        pytest.fail("readers are not there; make userlands")
    looked: list[str] = []

    def read(standing: Standing) -> Sequence[str]:
        looked.append(standing.path)
        # nft 0.9.8 ends by SIGSEGV when it lists a cgroup match.
        crashes = standing.backend == "nftables" and speaks_of_cgroups(standing)
        able = [each for each in found if not (each.suite == "bullseye" and crashes)]
        return [*by_library(standing), *(wrong for each in able for wrong in by_tool(each, standing))]

    cases = (
        cases_of("full") if EVERY else [*cases_of("core")[::7], *(c for c in cases_of("full") if "cgroup" in c.name)]
    )
    with Runner(backend, readers=(read,)) as runner:
        report = runner.report([runner.run(case) for case in cases if case.story != "model"])
    failed: dict[str, Any] = {each.case: each.differences for each in report.outcomes if each.status == "failed"}
    assert not failed
    assert report.taint == 0
    assert report.complaints == ()
    figure(f"{len(looked)} rule sets read by libnftables and {len(found)} generations of tools, {report.seconds:.0f} s")


def speaks_of_cgroups(standing: Standing) -> bool:
    return any(match.kind == "cgroup" for *_, rule in standing.ruleset.walk() for match in rule.matches)
