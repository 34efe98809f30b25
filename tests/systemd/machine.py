"""A machine with a real systemd as its first process: systemd-nspawn on a root that `make systemd` has built.

What it writes goes to memory and is gone with it, but for what is bound into it. Its network is its own.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

#: Built by `make systemd`; another by this variable.
ROOT = Path(os.environ.get("NETAPPLY_TEST_ROOT") or Path(__file__).parents[2] / "build" / "systemd" / "root")
NETAPPLY = "/opt/netapply/bin/netapply"
PYTHON = "/opt/netapply/bin/python"
PATIENCE = 60.0


def lacking() -> str:
    """What is not there of what a machine takes; "" if all is."""
    if os.geteuid():
        return "systemd-nspawn takes root"
    for tool in ("systemd-nspawn", "nsenter"):
        if not shutil.which(tool):
            return f"{tool} is not installed"
    return "" if (ROOT / "opt/netapply/bin/netapply").exists() else f"no root file system at {ROOT}: make systemd"


class Machine:
    """Boots when entered, and is gone when left. `run` runs a program in it."""

    def __init__(self, place: Path, binds: Mapping[Path, str] | None = None) -> None:
        self._place = place
        self._binds = dict(binds or {})
        self._nspawn: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def __enter__(self) -> Self:
        try:
            self._boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _boot(self) -> None:
        binds = [f"--bind={source}:{target}" for source, target in self._binds.items()]
        command = ["systemd-nspawn", "--quiet", f"--directory={ROOT}", "--volatile=overlay", "--boot"]
        command += ["--register=no", "--keep-unit", "--private-network", "--console=pipe", "--capability=all"]
        command += [f"--machine=netapply-test-{secrets.token_hex(4)}", "--system-call-filter=bpf perf_event_open"]
        command += binds
        environment = {**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"}
        with open(self._place / "console", "ab") as console:
            self._nspawn = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=environment
            )
        self.until(lambda: bool(self._leader()), "the machine did not begin")
        self.pid = self._leader()
        self.until(lambda: self.systemctl("is-system-running", check=False) in ("running\n", "degraded\n"), "no boot")

    def _leader(self) -> int:
        """Its first process, as this one sees it."""
        assert self._nspawn
        if self._nspawn.poll() is not None:
            raise AssertionError(f"nspawn ended: {(self._place / 'console').read_text()}")
        pid = self._nspawn.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return next((int(child) for child in children if _is_first(child)), 0)

    def __exit__(self, *_: object) -> None:
        if self._nspawn is None:
            return
        self._nspawn.send_signal(signal.SIGTERM)  # an orderly power-off
        try:
            self._nspawn.wait(20)
        except subprocess.TimeoutExpired:
            if self.pid:
                os.kill(self.pid, signal.SIGKILL)  # its first process, and all others with it
            self._nspawn.kill()
            self._nspawn.wait(20)
        self._nspawn = None

    def _into(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "-r", "-w", "env", "-i", _PATH, *command]

    def run(self, *command: str, check: bool = True, stdin: str = "") -> str:
        """What a program prints; its errors too where it may fail."""
        done = subprocess.run(
            self._into(*command), input=stdin, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.journal()}"
            )
        return done.stdout + ("" if check else done.stderr)

    def spawn(self, *command: str) -> subprocess.Popen[str]:
        """A program that goes on."""
        return subprocess.Popen(self._into(*command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def netapply(self, *words: str, check: bool = True) -> str:
        return self.run(NETAPPLY, *words, check=check)

    def systemctl(self, *words: str, check: bool = True) -> str:
        return self.run("systemctl", *words, check=check)

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit."""
        words = [f"--property={each}" for each in properties]
        return dict(line.split("=", 1) for line in self.systemctl("show", unit, *words).splitlines())

    def write(self, path: str, text: str) -> None:
        self.run("sh", "-c", f"mkdir -p $(dirname {path}) && cat > {path}", stdin=text)

    def journal(self) -> str:
        """What the agent and systemd logged, at the end."""
        command = self._into("journalctl", "--no-pager", "-n", "60", "-o", "cat")
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False).stdout

    def until(self, look: Callable[[], bool], otherwise: str, patience: float = PATIENCE) -> float:
        """Wait until something is so; seconds that it took."""
        begun = time.monotonic()
        while not look():
            if time.monotonic() - begun > patience:
                raise AssertionError(f"{otherwise}\n{self.journal() if self.pid else ''}")
            time.sleep(0.05)
        return time.monotonic() - begun


_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _is_first(pid: str) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return any(line.split()[1:][-1:] == ["1"] for line in status.splitlines() if line.startswith("NSpid:"))
