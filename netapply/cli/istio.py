"""`netapply istio-iptables` and `netapply istio-clean-iptables`: Istio's command lines, read without argparse.

Exit codes are Istio's: 0, 1 for any error, 126 where validation fails.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from netapply.api import Capture, open_capture
from netapply.cli.output import Printer, print_result
from netapply.dropin.facts import read_facts, without_kernel
from netapply.dropin.run import Job, apply, choose_lock, clean, plan_of
from netapply.errors import Fault, NetapplyError, PlanError
from netapply.importers.istio import VERSIONS, Facts, global_addresses
from netapply.importers.istio_settings import IstioSettings, read_command, seconds
from netapply.plan import CapturePlan

APPLY, CLEAN = COMMANDS = ("istio-iptables", "istio-clean-iptables")
LAYOUTS = (*VERSIONS, "netapply")
BACKENDS = ("auto", "iptables-legacy", "iptables-nft", "nftables")
FORMS = ("text", "json")
#: Seconds. As Istio, which gives iptables --wait=30.
LOCK_TIMEOUT = 30.0


def _one_of(words: Sequence[str]) -> Callable[[str], str]:
    return lambda text: "" if text in words else f"write one of {', '.join(words)}"


def _lock_timeout(text: str) -> str:
    with suppress(ValueError):
        if 0 <= float(text) <= 86_400:
            return ""
    return "write a number of seconds from 0 to 86400"


#: Our own flags beside Istio's, with what each accepts ("" if it does). Each has a variable, NETAPPLY_ and its name.
OWN: Mapping[str, Callable[[str], str]] = {
    "layout": _one_of(LAYOUTS),
    "backend": _one_of(BACKENDS),
    "state_dir": lambda _: "",
    "lock_timeout": _lock_timeout,
    "output": _one_of(FORMS),
}


def main(command: str, words: Sequence[str], env: Mapping[str, str]) -> int:
    """Run one of `COMMANDS`; returns the exit code."""
    if not {"-h", "--help"}.isdisjoint(words):
        return _help(command)
    faults: list[Fault] = []
    notes: list[str] = []
    settings, own = read_command(words, env, OWN, faults, notes)
    form = own.get("output", "text")
    printer = Printer(form if form in FORMS else "text", sys.stdout, sys.stderr)
    try:
        job = Job(settings, own.get("layout", VERSIONS[0]), own.get("backend", "auto"))
        if faults:
            raise PlanError((*faults, *_more_faults(job)))
        choose_lock(settings, os.environ)
        with open_capture(
            settings.network_namespace or None,
            host=True,  # on a virtual machine, the machine's own is meant
            lock_timeout=float(own.get("lock_timeout", LOCK_TIMEOUT)),
            state_directory=own.get("state_dir"),
        ) as capture:
            _run(command, capture, job, printer, notes)
        printer.flush()
    except NetapplyError as error:
        printer.error(command, error, faulty="the settings have")
        return error.exit_code
    except KeyboardInterrupt:
        step = "a run that had not ended was rolled back"
        printer.error(command, NetapplyError("interrupted", next_step=step))
        return 130
    return 0


def _run(command: str, capture: Capture, job: Job, printer: Printer, notes: list[str]) -> None:
    """As Istio's: rules unless these are to be left out, then validation."""
    settings = job.settings
    cleans = command == CLEAN or settings.cleanup_only
    validates = settings.run_validation and not settings.dry_run and command == APPLY
    plan, facts = CapturePlan(), Facts()
    if validates or not (cleans or settings.skip_rule_apply):
        facts = read_facts(capture.namespace, settings)
        plan = plan_of(job, facts, notes)
    for note in notes:
        printer.note(note)
    if settings.dry_run:
        _show(command, capture, job, None if cleans else plan, printer)
    elif command == CLEAN or not settings.skip_rule_apply:
        result = clean(capture, job) if cleans else apply(capture, job, plan, facts)
        if printer.json:
            printer.document(command, result._asdict())
        else:
            print_result(result, printer)
    if validates:
        _validate(capture, settings, plan, facts, printer)


def _show(command: str, capture: Capture, job: Job, plan: CapturePlan | None, printer: Printer) -> None:
    """What would be applied, or, without a plan, what stands and would be removed."""
    from netapply.cli.rendering import rendering
    from netapply.dropin.run import backend_of

    if plan is None:
        rules = capture.show(backend=job.backend, layout="istio")
        if printer.json:
            printer.document(command, {"dry_run": True, "rules": [rule._asdict() for rule in rules]})
            return
        printer.line(f"# dry run: {len(rules)} rules would be removed, with their chains and routing")
        for rule in rules:
            printer.line(f"# {rule.family} {rule.table} {rule.chain}: {rule.rule}")
        return
    backend, reason = backend_of(capture, job)
    made = rendering(plan, backend, job.layout)
    if printer.json:
        printer.document(command, {"dry_run": True, "backend": backend.name, "reason": reason, **made._asdict()})
        return
    printer.line(f"# dry run: nothing is touched; {backend.name} ({reason}), IPv6: {plan.ipv6}")
    printer.line(made.lines)


def _validate(capture: Capture, settings: IstioSettings, plan: CapturePlan, facts: Facts, printer: Printer) -> None:
    from netapply.dropin.validation import Probe, caller_of, validate

    ports = tuple(dict.fromkeys((plan.proxy.outbound_port, plan.proxy.inbound_port)))
    ipv6 = len((global_addresses(facts) or facts.addresses)[0]) == 16
    caller = caller_of(plan.proxy.uids, plan.proxy.gids)
    timeout = max(seconds(settings.probe_timeout) or 0.0, 0.0)
    validate(capture.namespace, Probe(ipv6, ports, int(settings.iptables_probe_port), caller, timeout))
    if not printer.json:
        printer.line("validation passed: the rules that stand capture a connection")


def _more_faults(job: Job) -> tuple[Fault, ...]:
    """What else is wrong in settings of which some could not be read."""
    try:
        plan_of(job, without_kernel(job.settings), [])
    except PlanError as error:
        return error.faults
    return ()


def _help(command: str) -> int:
    from netapply.cli.arguments import build_parser

    build_parser().parse_args([command, "--help"])
    return 0
