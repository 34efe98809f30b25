"""Plan files: bytes to `CapturePlan` and back. Every fault of a file is reported at once, and nothing else happens.

plan = load_plan(b"apiVersion: netapply/v1")
plan = read_plan("plan.yaml")            # "-" is standard input
dump_plan(plan)                          # as a file spells it, JSON-able
fingerprint(plan)                        # 16 hex digits, the same for plans that mean the same
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from netapply.contradictions import find_contradictions
from netapply.documents import LIMITS, Format, Limits, read_document
from netapply.errors import Fault, PlanError
from netapply.fields import FAULTY, Check, Redundant
from netapply.lookups import SYSTEM, Lookups
from netapply.plan import Owners, plan_of
from netapply.ruleset import FAMILIES
from netapply.schema import PLAN
from netapply.values import NamedTuple

if TYPE_CHECKING:
    from netapply.plan import CapturePlan

_FORMATS: dict[str, Format] = {".json": "json", ".toml": "toml", ".yaml": "yaml", ".yml": "yaml"}


class Loaded(NamedTuple):
    """A plan, and the entries of its file that change nothing (for `netapply.lint`)."""

    plan: CapturePlan
    redundant: tuple[Redundant, ...]


def load_plan(
    data: bytes | str,
    *,
    format: Format | None = None,  # noqa: A002 - the word that users know
    lookups: Lookups = SYSTEM,
    source: str = "<plan>",
    limits: Limits = LIMITS,
) -> CapturePlan:
    """The plan of a file's content; the format is guessed when None. Raises PlanError with every fault."""
    return examine_plan(data, format=format, lookups=lookups, source=source, limits=limits).plan


def read_plan(
    path: str | os.PathLike[str],
    *,
    format: Format | None = None,  # noqa: A002 - the word that users know
    lookups: Lookups = SYSTEM,
    limits: Limits = LIMITS,
) -> CapturePlan:
    """The plan in the file at `path`, or on standard input for "-". Raises PlanError, also where it cannot be read."""
    path = os.fspath(path)
    data = read_source(path, limits)
    return load_plan(data, format=format or format_of(path), lookups=lookups, source=_shown(path), limits=limits)


def examine_plan(
    data: bytes | str,
    *,
    format: Format | None = None,  # noqa: A002 - the word that users know
    lookups: Lookups = SYSTEM,
    source: str = "<plan>",
    limits: Limits = LIMITS,
    beside: tuple[str, ...] = (),
) -> Loaded:
    """`load_plan`, and what was redundant in the file. `beside` it has fields that are not here, nor the plan's."""
    document = read_document(data, format, limits, source)
    check = Check(lookups, beside)
    plan = PLAN.parse(document, "", check)
    if plan is not FAULTY:
        check.faults.extend(find_contradictions(plan, [fault.path for fault in check.faults]))
    if check.faults:
        raise PlanError(tuple(check.faults))
    return Loaded(plan, tuple(check.redundant))


def read_source(path: str, limits: Limits = LIMITS) -> bytes:
    """The bytes of a file, or of standard input for "-"; no more than one over the limit. Raises PlanError."""
    try:
        if path == "-":
            return sys.stdin.buffer.read(limits.max_bytes + 1)
        with open(path, "rb") as file:
            return file.read(limits.max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise PlanError((Fault(_shown(path), reason, "name a plan file that can be read"),)) from error


def format_of(path: str) -> Format | None:
    """What the file's name says about its format."""
    name = path.lower()
    return next((word for ending, word in _FORMATS.items() if name.endswith(ending)), None)


def _shown(path: str) -> str:
    return "<stdin>" if path == "-" else path


def dump_plan(plan: CapturePlan) -> dict[str, Any]:
    """The whole plan in a file's spelling, defaults too, JSON-able. `load_plan` of it gives the same plan."""
    written: dict[str, Any] = PLAN.write(plan)
    return written


def fingerprint(plan: CapturePlan) -> str:
    """16 hex digits of the SHA-256 of the plan's canonical JSON, and of the cgroups' ids, which files do not spell."""
    import json

    plans = [plan_of(plan, family) for family in FAMILIES]
    cgroups = {cgroup.path: cgroup.id for each in plans for owners in _owners(each) for cgroup in owners.cgroups}
    text = json.dumps([dump_plan(plan), cgroups], sort_keys=True, separators=(",", ":"))
    digest: str = _sha256(text.encode()).hexdigest()
    return digest[:16]


def _sha256(data: bytes) -> Any:
    """A hash object. hashlib imports all of OpenSSL, 3 ms; CPython has its own (before 3.12 under another name)."""
    for name in ("_sha2", "_sha256"):
        with suppress(ImportError):
            return import_module(name).sha256(data)
    return import_module("hashlib").sha256(data)


def _owners(plan: CapturePlan) -> list[Owners]:
    rules = plan.outbound.owners
    places = [plan.proxy.self_calls, rules.include, rules.exclude]
    places += [exception.owners for exception in plan.outbound.exclude_for_owners]
    return [place for place in places if isinstance(place, Owners)]
