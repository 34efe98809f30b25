"""One machine after another, one for each kernel of `make vagrant-box`: up, check.py in it, its results out, destroyed.

    vagrant/libvirt.sh python3 vagrant/matrix.py [--level LEVEL] [--only STEP...] [KERNEL...]

Every wait has an end. Writes build/vagrant/results/KERNEL/. Exit code 1 if a machine did not come up or a step failed.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BUILT = Path(os.environ.get("NETAPPLY_VAGRANT", HERE.parent / "build" / "vagrant")).resolve()
RESULTS = BUILT / "results"
INSIDE = "/var/tmp/netapply-results"  # in the machine
#: Minutes that check.py may take at a level; itself bounds each of its steps.
MINUTES = {"core": 150, "full": 480, "stress": 2000}
SCALE = {"qemu": "20", "kvm": "1"}  # an emulated machine takes 10 to 25 times what a real one does


def main() -> int:
    """All kernels that are asked for, or all that there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="5.10 and so on")
    parser.add_argument("--level", default="core", choices=MINUTES)
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="see check.py")
    asked = parser.parse_args()
    built = sorted((path.name for path in (BUILT / "boot").iterdir()), key=lambda name: [*map(int, name.split("."))])
    if strangers := [name for name in asked.kernels if name not in built]:
        parser.error(f"no {', '.join(strangers)} in {BUILT}/boot, only {', '.join(built)}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    os.environ["NETAPPLY_DRIVER"] = driver(built[0])
    words = ["--level", asked.level, *(["--only", *asked.only] if asked.only else [])]
    faults = [kernel for kernel in asked.kernels or built if not check(kernel, words, MINUTES[asked.level])]
    print(f"vagrant: failed on {', '.join(faults)}" if faults else "vagrant: all passed")
    return 1 if faults else 0


def driver(kernel: str) -> str:
    """kvm, where a kernel really starts on it (a /dev/kvm is not enough); else qemu, which emulates."""
    boot = ["-kernel", str(BUILT / "boot" / kernel / "vmlinuz"), "-append", "console=ttyS0 panic=-1"]
    plain = ["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot", "-m", "512"]
    try:
        # Without a root file system it panics, and that ends it.
        done = subprocess.run(
            ["qemu-system-x86_64", "-machine", "q35,accel=kvm", "-cpu", "host", *plain, *boot],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return "qemu"
    return "kvm" if b"Kernel panic" in done.stdout and not done.returncode else "qemu"


def check(kernel: str, words: list[str], minutes: int) -> bool:
    """One machine, from up to destroy; what it said is printed as it comes."""
    name, results = f"kernel-{kernel}", RESULTS / kernel
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    begun = time.monotonic()
    print(f"{name}: up, by {os.environ['NETAPPLY_DRIVER']}", flush=True)
    try:
        with open(results / "up.txt", "w") as log:
            subprocess.run(["vagrant", "up", name], stdout=log, stderr=log, timeout=1200, check=True)
        reach = results / "ssh"
        reach.write_text(_said(["vagrant", "ssh-config", "--host", name, name]))
        scale = SCALE[os.environ["NETAPPLY_DRIVER"]]
        inside = ["sudo", f"NETAPPLY_TIMEOUT_SCALE={scale}", "python3", "/netapply/check.py", INSIDE, *words]
        print(f"{name}: there after {time.monotonic() - begun:.0f} s", flush=True)
        ssh = ["ssh", "-F", str(reach), "-o", "ServerAliveInterval=60", "-o", "ServerAliveCountMax=10", name]
        checked = subprocess.run([*ssh, *inside], timeout=60 * minutes, check=False).returncode
        packed = subprocess.run([*ssh, "tar", "-C", INSIDE, "-c", "."], timeout=300, check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-C", str(results), "-x"], input=packed.stdout, timeout=60, check=True)
        stamp(results, json.loads((results / "result.json").read_text()))
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        console = BUILT / "run" / f"console-{kernel}.txt"
        if console.exists():
            shutil.copy(console, results / "console.txt")
        said = [*_last_lines(results / "up.txt"), *_last_lines(results / "console.txt")]
        stamp(results, {"kernel": kernel, "steps": {"machine": {"state": "failed", "said": str(error)}}})
        print(f"{name}: {error}", *said, sep="\n  ", flush=True)
        return False
    finally:
        subprocess.run(["vagrant", "destroy", "--force", name], stdout=subprocess.DEVNULL, timeout=300, check=False)
    print(f"{name}: {'failed' if checked else 'passed'}, {time.monotonic() - begun:.0f} s in all", flush=True)
    return not checked


def stamp(results: Path, result: dict[str, Any]) -> None:
    """Write result.json, with when it was and how the machine was run."""
    today = dt.datetime.now(dt.UTC).date().isoformat()
    known = {"date": today, "driver": os.environ["NETAPPLY_DRIVER"]}
    (results / "result.json").write_text(json.dumps({**known, **result}, indent=1) + "\n")


def _said(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def _last_lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-15:] if path.exists() else []


if __name__ == "__main__":
    sys.exit(main())
