"""The one runner: cases in, outcomes out.

with Runner("nftables") as runner:
    outcomes = [runner.run(case) for case in cases_of("core")]
    report = runner.report(outcomes)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Self

from netapply.backend import find_backend
from netapply.conformance import machine
from netapply.conformance.belongings import belongings
from netapply.conformance.case import Case, Outcome
from netapply.conformance.stage import Reader, Stage, make_cgroups, plan_from, stage
from netapply.conformance.stories import tell
from netapply.errors import NetapplyError
from netapply.values import NamedTuple


class Report(NamedTuple):
    """What came of a run. `seconds` is all of it, `rate` is of probes a second while probes were under way.

    `taint` and `complaints` are the kernel's, new since the start; `unseen` says what could not be looked at.
    """

    backend: str
    kernel: str
    outcomes: tuple[Outcome, ...]
    probes: int
    rate: float
    seconds: float
    taint: int
    complaints: tuple[str, ...]
    unseen: tuple[str, ...]

    def count(self, status: str) -> int:
        """How many cases passed, failed or were skipped."""
        return sum(outcome.status == status for outcome in self.outcomes)

    @property
    def good(self) -> bool:
        """Something was shown, nothing failed, and the kernel is as healthy as before."""
        return self.count("passed") > 0 and self.count("failed") == 0 and not self.taint


class Runner:
    """Runs cases on one backend; a context manager. `readers` look at the rules of each case with tools of their own.

    Raises UnsupportedError where no backend has this name, NamespaceError where no namespace can be made.
    """

    def __init__(self, backend: str, readers: Sequence[Reader] = ()) -> None:
        self._backend = find_backend(backend)
        self._readers = readers
        self._stack = ExitStack()
        self._on_stage = ExitStack()
        self._stage: Stage | None = None
        self._probes, self._probing = 0, 0.0
        self._begun = time.monotonic()

    def __enter__(self) -> Self:
        self._machine = machine.look()
        self._directory = self._stack.enter_context(belongings())
        make_cgroups()
        try:
            self._stage = self._new_stage()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        try:
            self._leave()
        finally:
            self._stack.close()

    def run(self, case: Case) -> Outcome:
        """One case; an error of netapply's is a failure of the case. Raises NetapplyError where no stage can be had."""
        on = self._stage or self._new_stage()
        begun, sent, busy = time.monotonic(), on.prober.sent, on.prober.seconds
        if skipped := _unusable(on) or on.capabilities.missing(case, plan_from(case.plan)):
            return Outcome(case.name, case.level, "skipped", skipped=skipped)
        wrong = tuple(self._differences(case, on))
        spent, probes = time.monotonic() - begun, on.prober.sent - sent
        self._probes += probes
        self._probing += on.prober.seconds - busy
        if wrong or on.spoiled:  # whatever is left there is not the next one's
            self._leave()
        return Outcome(case.name, case.level, "failed" if wrong else "passed", wrong, "", probes, spent)

    def ready(self) -> None:
        """Have a stage to run on. Raises NetapplyError."""
        if self._stage is None:
            self._new_stage()

    def report(self, outcomes: Sequence[Outcome]) -> Report:
        """What came of all of them, and of the kernel."""
        since = machine.since(self._machine)
        spent = time.monotonic() - self._begun
        rate = self._probes / self._probing if self._probing else 0.0
        return Report(self._backend.name, machine.kernel(), tuple(outcomes), self._probes, rate, spent, *since)

    def _differences(self, case: Case, on: Stage) -> Iterator[str]:
        try:
            yield from tell(case, on, self._readers)
        except NetapplyError as error:
            yield f"{type(error).__name__}: {error}"
        except OSError as error:
            yield f"the prober: {error}"
        if case.story == "model":  # the next one comes in its place
            return
        try:
            yield from _cleaned(case, on)
        except NetapplyError as error:
            yield f"clean: {type(error).__name__}: {error}"

    def _new_stage(self) -> Stage:
        self._stage = self._on_stage.enter_context(stage(self._backend, self._directory))
        return self._stage

    def _leave(self) -> None:
        self._stage = None
        self._on_stage.close()
        self._on_stage = ExitStack()


def _unusable(on: Stage) -> str:
    return "" if on.found.status == "usable" else f"{on.backend.name} is {on.found.status}: {on.found.reason}"


def _cleaned(case: Case, on: Stage) -> Iterator[str]:
    """Clean, and look whether that left anything."""
    namespace, backend = on.capture.namespace, on.backend
    if on.spoiled:
        return
    on.capture.clean(backend=backend.name, layout=case.layout)
    if on.read(case.layout) is not None or backend.detect(namespace):
        yield "clean left rules of ours"
    yield from (f"after clean, {wrong}" for wrong in on.blank.changes(on.picture()))
    if on.capture.clean(backend=backend.name, layout=case.layout).changed:
        yield "a second clean changed something"
