"""Rules that a layout puts straight into built-in chains are ours, and what looks the same and is not ours is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from netapply.api import Capture, open_capture
from netapply.importers.istio import Facts, plan_from_settings
from netapply.importers.istio_settings import IstioSettings
from netapply.ownership import Adopted, leftovers
from netapply.plan import CapturePlan
from tests.netns import Netns

DIALECTS = ("iptables-nft", "iptables-legacy")
FACTS = Facts(addresses=(b"\x0a\0\0\1", b"\xfd" + bytes(14) + b"\1"))
EXCLUDED = IstioSettings(istio_exclude_interfaces="eth7", istio_inbound_ports="*", dual_stack=True)
TPROXY = EXCLUDED._replace(istio_inbound_interception_mode="TPROXY")


def plan(settings: IstioSettings) -> CapturePlan:
    return plan_from_settings(settings, "istio", FACTS)


@pytest.fixture(params=DIALECTS)
def dialect(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def capture(netns: Netns, tmp_path: Path) -> Iterator[Capture]:
    with open_capture(netns.path, state_directory=str(tmp_path)) as opened:
        yield opened


def save(netns: Netns, dialect: str) -> str:
    flavour = dialect.removeprefix("iptables-")
    text = netns.run(f"iptables-{flavour}-save") + netns.run(f"ip6tables-{flavour}-save")
    kept = (line.partition(" [")[0] for line in text.splitlines() if line[:1] not in "#:*" and line != "COMMIT")
    return "\n".join(kept)


@pytest.mark.parametrize("settings", [EXCLUDED, TPROXY], ids=["redirect", "tproxy"])
def test_rules_in_built_in_chains_are_kept_updated_and_removed(
    capture: Capture, netns: Netns, dialect: str, settings: IstioSettings
) -> None:
    assert capture.apply(plan(settings), backend=dialect, layout="istio").changed
    assert "-A PREROUTING -i eth7 -j RETURN" in save(netns, dialect)
    assert not capture.apply(plan(settings), backend=dialect, layout="istio").changed
    assert capture.verify().same
    changed = settings._replace(istio_exclude_interfaces="eth8")
    assert capture.apply(plan(changed), backend=dialect, layout="istio").changed
    assert "eth7" not in save(netns, dialect)
    capture.clean()
    assert save(netns, dialect) == ""


def test_a_foreign_rule_that_looks_the_same_stays_what_and_where_it_is(
    capture: Capture, netns: Netns, dialect: str
) -> None:
    for rule in ("-i eth7 -j RETURN", "-p icmp -j ACCEPT"):
        netns.run(dialect, "-t", "nat", "-A", "PREROUTING", *rule.split())
    before = save(netns, dialect)
    capture.apply(plan(EXCLUDED), backend=dialect, layout="istio")
    assert save(netns, dialect).count("-A PREROUTING -i eth7 -j RETURN") == 3  # theirs, and ours of both families
    capture.clean()
    assert save(netns, dialect) == before


@pytest.mark.parametrize("journal", [True, False], ids=["with journal", "without"])
def test_rules_that_lost_their_tag_in_a_save_and_restore_are_still_ours(
    capture: Capture, netns: Netns, dialect: str, tmp_path: Path, *, journal: bool
) -> None:
    capture.apply(plan(EXCLUDED), backend=dialect, layout="istio")
    before = save(netns, dialect)
    for tool in (dialect, dialect.replace("iptables", "ip6tables")):
        flavour = tool.partition("-")
        netns.run(f"{tool}-restore", stdin=netns.run(f"{flavour[0]}-{flavour[2]}-save"))
    assert save(netns, dialect) == before
    if not journal:
        for file in tmp_path.rglob("*"):
            if file.is_file():
                file.unlink()
    capture.apply(plan(EXCLUDED), backend=dialect, layout="istio")
    assert save(netns, dialect) == before
    assert not capture.apply(plan(EXCLUDED), backend=dialect, layout="istio").changed
    capture.clean()
    assert save(netns, dialect) == ""


def test_a_layout_gives_way_to_another_in_one_transaction(capture: Capture, netns: Netns, dialect: str) -> None:
    capture.apply(CapturePlan(), backend=dialect)
    capture.apply(plan(EXCLUDED), backend=dialect, layout="istio")
    assert "NETAPPLY_" not in save(netns, dialect)
    capture.apply(CapturePlan(), backend=dialect)
    assert "ISTIO_" not in save(netns, dialect)
    assert "eth7" not in save(netns, dialect)


def test_what_another_program_left_is_taken_over(capture: Capture, netns: Netns, dialect: str) -> None:
    rules = "*mangle\n:ISTIO_DIVERT -\n-A ISTIO_DIVERT -j ACCEPT\n-A PREROUTING -i eth7 -j RETURN\nCOMMIT\n"
    netns.run(f"{dialect}-restore", stdin=rules)
    for family in ("-4", "-6"):
        netns.run("ip", family, "rule", "add", "fwmark", "1337", "lookup", "133")
        netns.run("ip", family, "rule", "add", "fwmark", "1337", "lookup", "133", "pref", "99")
        netns.run("ip", family, "route", "add", "local", "default", "dev", "lo", "table", "133")
    netns.run("ip", "address", "add", "::6/128", "dev", "lo")

    def adopt() -> Adopted:
        return leftovers([(plan(TPROXY), "istio")])

    capture.apply(plan(EXCLUDED), backend=dialect, layout="istio", adopt=adopt)
    assert "eth7" not in netns.run(f"{dialect}-save", "-t", "mangle")
    for family in ("-4", "-6"):
        assert "133" not in netns.run("ip", family, "rule")
        assert netns.run("ip", family, "route", "show", "table", "133", check=False) == ""
    capture.clean(layout="istio", adopt=adopt)
    assert save(netns, dialect) == ""
    assert "::6" not in netns.run("ip", "address")


def test_routing_that_another_program_left_without_its_chains_is_taken_over(capture: Capture, netns: Netns) -> None:
    for family in ("-4", "-6"):
        netns.run("ip", family, "rule", "add", "fwmark", "1337", "lookup", "133")
        netns.run("ip", family, "route", "add", "local", "default", "dev", "lo", "table", "133")
    capture.apply(plan(EXCLUDED), layout="istio", adopt=lambda: leftovers([(plan(TPROXY), "istio")]))
    for family in ("-4", "-6"):
        assert "133" not in netns.run("ip", family, "rule")
        assert netns.run("ip", family, "route", "show", "table", "133", check=False) == ""


def test_without_being_asked_chains_of_another_program_are_not_ours(
    capture: Capture, netns: Netns, dialect: str
) -> None:
    netns.run(dialect, "-t", "nat", "-N", "ISTIO_OUTPUT")
    assert not capture.clean().changed
    assert capture.clean(layout="istio").changed
