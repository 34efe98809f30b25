"""Values and errors as JSON, and results and errors back from it: what the command prints, and the agent answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from netapply import errors
from netapply.errors import ApplyError, ConflictError, Fault, KernelError, NetapplyError, PlanError
from netapply.results import Result

_FAULTS = "faults"


def plain(value: Any) -> Any:
    """A value as JSON knows it: named tuples as objects, at any depth; bytes in hex; all else as text."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    names: tuple[str, ...] | None = getattr(value, "_fields", None)
    if names is not None:
        return {name: plain(getattr(value, name)) for name in names}
    if _is_mapping(value):
        return {str(name): plain(each) for name, each in value.items()}
    if _is_collection(value):
        return [plain(each) for each in value]
    return value.hex() if isinstance(value, bytes) else str(value)


def _is_mapping(value: Any) -> TypeGuard[Mapping[Any, Any]]:
    return isinstance(value, Mapping)


def _is_collection(value: Any) -> TypeGuard[Iterable[Any]]:
    return isinstance(value, (tuple, list, set, frozenset))


def error_fields(error: NetapplyError) -> dict[str, Any]:
    """An error as JSON: its kind, message and next step, and what its class adds."""
    kind = getattr(error, "kind", "") or type(error).__name__
    fields: dict[str, Any] = {"kind": kind, "message": str(error), "next_step": error.next_step}
    if isinstance(error, PlanError):
        fields[_FAULTS] = [fault._asdict() for fault in error.faults]
    if isinstance(error, ConflictError):
        fields["dialects"] = error.dialects
    if isinstance(error, KernelError):
        fields.update(operation=error.operation, errno=error.errno, extack=error.extack)
    if isinstance(error, ApplyError):
        fields.update(step=error.step, restored=error.restored)
        if isinstance(error.__cause__, NetapplyError):
            fields["cause"] = error_fields(error.__cause__)
    return fields


def error_of(fields: Mapping[str, Any]) -> NetapplyError:
    """The error that was told by `error_fields`; a NetapplyError where its kind is not known here."""
    known = {name: each for name, each in vars(errors).items() if isinstance(each, type)}
    kind = known.get(str(fields.get("kind")), NetapplyError)
    if kind is PlanError:
        return PlanError(tuple(Fault(**each) for each in fields[_FAULTS]))
    if not issubclass(kind, NetapplyError):
        kind = NetapplyError
    error = kind.__new__(kind)  # its message is made already, so its own __init__ would say everything twice
    Exception.__init__(error, str(fields.get("message", "")))
    error.__dict__.update({name: each for name, each in fields.items() if name not in ("kind", "message", "cause")})
    if "dialects" in fields:
        error.__dict__["dialects"] = tuple(fields["dialects"])
    if "cause" in fields:
        error.__cause__ = error_of(fields["cause"])
    return error


def result_of(fields: Mapping[str, Any]) -> Result:
    """The Result that was told as JSON; what a later version adds is left out."""
    known: dict[str, Any] = {name: fields[name] for name in Result._fields if name in fields}
    for name in ("steps", "degraded", "notes"):
        known[name] = tuple(known.get(name, ()))
    return Result(**known)
