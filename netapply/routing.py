"""What stands beside the rules: policy rules, routes, addresses and sysctls, put up and taken down step by step.

    standing = read(kernel, wanted, record)     what of it is there, and which of that is ours
    steps = plan(standing, wanted)              () when all of it stands; None for `wanted` takes ours down
    done = [step for step in steps if commit(kernel, step)]
    record = remember(standing.ours, done)      to be kept, and given to the next read

What somebody else put up before us is used, and never removed. Ours are told apart without a record where the kernel
can say who put them up: rules of protocol kernel with a preference of ours, local routes of protocol kernel in the
tables of these rules, and addresses with our IFA_PROTO (Linux 5.18). Settings, and addresses on older kernels, are
ours by the record alone.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from contextlib import suppress
from typing import TypeAlias, assert_never

from netapply.errors import KernelError
from netapply.kernel import Kernel
from netapply.policy import PROTOCOL, change_route, change_rule, read_policy
from netapply.rtnetlink import ADDRESS_PROTOCOL, change_address, loopback_addresses, rule_priorities
from netapply.ruleset import LocalAddress, LocalRoute, PolicyRule, Routing, Sysctl
from netapply.values import NamedTuple

#: Preferences of our policy rules: from here, RULE_PRIORITIES of them.
RULE_PRIORITY = 13370
RULE_PRIORITIES = 10

_PRIORITIES = frozenset(range(RULE_PRIORITY, RULE_PRIORITY + RULE_PRIORITIES))
#: net/ipv4/fib_rules.c: the rules that every namespace begins with. Of 0 rtnetlink tells nothing.
_OF_THE_KERNEL = frozenset((0, 0x7FFE, 0x7FFF))
_SWAP = str.maketrans("./", "/.")


NOTHING = Routing()


class SysctlChange(NamedTuple):
    """A setting that is changed from `before` to `after`."""

    name: str
    before: str
    after: str


class Standing(NamedTuple):
    """What is there: `present` of all that was asked for and all that is ours, whoever put it up; `ours` of that.

    The settings of `present` have the values of now, those of `ours` the values that they get back.
    """

    present: Routing = NOTHING
    ours: Routing = NOTHING

    @property
    def held(self) -> Routing:
        """What is ours as a state to come back to: settings with the values of now."""
        own = dict(self.ours.sysctls)
        return self.ours._replace(sysctls=tuple(each for each in self.present.sysctls if each.name in own))


_NOTHING_STANDS = Standing()

Item: TypeAlias = PolicyRule | LocalRoute | LocalAddress | SysctlChange


class RoutingStep(NamedTuple):
    """One change, atomic in the kernel: `add` puts `item` up or sets it, otherwise it goes or is set back."""

    add: bool
    item: Item

    @property
    def name(self) -> str:
        """The step in ip(8)'s and sysctl(8)'s words."""
        verb = "add" if self.add else "delete"
        match self.item:
            case PolicyRule(family, mark, mask, table, priority):
                return f"{verb} policy rule {family} pref {priority} fwmark {mark:#x}/{mask:#x} lookup {table}"
            case LocalRoute(family, table):
                return f"{verb} route {family} local default dev lo table {table}"
            case LocalAddress():
                return f"{verb} address {self.item} dev lo"
            case SysctlChange(name, before, after):
                return f"set sysctl {name} = {after if self.add else before}"
            case _:
                assert_never(self.item)

    @property
    def inverse(self) -> RoutingStep:
        """The step that undoes this one."""
        return RoutingStep(not self.add, self.item)


def read(kernel: Kernel, wanted: Routing = NOTHING, record: Routing = NOTHING, adopted: Routing = NOTHING) -> Standing:
    """What of `wanted`, of `record` and of ours stands. Changes nothing. Raises KernelError.

    `adopted` counts as ours whoever put it up; a rule of priority 0 in it is one of any priority.
    """
    rules, routes = _read_policy(kernel, wanted, record, adopted)
    addresses = _read_addresses(kernel, wanted, record, adopted)
    values = _read_sysctls(kernel, wanted, record)
    if not (rules or routes or addresses or values):
        return _NOTHING_STANDS
    own_rules = tuple(rule for rule, by in rules.items() if _is_ours(rule, by, record, adopted))
    tables = {LocalRoute(rule.family, rule.table) for rule in own_rules} | set(record.routes)
    own_routes = (r for r, by in routes.items() if r in adopted.routes or (by == PROTOCOL and r in tables))
    known = {*record.addresses, *adopted.addresses}
    return Standing(
        Routing(tuple(rules), tuple(routes), tuple(addresses), values),
        Routing(
            own_rules,
            tuple(own_routes),
            tuple(one for one, by in addresses.items() if by == ADDRESS_PROTOCOL or one in known),
            tuple(setting for setting in record.sysctls if setting.name in dict(values)),
        ),
    )


def _read_policy(
    kernel: Kernel, wanted: Routing, record: Routing, adopted: Routing
) -> tuple[dict[PolicyRule, int], dict[LocalRoute, int]]:
    asked = {*wanted.rules, *record.rules}
    tables = {*wanted.routes, *record.routes}
    if not asked and not tables:
        there = rule_priorities(kernel)
        if there <= _OF_THE_KERNEL if adopted.rules else _PRIORITIES.isdisjoint(there):
            return {}, {}
    tables |= {*adopted.routes}
    policy = read_policy(kernel, tables, lambda rule, by: _is_ours(rule, by, record, adopted))
    rules = {rule: by for rule, by in policy.rules.items() if rule in asked or _is_ours(rule, by, record, adopted)}
    return rules, policy.routes


def _is_ours(rule: PolicyRule, by: int, record: Routing, adopted: Routing) -> bool:
    known = by == PROTOCOL and (rule.priority in _PRIORITIES or rule in record.rules)
    return known or rule._replace(priority=0) in adopted.rules


def _read_addresses(kernel: Kernel, wanted: Routing, record: Routing, adopted: Routing) -> dict[LocalAddress, int]:
    asked = {*wanted.addresses, *record.addresses, *adopted.addresses}
    found = ((LocalAddress(packed), by) for packed, by in loopback_addresses(kernel))
    return {address: by for address, by in found if by == ADDRESS_PROTOCOL or address in asked}


def _read_sysctls(kernel: Kernel, wanted: Routing, record: Routing) -> tuple[Sysctl, ...]:
    values = {name: _read_sysctl(kernel, name) for name, _ in wanted.sysctls}
    for name in (name for name, _ in record.sysctls if name not in values):
        # Its interface may be gone, and the setting with it.
        with suppress(KernelError):
            values[name] = _read_sysctl(kernel, name)
    return tuple(Sysctl(name, value) for name, value in values.items())


def of_others(kernel: Kernel) -> bool:
    """Whether policy rules stand that are neither the kernel's nor of our preferences. Raises KernelError."""
    return not rule_priorities(kernel) <= _OF_THE_KERNEL | _PRIORITIES


def plan(standing: Standing, desired: Routing | None) -> tuple[RoutingStep, ...]:
    """The steps from what stands to `desired`; () when there is nothing to do. Pure.

    First comes what is new, and then what of ours has to go, the rule that marks a table as ours last: in between,
    packets have both.
    """
    wanted = desired or NOTHING
    if standing == _NOTHING_STANDS and wanted == NOTHING:
        return ()
    present, ours = standing
    values = dict(present.sysctls)
    steps = [
        *(RoutingStep(add=True, item=rule) for rule in wanted.rules if rule not in present.rules),
        *(RoutingStep(add=True, item=route) for route in wanted.routes if route not in present.routes),
        *(RoutingStep(add=True, item=address) for address in wanted.addresses if _is_missing(address, present)),
        *(
            RoutingStep(add=True, item=SysctlChange(name, values[name], value))
            for name, value in wanted.sysctls
            if values[name].split() != value.split()
        ),
    ]
    names = {sysctl.name for sysctl in wanted.sysctls}
    gone: list[Item] = [rule for rule in ours.rules if rule not in wanted.rules]
    gone += [route for route in ours.routes if route not in wanted.routes]
    gone += [address for address in ours.addresses if address not in wanted.addresses]
    gone += [
        SysctlChange(name, before, values[name])
        for name, before in ours.sysctls
        if name not in names and values[name].split() != before.split()
    ]
    return (*steps, *(RoutingStep(add=False, item=item) for item in reversed(gone)))


def _is_missing(address: LocalAddress, present: Routing) -> bool:
    if len(address.packed) == 4 and address.packed[0] == 127:
        return False  # all of 127.0.0.0/8 is local already
    return address not in present.addresses


def commit(kernel: Kernel, step: RoutingStep) -> bool:
    """Do one step; False when it was like that already, so that it is not ours. Raises KernelError."""
    try:
        match step.item:
            case PolicyRule():
                change_rule(kernel, step.name, step.item, add=step.add)
            case LocalRoute():
                change_route(kernel, step.name, step.item, add=step.add)
            case LocalAddress(packed):
                change_address(kernel, step.name, packed, add=step.add)
            case SysctlChange(name, before, after):
                return _write_sysctl(kernel, step.name, name, after if step.add else before)
            case _:
                assert_never(step.item)
    except KernelError as error:
        if error.errno in (_STANDS if step.add else _GONE):
            return False
        error.next_step = error.next_step or _NEXT_STEP.get(error.errno, "")
        raise
    return True


_STANDS = frozenset((errno.EEXIST,))
_GONE = frozenset((errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL))
_NEXT_STEP = {
    errno.ENETDOWN: "`ip link set lo up` in the namespace: a proxy cannot be reached without `lo` either",
    errno.EACCES: "set net.ipv6.conf.lo.disable_ipv6 = 0, or plan without IPv6",
    errno.EOPNOTSUPP: "this kernel has no IPv6: plan without it",
    errno.EAFNOSUPPORT: "this kernel has no IPv6: plan without it",
    errno.EPERM: "run as root, or with CAP_NET_ADMIN",
    errno.EROFS: "make /proc/sys writable, or have the setting made from outside of the container",
}


def remember(ours: Routing, done: Iterable[RoutingStep]) -> Routing:
    """The record after these steps: what of ours stands now, and the value that each setting had before the first."""
    items: dict[Item, None] = dict.fromkeys((*ours.rules, *ours.routes, *ours.addresses))
    settings = dict(ours.sysctls)
    for add, item in done:
        if isinstance(item, SysctlChange):
            if add:
                settings.setdefault(item.name, item.before)
            else:
                settings.pop(item.name, None)
        elif add:
            items[item] = None
        else:
            items.pop(item, None)
    return Routing(
        tuple(item for item in items if isinstance(item, PolicyRule)),
        tuple(item for item in items if isinstance(item, LocalRoute)),
        tuple(item for item in items if isinstance(item, LocalAddress)),
        tuple(Sysctl(name, value) for name, value in settings.items()),
    )


def _sysctl_path(name: str) -> str:
    return "sys/" + name.translate(_SWAP)


def _read_sysctl(kernel: Kernel, name: str) -> str:
    try:
        return kernel.read_file(_sysctl_path(name)).strip()
    except OSError as error:
        step = "the interface or the kernel module that the setting belongs to is not there"
        raise KernelError(f"read sysctl {name}", error.errno or 0, next_step=step) from error


def _write_sysctl(kernel: Kernel, operation: str, name: str, value: str) -> bool:
    if _read_sysctl(kernel, name).split() == value.split():
        return False
    try:
        kernel.write_file(_sysctl_path(name), value)
    except OSError as error:
        raise KernelError(operation, error.errno or 0) from error
    return True
