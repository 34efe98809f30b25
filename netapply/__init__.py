"""netapply: transparent traffic capture for proxies. One plan, three netfilter dialects, no binary, one transaction.

    import netapply

    plan = netapply.read_plan("capture.yaml")
    with netapply.open("pod-1") as capture:
        result = capture.apply(plan)

`netapply.aio` is the same for asyncio, `netapply.testing` the fake for your unit tests; `netapply.decide.decide` and
`netapply.evaluate.evaluate` tell what becomes of a flow. Names are loaded when they are
first used: a one-shot command pays only for what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from netapply.agent import Agent as Agent
    from netapply.agent import AgentConfig as AgentConfig
    from netapply.api import Capture as Capture
    from netapply.api import CaptureLike as CaptureLike
    from netapply.api import open_capture as open  # noqa: A004 - netapply.open, as the standard library's modules have it
    from netapply.compiler import compile_plan as compile_plan
    from netapply.errors import ApplyError as ApplyError
    from netapply.errors import ConflictError as ConflictError
    from netapply.errors import Fault as Fault
    from netapply.errors import KernelError as KernelError
    from netapply.errors import LockError as LockError
    from netapply.errors import NamespaceError as NamespaceError
    from netapply.errors import NetapplyError as NetapplyError
    from netapply.errors import PlanError as PlanError
    from netapply.errors import UnsupportedError as UnsupportedError
    from netapply.flow import Decision as Decision
    from netapply.flow import Flow as Flow
    from netapply.plan import CapturePlan as CapturePlan
    from netapply.planfile import dump_plan as dump_plan
    from netapply.planfile import fingerprint as fingerprint
    from netapply.planfile import load_plan as load_plan
    from netapply.planfile import read_plan as read_plan
    from netapply.results import Diff as Diff
    from netapply.results import Result as Result

__version__ = "0.1.0"

_HOMES = {
    "netapply.agent": ("Agent", "AgentConfig"),
    "netapply.api": ("Capture", "CaptureLike"),
    "netapply.compiler": ("compile_plan",),
    "netapply.errors": (
        "ApplyError",
        "ConflictError",
        "Fault",
        "KernelError",
        "LockError",
        "NamespaceError",
        "NetapplyError",
        "PlanError",
        "UnsupportedError",
    ),
    "netapply.flow": ("Decision", "Flow"),
    "netapply.plan": ("CapturePlan",),
    "netapply.planfile": ("dump_plan", "fingerprint", "load_plan", "read_plan"),
    "netapply.results": ("Diff", "Result"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["open", *_HOME]  # noqa: PLE0604  # pyright: ignore[reportUnsupportedDunderAll]  # a table's names


def __getattr__(name: str) -> Any:
    if name == "open":
        return import_module("netapply.api").open_capture
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'netapply' has no attribute {name!r}")
    return getattr(import_module(home), name)
