"""Paths of namespaces: no link that somebody else made is followed, whichever part of the path it is."""

from __future__ import annotations

import errno
import os
from collections import Counter
from pathlib import Path

import pytest

from netapply import paths
from netapply.errors import NamespaceError
from netapply.namespace import Namespace
from tests.netns import Netns

SOMEBODY = 4242


def opened(path: str) -> int:
    with Namespace.open(path) as namespace:
        return namespace.identity.inode


@pytest.fixture(params=["openat2", "an older kernel", "a filter of system calls"])
def _kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    number = {"an older kernel": errno.ENOSYS, "a filter of system calls": errno.EPERM}.get(request.param)
    if number is None:
        return

    def refuse(path: str, flags: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(paths, "open_without_links", refuse)


@pytest.mark.usefixtures("_kernel")
def test_a_link_of_our_own_is_followed_and_that_of_somebody_else_is_not(netns: Netns, tmp_path: Path) -> None:
    link = tmp_path / "pod"
    link.symlink_to(netns.path)
    assert opened(str(link)) == netns.inode
    os.chown(link, SOMEBODY, SOMEBODY, follow_symlinks=False)
    with pytest.raises(NamespaceError, match="pod is a link that user 4242 made"):
        Namespace.open(str(link))


@pytest.mark.usefixtures("_kernel")
def test_a_directory_that_is_somebody_elses_link_is_not_gone_through(named_netns: Netns, tmp_path: Path) -> None:
    (tmp_path / "real").symlink_to("/run/netns")
    (tmp_path / "again").symlink_to("real")
    path = f"{tmp_path}/again/{named_netns.name}"
    assert opened(path) == named_netns.inode
    assert opened(f"{tmp_path}/./again/..//again/{named_netns.name}") == named_netns.inode
    os.chown(tmp_path / "real", SOMEBODY, SOMEBODY, follow_symlinks=False)
    with pytest.raises(NamespaceError, match="real is a link that user 4242 made"):
        Namespace.open(path)


@pytest.mark.usefixtures("_kernel")
def test_names_and_links_of_proc_lead_where_they_say(named_netns: Netns, netns: Netns) -> None:
    assert opened(named_netns.name) == named_netns.inode
    assert opened(f"/var/run/netns/{named_netns.name}") == named_netns.inode
    assert opened(netns.path) == netns.inode
    assert opened(f"/proc/{os.getpid()}/root{netns.path}") == netns.inode


@pytest.mark.usefixtures("_kernel")
def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(NamespaceError, match="cannot be opened"):
        Namespace.open(str(tmp_path / "a"))


@pytest.mark.usefixtures("_kernel")
def test_what_does_not_exist_is_said_and_nothing_stays_open(tmp_path: Path) -> None:
    (tmp_path / "gone").symlink_to("nowhere/at/all")

    def descriptors() -> Counter[str]:
        links = (Path(entry.path) for entry in os.scandir("/proc/self/fd"))
        return Counter(str(link.readlink()) for link in links if link.is_symlink())

    before = descriptors()
    for path in (tmp_path / "none", tmp_path / "gone", tmp_path / "none" / "deeper"):
        with pytest.raises(NamespaceError, match="does not exist"):
            Namespace.open(str(path))
    for path in (tmp_path, Path("/")):
        with pytest.raises(NamespaceError, match="is no namespace"):
            Namespace.open(f"{path}/")
    more = descriptors() - before  # others' that are closed meanwhile are no matter
    assert [name for name in more if not name.startswith("/proc/")] == []


@pytest.mark.parametrize("spec", ["/run/netns/a\0b", "a\0b", "/" + "x" * 5000, "/run/\udcff/x", "pid:1\0", "\n/x"])
def test_a_name_of_any_bytes_is_refused_in_words(spec: str) -> None:
    with pytest.raises(NamespaceError):
        Namespace.open(spec)
