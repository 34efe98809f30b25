"""What the native backend asks of a kernel, and what it says of one that lacks something."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator

import pytest

from netapply.features import needs
from netapply.kernel import Kernel
from netapply.namespace import Namespace
from netapply.plan import CapturePlan, Cgroup, Dns, Inbound, LogSettings, Owners
from netapply_nftables import BACKEND
from netapply_nftables.probe import FEATURES
from netapply_wire import expressions as nft
from netapply_wire.nfnetlink import NFNL_MSG_BATCH_BEGIN, generation, string
from tests.netns import Netns

NFPROTO_IPV6 = b"\n"
#: What stands in a batch, what stands there instead so that the kernel does not know it, and what is missing then.
LACKS = {
    "no tproxy": (string(1, "tproxy"), string(1, "tpr0xy"), {"tproxy"}),
    "no log": (string(1, "log"), string(1, "l0g"), {"log"}),
    "no cgroups": (nft.socket(nft.NFT_SOCKET_CGROUPV2, 1), nft.socket(99, 1), {"cgroups"}),
    "no zones": (nft.set_ct(nft.NFT_CT_ZONE), nft.set_ct(99), {"dns.zones"}),
    "no states": (nft.ct(nft.NFT_CT_STATE), nft.ct(99), {"invalid", "tproxy"}),
    "no connmarks": (nft.ct(nft.NFT_CT_MARK), nft.ct(99), {"tproxy"}),
    "no sets": (nft.lookup("netapply-4-probe"), nft.lookup("netapply-4-prob0"), {"sets"}),
    "no IPv6": (nft.cmp(nft.NFT_CMP_EQ, NFPROTO_IPV6), nft.cmp(99, NFPROTO_IPV6), {"ip6"}),
    "no conntrack at all": (string(1, "ct"), string(1, "c0"), {"invalid", "tproxy", "dns.zones"}),
}


class Overheard(Kernel):
    """A kernel whose requests are kept, changed on their way, or answered with an error."""

    def __init__(self, kernel: Kernel, change: Callable[[bytes], bytes] = bytes, failure: int = 0) -> None:
        self._kernel, self._change, self._failure = kernel, change, failure
        self.batches = 0
        self.requests = 0

    def netlink(self, protocol: int, request: bytes) -> list[bytes]:
        self.requests += 1
        self.batches += int.from_bytes(request[4:6], sys.byteorder) == NFNL_MSG_BATCH_BEGIN
        if self._failure:
            raise OSError(self._failure, os.strerror(self._failure))
        return self._kernel.netlink(protocol, self._change(request))


@pytest.fixture
def kernel(netns: Netns) -> Iterator[Namespace]:
    with Namespace.open(netns.path) as namespace:
        yield namespace


def test_a_kernel_that_has_everything_is_asked_for_it_in_one_batch(kernel: Namespace) -> None:
    overheard = Overheard(kernel)
    assert dict(BACKEND.probe(overheard).missing) == {}
    assert overheard.batches == 1


@pytest.mark.parametrize("lack", LACKS)
def test_what_the_kernel_lacks_is_named_and_nothing_else(kernel: Namespace, lack: str) -> None:
    there, instead, missing = LACKS[lack]
    before = generation(kernel)
    overheard = Overheard(kernel, lambda request: request.replace(there, instead))
    probe = BACKEND.probe(overheard)
    assert (probe.status, set(probe.missing)) == ("usable", missing)
    assert overheard.batches == 1 + len(missing)
    assert generation(kernel) == before


def test_a_kernel_without_what_all_plans_need_is_unsupported(kernel: Namespace) -> None:
    overheard = Overheard(kernel, lambda request: request.replace(string(1, "redir"), string(1, "red1r")))
    assert BACKEND.probe(overheard).status == "unsupported"
    assert overheard.batches == 1


@pytest.mark.parametrize(
    ("failure", "status"), [(errno.EPERM, "denied"), (errno.EINVAL, "unsupported"), (errno.EBUSY, "busy")]
)
def test_a_kernel_that_does_not_show_its_tables_is_sent_no_batch(kernel: Namespace, failure: int, status: str) -> None:
    overheard = Overheard(kernel, failure=failure)
    assert BACKEND.probe(overheard).status == status
    assert (overheard.requests, overheard.batches) == (1, 0)


def test_it_says_in_the_words_of_plans_all_that_plans_may_need() -> None:
    everything = CapturePlan(
        inbound=Inbound(mode="tproxy"),
        dns=Dns("all"),
        invalid="drop",
        log=LogSettings("x"),
        comments=True,
        ipv6="capture",
    )
    owners = everything.outbound.owners._replace(exclude=Owners(cgroups=(Cgroup("a", 1),)))
    everything = everything._replace(outbound=everything.outbound._replace(owners=owners))
    # "sets" is no need of a plan: without it address lists are compiled to rules.
    assert {feature.word for feature in FEATURES} == {*needs(everything), "sets"}
