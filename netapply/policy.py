"""Policy rules and routes of TPROXY, by pyroute2.

Each function runs inside the namespace, in the thread that `Kernel.inside` makes, on a socket of that thread's:
pyroute2's own way into a namespace forks. Importing pyroute2 takes 140 ms, so it is done by the call that needs it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any, TypeVar

from netapply import netlink
from netapply.errors import KernelError
from netapply.kernel import Kernel
from netapply.rtnetlink import LOOPBACK_INDEX
from netapply.ruleset import FAMILIES, Family, LocalRoute, PolicyRule
from netapply.values import NamedTuple

T = TypeVar("T")

#: linux/rtnetlink.h: RTPROT_KERNEL. Anything else is foreign to systemd-networkd, which removes what is foreign.
PROTOCOL = 2

_AF: dict[Family, int] = {"ip": 2, "ip6": 10}
_RTN_LOCAL, _RT_SCOPE_HOST, _FR_ACT_TO_TBL = 2, 254, 1
_NO_SUPPRESSION = 0xFFFFFFFF
#: What a rule that looks at nothing but the mark may say of itself.
_MARK_RULE = frozenset(
    ("FRA_TABLE", "FRA_PRIORITY", "FRA_FWMARK", "FRA_FWMASK", "FRA_PROTOCOL", "FRA_SUPPRESS_PREFIXLEN")
)


class Policy(NamedTuple):
    """What stands: each rule and route with the protocol that put it there."""

    rules: dict[PolicyRule, int]
    routes: dict[LocalRoute, int]


def read_policy(kernel: Kernel, tables: Iterable[LocalRoute], mine: Callable[[PolicyRule, int], bool]) -> Policy:
    """All rules by mark, and which of the local routes `tables`, or of tables of rules that are `mine`, stand."""

    def work(ipr: Any) -> Policy:
        rules: dict[PolicyRule, int] = {}
        for family in FAMILIES:
            for message in ipr.get_rules(family=_AF[family]):
                rule = _rule(family, message)
                if rule is not None:
                    rules.setdefault(rule, _attribute(message, "FRA_PROTOCOL", 0))
        wanted = {*tables, *(LocalRoute(rule.family, rule.table) for rule in rules if mine(rule, rules[rule]))}
        routes: dict[LocalRoute, int] = {}
        for route in sorted(wanted):
            for message in ipr.get_routes(family=_AF[route.family], table=route.table):
                if _is_local_default(message, route.table):
                    routes.setdefault(route, int(message["proto"]))
        return Policy(rules, routes)

    return _with_iproute(kernel, "list policy rules and routes", work)


def change_rule(kernel: Kernel, operation: str, rule: PolicyRule, *, add: bool) -> None:
    """Add or delete a rule. Raises KernelError: EEXIST, ENOENT where there is nothing to do."""
    verb = "add" if add else "del"
    fields = {"fwmark": rule.mark, "fwmask": rule.mask, "table": rule.table, "priority": rule.priority}
    if add:  # one that was taken over may be anybody's
        fields["protocol"] = PROTOCOL
    _with_iproute(kernel, operation, lambda ipr: ipr.rule(verb, family=_AF[rule.family], **fields))


def change_route(kernel: Kernel, operation: str, route: LocalRoute, *, add: bool) -> None:
    """Add or delete a route. Raises KernelError: EEXIST, ESRCH where there is nothing to do; ENETDOWN without `lo`."""
    fields: dict[str, Any] = {"dst": "default", "type": "local", "oif": LOOPBACK_INDEX, "table": route.table}
    if route.family == "ip":
        fields["scope"] = _RT_SCOPE_HOST  # fib_frontend.c: a local route of a wider scope is EINVAL
    if add:
        fields["proto"] = PROTOCOL
    verb = "add" if add else "del"
    _with_iproute(kernel, operation, lambda ipr: ipr.route(verb, family=_AF[route.family], **fields))


def tame(ipr: Any) -> None:
    """Have an IPRoute hear the kernel alone, wait no longer than for other answers, and print nothing."""
    ipr.asyncore.socket.connect((0, 0))  # as `netapply.netlink.open_netlink` does
    loop = ipr.asyncore.event_loop
    loop.call_later(netlink.DEADLINE, loop.stop)  # it would wait for ever; so it raises RuntimeError
    loop.set_exception_handler(_say_nothing)  # an answer that breaks it is told by the error


def _say_nothing(_loop: object, _context: object) -> None: ...


def _with_iproute(kernel: Kernel, operation: str, work: Callable[[Any], T]) -> T:
    def run() -> T:
        pyroute2: Any = import_module("pyroute2")  # Any: it ships no types
        refused = import_module("pyroute2.netlink.exceptions").NetlinkError

        try:
            with pyroute2.IPRoute() as ipr:
                tame(ipr)
                return work(ipr)
        except refused as error:
            raise KernelError(operation, error.code) from error
        except RuntimeError as error:
            raise KernelError(operation, errno.ETIMEDOUT) from error
        except OSError as error:
            raise KernelError(operation, error.errno or 0) from error

    return kernel.inside(run)


def _attribute(message: Any, name: str, default: int) -> int:
    value = message.get_attr(name)
    return default if value is None else int(value)


def _rule(family: Family, message: Any) -> PolicyRule | None:
    """The rule, or None if it looks at anything but the mark, or does anything but look up a table."""
    header = (message["action"], message["flags"], message["src_len"], message["dst_len"], message["tos"])
    if header != (_FR_ACT_TO_TBL, 0, 0, 0, 0):
        return None
    if not _MARK_RULE.issuperset(name for name, _ in message["attrs"]):
        return None
    if _attribute(message, "FRA_SUPPRESS_PREFIXLEN", _NO_SUPPRESSION) != _NO_SUPPRESSION:
        return None
    mark, mask = _attribute(message, "FRA_FWMARK", 0), _attribute(message, "FRA_FWMASK", 0)
    table = _attribute(message, "FRA_TABLE", int(message["table"]))
    return PolicyRule(family, mark, mask, table, _attribute(message, "FRA_PRIORITY", 0))


def _is_local_default(message: Any, table: int) -> bool:
    return (
        message["type"] == _RTN_LOCAL
        and message["dst_len"] == 0
        and _attribute(message, "RTA_OIF", 0) == LOOPBACK_INDEX
        and _attribute(message, "RTA_TABLE", int(message["table"])) == table
    )
