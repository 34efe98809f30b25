"""`netapply conform --mutations`: does the suite notice a backend's mistakes?"""

from __future__ import annotations

from netapply.cli.output import Printer
from netapply.conformance.proof import Found, prove
from netapply.conformance.unprivileged import enter_user_namespace
from netapply.errors import NetapplyError


def run_prove(printer: Printer, *, backend: str, pattern: str) -> int:
    """Make each mistake, and print which case noticed; 1 if one was noticed by none."""
    note = enter_user_namespace()
    if note:
        printer.note(note)
    found: list[Found] = []
    for each in prove(backend, pattern):
        printer.progress(f"{backend} {len(found) + 1}: {each.mutation}")
        found.append(each)
    printer.progress("")
    if not found:
        raise NetapplyError(f"no mistake is called {pattern!r}", next_step="leave -k out")
    counted = [each for each in found if not each.idle]
    noticed = sum(bool(each.case) for each in counted)
    if printer.json:
        printer.document("conform", {"mutations": [each._asdict() for each in found]}, ok=noticed == len(counted))
        return 0 if noticed == len(counted) else 1
    printer.table(("MISTAKE", "NOTICED BY"), [(each.mutation, _by(each)) for each in found])
    idle = f"; {len(found) - len(counted)} make no difference in this dialect" if len(counted) < len(found) else ""
    colour = "green" if noticed == len(counted) else "red"
    printer.line(printer.paint(f"{noticed} of {len(counted)} mistakes are noticed{idle}", colour))
    return 0 if noticed == len(counted) else 1


def _by(found: Found) -> str:
    return found.case or ("(makes no difference here)" if found.idle else "NOBODY")
