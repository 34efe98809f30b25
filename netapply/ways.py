"""The way from a namespace to an address, as its kernel routes: the device, and the source that it takes.

By pyroute2, inside of the namespace and imported only when asked, as `netapply.policy` does.
"""

from __future__ import annotations

import errno
from importlib import import_module
from typing import Any

from netapply.errors import KernelError
from netapply.kernel import Kernel
from netapply.policy import tame
from netapply.reasons import show_address
from netapply.sockets import socket
from netapply.values import NamedTuple

RTN_LOCAL = 2  # linux/rtnetlink.h: the address is one's own


class Way(NamedTuple):
    """How packets get to an address: by which device (`lo` to one's own), from which address (b"" if unknown)."""

    iface: str
    source: bytes


def way_to(kernel: Kernel, destination: bytes) -> Way | None:
    """The way of an unmarked packet to a packed address; None where there is none."""

    def work() -> Way | None:
        pyroute2: Any = import_module("pyroute2")  # Any: it ships no types
        refused = import_module("pyroute2.netlink.exceptions").NetlinkError
        try:
            with pyroute2.IPRoute() as ipr:
                tame(ipr)
                route = ipr.route("get", dst=show_address(destination))[0]
                if route["type"] == RTN_LOCAL:
                    return Way("lo", destination)
                device = ipr.get_links(route.get_attr("RTA_OIF"))[0].get_attr("IFLA_IFNAME")
        except refused:
            return None
        except RuntimeError as error:
            raise KernelError("look for a way", errno.ETIMEDOUT) from error
        return Way(str(device), _packed(route.get_attr("RTA_PREFSRC")))

    return kernel.inside(work)


def _packed(address: str | None) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address) if address else b""
