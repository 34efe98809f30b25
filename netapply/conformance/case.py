"""What a case is: a plan, flows, and what must become of them. Values alone; nothing here touches a kernel.

    Case("outbound is captured", "core", {}, (Probe("pod", "tcp", "10.77.0.1", 80, captured(15001)),))

The suite's version is `VERSION`. A case says since which version it is there, and is never changed in its meaning: a
better one gets a new name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from netapply.ruleset import Family
from netapply.values import NamedTuple

VERSION = 1

Level: TypeAlias = Literal["core", "full", "stress"]
#: Each level has all cases of those before it.
LEVELS: tuple[Level, ...] = ("core", "full", "stress")

#: Address in text, and port.
Endpoint: TypeAlias = tuple[str, int]

#: What is done with a plan besides sending the probes; see `netapply.conformance.stories`.
Story: TypeAlias = Literal["apply", "update", "older", "foreign", "drift", "failure", "model"]


class Sender(NamedTuple):
    """Whose socket it is: file system ids, supplementary groups, and the cgroup v2 below the suite's own ("" root)."""

    uid: int = 1000
    gid: int = 1000
    groups: tuple[int, ...] = ()
    cgroup: str = ""

    def __str__(self) -> str:
        groups = f"+{','.join(map(str, self.groups))}" if self.groups else ""
        return f"{self.uid}:{self.gid}{groups}" + (f" in {self.cgroup}" if self.cgroup else "")


APP, PROXY, ROOT = Sender(), Sender(1337, 1337), Sender(0, 0)


class Verdict(NamedTuple):
    """What must become of the first packet of a flow, as sockets show it.

    direct: whoever has the address answers, on the very port. captured: the pod's listener on `port` answers, and
    learns the original destination (TCP: SO_ORIGINAL_DST, or the TPROXY socket's own name). `by` tells the way, ""
    leaves it open; a dnat goes to `address`. dropped: nobody sees it, and nobody answers. refused: a reset comes back.
    """

    fate: Literal["direct", "captured", "dropped", "refused"]
    port: int = 0
    by: Literal["", "redirect", "tproxy", "dnat"] = ""
    address: str = ""

    def __str__(self) -> str:
        if self.fate != "captured":
            return self.fate
        to = f"{self.address} port {self.port}" if self.address else f"port {self.port}"
        return f"captured by {to}" + (f" ({self.by})" if self.by else "")


DIRECT, DROPPED, REFUSED = Verdict("direct"), Verdict("dropped"), Verdict("refused")


def captured(port: int, by: Literal["", "redirect", "tproxy", "dnat"] = "", address: str = "") -> Verdict:
    """Captured by the listener on `port`."""
    return Verdict("captured", port, by, address)


class Probe(NamedTuple):
    """One flow: who sends from where to which numeric address and port, and what must become of it.

    `origin` "pod" is the namespace that holds the plan, "remote" all others. `device` is the one by which the packet
    leaves or enters the pod ("lo" follows from a destination of the pod's own, and is not written). `source` and
    `sport` are bound where given; else the kernel takes the address, and the prober a port. `mark` is the socket's.
    """

    origin: Literal["pod", "remote"]
    protocol: Literal["tcp", "udp"]
    to: str
    port: int
    expect: Verdict
    sender: Sender = APP
    source: str = ""
    sport: int = 0
    device: str = "eth0"
    mark: int = 0
    #: "invalid": a TCP segment that conntrack finds invalid (SYN and ACK of no connection); from the remote side only.
    state: Literal["new", "invalid"] = "new"

    @property
    def family(self) -> Family:
        return "ip6" if ":" in self.to else "ip"

    def __str__(self) -> str:
        who: str = f"pod {self.sender}" if self.origin == "pod" else "remote"
        bound = f" from {self.source or '*'}:{self.sport or '*'}" if self.source or self.sport else ""
        device = f" by {self.device}" if self.device != "eth0" else ""
        mark = f" mark {self.mark:#x}" if self.mark else ""
        host = f"[{self.to}]" if self.family == "ip6" else self.to
        invalid = " invalid" if self.state == "invalid" else ""
        return f"{who}{bound}{device}{mark} > {self.protocol}{invalid} {host}:{self.port}"


class Seen(NamedTuple):
    """What became of a probe.

    answered: the listener on `port` in `place` had the packet as sent to `local`, and its answer came back.
    unanswered: it had the packet, and its answer did not come back. silent: nobody had it, and nothing came back.
    refused: a reset came back. failed: it could not be sent; `error` says why. `original` is what SO_ORIGINAL_DST
    said (None: nothing, or UDP), `peer` whom the listener saw calling, `client` who called.
    """

    fate: Literal["answered", "unanswered", "silent", "refused", "failed"]
    place: str = ""
    port: int = 0
    local: Endpoint = ("", 0)
    original: Endpoint | None = None
    peer: Endpoint = ("", 0)
    client: Endpoint = ("", 0)
    error: str = ""

    def __str__(self) -> str:
        if self.fate in ("answered", "unanswered"):
            original = f", original destination {_show(self.original)}" if self.original else ""
            named = f" as {_show(self.local)}" if self.local[0] else ""
            return f"{self.fate} in the {self.place} by port {self.port}{named}{original}"
        return f"{self.fate}: {self.error}" if self.error else self.fate


def difference(probe: Probe, seen: Seen) -> str:
    """Where `seen` is not what the probe expects, in a phrase; "" when it is."""
    wrong = _difference(probe, seen)
    return f"{probe}: expected {probe.expect}, but {wrong}" if wrong else ""


def _difference(probe: Probe, seen: Seen) -> str:
    want, to = probe.expect, (probe.to, probe.port)
    if want.fate in ("dropped", "refused"):
        return "" if seen.fate == {"dropped": "silent", "refused": "refused"}[want.fate] else str(seen)
    if seen.fate != "answered":
        return str(seen)
    if probe.state == "invalid":  # a reset is all that comes of it
        return "" if want.fate == "direct" else str(seen)
    if seen.peer != seen.client:
        return f"{seen}, which saw {_show(seen.peer)} calling and not {_show(seen.client)}"
    if want.fate == "direct":
        there = seen.local == to and seen.port == probe.port and seen.original in (None, to)
        return "" if there else str(seen)
    if want.address:
        return "" if seen.local == (want.address, want.port) and seen.port == want.port else str(seen)
    if seen.place != "pod" or seen.port != want.port:
        return str(seen)
    kept = seen.local == to  # TPROXY leaves the destination as it was
    if (want.by == "tproxy" and not kept) or (want.by == "redirect" and seen.local[1] != want.port):
        return f"not by {want.by}: {seen}"
    if probe.protocol == "tcp" and not kept and seen.original != to:
        return f"the original destination is lost: {seen}"
    return ""


def _show(endpoint: Endpoint) -> str:
    host = f"[{endpoint[0]}]" if ":" in endpoint[0] else endpoint[0]
    return f"{host}:{endpoint[1]}"


class Case(NamedTuple):
    """One case. `plan` is a plan file's content without apiVersion; it is read by the loader as anybody's.

    Every case checks, besides its probes: the rules read back are the compiled ones, a second apply changes nothing,
    and clean leaves the namespace as it was. `update` is the plan of the second half of a story that has one.
    """

    name: str
    level: Level
    plan: Mapping[str, Any]
    probes: tuple[Probe, ...] = ()
    layout: str = "netapply"
    story: Story = "apply"
    update: Mapping[str, Any] = {}
    #: Sent after the others are closed, or after the second half of the story.
    after: tuple[Probe, ...] = ()
    #: Whose sockets the proxy's listeners are.
    proxy: Sender = PROXY
    #: Ports of the proxy on which nobody listens.
    absent: tuple[int, ...] = ()
    #: No entry of conntrack may be left without a reply, and queries over UDP must be in the zones that are decided.
    all_replied: bool = False
    #: What it needs beyond what its plan and probes tell; see `netapply.conformance.capabilities`.
    requires: tuple[str, ...] = ()
    since: int = 1


class Outcome(NamedTuple):
    """What came of a case. `skipped` says which capability is missing and how that was found out."""

    case: str
    level: Level
    status: Literal["passed", "failed", "skipped"]
    differences: tuple[str, ...] = ()
    skipped: str = ""
    probes: int = 0
    seconds: float = 0.0
