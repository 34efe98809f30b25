"""In the machine, as root: what netapply shows of itself on this kernel.

    python3 check.py DIRECTORY [--level LEVEL] [--only STEP...]

Runs the demo, the conformance suite and the systemd unit, each for a bounded time; writes DIRECTORY/result.json and the
JUnit reports. Exit code 1 if a step failed; what this netapply does not have is "not there", and no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree as ET

HOME = Path("/opt/netapply")
NETAPPLY = str(HOME / "bin" / "netapply")
BACKENDS = ("nftables", "iptables-nft", "iptables-legacy")
MINUTES = {"core": 40, "full": 150, "stress": 600}  # an emulated machine takes 20 times what a real one does
PLAN = """
apiVersion: netapply/v1
kind: CapturePlan
outbound: {owners: {exclude: {cgroups: [system.slice]}}}
"""


UNIT_NAMESPACE = "netapply-check"


class Step(NamedTuple):
    """What came of one: passed, failed or not there, and a phrase about it."""

    state: str
    said: str
    seconds: float = 0.0


class Ran(NamedTuple):
    """A command that was run; code 124 when its time was over, as timeout(1) has it."""

    code: int
    out: str
    err: str

    def why(self) -> str:
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return f"exit {self.code}: {' / '.join(lines[-3:])}"[:400]


def run(*command: str, minutes: float = 5, given: str = "") -> Ran:
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=60 * minutes, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return Ran(124, "", f"not done after {minutes} minutes")
    except OSError as error:
        return Ran(127, "", str(error))
    return Ran(done.returncode, done.stdout, done.stderr)


def demo(backend: str) -> Step:
    """The six traffic types, inbound by REDIRECT and by TPROXY."""
    ran = run(NETAPPLY, "demo", "--backend", backend, "--output", "json", minutes=10)
    try:
        rounds = json.loads(ran.out)["rounds"]
    except (ValueError, KeyError):
        return Step("failed", ran.why())
    flows = [flow for each in rounds for flow in each["flows"]]
    wrong = [f"{flow['flow']} {flow['family']}: {'; '.join(flow['faults'])}" for flow in flows if flow["faults"]]
    skipped = [f"{each['mode']} skipped, {each['skipped']}" for each in rounds if each["skipped"]]
    said = "; ".join([f"{len(flows) - len(wrong)} of {len(flows)} flows", *skipped, *wrong[:5]])
    return Step("failed" if ran.code or wrong else "passed", said)


def conform(backend: str, level: str, results: Path) -> Step:
    """The conformance suite."""
    if run(NETAPPLY, "conform", "--help").code:
        return Step("not there", "")
    report = results / f"conform-{backend}.xml"
    words = ("--backend", backend, "--level", level, "--junit", str(report))
    ran = run(NETAPPLY, "conform", *words, minutes=MINUTES[level])
    (results / f"conform-{backend}.txt").write_text(ran.out + ran.err)
    if not report.exists():
        return Step("failed", ran.why())
    cases = list(ET.parse(report).iter("testcase"))  # noqa: S314  # our own
    failed = [case.get("name", "") for case in cases if {"failure", "error"} & {child.tag for child in case}]
    skips = [child.get("message", "") for case in cases for child in case if child.tag == "skipped"]
    said = [f"{len(cases) - len(failed) - len(skips)} of {len(cases)} cases"]
    said += [f"{skips.count(why)} skipped: {why}" for why in dict.fromkeys(skips)]
    said += [f"failed: {', '.join(failed[:8])}"] if failed else [ran.why()] if ran.code else []
    return Step("failed" if ran.code else "passed", "; ".join(said))


def preferred(backend: str) -> Step:
    """What a kernel lacks is refused where it is needed, and left out where it is preferred: cgroups on 5.10."""
    lacks = "cgroups" in missing().get(backend, ())
    words = ("unshare", "--net", NETAPPLY, "apply", "-", "--backend", backend, "--output", "json")
    needed, wished = run(*words, given=PLAN), run(*words, given=PLAN + "prefer: [cgroups]\n")
    try:
        degraded = json.loads(wished.out).get("degraded", [])
    except ValueError:
        return Step("failed", wished.why())
    right = bool(needed.code) == lacks and not wished.code and bool(degraded) == lacks
    said = "cgroups refused where needed, left out where preferred" if lacks else "cgroups applied"
    return Step("passed" if right else "failed", said if right else f"{needed.why()}; {wished.why()}")


def unit() -> Step:
    """The agent as users install it: a plan file put into force, and a flush healed, by the unit."""
    if run(NETAPPLY, "install-unit", "--print").code:
        return Step("not there", "")
    plans = Path("/etc/netapply/plans.d")
    for command in (
        ("ip", "netns", "add", UNIT_NAMESPACE),
        (NETAPPLY, "install-unit"),
        ("systemd-sysusers", "netapply.conf"),
        ("systemd-tmpfiles", "--create", "netapply.conf"),
        ("systemctl", "daemon-reload"),
        ("systemctl", "start", "netapply.socket", "netapply-read.socket", "netapply.service"),
        ("systemctl", "is-active", "netapply.service"),
    ):
        ran = run(*command)
        if ran.code:
            return Step("failed", f"{' '.join(command)}: {ran.why()}")
    plans.mkdir(parents=True, exist_ok=True)
    (plans / "check.yaml").write_text(
        f"apiVersion: netapply/v1\nnamespaces: [{{path: /run/netns/{UNIT_NAMESPACE}}}]\nbackend: nftables\n"
    )
    listed = ("ip", "netns", "exec", UNIT_NAMESPACE, "nft", "list", "table", "inet", "netapply")
    said = ""
    if not _within(lambda: not run(*listed).code):
        said = "the plan file was not put into force"
    elif run("ip", "netns", "exec", UNIT_NAMESPACE, "nft", "flush", "ruleset").code:
        said = "nft flush ruleset failed"
    elif not _within(lambda: not run(*listed).code):
        said = "a flush was not healed"
    stopped = run("systemctl", "stop", "netapply.service")
    if said or stopped.code:
        return Step("failed", said or f"systemctl stop: {stopped.why()}")
    return Step("passed", "active, plan in force, flush healed, stopped")


def _within(holds: Callable[[], bool], seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def missing() -> dict[str, list[str]]:
    """What each backend finds that this kernel lacks, by `netapply detect`."""
    ran = run("unshare", "--net", NETAPPLY, "detect", "--output", "json")
    try:
        found = json.loads(ran.out)["candidates"]
    except (ValueError, KeyError):
        return {}
    return {each["backend"]: [feature for feature, _ in each["missing"]] for each in found}


def machine() -> dict[str, Any]:
    """Versions of what counts here."""
    release = platform.freedesktop_os_release()

    def version(*command: str) -> str:
        found = re.search(r"\d+(\.\d+)+", run(*command).out)
        return found[0] if found else "none"

    return {
        "kernel": platform.release(),
        "system": release.get("PRETTY_NAME", ""),
        "python": platform.python_version(),
        "nft": version("nft", "--version"),
        "iptables": version("iptables", "--version"),
        "netapply": version(NETAPPLY, "--version"),
    }


def taint() -> int:
    """The kernel's own opinion of itself, 0 where all is well; see Documentation/admin-guide/tainted-kernels.rst."""
    return int(Path("/proc/sys/kernel/tainted").read_text())


def main() -> int:
    """Run all steps that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--level", default="core", choices=MINUTES)
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="demo, preferred, conform, unit")
    asked = parser.parse_args()
    asked.directory.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    steps = {
        **{f"demo {backend}": (lambda b=backend: demo(b)) for backend in BACKENDS},
        **{f"preferred {backend}": (lambda b=backend: preferred(b)) for backend in BACKENDS},
        **{f"conform {backend}": (lambda b=backend: conform(b, asked.level, asked.directory)) for backend in BACKENDS},
        "unit": unit,
    }
    before, done = taint(), {}
    for name, work in steps.items():
        if asked.only and name.split()[0] not in asked.only:
            continue
        begun = time.monotonic()
        step = work()._replace(seconds=round(time.monotonic() - begun, 1))
        done[name] = step._asdict()
        print(f"  {name}: {step.state}{', ' if step.said else ''}{step.said} ({step.seconds:.0f} s)", flush=True)
    if taint() != before:
        done["kernel"] = Step("failed", f"taint {before} before, {taint()} after")._asdict()
    result = {**machine(), "level": asked.level, "taint": taint(), "missing": missing(), "steps": done}
    (asked.directory / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(step["state"] == "failed" for step in done.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
