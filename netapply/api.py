"""The library's front: one namespace, opened, and what can be done with it.

    with netapply.open("pod-1") as capture:
        print(capture.apply(plan).steps)

`netapply.testing.FakeKernel` opens objects of the same shape that touch no kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from netapply import core, inspection, recovery
from netapply.journal import Journal
from netapply.namespace import Namespace
from netapply.ownership import Adoption
from netapply.plan import CapturePlan
from netapply.results import Detection, Diff, Live, Result, RuleCounter


class CaptureLike(Protocol):
    """What can be done with one namespace. The real one is `Capture`; tests take `netapply.testing.FakeCapture`."""

    def apply(
        self,
        plan: CapturePlan,
        *,
        backend: str = "auto",
        layout: str = "netapply",
        cancelled: Callable[[], bool] = ...,
    ) -> Result:
        """Make the namespace hold `plan`, or leave it as it was and raise NetapplyError."""
        ...

    def diff(self, plan: CapturePlan, *, backend: str = "auto", layout: str = "netapply") -> Diff:
        """What `apply` would change. Changes nothing."""
        ...

    def verify(self, plan: CapturePlan | None = None) -> Diff:
        """Whether the namespace still holds `plan`, or what was last applied."""
        ...

    def clean(self) -> Result:
        """Remove all that is ours, in every dialect."""
        ...

    def show(self) -> tuple[RuleCounter, ...]:
        """Our live rules with their counters."""
        ...

    def detect(self) -> Detection:
        """Which backends work here, and which one `auto` takes. Changes nothing."""
        ...

    def close(self) -> None:
        """Let go of the namespace."""
        ...


class Capture:
    """One real namespace. Its methods block; each is one transaction or one look, and may be called from any thread."""

    def __init__(self, namespace: Namespace, journal: Journal) -> None:
        self.namespace = namespace
        self.journal = journal

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def apply(
        self,
        plan: CapturePlan,
        *,
        backend: str = "auto",
        layout: str = "netapply",
        adopt: Adoption | None = None,
        fingerprint: str = "",
        cancelled: Callable[[], bool] = lambda: False,
        proof: Callable[[], None] | None = None,
        flush: bool = False,
        reason: str = "",
    ) -> Result:
        """See `netapply.core.apply`."""
        return core.apply(
            self.namespace,
            plan,
            backend=backend,
            layout=layout,
            adopt=adopt,
            journal=self.journal,
            fingerprint=fingerprint,
            cancelled=cancelled,
            proof=proof,
            flush=flush,
            reason=reason,
        )

    def diff(self, plan: CapturePlan, *, backend: str = "auto", layout: str = "netapply") -> Diff:
        """See `netapply.inspection.diff`."""
        return inspection.diff(self.namespace, plan, backend=backend, layout=layout)

    def verify(self, plan: CapturePlan | None = None, *, backend: str = "auto", layout: str = "netapply") -> Diff:
        """See `netapply.inspection.verify`."""
        return inspection.verify(self.namespace, plan, backend=backend, layout=layout, journal=self.journal)

    def clean(
        self, *, backend: str = "auto", layout: str = "netapply", adopt: Adoption | None = None, reason: str = ""
    ) -> Result:
        """See `netapply.core.clean`."""
        return core.clean(
            self.namespace, backend=backend, layout=layout, adopt=adopt, journal=self.journal, reason=reason
        )

    def migrate(
        self,
        plan: CapturePlan,
        to: str,
        *,
        layout: str = "netapply",
        adopt: Adoption | None = None,
        fingerprint: str = "",
        proof: Callable[[], None] | None = None,
        reason: str = "",
    ) -> Result:
        """See `netapply.migration.migrate`."""
        from netapply.migration import migrate  # few ask for it

        return migrate(
            self.namespace,
            plan,
            to,
            layout=layout,
            adopt=adopt,
            journal=self.journal,
            fingerprint=fingerprint,
            proof=proof,
            reason=reason,
        )

    def rollback(self, back: int = 1, *, reason: str = "") -> Result:
        """See `netapply.core.rollback`."""
        return core.rollback(self.namespace, back, journal=self.journal, reason=reason)

    def recover(self) -> Result:
        """See `netapply.recovery.recover`."""
        return recovery.recover(self.namespace, journal=self.journal)

    def live(self, *, backend: str = "auto", layout: str = "netapply") -> tuple[Live, ...]:
        """See `netapply.inspection.live`."""
        return inspection.live(self.namespace, backend=backend, layout=layout, journal=self.journal)

    def show(self, *, backend: str = "auto", layout: str = "netapply") -> tuple[RuleCounter, ...]:
        """See `netapply.inspection.show`."""
        return inspection.show(self.namespace, backend=backend, layout=layout, journal=self.journal)

    def detect(self, *, layout: str = "netapply") -> Detection:
        """See `netapply.inspection.detect`."""
        return inspection.detect(self.namespace, layout=layout, journal=self.journal)

    def close(self) -> None:
        """Let go of the namespace; nothing keeps it alive some 50 ms later."""
        self.namespace.close()


def open_capture(
    spec: str | int | None = None,
    *,
    host: bool = False,
    lock_timeout: float = 10.0,
    state_directory: str | None = None,
) -> Capture:
    """Open a network namespace: a name, a path, "pid:N", "fd:N" or a number; None is the caller's own.

    The machine's initial namespace is refused unless `host`. `lock_timeout` is in seconds, for the xtables lock and
    for another netapply on the same namespace. Raises NamespaceError.
    """
    return Capture(Namespace.open(spec, host=host, lock_timeout=lock_timeout), Journal(state_directory))
