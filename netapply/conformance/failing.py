"""A namespace in which the Nth change fails, once: the kernel refuses it, or its answer is lost after it was done."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Generator
from contextlib import contextmanager

from netapply.api import Capture
from netapply.conformance.stage import Stage
from netapply.kernel import NetlinkProtocol, Scratch
from netapply.namespace import Namespace
from netapply.ruleset import Family

MOST = 30  # changes of one apply: legacy has one for each table and family, and each routing step is one
_BATCH_BEGIN = 16  # linux/netfilter/nfnetlink.h: NFNL_MSG_BATCH_BEGIN


class Fault:
    """The `at`th change fails, before or after it is done; `hit` says that it did."""

    def __init__(self, at: int, *, after: bool) -> None:
        self._left = at
        self._after = after
        self.hit = False

    def before(self) -> bool:
        """A change is about to be made: raise, or say whether its answer is to be lost."""
        self._left -= 1
        if self._left != -1:
            return False
        self.hit = True
        if not self._after:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return True


class FailingNamespace(Namespace):
    """Like any other but for its fault."""

    fault: Fault

    def netlink(self, protocol: NetlinkProtocol, request: bytes) -> list[bytes]:
        """Fails where the request is a batch of nfnetlink."""
        _, kind = struct.unpack_from("=IH", request)
        lost = kind == _BATCH_BEGIN and self.fault.before()
        answer = super().netlink(protocol, request)
        if lost:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return answer

    def setsockopt(self, family: Family, option: int, blob: bytes, scratch: Scratch | None = None) -> bytes:
        """Fails whatever is set."""
        lost = self.fault.before()
        answer = super().setsockopt(family, option, blob, scratch)
        if lost:
            raise OSError(errno.EINTR, os.strerror(errno.EINTR))
        return answer


@contextmanager
def capture(stage: Stage, at: int, *, after: bool) -> Generator[tuple[Capture, Fault]]:
    """The stage's pod, opened once more, where the `at`th change fails."""
    fault = Fault(at, after=after)
    namespace = FailingNamespace.open(stage.world.pod.path)
    assert isinstance(namespace, FailingNamespace)
    namespace.fault = fault
    with Capture(namespace, stage.capture.journal) as opened:
        yield opened, fault
