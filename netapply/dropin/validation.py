"""Whether a connection that must be captured is: what `--run-validation` of istio-iptables does.

As Istio's validator (tools/istio-iptables/pkg/validation): somebody listens where the proxy would, on loopback, and
the proxy's user calls the probe port of 127.0.0.6 (::6), where nobody listens. Rules that stand turn the call back to
the listener, and the kernel still knows where it was meant to go.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from contextlib import ExitStack, suppress

from netapply.errors import ValidationError
from netapply.namespace import Namespace
from netapply.syscalls import set_filesystem_ids
from netapply.values import NamedTuple

#: Between two calls, in seconds: rules that another program is to put up may come any moment.
PAUSE = 0.2
_ORIGINAL = 80  # SO_ORIGINAL_DST, IP6T_SO_ORIGINAL_DST: linux/netfilter_ipv4.h, linux/netfilter_ipv6/ip6_tables.h
_PORT = struct.Struct("!2xH")  # struct sockaddr_in and sockaddr_in6 begin alike: family, port


class Probe(NamedTuple):
    """Where the proxy listens, which port is called, as whom (uid, gid), and for how many seconds."""

    ipv6: bool
    listening: tuple[int, ...]
    port: int
    caller: tuple[int, int]
    timeout: float

    @property
    def loopback(self) -> str:
        """Where the listeners are, and the caller."""
        return "::1" if self.ipv6 else "127.0.0.1"

    @property
    def target(self) -> str:
        """What is called."""
        return "::6" if self.ipv6 else "127.0.0.6"


def validate(namespace: Namespace, probe: Probe) -> None:
    """Return once a connection was captured. Raises ValidationError after `timeout`."""
    reason = namespace.inside(lambda: _run(probe))
    if not reason:
        return
    ports = " or ".join(map(str, probe.listening))
    uid = probe.caller[0]
    raise ValidationError(
        f"validation failed: no connection to {probe.target} port {probe.port} came to port {ports} "
        f"within {probe.timeout:g} s ({reason})",
        next_step=f"see which rules stand (netapply show --layout istio), and run this as uid {uid}, whose calls are "
        "captured; with istio-cni, delete the pod once istio-cni runs on its node",
    )


def _run(probe: Probe) -> str:
    """In a thread of its own, in the namespace: why nothing was captured, or ""."""
    with suppress(PermissionError):  # then the caller is whoever runs this, as with Istio
        set_filesystem_ids(*probe.caller)
    deadline = time.monotonic() + probe.timeout
    with ExitStack() as stack:
        listeners: list[socket.socket] = []
        reason = ""
        for port in probe.listening:
            try:
                listeners.append(stack.enter_context(_listener(probe, port)))
            except OSError as error:
                reason = f"port {port} cannot be listened on: {error.strerror}"
        if not listeners:
            return reason
        while reason := _call(probe, listeners):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(PAUSE, left))
    return reason


def _socket(probe: Probe) -> socket.socket:
    return socket.socket(socket.AF_INET6 if probe.ipv6 else socket.AF_INET, socket.SOCK_STREAM)


def _listener(probe: Probe, port: int) -> socket.socket:
    sock = _socket(probe)
    try:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):  # a proxy may listen there already
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
        sock.bind((probe.loopback, port))
        sock.listen()
    except BaseException:
        sock.close()
        raise
    return sock


def _call(probe: Probe, listeners: list[socket.socket]) -> str:
    """Call once. Why it was not captured, or ""."""
    with _socket(probe) as caller:
        caller.settimeout(1.0)
        caller.bind((probe.loopback, 0))
        try:
            caller.connect((probe.target, probe.port))
        except OSError as error:
            return f"the call ended with: {error.strerror or error}"
        reason = "another program answered the call"
        for listener in select.select(listeners, [], [], PAUSE)[0]:
            with listener.accept()[0] as accepted:
                port = _original_port(accepted, ipv6=probe.ipv6)
                with suppress(OSError):
                    accepted.sendall(str(port).encode())  # Istio's says so too, for whoever looks
                if port == probe.port:
                    return ""
                reason = f"a call to port {port} came instead"
        return reason


def _original_port(accepted: socket.socket, *, ipv6: bool) -> int:
    """Where the connection was meant to go before it was redirected; 0 where the kernel does not know."""
    level = socket.IPPROTO_IPV6 if ipv6 else socket.IPPROTO_IP
    try:
        return int(_PORT.unpack_from(accepted.getsockopt(level, _ORIGINAL, 28 if ipv6 else 16))[0])
    except OSError:
        return 0


def caller_of(uids: tuple[int, ...], gids: tuple[int, ...]) -> tuple[int, int]:
    """As whom to call: ourselves if we are the proxy, or else its first user."""
    if not uids or os.geteuid() in uids:
        return os.geteuid(), os.getegid()
    return uids[0], gids[0] if gids else os.getegid()
