"""The units for systemd, and how they are installed. On a real systemd they are tested by tests/systemd."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from netapply.cli import main
from netapply.cli.units import PLACES, render, unit_of
from netapply.errors import NetapplyError

PYTHON = "/usr/bin/python3"
analyze = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


@pytest.fixture(autouse=True)
def installed_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests themselves may run from below /tmp, where a service would see nothing of them."""
    monkeypatch.setattr(sys, "executable", PYTHON)


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """All unit files, rendered for an interpreter that is there."""
    for name in PLACES:
        if not name.endswith(".conf"):
            (tmp_path / name).write_text(render(name, unit_of(PYTHON, [])))
    return tmp_path


@analyze
def test_the_service_is_exposed_as_little_as_2_0(units: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(units / "netapply.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"exposure level for netapply.service: ([\d.]+)", done.stdout)
    assert found, done.stderr
    assert float(found[1]) <= 2.0
    assert done.returncode == 0


@analyze
def test_systemd_has_nothing_to_say_against_the_units(units: Path) -> None:
    names = [str(path) for path in units.iterdir()]
    done = subprocess.run(["systemd-analyze", "verify", *names], capture_output=True, text=True, check=False)
    ours = [line for line in done.stderr.splitlines() if "netapply" in line]
    assert (done.returncode, ours) == (0, [])


def test_no_placeholder_is_left() -> None:
    for name in PLACES:
        assert not re.search(r"@[A-Z]+@", render(name, unit_of(PYTHON, [])))


def test_flags_of_the_agent_become_the_unit(tmp_path: Path) -> None:
    flags = ["--poll", "2", "--metrics", "127.0.0.1:9000", "--state=/srv/x y%", "--read-group=ops", "--host"]
    unit = unit_of(PYTHON, flags)
    service = render("netapply.service", unit)
    start = next(line for line in service.splitlines() if line.startswith("ExecStart="))
    assert start == f'ExecStart={PYTHON} -I -m netapply agent --poll 2 "--state=/srv/x y%%" --read-group=ops --host'
    assert "\nReadWritePaths=/srv/x y%%\n" in service
    assert "SocketGroup=ops\n" in render("netapply-read.socket", unit)
    assert "ListenStream=127.0.0.1:9000\n" in render("netapply-metrics.socket", unit)
    assert "g ops - -" in render("netapply.sysusers.conf", unit)


@pytest.mark.parametrize(
    ("library", "backoff"),
    [
        ("usr/lib/systemd/libsystemd-shared-252.so", False),
        ("usr/lib/x86_64-linux-gnu/systemd/libsystemd-shared-257.so", True),
        ("usr/lib64/systemd/libsystemd-shared-256.5-1.fc41.so", True),
        ("usr/lib/systemd/nothing", False),
    ],
)
def test_a_systemd_that_knows_how_tries_more_and_more_rarely(tmp_path: Path, library: str, backoff: bool) -> None:
    (tmp_path / library).parent.mkdir(parents=True)
    (tmp_path / library).touch()
    assert main(["install-unit", "--root", str(tmp_path)]) == 0
    written = (tmp_path / PLACES["netapply.service"]).read_text()
    assert ("RestartSteps=8\nRestartMaxDelaySec=60\n" in written) is backoff
    assert "RestartSec=1\n" in written
    assert "StartLimitIntervalSec=0\n" in written


@pytest.mark.parametrize(
    ("python", "home"),
    [("/usr/bin/python3", "yes"), ("/opt/netapply/bin/python", "yes"), ("/home/me/venv/bin/python", "read-only")],
)
def test_homes_are_hidden_unless_the_program_lies_in_one(python: str, home: str) -> None:
    assert f"ProtectHome={home}\n" in render("netapply.service", unit_of(python, []))


@pytest.mark.parametrize(
    ("python", "flags"),
    [
        (PYTHON, ["--socket", "/run/x"]),
        (PYTHON, ["--odd"]),
        (PYTHON, ["--poll", "soon"]),
        (PYTHON, ["--state", "/a\nUser=nobody"]),
        ("/tmp/venv/bin/python", []),
    ],
)
def test_what_cannot_work_as_a_unit_is_refused(python: str, flags: list[str]) -> None:
    with pytest.raises(NetapplyError):
        render("netapply.service", unit_of(python, flags))


def test_install_unit_writes_all_says_what_to_run_and_does_it_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["install-unit", "--root", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("written") == len(PLACES)
    assert "next: systemctl enable --now netapply.socket netapply-read.socket netapply.service" in said
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(PLACES.values())
    assert f"ExecStart={sys.executable} -I" in (tmp_path / PLACES["netapply.service"]).read_text()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert said.count("unchanged") == len(PLACES)
    assert "next" not in said
    assert main([*words, "--", "--poll", "3"]) == 0
    assert "next: systemctl restart netapply.service" in capsys.readouterr().out


def test_remove_takes_what_was_written_and_the_links_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["install-unit", "--root", str(tmp_path)]
    main(words)
    wants = tmp_path / "etc/systemd/system/sockets.target.wants"
    wants.mkdir()
    (wants / "netapply.socket").symlink_to("/etc/systemd/system/netapply.socket")
    other = tmp_path / "etc/systemd/system/other.service"
    other.write_text("[Service]\n")
    assert main([*words, "--remove"]) == 0
    assert [path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()] == [other]
    assert "next: systemctl daemon-reload" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [[], ["--remove"]])
def test_a_unit_of_somebody_else_is_left_and_nothing_is_done(
    tmp_path: Path, flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / PLACES["netapply.service"]
    path.parent.mkdir(parents=True)
    path.write_text("[Service]\nExecStart=/bin/mine\n")
    assert main(["install-unit", "--root", str(tmp_path), *flag]) == 1
    assert "not by netapply install-unit" in capsys.readouterr().err
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [path]
