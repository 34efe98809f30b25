"""Prometheus and its promtool, as `make userlands` unpacks them or the machine has them: for tests alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml

from netapply.lab.namespaces import Place
from tests import userlands
from tests.envoy import get
from tests.netns import PATIENCE

PORT = 9090


def tool(name: str) -> str:
    """The path of `prometheus` or `promtool`. Skips where there is none; where CI is set that is a failure."""
    found = userlands.find(userlands.PROMETHEUS)
    path = found.tool(name) if found else shutil.which(name)
    if path:
        return path
    if os.environ.get("CI"):
        pytest.fail(f"{name} is not there; make userlands")
    pytest.skip(f"{name} is not there; make userlands")


def promtool(*words: str, stdin: str = "") -> None:
    """Fails with what promtool says where it says no."""
    command = [tool("promtool"), *words]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus:
    """Runs in a namespace, and listens on its loopback."""

    def __init__(self, where: Place, place: Path, configuration: dict[str, Any]) -> None:
        self._where = where
        self._place = place
        (place / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns when it is ready."""
        command = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self._where.fd}", tool("prometheus")]
        command += [f"--config.file={self._place}/prometheus.yaml", f"--storage.tsdb.path={self._place}/data"]
        command += [f"--web.listen-address=127.0.0.1:{PORT}", "--log.level=warn"]
        with open(self._place / "prometheus.log", "ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE
        while True:
            with suppress(OSError):
                if "Ready" in get(self._where, ("127.0.0.1", PORT), "/-/ready")[1]:
                    return
            log_text = (self._place / "prometheus.log").read_text()
            assert self._process.poll() is None, log_text
            assert time.monotonic() < deadline, log_text
            time.sleep(0.05)

    def stop(self) -> None:
        """It need not put its data in order."""
        if self._process:
            self._process.kill()
            self._process.wait(PATIENCE)
        self._process = None

    def query(self, expression: str) -> dict[tuple[str, ...], float]:
        """Values by their labels' values, in the order of the labels' names, without instance, job and the name."""
        found = self.ask(f"/api/v1/query?{urlencode({'query': expression})}")["result"]
        return {_labels(each["metric"]): float(each["value"][1]) for each in found}

    def ask(self, path: str) -> Any:
        """What its API answers."""
        answer = json.loads(get(self._where, ("127.0.0.1", PORT), path)[1])
        assert answer["status"] == "success", answer
        return answer["data"]


def _labels(metric: dict[str, str]) -> tuple[str, ...]:
    return tuple(value for name, value in sorted(metric.items()) if name not in ("instance", "job", "__name__"))
