"""docs/operating.md on a machine that has never seen netapply: each of its commands, in its order, as it stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.systemd.machine import Machine, lacking
from tests.systemd.test_service import states
from tests.test_docs import blocks, rows, section

pytestmark = pytest.mark.skipif(bool(lacking()), reason=lacking())

GUIDE = Path(__file__).parents[2] / "docs" / "operating.md"
#: pip's places in the machine, which reaches nothing outside.
PIP = "PIP_NO_INDEX=1 PIP_FIND_LINKS='/wheelhouse /newer' PIP_DISABLE_PIP_VERSION_CHECK=1"
NETAPPLY = "/usr/local/bin/netapply"


def commands(title: str) -> list[str]:
    """What stands behind a prompt below a heading, which `section` takes for headings."""
    text = GUIDE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"^# (.+)$", "".join(re.findall(r"```console\n(.*?)```", text, re.DOTALL)), re.MULTILINE)


def looks() -> list[str]:
    """The commands in the table of what to look at."""
    return [found[1] for row in rows(section(GUIDE, "Looking")) if (found := re.fullmatch(r"`(.+)`", row[0]))]


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine(tmp_path_factory.mktemp("machine")) as machine:
        machine.run("rm", "-rf", "/opt/netapply")
        yield machine


def follow(machine: Machine, title: str, *, newest: bool = True) -> None:
    """Do what the guide says there."""
    places = PIP if newest else PIP.replace(" /newer", "")
    assert commands(title)
    for command in commands(title):
        machine.run("sh", "-c", f"export {places}; cd /srv; {command}")


def plans(machine: Machine) -> None:
    """The plan files of the guide, and what their selectors name; that for the machine tried first, as it says."""
    first, host = (block.text for block in blocks(GUIDE) if block.words == ("yaml", "agent"))
    machine.write("/srv/plan.yaml", re.sub(r"(?m)^namespaces:\n(  .*\n)+", "", host))
    tried = re.findall(r"`(netapply (?:apply --host|confirm).*?)`", section(GUIDE, "Plans"))
    assert len(tried) == 2
    for command in (*tried, "netapply clean --host"):
        machine.run("sh", "-c", f"cd /srv; {command}")
    machine.write("/etc/netapply/plans.d/first.yaml", first)
    machine.write("/etc/netapply/plans.d/host.yaml", host)
    for name in ("cni-1", "build-1"):
        machine.run("ip", "netns", "add", name)
    machine.run("sh", "-c", "unshare -n sleep 1000 >/dev/null 2>&1 & mkdir -p /run/app; echo $! > /run/app/app.pid")
    machine.until(lambda: list(states(machine, NETAPPLY).values()).count("inplace") == 4, "the plans are not in force")


def ruleset(machine: Machine, name: str) -> str:
    return machine.run("ip", "netns", "exec", name, "nft", "-sa", "list", "ruleset")


def test_the_guide_from_the_installation_to_the_removal(machine: Machine) -> None:
    follow(machine, "Install", newest=False)
    machine.run("sh", "-c", "systemctl daemon-reload; systemctl restart netapply.service")  # with the flags, as printed
    plans(machine)
    stands = ruleset(machine, "build-1")
    assert "table inet netapply" in stands

    for command in looks():
        if command == "netapply watch":
            watch = machine.spawn("timeout", "20", NETAPPLY, "watch")
            assert watch.stdout
            machine.until(lambda: "watch" in machine.run("ps", "ax"), "nobody watches")
            machine.run("sh", "-c", "sleep 1; ip netns exec build-1 nft flush ruleset")
            assert any("healed" in line for line in watch.stdout)
            watch.kill()
            watch.wait(20)
        else:
            assert machine.run("sh", "-c", command)

    machine.run("ip", "netns", "add", "pod-1")
    follow(machine, "Doctor")
    assert machine.run("test", "-s", "/srv/report.tar.gz") == ""

    follow(machine, "Prometheus")
    code = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9469/metrics', timeout=10).read().decode())"
    assert 'netapply_namespaces{state="inplace"} 4' in machine.run("python3", "-c", code)

    stands = ruleset(machine, "build-1")
    follow(machine, "Upgrade")
    assert machine.run(NETAPPLY, "--version").split()[-1] == "99.0"
    assert list(states(machine, NETAPPLY).values()).count("inplace") == 4
    assert ruleset(machine, "build-1") == stands

    follow(machine, "Removal")
    for name in ("build-1", "cni-1"):
        assert ruleset(machine, name) == ""
    assert machine.run("nft", "list", "ruleset") == ""
    left = machine.run("find", "/etc", "/run", "/var/lib", "/opt", "/usr/local", "-name", "*netapply*")
    assert left == ""
    assert "netapply" not in machine.run("systemctl", "list-units", "--all", "--plain") + machine.run("ps", "ax")
    assert "netapply" not in machine.run("cat", "/etc/group")
