"""`netapply import`: the settings of another tool as a plan file. Touches nothing."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Callable, Mapping

from netapply.cli.output import Printer
from netapply.cli.words import Arguments
from netapply.documents import LIMITS, read_document
from netapply.dropin.facts import BOTH_FAMILIES, read_facts
from netapply.errors import Fault, NetapplyError, PlanError
from netapply.importers.annotations import read_pod
from netapply.importers.istio import Facts, global_addresses
from netapply.importers.istio_plans import import_plan
from netapply.importers.istio_settings import IstioSettings
from netapply.importers.readings import Reading, read_flags
from netapply.lookups import SYSTEM
from netapply.namespace import Namespace
from netapply.planfile import dump_plan, format_of, read_source

#: What a pod's list of managed fields needs.
_POD_LIMITS = LIMITS._replace(max_depth=64)


def import_settings(arguments: Arguments, printer: Printer) -> int:
    """Print the plan file."""
    try:
        return PEERS[arguments.peer](arguments, printer)
    except PlanError as error:
        printer.error("import", error, faulty="the settings have")
        return error.exit_code


def _istio(arguments: Arguments, printer: Printer) -> int:
    reading = _reading(arguments)
    facts, known = _facts(arguments, reading.settings)
    reading = reading._replace(otherwise={**known, **reading.otherwise})
    if not facts.addresses:
        stated = Fault("addresses", "none here but loopback and link-local", "state --ipv6 yes, or no")
        reading, facts = reading._replace(faults=(*reading.faults, stated)), facts._replace(addresses=BOTH_FAMILIES)
    made = import_plan(reading, arguments.layout, facts)
    if printer.json:
        plan = {"layout": arguments.layout, "plan": dump_plan(made.plan), "comments": made.comments}
        printer.document("import", {**plan, "warnings": reading.warnings})
        return 0
    printer.line(made.text.rstrip("\n"))
    for warning in reading.warnings:
        printer.note(f"warning: {warning}")
    return 0


def _reading(arguments: Arguments) -> Reading:
    variables, path = arguments.env_file, arguments.annotations
    env: Mapping[str, str] = _environment(variables) if variables else {}
    if not path:
        reading = read_flags(arguments.flags, env)
        return reading._replace(of=f"{reading.of}, with {_shown(variables)}") if variables else reading
    if arguments.flags:
        raise NetapplyError(
            "a pod was given and flags too, and istio-cni takes no flags",
            next_step="give --annotations, or flags after --, but not both",
        )
    pod = read_document(read_source(path), format_of(path), _POD_LIMITS, _shown(path))
    return read_pod(pod, env, _shown(path))


def _shown(path: str) -> str:
    return "standard input" if path == "-" else path


def _environment(path: str) -> Mapping[str, str]:
    """The variables of a file, written as for a shell: NAME=value or export NAME='value', and comments."""
    found: dict[str, str] = {}
    faults: list[Fault] = []
    for number, line in enumerate(read_source(path).decode("utf-8", "replace").splitlines(), 1):
        where, text = f"{_shown(path)}:{number}", line.strip()
        try:
            words = shlex.split(text) if not text.startswith("#") else []
        except ValueError:
            faults.append(Fault(where, ascii(text), "close the quotes on the same line"))
            continue
        for word in words[1:] if words[:1] == ["export"] else words:
            name, equals, value = word.partition("=")
            if word.startswith("#"):
                break
            if equals and name.isidentifier():
                found[name] = value
            else:
                faults.append(Fault(where, ascii(word), "write NAME=value, with quotes around a value with spaces"))
    if faults:
        raise PlanError(tuple(faults))
    return found


def _facts(arguments: Arguments, settings: IstioSettings) -> tuple[Facts, dict[str, str]]:
    """What Istio would look up, here or as it was stated; and by plan path how it is known."""
    lookups, servers = SYSTEM, arguments.servers
    if servers is not None:
        lookups = lookups._replace(servers=lambda: tuple(each.strip() for each in servers.split(",")))
    known = {"dns.servers": "from /etc/resolv.conf here" if servers is None else f"--servers {servers}"}
    with Namespace.open(None, host=True) as here:  # to read its addresses
        facts = read_facts(here, settings, lookups)
    if arguments.ipv6:
        known["ipv6"] = f"--ipv6 {arguments.ipv6}"
        return facts._replace(addresses=BOTH_FAMILIES[arguments.ipv6 == "yes" :][:1]), known
    found = tuple(global_addresses(facts))
    facts = facts._replace(addresses=found)
    of_ipv6 = [packed for packed in found if len(packed) == 16]
    if settings.dual_stack:
        known["ipv6"] = f"{_text(of_ipv6[0])} is an address here" if of_ipv6 else "no address here is of IPv6"
    elif found:
        known["ipv6"] = f"the first address here is {_text(found[0])}"
    return facts, known


def _text(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


PEERS: Mapping[str, Callable[[Arguments, Printer], int]] = {"istio": _istio}
