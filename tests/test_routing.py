from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netapply.errors import KernelError
from netapply.namespace import Namespace
from netapply.routing import (
    NOTHING,
    RULE_PRIORITY,
    RoutingStep,
    Standing,
    SysctlChange,
    commit,
    plan,
    read,
    remember,
)
from netapply.ruleset import LocalAddress, LocalRoute, PolicyRule, Routing, Sysctl

SIX = LocalAddress(b"\0" * 15 + b"\6")
FORWARDING = "net.ipv4.ip_forward"
TPROXY = Routing(
    rules=(PolicyRule("ip", 1337, 0xFFFFFFFF, 133, RULE_PRIORITY), PolicyRule("ip6", 1, 0xFF, 1000, RULE_PRIORITY)),
    routes=(LocalRoute("ip", 133), LocalRoute("ip6", 1000)),
)
ALL = Routing(TPROXY.rules, TPROXY.routes, (SIX,), (Sysctl(FORWARDING, "1"),))


def everything(netns) -> str:
    commands = ("-d rule", "-6 -d rule", "route show table all", "-6 route show table all", "-d addr")
    shown = [netns.run("ip", *command.split()) for command in commands]
    return "".join(shown) + netns.run("cat", "/proc/sys/net/ipv4/ip_forward")


def run(namespace, desired, record=NOTHING):
    """What the transaction does: the steps, and the new record."""
    standing = read(namespace, desired or NOTHING, record)
    steps = plan(standing, desired)
    done = [step for step in steps if commit(namespace, step)]
    return steps, remember(standing.ours, done)


@pytest.fixture
def namespace(netns):
    with Namespace.open(netns.fd) as opened:
        yield opened


@pytest.mark.parametrize("desired", [ALL, TPROXY, Routing(addresses=(SIX,)), Routing(sysctls=ALL.sysctls)])
def test_after_apply_and_clean_the_namespace_is_as_it_was(netns, namespace, desired):
    before = everything(netns)
    _, record = run(namespace, desired)
    assert everything(netns) != before
    assert run(namespace, None, record)[1] == NOTHING
    assert everything(netns) == before


def test_ip_shows_what_was_asked_for(netns, namespace):
    run(namespace, ALL)
    assert "13370:\tfrom all fwmark 0x539 lookup 133 proto kernel" in netns.run("ip", "-d", "rule")
    assert "fwmark 0x1/0xff lookup 1000 proto kernel" in netns.run("ip", "-6", "-d", "rule")
    assert netns.run("ip", "route", "show", "table", "133") == "local default dev lo proto kernel scope host \n"
    assert "local default dev lo proto kernel" in netns.run("ip", "-6", "route", "show", "table", "1000")
    assert "inet6 ::6/128 scope global" in netns.run("ip", "addr", "show", "lo")


def test_a_second_apply_has_no_step(namespace):
    first, record = run(namespace, ALL)
    assert len(first) == 6
    assert record.rules == ALL.rules
    assert run(namespace, ALL, record) == ((), record)


def test_all_but_settings_is_recognised_as_ours_without_a_record(netns, namespace):
    before = everything(netns)
    run(namespace, Routing(TPROXY.rules, TPROXY.routes, (SIX,)))
    ours = read(namespace).ours
    assert set(ours.rules) == set(TPROXY.rules)
    assert set(ours.routes) == set(TPROXY.routes)
    assert ours.addresses == (SIX,)
    run(namespace, None)
    assert everything(netns) == before


def test_what_others_put_up_before_us_is_used_and_left(netns, namespace):
    netns.run("ip", "rule", "add", "pref", "13370", "fwmark", "1337", "lookup", "133", "protocol", "static")
    netns.run("ip", "route", "add", "local", "default", "dev", "lo", "table", "133")
    netns.run("ip", "addr", "add", "::6/128", "dev", "lo")
    netns.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    before = everything(netns)
    desired = Routing(TPROXY.rules[:1], TPROXY.routes[:1], (SIX,), ALL.sysctls)
    steps, record = run(namespace, desired)
    assert (steps, record) == ((), NOTHING)
    run(namespace, None, record)
    assert everything(netns) == before


def test_a_rule_that_others_put_up_at_a_preference_of_theirs_is_used(netns, namespace):
    netns.run("ip", "rule", "add", "pref", "500", "fwmark", "1337", "lookup", "133", "protocol", "kernel")
    rule = PolicyRule("ip", 1337, 0xFFFFFFFF, 133, 500)
    assert read(namespace, Routing(rules=(rule,))) == Standing(Routing(rules=(rule,)), NOTHING)


def test_a_route_that_others_put_up_in_the_table_of_our_rule_is_left(netns, namespace):
    netns.run("ip", "route", "add", "local", "default", "dev", "lo", "table", "133")
    before = everything(netns)
    steps, record = run(namespace, Routing(TPROXY.rules[:1], TPROXY.routes[:1]))
    assert len(steps) == 1
    assert record == Routing(TPROXY.rules[:1])
    assert read(namespace, NOTHING, record).ours.routes == ()
    run(namespace, None, record)
    assert everything(netns) == before


def test_other_rules_and_routes_are_never_ours(netns, namespace):
    netns.run("ip", "rule", "add", "pref", "13370", "from", "10.0.0.0/8", "fwmark", "7", "lookup", "9")
    netns.run("ip", "rule", "add", "pref", "13371", "not", "fwmark", "7", "lookup", "9", "protocol", "kernel")
    netns.run("ip", "rule", "add", "pref", "13372", "fwmark", "7", "goto", "32766", "protocol", "kernel")
    netns.run("ip", "rule", "add", "pref", "13373", "iif", "lo", "fwmark", "7", "lookup", "9", "protocol", "kernel")
    netns.run("ip", "route", "add", "local", "10.0.0.0/8", "dev", "lo", "table", "133", "proto", "kernel")
    netns.run("ip", "addr", "add", "192.0.2.1/32", "dev", "lo")
    before = everything(netns)
    _, record = run(namespace, ALL)
    assert record[:3] == ALL[:3]
    run(namespace, None, record)
    assert everything(netns) == before


def test_a_changed_plan_takes_down_what_it_no_longer_wants(netns, namespace):
    _, record = run(namespace, ALL)
    smaller = Routing(TPROXY.rules[:1], TPROXY.routes[:1])
    _, record = run(namespace, smaller, record)
    assert record == smaller
    assert "::6" not in netns.run("ip", "addr")
    assert "1000" not in netns.run("ip", "-6", "rule")


def test_a_setting_gets_back_its_first_value_after_several_changes(namespace):
    namespace.write_file("sys/net/ipv4/ip_default_ttl", "70")
    name = "net.ipv4.ip_default_ttl"
    _, record = run(namespace, Routing(sysctls=(Sysctl(name, "80"),)))
    _, record = run(namespace, Routing(sysctls=(Sysctl(name, "90"),)), record)
    run(namespace, None, record)
    assert namespace.read_file("sys/net/ipv4/ip_default_ttl").strip() == "70"


def test_the_setting_of_an_interface_that_is_gone_does_not_hinder_clean(netns, namespace):
    netns.run("ip", "link", "add", "veth0.7", "type", "veth", "peer", "name", "veth1")
    _, record = run(namespace, Routing(sysctls=(Sysctl("net.ipv4.conf.veth0/7.route_localnet", "1"),)))
    assert record.sysctls == (Sysctl("net.ipv4.conf.veth0/7.route_localnet", "0"),)
    netns.run("ip", "link", "del", "veth0.7")
    assert run(namespace, None, record) == ((), NOTHING)


def test_a_setting_that_does_not_exist_is_an_error_with_a_next_step(namespace):
    with pytest.raises(KernelError, match=r"read sysctl net\.ipv4\.absent") as caught:
        read(namespace, Routing(sysctls=(Sysctl("net.ipv4.absent", "1"),)))
    assert caught.value.errno == errno.ENOENT
    assert caught.value.next_step


def test_each_step_is_undone_by_its_inverse(netns, namespace):
    for step in plan(read(namespace, ALL), ALL):
        before = everything(netns)
        assert commit(namespace, step)
        assert everything(netns) != before
        assert commit(namespace, step.inverse)
        assert everything(netns) == before
        if not isinstance(step.item, PolicyRule):
            continue
        commit(namespace, step)


def test_a_step_that_is_done_already_is_no_error_and_not_ours(namespace):
    steps = plan(read(namespace, ALL), ALL)
    assert [commit(namespace, step) for step in steps] == [True] * 6
    assert [commit(namespace, step) for step in steps] == [False] * 6
    assert [commit(namespace, step.inverse) for step in reversed(steps)] == [True] * 6
    assert [commit(namespace, step.inverse) for step in reversed(steps)] == [False] * 6


def test_an_ipv6_route_without_lo_names_the_remedy(make_netns):
    with Namespace.open(make_netns(lo=False).fd) as namespace:
        with pytest.raises(KernelError, match="add route ip6") as caught:
            commit(namespace, RoutingStep(add=True, item=LocalRoute("ip6", 133)))
        assert caught.value.errno == errno.ENETDOWN
        assert "ip link set lo up" in caught.value.next_step


def test_an_address_and_an_ipv4_route_do_not_need_lo_up(make_netns):
    netns = make_netns(lo=False)
    before = everything(netns)
    with Namespace.open(netns.fd) as namespace:
        _, record = run(namespace, Routing(TPROXY.rules[:1], TPROXY.routes[:1], (SIX,)))
        assert len(record.addresses) == 1
        run(namespace, None, record)
    assert everything(netns) == before


def test_an_address_where_ipv6_is_disabled_names_the_remedy(netns, namespace):
    namespace.write_file("sys/net/ipv6/conf/lo/disable_ipv6", "1")
    with pytest.raises(KernelError, match=r"add address ::6/128.*disabled") as caught:
        commit(namespace, RoutingStep(add=True, item=SIX))
    assert "disable_ipv6" in caught.value.next_step


def test_addresses_of_127_need_nothing(namespace):
    assert run(namespace, Routing(addresses=(LocalAddress(b"\x7f\0\0\6"),))) == ((), NOTHING)


def test_reading_changes_nothing(netns, namespace):
    before = everything(netns)
    read(namespace, ALL)
    assert everything(netns) == before


def test_a_plan_without_rules_and_routes_does_not_import_pyroute2(netns):
    script = (
        "import sys\n"
        "from netapply.namespace import Namespace\n"
        "from netapply.routing import *\n"
        "from netapply.ruleset import *\n"
        "wanted = Routing(addresses=(LocalAddress(bytes(15) + bytes([6])),))\n"
        "with Namespace.open() as namespace:\n"
        "    done = [commit(namespace, step) for step in plan(read(namespace, wanted), wanted)]\n"
        "print(done, sorted({'pyroute2', 'asyncio', 'dataclasses', 'ipaddress', 'inspect'} & set(sys.modules)))\n"
    )
    root = Path(__file__).parents[1]
    assert netns.run(sys.executable, "-c", script, stdin="").strip() == "[True] []", root


def test_rules_and_routes_are_made_without_starting_a_process(netns):
    script = (
        "import os\n"
        "from netapply.namespace import Namespace\n"
        "from netapply.routing import *\n"
        "from netapply.ruleset import *\n"
        f"wanted = {TPROXY!r}\n"
        "namespace = Namespace.open(fd)\n"
        "for step in plan(read(namespace, wanted), wanted): commit(namespace, step)\n"
    )
    # Processes, not threads, come of a clone without CLONE_THREAD.
    done = subprocess.run(
        [
            "strace",
            "-f",
            "-qq",
            "-e",
            "trace=fork,vfork,clone,clone3,execve",
            sys.executable,
            "-c",
            f"fd={netns.fd}\n{script}",
        ],
        pass_fds=(netns.fd,),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    calls = [
        line
        for line in done.stderr.splitlines()
        if "(" in line and "CLONE_THREAD" not in line and "resumed" not in line
    ]
    assert [line for line in calls if "execve(" not in line] == []
    assert len(calls) == 1
    assert netns.run("ip", "route", "show", "table", "133")


# --- algebra -----------------------------------------------------------------------------------------------

FAMILY = st.sampled_from(("ip", "ip6"))
RULES = st.builds(PolicyRule, FAMILY, st.just(1), st.just(1), st.integers(1, 3), st.just(RULE_PRIORITY))
ROUTES = st.builds(LocalRoute, FAMILY, st.integers(1, 3))
ADDRESSES = st.builds(LocalAddress, st.integers(1, 4).map(lambda n: n.to_bytes(16, "big")))
VALUES = st.dictionaries(st.sampled_from("abc"), st.sampled_from("012"))


def some(items):
    return st.lists(items, unique=True, max_size=3).map(tuple)


def settings_of(values):
    return tuple(Sysctl(name, value) for name, value in values.items())


PLANS = st.builds(Routing, some(RULES), some(ROUTES), some(ADDRESSES), VALUES.map(settings_of))


class World:
    """Items and settings that stand, and commit by the book."""

    def __init__(self, items: set[object]) -> None:
        self.items = items
        self.settings = dict.fromkeys("abc", "0")

    def commit(self, step: RoutingStep) -> bool:
        before = (set(self.items), dict(self.settings))
        if isinstance(step.item, SysctlChange):
            self.settings[step.item.name] = step.item.after if step.add else step.item.before
        elif step.add:
            self.items.add(step.item)
        else:
            self.items.discard(step.item)
        return before != (self.items, self.settings)

    def standing(self, ours: Routing) -> Standing:
        parts = [tuple(i for i in self.items if isinstance(i, kind)) for kind in (PolicyRule, LocalRoute, LocalAddress)]
        return Standing(Routing(*parts, settings_of(self.settings)), ours)

    def apply(self, desired: Routing | None, ours: Routing) -> tuple[tuple[RoutingStep, ...], Routing]:
        steps = plan(self.standing(ours), desired)
        return steps, remember(ours, [step for step in steps if self.commit(step)])


@given(PLANS, PLANS, PLANS)
def test_any_plans_one_after_the_other_and_clean_leave_what_others_had(foreign, first, second):
    theirs = {*foreign.rules, *foreign.routes, *foreign.addresses}
    world = World(set(theirs))
    ours = NOTHING
    for desired in (first, second):
        _, ours = world.apply(desired, ours)
        assert world.items == theirs | {*desired.rules, *desired.routes, *desired.addresses}
        assert dict(desired.sysctls).items() <= world.settings.items()
        assert world.apply(desired, ours) == ((), ours)
    _, ours = world.apply(None, ours)
    assert world.items == theirs
    assert set(world.settings.values()) == {"0"}


@given(PLANS, PLANS)
def test_any_steps_are_undone_by_their_inverses_in_reverse(first, second):
    world = World(set())
    _, ours = world.apply(first, NOTHING)
    before = (set(world.items), dict(world.settings))
    steps, _ = world.apply(second, ours)
    for step in reversed(steps):
        world.commit(step.inverse)
    assert (world.items, world.settings) == before
