"""A one-shot command imports what it needs, and reads its words without argparse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netapply.cli.arguments import UsageError, build_parser
from netapply.cli.words import COMMANDS, Arguments, read
from tests.netns import PATIENCE, Netns

PLAN = '{"apiVersion": "netapply/v1", "outbound": {"ports": {"exclude": [15020]}}}\n'
#: Each of these takes longer to import than a dialect.
SLOW = {
    *("argparse", "asyncio", "dataclasses", "difflib", "gettext", "hashlib", "inspect", "ipaddress", "locale"),
    *("pathlib", "pyroute2", "shutil", "structlog", "tempfile", "tomllib", "traceback", "yaml"),
}
READS_AND_WRITES = {
    "nftables": {
        f"netapply_nftables.{name}" for name in ("changes", "decode", "encode", "probe", "render", "snapshot")
    },
    "iptables-nft": {f"netapply_iptables_nft.{name}" for name in ("decode", "encode", "probe", "snapshot", "update")},
    "iptables-legacy": {f"netapply_iptables_legacy.{name}" for name in ("commit", "encode", "rules", "snapshot")},
}
ALL = "print(*sorted(sys.modules))"


@pytest.fixture
def pod(netns: Netns) -> Netns:
    """A namespace with an address: the drop-in wants one."""
    netns.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth1")
    netns.run("ip", "link", "set", "eth0", "up")
    netns.run("ip", "addr", "add", "10.99.0.2/24", "dev", "eth0")
    return netns


def loaded_by(*words: str) -> set[str]:
    """The modules that a process has imported when the command ends."""
    code = f"import sys; from netapply.cli import main; code = main(); {ALL}; sys.exit(code)"
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("backend", READS_AND_WRITES)
@pytest.mark.parametrize("command", ["apply", "istio-iptables"])
def test_an_apply_imports_no_slow_module_and_one_dialects_encoders(
    pod: Netns, tmp_path: Path, command: str, backend: str
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(PLAN)
    where = ("--quiet", "--netns", pod.path, str(plan)) if command == "apply" else ("--network-namespace", pod.path)
    loaded = loaded_by(command, "--backend", backend, *where)
    assert not SLOW & loaded
    assert not {module for name in READS_AND_WRITES if name != backend for module in READS_AND_WRITES[name] & loaded}
    assert READS_AND_WRITES[backend] & loaded  # or else the names above are out of date


def test_the_names_of_the_modules_that_are_not_imported_exist() -> None:
    names = [*SLOW - {"structlog"}, *(name for each in READS_AND_WRITES.values() for name in each)]
    subprocess.run([sys.executable, "-c", f"import {', '.join(names)}"], check=True, timeout=PATIENCE)


# --- the words -----------------------------------------------------------------------------------------------

WORDS = [
    *("plan.yaml", "-", "", "a b", "-o", "json", "text", "--output=json", "--output", "-ojson", "-o=json", "-N", "pod"),
    *("--netns=pod", "--netns=", "-Npod", "--host", "--host=1", "--lock-timeout", "5", "-5", "nan", "1e9", "x"),
    *("--lock-timeout=0.5", "--state-dir", "/run/x", "--backend", "nftables", "--layout", "istio", "--layout=bad"),
    *("--quiet", "--quie", "--deep", "--all", "--", "--unknown", "-h9"),
]
PARSER = build_parser(lean=True)


@given(st.sampled_from(sorted(COMMANDS)), st.lists(st.sampled_from(WORDS), max_size=6))
def test_what_is_read_without_argparse_is_what_argparse_reads(command: str, words: list[str]) -> None:
    found = read([command, *words])
    if found is not None:
        assert vars(found) == vars(PARSER.parse_args([command, *words], Arguments()))


@pytest.mark.parametrize("words", [
    "apply plan.yaml", "apply -N pod --backend nftables --quiet -", "apply --netns=pod -o json --layout istio p.json",
    "clean --host --state-dir /run/x", "verify", "verify --deep plan.yaml", "show --all --lock-timeout 0.5",
    "render --backend iptables-nft plan.yaml", "diff -o=json plan.yaml",
])  # fmt: skip
def test_the_everyday_command_lines_are_read_without_argparse(words: str) -> None:
    found = read(words.split())
    assert found is not None
    assert vars(found) == vars(PARSER.parse_args(words.split(), Arguments()))


@pytest.mark.parametrize("words", [
    [], ["--version"], ["detect"], ["apply"], ["apply", "-h"], ["apply", "a", "b"], ["apply", "--quie", "a"],
    ["apply", "--netns"], ["apply", "a", "--layout", "bad"], ["clean", "--lock-timeout", "-1"],
    ["clean", "--lock-timeout=86401"], ["apply", "--quiet=1", "a"], ["apply", "--", "a"],
])  # fmt: skip
def test_the_others_are_left_to_argparse(words: list[str]) -> None:
    assert read(words) is None


def test_argparse_tells_what_is_wrong() -> None:
    with pytest.raises(UsageError, match="'86401' is not a number of seconds from 0 to 86400"):
        PARSER.parse_args(["clean", "--lock-timeout=86401"], Arguments())
