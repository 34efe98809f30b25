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
