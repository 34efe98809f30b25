"""The first inputs of each target, made anew: what this machine's kernel answers, and files as netapply writes them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from netapply import history, rtnetlink
from netapply.agent import store
from netapply.agent.planfiles import parse_plan_file
from netapply.api import Capture
from netapply.backend import OURS, find_backend
from netapply.journal import Journal
from netapply.kernel import NETLINK_NETFILTER, NetlinkProtocol
from netapply.planfile import dump_plan, load_plan
from netapply_wire import ipset, nfnetlink
from tests import foreign, netns
from tests.fuzz.engine import keep
from tests.fuzz.tapes import Input, Recording

PLANS = Path(__file__).parent.parent / "plans"
_RICH = """
apiVersion: netapply/v1
inbound: {mode: tproxy, ports: {exclude: [15020, 8000-8100]}, sources: {exclude: [198.51.100.0/24]}}
outbound:
  cidrs: {exclude: [10.1.0.0/16, 10.3.0.0/16, 172.16.0.0/12, "fd00:1::/32", "fd00:2::/32"]}
  ports: {exclude: [22, 25, 5432-5440]}
dns: {capture: all}
log: {prefix: "netapply: ", rate: 30}
comments: true
prefer: [comments, log]
"""
_PLAIN = "apiVersion: netapply/v1\n"


def make() -> None:
    """Write the files of seeds; as root."""
    sys.argv = ["netapply", "apply"]  # history writes it down
    with tempfile.TemporaryDirectory(prefix="netapply-fuzz-") as directory:
        os.environ["XTABLES_LOCKFILE"] = f"{directory}/xtables.lock"
        journals: list[Input] = []
        for backend in ("nftables", "iptables-nft", "iptables-legacy"):
            tapes: list[Input] = []
            for text, busy in ((_RICH, True), (_PLAIN, False)):
                state = f"{directory}/{backend}-{busy}"
                tapes.append(_tape(backend, text, Journal(state), foreigners=busy))
                journals += [
                    (path.read_bytes().rstrip(b"\n").partition(b" ")[2],)
                    for path in Path(state).iterdir()
                    if path.stat().st_size and path.name != history.FILE and not path.name.endswith(".lock")
                ]
                past = Path(state, history.FILE).read_bytes()
            keep(backend, tapes)
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
        keep("journal", [(text.replace(boot, b"BOOT"),) for (text,) in journals])
        keep("torn-journal", [(b"0badc0de " + text + b"\n",) for (text,) in journals[:1]])
        keep("history", [(past,)])
        _files(directory)
    _routing()


def _tape(backend: str, text: str, journal: Journal, *, foreigners: bool) -> Input:
    made = netns.make()
    try:
        if foreigners:
            foreign.put_up(made, backend)
        with Recording.open(made.path) as namespace:
            assert isinstance(namespace, Recording)
            namespace.tape = []
            with Capture(namespace, journal) as capture:
                capture.apply(load_plan(text), backend=backend)
                namespace.forget()
                namespace.tape.clear()
                ipset._seen[:] = [True]  # as when it is played
                snapshot = find_backend(backend).read(namespace, OURS)
                assert None not in (snapshot.ruleset, snapshot.foreign, snapshot.counters)
                return tuple(namespace.tape)
    finally:
        made.close()


def _files(directory: str) -> None:
    plans = [path.read_bytes() for path in sorted(PLANS.iterdir())]
    whole = json.dumps(dump_plan(load_plan(_RICH))).encode()
    keep("plan", [(data,) for data in (*plans, _RICH.encode(), whole)])
    document = dump_plan(load_plan(_RICH))
    file = parse_plan_file("/etc/netapply/plans/a.yaml", {**document, "namespaces": [{"path": "/run/netns/pod"}]})
    asked = store.Asked("k", "/run/netns/pod", {"app": "x"}, None)
    store.save(f"{directory}/agent", store.Kept((file,), (asked,)))
    keep("store", [(Path(directory, "agent", "desired.json").read_bytes(),)])


def _routing() -> None:
    made = netns.make()
    made.run("ip", "address", "add", "192.0.2.1/32", "dev", "lo")
    made.run("ip", "-6", "rule", "add", "fwmark", "1", "lookup", "133")
    sent: list[Input] = []

    class Both(Recording):
        def netlink(self, protocol: NetlinkProtocol, request: bytes) -> list[bytes]:
            answer = super().netlink(protocol, request)
            sent.append((request, *(b"\0" + each for each in answer), b"\x07" + answer[0]))
            return answer

    try:
        with Both.open(made.path) as namespace:
            assert isinstance(namespace, Recording)
            namespace.tape = []
            list(rtnetlink.loopback_addresses(namespace))
            list(rtnetlink.local_addresses(namespace))
            rtnetlink.rule_priorities(namespace)
            keep("rtnetlink", [tuple(namespace.tape)])
            namespace.netlink(NETLINK_NETFILTER, nfnetlink._GET_GENERATION)
    finally:
        made.close()
    keep("netlink", sent)
