"""What could keep capture from working here: checks that look and change nothing, each with its evidence and a fix.

with open_capture("pod-1") as capture:
    for finding in examine(Sight(capture)):
        print(finding.check, finding.result, finding.evidence, finding.fix)
"""

from __future__ import annotations

from collections.abc import Iterator

from netapply.doctor import machine, network, others, proxy
from netapply.doctor.finding import Check as Check
from netapply.doctor.finding import Finding as Finding
from netapply.doctor.finding import Grade as Grade
from netapply.doctor.finding import Sight as Sight
from netapply.errors import NetapplyError

#: In the order in which they are told.
CHECKS: tuple[Check, ...] = (*network.CHECKS, *proxy.CHECKS, *others.CHECKS, *machine.CHECKS)


def examine(sight: Sight) -> Iterator[Finding]:
    """Everything, one after another. A look that failed is a finding, too, and the others go on."""
    for check in CHECKS:
        name = check.__name__.replace("_", " ")
        try:
            found = list(check(sight))
        except (NetapplyError, OSError) as error:
            step = getattr(error, "next_step", "") or "run as root"
            found = [Finding(name, "unseen", str(error), step)]
        yield from found
