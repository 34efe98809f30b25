"""iptables and nft of three Debian releases read, check, delete and restore what we wrote. See `tests/userlands.py`.

Settings of Istio, by REDIRECT and by TPROXY, in our own layout and in Istio's, in both iptables dialects and natively.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, Phase, given, settings

import netapply
from netapply.api import Capture
from netapply.backend import find_backend
from netapply.compiler import compile_plan
from netapply.importers.istio import Facts, plan_from_settings
from netapply.importers.istio_settings import IstioSettings
from netapply.namespace import Namespace
from netapply.plan import CapturePlan, IdRange, InboundPorts, OutboundCidrs, OwnerRules, Owners
from netapply.ruleset import FAMILIES, Cidr, Family, PortRange, Ruleset
from netapply_wire.iptables_save import save
from tests import iptables_nft_rules, test_legacy_rules, userlands
from tests import netns as namespaces
from tests.netns import Netns
from tests.test_iptables_nft_rules import by_chain, rules_of, section
from tests.userlands import Userland

VERSIONS = {
    "bullseye": {"iptables-legacy": (1, 8, 7), "iptables-nft": (1, 8, 7), "nft": (0, 9, 8)},
    "bookworm": {"iptables-legacy": (1, 8, 9), "iptables-nft": (1, 8, 9), "nft": (1, 0, 6)},
    "trixie": {"iptables-legacy": (1, 8, 11), "iptables-nft": (1, 8, 11), "nft": (1, 1, 3)},
}
PROGRAMS: dict[Family, str] = {"ip": "iptables", "ip6": "ip6tables"}

SETTINGS = IstioSettings(
    istio_inbound_ports="*",
    istio_local_exclude_ports="15090,15021,15020",
    istio_service_cidr="*",
    istio_service_exclude_cidr="10.1.0.0/16,fd00:1::/32",
    istio_outbound_ports="32000",
    istio_local_outbound_ports_exclude="9000",
    istio_exclude_interfaces="eth7",
    kube_virt_interfaces="vm0",
    redirect_dns=True,
    drop_invalid=True,
    dual_stack=True,
    istio_outbound_owner_groups_exclude="888",
)
FACTS = Facts((b"\x0a\x09\x09\x09", b"\xfd" + bytes(14) + b"\2"), ("10.0.0.5", "fd00::5"))


REDIRECT = plan_from_settings(SETTINGS, "istio", FACTS)
TPROXY = plan_from_settings(SETTINGS._replace(istio_inbound_interception_mode="TPROXY"), "istio", FACTS)
#: With what Istio has not: comments and sets.
RICH = REDIRECT._replace(
    comments=True,
    outbound=REDIRECT.outbound._replace(
        cidrs=OutboundCidrs(exclude=tuple(Cidr(bytes((10, 0, i, 0)), 24) for i in range(0, 80, 2)))
    ),
)


def excluding(plan: CapturePlan, ports: tuple[tuple[int, int], ...], groups: tuple[int, int] | None) -> CapturePlan:
    """The plan with other ports left alone inbound, and another range of groups outbound."""
    inbound = plan.inbound._replace(ports=InboundPorts(exclude=tuple(PortRange(*each) for each in ports)))
    owners = OwnerRules(exclude=Owners(gids=(IdRange(*groups),) if groups else ()))
    return plan._replace(inbound=inbound, outbound=plan.outbound._replace(owners=owners))


CASES = {
    "netapply-redirect": ("netapply", excluding(RICH, ((8000, 8100), (15020, 15021)), (6000, 6010))),
    "netapply-tproxy": ("netapply", TPROXY),
    "istio-redirect": ("istio", excluding(REDIRECT, ((8000, 8100), (15020, 15021)), None)),
    "istio-tproxy": ("istio", TPROXY),
}
NATIVE_CASES = CASES | {"netapply-redirect": ("netapply", RICH), "istio-redirect": ("istio", REDIRECT)}
#: What a release's nft may write otherwise than we do when it restores its own listing: it joins neighbours in a list
#: that holds a range, and so do we.
OTHERWISE = {
    "a range of ports": excluding(REDIRECT, ((8000, 8100),), None),
    "a range of groups": excluding(REDIRECT, (), (6000, 6010)),
    "neighbours alone": excluding(REDIRECT, ((15020, 15020), (15021, 15021)), None),
    "neighbours beside a range": excluding(REDIRECT, ((8000, 8100), (15020, 15020), (15021, 15021)), None),
    "neighbours of a range": excluding(REDIRECT, ((8000, 8100), (8101, 8101), (8102, 8110)), None),
    "blocks side by side": RICH._replace(
        outbound=RICH.outbound._replace(
            cidrs=OutboundCidrs(exclude=tuple(Cidr(bytes((10, 0, i, 0)), 24) for i in range(80)))
        )
    ),
}
each_case = pytest.mark.parametrize("case", CASES)
each_dialect = pytest.mark.parametrize("dialect", ["legacy", "nft"])
#: Not shrunk: with tools to run, that takes minutes.
FEW = settings(
    max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)


@pytest.fixture(params=userlands.SUITES, scope="module")
def userland(request: pytest.FixtureRequest) -> Userland:
    found = userlands.find(request.param)
    if found is None and os.environ.get("CI"):
        pytest.fail(f"{request.param} is not there; make userlands")
    return found or pytest.skip(f"{request.param} is not there; make userlands")


class Applied(NamedTuple):
    """A plan that stands in a namespace, and the tools that look at it there."""

    netns: Netns
    userland: Userland
    capture: Capture
    backend: str
    layout: str
    plan: CapturePlan

    def run(self, family: Family, verb: str, *arguments: str, stdin: str | None = None) -> str:
        tool = PROGRAMS[family] + self.backend.removeprefix("iptables") + verb
        return self.netns.run(self.userland.tool(tool), *arguments, stdin=stdin)

    def saved(self) -> dict[Family, str]:
        return {family: self.run(family, "-save") for family in FAMILIES}

    def restore(self, texts: dict[Family, str], *options: str) -> None:
        for family, text in texts.items():
            self.run(family, "-restore", *options, stdin=text)

    def wanted(self) -> Ruleset:
        return compile_plan(self.plan, find_backend(self.backend).dialect, self.layout)

    def apply(self) -> bool:
        changed = self.capture.apply(self.plan, backend=self.backend, layout=self.layout).changed
        assert self.differences() == Counter()
        return changed

    def differences(self) -> Counter[tuple[str, str, str]]:
        """What verify says of the journal's rule set and of the plan's, which must be the same."""
        found = self.capture.verify().changes
        assert found == self.capture.verify(self.plan, backend=self.backend, layout=self.layout).changes
        return Counter((each.kind, each.where, each.what) for each in found)

    def listed(self) -> str:
        """What this generation's nft lists of all there is, counters at zero."""
        text = self.netns.run(self.userland.tool("nft"), "list", "ruleset")
        return re.sub(r"packets \d+ bytes \d+", "packets 0 bytes 0", text)


@pytest.fixture
def applied(netns: Netns, userland: Userland, dialect: str, case: str) -> Iterator[Applied]:
    layout, plan = CASES[case]
    with netapply.open(netns.path) as capture:
        made = Applied(netns, userland, capture, f"iptables-{dialect}", layout, plan)
        assert made.apply()
        yield made


def rules(texts: dict[Family, str]) -> dict[Family, dict[tuple[str, str], list[str]]]:
    return {family: by_chain(text) for family, text in texts.items()}


def arguments(line: str) -> list[str]:
    """Of iptables, for what it printed, without `-A`."""
    return shlex.split(line)[1:]


def headers(text: str) -> set[tuple[str, str]]:
    """Tables and their chains with policies, counters apart."""
    found: set[tuple[str, str]] = set()
    for table in text.split("*")[1:]:
        found |= {(table.split("\n")[0], chain) for chain in re.findall(r"(?m)^:(\S+ \S+) \[", table)}
    return found


def test_each_generation_is_what_it_is_called(userland: Userland) -> None:
    assert {tool: userland.version(tool) for tool in VERSIONS[userland.suite]} == VERSIONS[userland.suite]


@each_dialect
@each_case
def test_save_prints_what_we_render_and_check_finds_each_rule(applied: Applied) -> None:
    """iptables-nft 1.8.7 prints the headers of built-in chains that are not there too."""
    rendered = find_backend(applied.backend).render(applied.wanted())
    with_every_chain = save(applied.wanted(), every_chain=True)
    for family, text in applied.saved().items():
        assert by_chain(text) == by_chain(section(rendered, family))
        assert headers(section(rendered, family)) <= headers(text) <= headers(section(with_every_chain, family))
        for (table, _), lines in by_chain(text).items():
            for line in lines:
                applied.run(family, "", "-t", table, "-C", *arguments(line))


def shape(line: str) -> str:
    """What a rule is made of: its words without numbers and addresses."""
    return re.sub(r"(?<![-\w])[\d.:a-fx/,]*\d[\d.:a-fx/,]*", "N", line)


@each_dialect
@each_case
def test_delete_takes_one_rule_that_verify_names_and_apply_puts_back(applied: Applied) -> None:
    """One rule of each shape and chain, one after the other; then all are back, each in its place."""
    before = applied.saved()
    for family in FAMILIES:
        left = by_chain(before[family])
        gone: Counter[tuple[str, str, str]] = Counter()
        for (table, chain), lines in by_chain(before[family]).items():
            for line in {shape(line): line for line in lines}.values():
                applied.run(family, "", "-t", table, "-D", *arguments(line))
                left[table, chain].remove(line)
                gone["add", f"{family} {table} {chain}", line] += 1
        assert by_chain(applied.run(family, "-save")) == {place: lines for place, lines in left.items() if lines}
        # A built-in chain in which nothing of ours is left is told too.
        found = applied.differences()
        assert Counter({each: count for each, count in found.items() if each[2].startswith("-A ")}) == gone
        assert applied.apply()
    assert rules(applied.saved()) == rules(before)


@each_dialect
@each_case
def test_restoring_its_own_save_loses_our_tags_alone(applied: Applied) -> None:
    """Every rule holds. The next apply puts back the tags and the order in which chains were made; then all is done."""
    before = applied.saved()
    applied.restore(before)
    assert rules(applied.saved()) == rules(before)
    assert applied.differences() == Counter()
    assert applied.apply()
    assert rules(applied.saved()) == rules(before)
    assert not applied.apply()


@each_dialect
@each_case
def test_clean_takes_all_that_was_restored(applied: Applied) -> None:
    """Also the rules that lost their tags: the journal knows them."""
    applied.restore(applied.saved())
    assert applied.capture.clean().changed
    assert rules(applied.saved()) == {"ip": {}, "ip6": {}}


@each_dialect
@each_case
def test_restoring_its_own_save_without_flush_doubles_what_stands_in_built_in_chains(applied: Applied) -> None:
    """Doubled jumps to our chains are ours, told, and removed. A doubled rule that leads nowhere may be anybody's."""
    before = applied.saved()
    applied.restore(before, "--noflush")
    doubled: Counter[tuple[str, str, str]] = Counter()
    stays: dict[Family, Counter[str]] = {family: Counter() for family in FAMILIES}
    for table, chain, _, rule in applied.wanted().walk():
        if chain.base:
            line = find_backend(applied.backend).render_rule(table, chain, rule)
            if rule.statement.kind == "jump":
                doubled["remove", f"{table.family} {table.name} {chain.name}", line] += 1
            else:
                stays["ip6" if table.family == "ip6" else "ip"][line] += 1
    assert applied.differences() == doubled
    assert applied.apply()
    assert lines_of(applied) == {family: lines_in(before[family]) + stays[family] for family in FAMILIES}
    applied.capture.clean()
    assert lines_of(applied) == stays


@pytest.mark.parametrize("dialect", ["nft"])
@each_case
def test_the_oldest_reads_after_an_apply_what_another_restored(applied: Applied) -> None:
    """iptables-nft writes ports natively since 1.8.8, and 1.8.7 reads a native port as none at all: we rewrite it."""
    oldest = userlands.find("bullseye") or pytest.skip("bullseye is not there; make userlands")
    before = applied._replace(userland=oldest).saved()
    applied.restore(applied.saved())
    applied.apply()
    assert rules(applied._replace(userland=oldest).saved()) == rules(before)
    assert not applied.apply()


def lines_in(text: str) -> Counter[str]:
    return Counter(line for lines in by_chain(text).values() for line in lines)


def lines_of(applied: Applied) -> dict[Family, Counter[str]]:
    return {family: lines_in(text) for family, text in applied.saved().items()}


@each_dialect
@each_case
def test_foreign_rules_come_and_go_and_our_tags_stay(applied: Applied) -> None:
    before = applied.saved()
    foreign = ("-p", "udp", "-m", "udp", "--dport", "9", "-j", "ACCEPT")
    for verb in ("-A", "-C", "-D"):
        for family in FAMILIES:
            applied.run(family, "", "-t", "nat", verb, "OUTPUT", *foreign)
        assert applied.differences() == Counter()
        assert not applied.apply()
    assert rules(applied.saved()) == rules(before)


# --- nft -------------------------------------------------------------------------------------------------------


@contextmanager
def natively(netns: Netns, userland: Userland, layout: str, plan: CapturePlan) -> Iterator[Applied]:
    with netapply.open(netns.path) as capture:
        made = Applied(netns, userland, capture, "nftables", layout, plan)
        assert made.apply()
        yield made


def restore_listing(native: Applied) -> None:
    text = f"delete table inet netapply\n{native.listed()}"
    native.netns.run(native.userland.tool("nft"), "-f", "-", stdin=text)


def as_numbers(listing: str) -> str:
    """The listing as older releases print it: nft 1.1 says `dstnat + 5` for -95 in hook output too.

    Flags of TCP as the oldest and the newest do: 1.0 has a form of its own.
    """
    listing = listing.replace("tcp flags syn / fin,syn,rst,ack", "tcp flags & (fin | syn | rst | ack) == syn")
    named = re.compile(r"(?<=hook output priority )dstnat(?: ([+-]) (\d+))?")
    return named.sub(lambda found: str(-100 + int((found[1] or "") + (found[2] or "0"))), listing)


@pytest.mark.parametrize("case", NATIVE_CASES)
def test_nft_lists_what_we_render_and_restores_it_to_the_same(netns: Netns, userland: Userland, case: str) -> None:
    with natively(netns, userland, *NATIVE_CASES[case]) as native:
        listing = native.listed()
        assert as_numbers(listing) == find_backend("nftables").render(native.wanted())
        restore_listing(native)
        assert native.listed() == listing
        assert native.differences() == Counter()
        assert not native.apply()


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_nft_restores_is_ours_still(netns: Netns, userland: Userland, name: str) -> None:
    """Each list and range as we wrote it; an apply has nothing left to do."""
    with natively(netns, userland, "netapply", OTHERWISE[name]) as native:
        listing = native.listed()
        restore_listing(native)
        assert native.differences() == Counter()
        assert not native.apply()
        assert native.listed() == listing


@each_case
@pytest.mark.parametrize("dialect", ["nft"])
def test_nft_lists_the_tables_of_iptables_too(applied: Applied) -> None:
    chains = re.findall(r"(?m)^\tchain (\S+) \{", applied.listed())
    assert sorted(chains) == sorted(chain.name for table in applied.wanted().tables for chain in table.chains)


# --- random rule sets ------------------------------------------------------------------------------------------


def put(kernel: Namespace, backend: str, ruleset: Ruleset | None) -> None:
    chosen = find_backend(backend)
    for step in chosen.encode(chosen.read(kernel), ruleset):
        chosen.commit(kernel, step)


@pytest.fixture
def bare(userland: Userland) -> Iterator[tuple[Netns, Namespace]]:
    """A namespace for many rule sets, one after the other."""
    netns = namespaces.make()
    with Namespace.open(netns.path) as kernel:
        yield netns, kernel
    netns.close()


@each_dialect
def test_random_rule_sets_are_printed_as_rendered_and_restored_alike(
    bare: tuple[Netns, Namespace], userland: Userland, dialect: str
) -> None:
    netns, kernel = bare
    backend = f"iptables-{dialect}"

    @FEW
    @given((iptables_nft_rules if dialect == "nft" else test_legacy_rules).rulesets())
    def check(ruleset: Ruleset) -> None:
        put(kernel, backend, None)
        put(kernel, backend, ruleset)
        for family, program in PROGRAMS.items():
            tool = userland.tool(f"{program}-{dialect}-save")
            saved = netns.run(tool)
            assert by_chain(saved) == by_chain(section(find_backend(backend).render(ruleset), family))
            netns.run(userland.tool(f"{program}-{dialect}-restore"), stdin=saved)
        assert rules_of(find_backend(backend).read(kernel).ruleset) == rules_of(ruleset)

    check()
