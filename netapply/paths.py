"""Files and directories that nobody else could have put in the place of what is meant."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from netapply.syscalls import filesystem_magic, open_without_links

_PROC_MAGIC = 0x9FA0  # linux/magic.h
_LINKS = 40  # as many as the kernel follows: MAXSYMLINKS of linux/namei.h
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_private_directory(path: str, *, create: bool = True) -> int:
    """Open a directory that is ours alone, made if need be; refused where others have any access. Raises OSError.

    What is opened below the descriptor is then what we put there, whatever happens to the path.
    """
    place = os.path.abspath(path)
    try:
        fd = open_path(place, _DIRECTORY)
    except FileNotFoundError:
        if not create:
            raise
        _make(place)
        fd = open_path(place, _DIRECTORY)
    except NotADirectoryError:
        if not os.path.islink(place):
            raise
        raise OSError(errno.ELOOP, "is a symbolic link; name the directory that it leads to") from None
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(fd)
        raise OSError(errno.EPERM, "must be a directory of our own with mode 0700")
    return fd


def _make(place: str) -> None:
    """The directory and what is missing above it, for us alone: os.makedirs leaves that to the umask."""
    above = os.path.dirname(place)
    if above != place and not os.path.isdir(above):
        _make(above)
    with suppress(FileExistsError):  # another thread or process was first
        os.mkdir(place, 0o700)


def open_path(place: str, flags: int) -> int:
    """Open an absolute path, which exists, through no link that somebody else made. Raises OSError.

    Links of root's and of our own are as good as the path itself: /var/run, and names that point to /proc/PID/ns/net.
    With O_NOFOLLOW among `flags` the last part may be none at all.
    """
    try:
        return open_without_links(place, flags)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENOSYS, errno.EPERM):
            raise
    return _walk(place, flags)


def _walk(place: str, last: int) -> int:
    """The same step by step, each from where the one before has arrived."""
    parts = place.split("/")[::-1]
    here = os.open("/", os.O_PATH | os.O_CLOEXEC)
    followed = 0
    try:
        while parts:
            name = parts.pop() or "."
            flags = os.O_PATH | os.O_CLOEXEC if any(parts) else last
            try:
                there = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                there = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            if not stat.S_ISLNK(os.fstat(there).st_mode):
                os.close(here)
                here = there
                continue
            followed += 1
            try:
                if flags & os.O_NOFOLLOW:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                target = _target(there, name, followed)
            finally:
                os.close(there)
            if target is None:
                there = os.open(name, flags, dir_fd=here)
            else:
                there = os.open("/" if target.startswith("/") else ".", os.O_PATH | os.O_CLOEXEC, dir_fd=here)
                parts += target.split("/")[::-1]
            os.close(here)
            here = there
        return os.dup(here)
    finally:
        os.close(here)


def _target(link: int, name: str, followed: int) -> str | None:
    """Where a link leads; None for one of /proc, which may lead where no path does, and which only the kernel makes.

    Raises OSError where it is not to be followed.
    """
    if followed > _LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if filesystem_magic(link) == _PROC_MAGIC:
        return None
    owner = os.fstat(link).st_uid
    if owner not in (0, os.geteuid()):
        raise OSError(errno.ELOOP, f"{name} is a link that user {owner} made")
    return os.readlink("", dir_fd=link)
