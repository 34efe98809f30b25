"""A namespace with foreign rules, a state directory and a lock of its own, and commands run in it."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from netapply import netlink
from netapply.namespace import Namespace
from tests import foreign, netns
from tests.faults import pictures, tracing
from tests.faults.pictures import Picture
from tests.faults.tracing import Ended, Fault

#: The two plans of each kind of capture: the old state, or the first one, and the new.
_EXCLUDED = "outbound: {cidrs: {exclude: [10.1.0.0/16, 10.3.0.0/16, fd00:1::/32]}}"
_MANY = ", ".join(f"10.{i}.0.0/16" for i in range(0, 80, 2))
PLANS = {
    "redirect": ("", f"outbound: {{cidrs: {{exclude: [{_MANY}]}}}}\ndns: {{capture: all}}\n"),
    "tproxy": (
        "inbound: {mode: tproxy}\n",
        f"inbound: {{mode: tproxy, ports: {{exclude: [15020]}}}}\n{_EXCLUDED}\ninvalid: drop\n",
    ),
}
MODES = tuple(PLANS)
FAMILIES = {"IPv4 and IPv6": "capture", "IPv4": "skip"}


class Case(NamedTuple):
    """What is applied: by which backend, in which mode, for which families."""

    backend: str
    mode: str
    families: str
    #: The backend that `migrate` goes to.
    target: str = ""

    def __str__(self) -> str:
        dialects = f"{self.backend} to {self.target}" if self.target else self.backend
        return f"{dialects}, {self.mode}, {self.families}"


class Stage:
    """One namespace, which the commands of `Case` change. Close it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.directory = Path(tempfile.mkdtemp(prefix="netapply-faults-"))
        self.state = self.directory / "state"
        self.lock = self.directory / "xtables.lock"
        self._lock_before = os.environ.get("XTABLES_LOCKFILE", "")
        os.environ["XTABLES_LOCKFILE"] = str(self.lock)
        self.plans: list[str] = []
        for at, text in enumerate(PLANS[case.mode]):
            path = self.directory / f"{'ab'[at]}.yaml"
            path.write_text(f"apiVersion: netapply/v1\nipv6: {FAMILIES[case.families]}\n{text}")
            self.plans.append(str(path))
        self.netns = netns.make()
        for backend in filter(None, (case.backend, case.target)):
            foreign.put_up(self.netns, backend)
        self.namespace = Namespace.open(self.netns.path)
        self.empty = self.picture()

    def close(self) -> None:
        """Let go of the namespace, and remove the files."""
        self.namespace.close()
        self.netns.close()
        os.environ["XTABLES_LOCKFILE"] = self._lock_before
        shutil.rmtree(self.directory)

    def words(self, command: str, *more: str, where: str = "", lock_timeout: float = 10) -> list[str]:
        """A command line. "apply a" takes one of the two plans, "migrate b" the other; "probed b" with connections."""
        name, _, plan = command.partition(" ")
        words = [
            "migrate" if name == "probed" else name,
            "-N",
            where or self.netns.path,
            "--state-dir",
            str(self.state),
        ]
        words += ["--lock-timeout", str(lock_timeout), *more]
        if name == "apply":
            words += [self.plans["ab".index(plan)], "--backend", self.case.backend]
        elif plan:
            words += [self.plans["ab".index(plan)], "--to", self.case.target]
        if name == "migrate":
            words.append("--no-probe")
        return words

    def run(self, command: str, *more: str, **how: float) -> Ended:
        """Run a command in a process of its own; the next one, mostly."""
        words = self.words(command, *more, **how)  # type: ignore[arg-type]  # lock_timeout alone
        return tracing.run(lambda: command_line(words))

    def fail(
        self, command: str, fault: Fault, *more: str, where: str = "", deadline: float = netlink.DEADLINE
    ) -> Ended:
        """Run a command with a fault. `deadline` is in seconds, for an answer of the kernel's."""
        words = self.words(command, *more, where=where)

        def work() -> int:
            netlink.DEADLINE = deadline
            return command_line(words)

        return tracing.trace(work, fault)

    def picture(self) -> Picture:
        """What the namespace holds now."""
        return pictures.take(self.namespace)

    def reset(self, *commands: str) -> Picture:
        """Run commands that must do, one after the other, and look."""
        for command in commands:
            done = self.run(command)
            if done.code:
                raise AssertionError(f"{self.case}: {command} ended with {done.code}: {done.output}")
        return self.picture()

    def pending(self) -> list[str]:
        """The files of the state directory that say that a run has not ended."""
        return [path.name for path in self.state.glob("*.pending")] if self.state.exists() else []

    def journal(self) -> list[Path]:
        """The files of the journal, but for locks."""
        return sorted(p for p in self.state.iterdir() if p.suffix not in (".lock", ".new", ".bad"))


def command_line(words: Sequence[str]) -> int:
    """The command, in this process."""
    from netapply.cli import main

    return main(words)


def warm(stage: Stage) -> None:
    """Import what the commands import, once for all children: a fault in an import is none of ours."""
    for command in ("apply a", "apply b", "rollback", "recover", "verify", "clean"):
        words = stage.words(command)

        def told(words: Sequence[str] = words) -> int:
            code = command_line(words)
            print("\nMODULES", *sys.modules)
            return code

        for name in tracing.run(told).output.partition("MODULES ")[2].split():
            with suppress(ImportError):
                importlib.import_module(name)
