"""Names that are not UTF-8: the kernel takes any bytes, and whoever may change the rules can put them among ours."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest

import netapply
from netapply.backend import BUILT_IN
from netapply.cli.output import Printer
from netapply.namespace import Namespace
from netapply.plan import CapturePlan
from netapply_wire.nfnetlink import NFPROTO_INET, NFT_MSG_NEWCHAIN, NLM_F_CREATE, Operation, send_batch, string
from tests.netns import Netns

NAME = "NETAPPLY_\udcff"


def put_among_ours(netns: Netns, backend: str) -> None:
    """A chain of that name where ours are."""
    if backend == "nftables":
        body = string(1, "netapply") + string(3, NAME)
        with Namespace.open(netns.path) as namespace:
            send_batch(namespace, [Operation(NFT_MSG_NEWCHAIN, NFPROTO_INET, body, NLM_F_CREATE, "add chain")], None)
        return
    tool = f"iptables-{backend.removeprefix('iptables-')}"
    netns.run(tool, "-t", "nat", "-N", NAME)
    netns.run(tool, "-t", "nat", "-A", NAME, "-o", "e\udcff", "-j", "RETURN")
    netns.run(tool, "-t", "nat", "-A", "OUTPUT", "-j", NAME)


@pytest.mark.parametrize("backend", BUILT_IN)
def test_a_name_that_is_not_utf8_is_seen_and_removed(netns: Netns, backend: str) -> None:
    with netapply.open(netns.path) as capture:
        capture.apply(CapturePlan(), backend=backend)
        put_among_ours(netns, backend)
        assert any(NAME in change.where for change in capture.verify().changes)
        assert capture.apply(CapturePlan(), backend=backend).changed
        assert not capture.verify().changes
        put_among_ours(netns, backend)
        assert capture.clean().changed
        assert not any(each.ruleset.tables for each in capture.live(backend=backend))


@pytest.mark.parametrize("backend", BUILT_IN)
@pytest.mark.parametrize("output", ["text", "json"])
def test_the_command_shows_a_name_that_is_not_utf8(netns: Netns, backend: str, output: str) -> None:
    with netapply.open(netns.path) as capture:
        capture.apply(CapturePlan(), backend=backend)
    put_among_ours(netns, backend)
    command = [sys.executable, "-m", "netapply", "verify", "--netns", netns.path, "--output", output]
    done = subprocess.run(
        command, capture_output=True, timeout=60, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"}
    )
    assert done.stderr == b""
    assert done.returncode == 3
    assert b"NETAPPLY_\\udcff" in done.stdout


@pytest.mark.parametrize("colour", [False, True])
def test_what_a_terminal_would_obey_is_shown_and_not_sent(monkeypatch: pytest.MonkeyPatch, colour: bool) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: colour)
    monkeypatch.delenv("NO_COLOR", raising=False)
    printer = Printer("text", out, io.StringIO())
    printer.line(f"{printer.paint('drift', 'red')} in \x1b]0;title\x07 \x1b[2J \u202eesrever \x9b1m \udcff\tü")
    assert out.getvalue().endswith(" in \\x1b]0;title\\x07 \\x1b[2J \\u202eesrever \\x9b1m \\udcff\tü\n")
    assert out.getvalue().startswith("\x1b[31mdrift\x1b[0m" if colour else "drift")
