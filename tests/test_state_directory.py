"""The state directory is ours alone, whoever may write beside it: journal, history and the agent's memory alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import netapply
from netapply import history
from netapply.agent import store
from netapply.errors import JournalError, NetapplyError
from netapply.journal import Journal
from netapply.plan import CapturePlan
from tests.netns import Netns

SOMEBODY = 4242


def _journal(netns: Netns, place: Path) -> None:
    with netapply.open(netns.path, state_directory=str(place)) as capture:
        capture.apply(CapturePlan())


def _history(netns: Netns, place: Path) -> None:
    history.events(Journal(str(place)))


def _memory(netns: Netns, place: Path) -> None:
    store.save(str(place), store.Kept())


each_user = pytest.mark.parametrize("use", [_journal, _history, _memory])


@each_user
@pytest.mark.parametrize("kind", ["link", "link above", "mode 0755", "mode 0701", "somebody else's", "file", "fifo"])
def test_a_state_directory_that_is_not_ours_alone_is_refused(
    netns: Netns, tmp_path: Path, use: Callable[[Netns, Path], None], kind: str
) -> None:
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    place = tmp_path / "state"
    match kind:
        case "link":
            place.symlink_to(real)
        case "link above":
            (real / "state").mkdir(mode=0o700)
            (tmp_path / "above").symlink_to(real)
            os.chown(tmp_path / "above", SOMEBODY, SOMEBODY, follow_symlinks=False)
            place = tmp_path / "above" / "state"
        case "file":
            place.write_text("")
        case "fifo":
            os.mkfifo(place)
        case _:
            place.mkdir()
            place.chmod(int(kind.removeprefix("mode "), 8) if kind.startswith("mode") else 0o700)
            if kind == "somebody else's":
                os.chown(place, SOMEBODY, SOMEBODY)
    with pytest.raises((JournalError, NetapplyError)) as raised:
        use(netns, place)
    assert str(place) in str(raised.value)
    assert sorted(os.listdir(real)) == (["state"] if kind == "link above" else [])


@each_user
def test_a_link_above_that_is_our_own_is_followed(
    netns: Netns, tmp_path: Path, use: Callable[[Netns, Path], None]
) -> None:
    (tmp_path / "real" / "state").mkdir(parents=True)
    (tmp_path / "real" / "state").chmod(0o700)
    (tmp_path / "above").symlink_to("real")
    use(netns, tmp_path / "above" / "state")


def test_what_is_made_is_for_us_alone_whatever_the_umask(netns: Netns, tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    before = os.umask(0)
    try:
        _journal(netns, place)
        _memory(netns, place)
    finally:
        os.umask(before)
    made = [path for path in (place, place.parent, *place.iterdir()) if path.stat().st_mode & 0o077]
    assert made == []


@pytest.mark.parametrize("name", ["history", "history.1"])
def test_a_link_in_the_place_of_the_history_is_not_followed(netns: Netns, tmp_path: Path, name: str) -> None:
    place = tmp_path / "state"
    place.mkdir(mode=0o700)
    (tmp_path / "victim").write_text("as it was")
    (place / name).symlink_to(tmp_path / "victim")
    _journal(netns, place)
    assert (tmp_path / "victim").read_text() == "as it was"
    with pytest.raises(JournalError):
        _history(netns, place)


def test_files_of_a_namespace_that_is_gone_go_when_another_has_its_inode_number(netns: Netns, tmp_path: Path) -> None:
    """So there are no more of them than there were namespaces at a time, however many come and go."""
    with netapply.open(netns.path, state_directory=str(tmp_path)) as capture:
        for plan in (CapturePlan(), CapturePlan(ipv6="skip"), CapturePlan()):
            capture.apply(plan)
        identity = capture.namespace.identity
    before = f"{identity.device}-{identity.inode}-{identity.cookie}"
    assert {each.name for each in tmp_path.glob(f"{before}*")} == {before, f"{before}.0", f"{before}.1"}
    other = identity._replace(inode=1)
    journal = Journal(str(tmp_path))
    for another in (identity, other):
        journal.acquire(another, 1.0).close()
        assert (tmp_path / before).exists()
    journal.acquire(identity._replace(cookie=identity.cookie + 1), 1.0).close()
    assert not list(tmp_path.glob(f"{before}*"))


def test_a_lock_file_that_says_something_else_removes_nothing(netns: Netns, tmp_path: Path) -> None:
    with netapply.open(netns.path, state_directory=str(tmp_path)) as capture:
        capture.apply(CapturePlan())
        identity = capture.namespace.identity
    (lock,) = tmp_path.glob("*.lock")
    (tmp_path / "history.0").touch()
    for said in ("history", "../../etc/passwd", f"{lock.stem}-", f"{lock.stem}-1/../history", "\xff", "x" * 9000):
        lock.write_text(said, encoding="latin-1")
        Journal(str(tmp_path)).acquire(identity, 1.0).close()
    there = {each.name for each in tmp_path.iterdir()}
    assert there == {lock.name, f"{lock.stem}-{identity.cookie}", "history", "history.0"}
