"""The history under many writers: no line lost, none torn, none written twice."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from netapply import history
from netapply.cli import main
from netapply.errors import JournalError
from netapply.history import Event
from netapply.journal import Journal

WRITERS, LINES = 4, 400
EVENT = Event(0, "1-2-3", "pod", "apply", "done")


@pytest.fixture
def files(tmp_path: Path) -> Any:
    """Of the files of a journal, all that the history needs."""
    tmp_path.chmod(0o700)
    return SimpleNamespace(directory=os.open(tmp_path, os.O_RDONLY))


def write(files: Any, name: str, count: int) -> None:
    for number in range(count):
        assert not history.record(files, EVENT._replace(name=name, state=number))


def test_writers_at_once_lose_no_line_while_the_file_is_put_aside(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]
) -> None:
    """Every file that is put aside is kept by the test: each is full, and together they have each line once."""
    monkeypatch.setattr(history, "LIMIT", 2000)
    rename = os.rename

    def keeping(source: str, target: str, **where: int) -> None:
        inode = os.stat(source, dir_fd=files.directory).st_ino
        os.link(source, f"kept.{inode}", src_dir_fd=files.directory, dst_dir_fd=files.directory)
        rename(source, target, **where)

    monkeypatch.setattr(os, "rename", keeping)
    children: list[int] = []
    for writer in range(WRITERS):
        if pid := os.fork():
            children.append(pid)
            continue
        try:
            write(files, str(writer), LINES)
            os._exit(0)
        finally:
            os._exit(1)
    read = 0
    while children:
        done, status = os.waitpid(children[0], os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            del children[0]
        for writer in range(WRITERS):  # who reads meanwhile sees no gap, and nothing twice
            seen = [each.state for each in history.events(Journal(str(tmp_path))) if each.name == str(writer)]
            assert seen == list(range(seen[0], seen[0] + len(seen))) if seen else True
            read += 1
    kept = list(tmp_path.glob("kept.*"))
    assert all(path.stat().st_size > 2000 for path in kept)
    lines = [line for path in [*kept, *tmp_path.glob("history")] for line in path.read_bytes().splitlines()]
    found = [history._understood(line) for line in lines]
    assert sorted((each.name, each.state) for each in found if each) == sorted(
        (str(writer), number) for writer in range(WRITERS) for number in range(LINES)
    )
    assert len(kept) > 50
    figure(f"{len(lines)} lines of {WRITERS} processes, {len(kept)} times put aside, read {read} times meanwhile")


def test_a_line_that_does_not_fit_is_taken_back_and_told(files: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write(files, "before", 1)
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:20]))
        assert "not in it" in history.record(files, EVENT)
    write(files, "after", 1)
    assert [each.name for each in _all(files)] == ["before", "after"]


def test_a_line_after_one_that_a_power_cut_tore_is_whole(files: Any, tmp_path: Path) -> None:
    write(files, "before", 1)
    with (tmp_path / "history").open("ab") as file:
        file.write(b'[1,"torn')
    write(files, "after", 1)
    assert [each.name for each in _all(files)] == ["before", "after"]


def test_who_holds_the_file_for_ever_delays_a_change_for_a_while_alone(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr(history, "PATIENCE", 0.05)
    write(files, "before", 1)
    with (tmp_path / "history").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "not in it" in history.record(files, EVENT)
    assert [each.name for each in _all(files)] == ["before"]


def test_a_file_that_cannot_be_read_is_an_error_of_ours(files: Any, tmp_path: Path) -> None:
    (tmp_path / "history").symlink_to("elsewhere")
    with pytest.raises(JournalError, match=os.strerror(errno.ELOOP)):
        _all(files)


def _all(files: Any) -> tuple[Event, ...]:
    return history.events(Journal(os.readlink(f"/proc/self/fd/{files.directory}")))


def test_a_namespace_that_is_gone_is_told_by_the_name_that_it_had(
    files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(files, "netapply-test-gone", 1)
    write(files, "another", 1)
    assert main(["history", "-N", "netapply-test-gone", "--state-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "netapply-test-gone" in said
    assert "another" not in said
    assert main(["history", "-N", "netapply-test-never", "--state-dir", str(tmp_path)]) == 1
    assert "does not exist" in capsys.readouterr().err
