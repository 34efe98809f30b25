"""Real packets in throwaway network namespaces: a pod with a proxy, a remote side, and probes between them.

    async with Lab() as lab:
        ...                                   # put rules into lab.pod.path
        for traffic in traffic_types("redirect"):
            answer = await lab.send(traffic.send)
            print(traffic.name, traffic.expect.faults(answer) or "as expected")

The lab installs no rules, starts no program and leaves nothing behind.
"""

from __future__ import annotations

from netapply.lab.actors import ACTORS, Actor, Identity
from netapply.lab.answers import Answer, Hop
from netapply.lab.flows import Expect, Send, Traffic, traffic_types
from netapply.lab.lab import Lab
from netapply.lab.namespaces import Place, sweep
from netapply.lab.network import ADDRESSES, Addresses

__all__ = [
    "ACTORS",
    "ADDRESSES",
    "Actor",
    "Addresses",
    "Answer",
    "Expect",
    "Hop",
    "Identity",
    "Lab",
    "Place",
    "Send",
    "Traffic",
    "sweep",
    "traffic_types",
]
