"""The drop-in for istio-iptables, on real kernels: Istio's rules, taken over, changed, cleaned and validated."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from netapply.api import open_capture
from netapply.cli import main
from netapply.dropin.facts import read_facts
from netapply.dropin.run import Job, apply, choose_lock, plan_of
from netapply.errors import NetapplyError
from netapply.importers.istio_settings import IstioSettings, parse_settings
from netapply.lookups import SYSTEM
from tests.netns import PATIENCE, Netns
from tests.test_istio_layout import CORPUS, facts_of

EVERYTHING = ("-b", "*", "-i", "*")
FLAVOURS = ("legacy", "nft")
BACKENDS = {"legacy": "iptables-legacy", "nft": "iptables-nft"}

each_flavour = pytest.mark.parametrize("flavour", FLAVOURS)


class Ran(NamedTuple):
    """How the command ended, and what it said."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def pod(netns: Netns) -> Netns:
    """A namespace with an address of each family."""
    add_addresses(netns, "10.99.0.2/24", "fd99::2/64")
    return netns


@pytest.fixture
def run(pod: Netns, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command on the pod, as if nothing but `env` stood in the environment."""

    def run(*words: str, command: str = "istio-iptables", **env: str) -> Ran:
        kept = {name: os.environ[name] for name in ("XTABLES_LOCKFILE", "NETAPPLY_STATE_DIR")}
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", kept | env)
            code = main([command, "--network-namespace", pod.path, *words])
        return Ran(code, *capsys.readouterr())

    return run


def add_addresses(netns: Netns, *addresses: str) -> None:
    netns.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "peer0")
    netns.run("ip", "link", "set", "eth0", "up")
    netns.run("ip", "link", "set", "peer0", "up")
    for address in addresses:
        netns.run("ip", "address", "add", address, "dev", "eth0", *(["nodad"] if ":" in address else []))


def saved(netns: Netns, flavour: str) -> dict[str, dict[str, dict[str, list[str]]]]:
    """What stock tools read: rules by family, table and chain, without what is empty."""
    found: dict[str, dict[str, dict[str, list[str]]]] = {"ip": {}, "ip6": {}}
    for family, tool in (("ip", "iptables"), ("ip6", "ip6tables")):
        table = ""
        for line in netns.run(f"{tool}-{flavour}-save").splitlines():
            if line.startswith("*"):
                table = line[1:]
            elif line.startswith("-A "):
                _, chain, rule = line.split(" ", 2)
                found[family].setdefault(table, {}).setdefault(chain, []).append(rule)
    return found


def restore(netns: Netns, flavour: str, rules: dict[str, dict[str, dict[str, list[str]]]]) -> None:
    """Put rules there as istio-iptables does: by iptables-restore --noflush."""
    for family, tool in (("ip", "iptables"), ("ip6", "ip6tables")):
        text = ""
        for table, chains in rules[family].items():
            made = "".join(f":{name} - [0:0]\n" for name in chains if name.startswith("ISTIO_"))
            lines = "".join(f"-A {name} {rule}\n" for name, listed in chains.items() for rule in listed)
            text += f"*{table}\n{made}{lines}COMMIT\n"
        netns.run(f"{tool}-{flavour}-restore", "--noflush", stdin=text)


def of_case(case: dict[str, Any], flavour: str) -> Job:
    return Job(parse_settings(case["argv"], case["env"]), case["layout"], BACKENDS[flavour])


def case_of(name: str) -> dict[str, Any]:
    return next(case for case in CORPUS if case["id"] == name)


def routing_of(netns: Netns) -> str:
    """Policy rules by mark, and the addresses on lo that are not there by nature."""
    rules = [line for line in netns.run("ip", "rule").splitlines() if "fwmark" in line]
    rules += [line for line in netns.run("ip", "-6", "rule").splitlines() if "fwmark" in line]
    lo = [line for line in netns.run("ip", "-6", "-o", "address", "show", "lo").splitlines() if "::6/128" in line]
    return "\n".join([*rules, *lo])


# --- rules ---------------------------------------------------------------------------------------------------


@each_flavour
@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case["id"])
def test_the_kernel_holds_istios_rules_and_a_second_run_changes_nothing(
    netns: Netns, case: dict[str, Any], flavour: str
) -> None:
    job, facts = of_case(case, flavour), facts_of(case["setup"])
    with open_capture(netns.path) as capture:
        plan = plan_of(job, facts, [])
        assert apply(capture, job, plan, facts).changed
        assert saved(netns, flavour) == {"ip": {}, "ip6": {}} | case["expect"]
        assert not apply(capture, job, plan, facts).changed


@pytest.mark.parametrize("layout", ["istio", "istio-1.11", "istio-1.4", "netapply"])
def test_without_an_inbound_port_tproxy_needs_no_routing(run: Run, pod: Netns, layout: str) -> None:
    """As Istio; the route of a run before goes."""
    words = ["-m", "TPROXY", "-i", "*", "--layout", layout]
    assert run(*words, "-b", "80").code == 0
    assert "fwmark 0x539" in routing_of(pod)
    assert run(*words, "-b", "").code == 0
    assert "fwmark" not in routing_of(pod)
    assert "TPROXY" not in pod.run("iptables-nft-save", "-t", "mangle")


def test_detect_finds_istios_rules_that_no_journal_knows(pod: Netns) -> None:
    restore(pod, "nft", case_of("istio/ipnets")["expect"])
    with open_capture(pod.path) as capture:
        assert not any(each.ours for each in capture.detect().candidates)
        found = capture.detect(layout="istio")
        assert [each.backend for each in found.candidates if each.ours] == [found.chosen] == ["iptables-nft"]


def test_a_changed_setting_is_one_transaction(run: Run, pod: Netns) -> None:
    assert run(*EVERYTHING, "-d", "15020").out.startswith("changed by iptables-nft")
    assert run(*EVERYTHING, "-d", "15020").out.startswith("unchanged by iptables-nft")
    changed = run(*EVERYTHING, "-d", "15021", "--dual-stack")
    assert "  batch ip, ip6\n" in changed.out
    assert "IPv6: capture" in changed.out
    assert "--dport 15021" in pod.run("ip6tables-nft-save")
    assert "--dport 15020" not in pod.run("iptables-nft-save")


def test_facts_are_those_of_the_namespace_that_is_programmed(pod: Netns) -> None:
    settings = IstioSettings(redirect_dns=True, proxy_uid="envoy", istio_outbound_owner_groups_exclude="7,mesh,none")
    lookups = SYSTEM._replace(uid={"envoy": 9}.get, gid={"mesh": 8}.get, servers=lambda: ("10.0.0.53",))
    with open_capture(pod.path) as capture:
        facts = read_facts(capture.namespace, settings, lookups)
    assert facts.addresses[:2] == (b"\x7f\0\0\1", b"\x0a\x63\0\2")  # IPv4 first
    assert b"\xfd\x99" + bytes(13) + b"\2" in facts.addresses
    assert (facts.servers, facts.users, facts.groups) == (("10.0.0.53",), {"envoy": 9}, {"mesh": 8})


def test_an_unreadable_resolv_conf_is_no_error_unless_it_is_needed(netns: Netns) -> None:
    def servers() -> tuple[str, ...]:
        raise FileNotFoundError(2, "No such file or directory")

    lookups = SYSTEM._replace(servers=servers)
    with open_capture(netns.path) as capture:
        read_facts(capture.namespace, IstioSettings(redirect_dns=True, capture_all_dns=True), lookups)
        with pytest.raises(NetapplyError, match=r"resolv\.conf") as raised:
            read_facts(capture.namespace, IstioSettings(redirect_dns=True), lookups)
    assert "--capture-all-dns" in raised.value.next_step


# --- dialects ------------------------------------------------------------------------------------------------


def test_the_dialect_is_the_one_that_is_in_use_and_stays(run: Run, pod: Netns) -> None:
    pod.run("iptables-legacy", "-A", "INPUT", "-p", "255", "-j", "RETURN")
    assert run(*EVERYTHING).out.startswith("changed by iptables-legacy")
    pod.run("iptables-nft", "-A", "INPUT", "-p", "255", "-j", "RETURN")
    assert run(*EVERYTHING).out.startswith("unchanged by iptables-legacy")
    assert "ISTIO" not in pod.run("iptables-nft-save")


def test_looking_for_the_dialect_in_use_leaves_no_trace(run: Run, pod: Netns) -> None:
    for _ in range(2):
        assert "by iptables-nft" in run(*EVERYTHING).out
    assert not pod.run("cat", "/proc/net/ip_tables_names")


@pytest.mark.parametrize(
    ("words", "env", "backend"),
    [
        (["--native-nftables"], {}, "nftables"),
        ([], {"NATIVE_NFTABLES": "true", "FORCE_IPTABLES_BINARY": "legacy"}, "nftables"),
        (["--force-iptables-binary=legacy"], {}, "iptables-legacy"),
        ([], {"FORCE_IPTABLES_BINARY": "nft"}, "iptables-nft"),
        (["--backend", "iptables-legacy"], {"NATIVE_NFTABLES": "true"}, "iptables-legacy"),
        ([], {"NETAPPLY_BACKEND": "nftables"}, "nftables"),
    ],
)
def test_a_dialect_can_be_named(run: Run, words: list[str], env: dict[str, str], backend: str) -> None:
    assert run(*EVERYTHING, *words, **env).out.startswith(f"changed by {backend} (asked for)")


def test_another_dialect_is_refused_with_what_to_do(run: Run, pod: Netns) -> None:
    run(*EVERYTHING)
    before = pod.run("nft", "list", "ruleset")
    refused = run(*EVERYTHING, "--native-nftables")
    assert refused.code == 1
    assert "next: netapply istio-clean-iptables" in refused.err
    assert pod.run("nft", "list", "ruleset") == before


@pytest.mark.parametrize("layout", ["istio", "istio-1.11", "istio-1.4", "netapply"])
@pytest.mark.parametrize("backend", ["nftables", "iptables-nft", "iptables-legacy"])
def test_every_layout_is_applied_and_cleaned_in_every_dialect(run: Run, pod: Netns, backend: str, layout: str) -> None:
    before = pod.run("nft", "list", "ruleset")
    words = [*EVERYTHING, "-m", "TPROXY", "-k", "tap0", "-c", "eth9", "--layout", layout, "--backend", backend]
    assert run(*words).code == 0
    assert run(*words).out.startswith("unchanged")
    assert run(command="istio-clean-iptables").out.startswith(f"changed by {backend}")
    assert saved(pod, "legacy") == {"ip": {}, "ip6": {}}
    assert pod.run("nft", "list", "ruleset") == before
    assert not routing_of(pod)


# --- what Istio left -----------------------------------------------------------------------------------------

LEFT = ["istio/tproxy", "istio-1.11/TestRulesWithTproxy", "istio-1.4/mode_tproxy", "istio/ipv6-virt-interfaces",
        "istio-1.11/TestRulesWithIpRange", "istio/basic-exclude-nic"]  # fmt: skip


def leave(netns: Netns, case: dict[str, Any], *flavours: str) -> None:
    """What istio-iptables leaves, run twice: policy rules without our signs, one of them twice."""
    for flavour in flavours:
        restore(netns, flavour, case["expect"])
    if "TPROXY" in case["argv"]:
        for preference in ("32765", "32764"):
            netns.run("ip", "rule", "add", "pref", preference, "fwmark", "1337", "lookup", "133")
        netns.run("ip", "route", "add", "local", "default", "dev", "lo", "table", "133")
    if case["expect"]["ip6"]:
        netns.run("ip", "-6", "address", "add", "::6/128", "dev", "lo")


@each_flavour
@pytest.mark.parametrize("name", LEFT)
def test_what_istio_left_is_taken_over(netns: Netns, name: str, flavour: str) -> None:
    case = case_of(name)
    leave(netns, case, flavour)
    job, facts = of_case(case, flavour), facts_of(case["setup"])
    with open_capture(netns.path) as capture:
        changed = job._replace(settings=job.settings._replace(istio_local_outbound_ports_exclude="9"))
        for each in (changed, job):
            apply(capture, each, plan_of(each, facts, []), facts)
        assert saved(netns, flavour) == {"ip": {}, "ip6": {}} | case["expect"]
        assert not apply(capture, job, plan_of(job, facts, []), facts).changed
    preferences = [line.partition(":")[0] for line in routing_of(netns).splitlines() if "fwmark" in line]
    assert set(preferences) <= {"13370"}


@each_flavour
@pytest.mark.parametrize("name", LEFT)
def test_what_istio_left_is_cleaned_by_its_own_flags(run: Run, pod: Netns, name: str, flavour: str) -> None:
    case = case_of(name)
    foreign = ["-A", "PREROUTING", "-t", "nat", "-p", "tcp", "-m", "tcp", "--dport", "9", "-j", "ACCEPT"]
    pod.run(f"iptables-{flavour}", *foreign)
    before = saved(pod, flavour)
    leave(pod, case, flavour)
    argv = [word for word in case["argv"] if word != "--redirect-dns"]
    assert run(*argv, command="istio-clean-iptables", **case["env"]).code == 0
    left = saved(pod, flavour)
    if name not in {"istio-1.11/TestRulesWithIpRange", "istio-1.11/TestRulesWithTproxy"}:
        assert left == before
    else:  # the rules that name the servers of another machine's resolv.conf cannot be known
        assert all("127.0.0.53" in rule for rule in rules_in(left) - rules_in(before))
    assert not routing_of(pod)


def rules_in(found: dict[str, dict[str, dict[str, list[str]]]]) -> set[str]:
    return {
        rule for tables in found.values() for chains in tables.values() for each in chains.values() for rule in each
    }


def test_rules_in_both_dialects_are_brought_into_one(run: Run, pod: Netns) -> None:
    leave(pod, case_of("istio/ipnets"), "legacy", "nft")
    ran = run("-i", "10.0.0.0/8")
    assert ran.code == 0, ran.err
    assert "several dialects" in ran.err
    assert not rules_in(saved(pod, "legacy"))
    assert run("-i", "10.0.0.0/8").out.startswith("unchanged by iptables-nft")


# --- modes ---------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_what_iptables_restore_takes_and_touches_nothing(run: Run, pod: Netns) -> None:
    before = pod.run("nft", "list", "ruleset"), pod.run("cat", "/proc/net/ip_tables_names"), routing_of(pod)
    shown = run(*EVERYTHING, "-d", "15020", "-n").out
    assert (pod.run("nft", "list", "ruleset"), pod.run("cat", "/proc/net/ip_tables_names"), routing_of(pod)) == before
    pod.run("iptables-nft-restore", stdin=shown)
    run(*EVERYTHING, "-d", "15020", "--cleanup-only")
    run(*EVERYTHING, "-d", "15020")
    printed = [line for line in shown.splitlines() if line.startswith("-A ")]
    assert sorted(printed) == sorted(line for line in pod.run("iptables-nft-save").splitlines() if line[:3] == "-A ")


def test_a_dry_run_of_the_native_dialect_prints_what_nft_takes(run: Run, pod: Netns) -> None:
    shown = run(*EVERYTHING, "-n", "--dual-stack", DRY_RUN="0", NATIVE_NFTABLES="1").out
    assert "# beside the rules: add address ::6/128 dev lo" in shown
    pod.run("nft", "-c", "-f", "-", stdin=shown)


def test_a_dry_run_of_cleaning_says_what_would_go(run: Run, pod: Netns) -> None:
    run(*EVERYTHING)
    before = pod.run("nft", "list", "ruleset")
    for words in (["istio-iptables", "--cleanup-only"], ["istio-clean-iptables"]):
        shown = run("-n", *words[1:], command=words[0]).out
        assert "-A ISTIO_OUTPUT -j ISTIO_REDIRECT" in shown
    assert pod.run("nft", "list", "ruleset") == before


def test_cleaning_needs_no_flags_and_no_addresses(netns: Netns, capsys: pytest.CaptureFixture[str]) -> None:
    leave(netns, case_of("istio/ipnets"), "nft", "legacy")
    assert main(["istio-iptables", "--network-namespace", netns.path, "--cleanup-only"]) == 0
    assert "changed by iptables-nft, iptables-legacy" in capsys.readouterr().out
    assert not rules_in(saved(netns, "nft")) | rules_in(saved(netns, "legacy"))
    assert main(["istio-clean-iptables", "--network-namespace", netns.path]) == 0
    assert capsys.readouterr().out.startswith("unchanged")


def test_rules_that_are_to_be_left_out_are(run: Run, pod: Netns) -> None:
    before = pod.run("nft", "list", "ruleset")
    assert run(*EVERYTHING, "--skip-rule-apply") == (0, "", "")
    assert pod.run("nft", "list", "ruleset") == before


def test_every_fault_is_told_at_once_with_exit_code_1(run: Run, pod: Netns) -> None:
    refused = run("-b", "http", "--nonsense", "--layout", "istio-9", "-i", "10.0.0.0", "-m", "TPROXY", "-t", "x")
    assert (refused.code, refused.out) == (1, "")
    lines = refused.err.splitlines()
    assert lines[0] == "netapply: istio-iptables: the settings have 5 faults; nothing was touched"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "argument", "--layout", "--istio-service-cidr", "--istio-inbound-ports", "--istio-inbound-tproxy-mark",
    ]  # fmt: skip
    assert not pod.run("nft", "list", "ruleset")


def test_a_namespace_without_an_address_is_refused(netns: Netns, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["istio-iptables", "--network-namespace", netns.path]) == 1
    assert "give the namespace an address" in capsys.readouterr().err


def test_json_is_one_object_for_success_and_error(run: Run) -> None:
    done = json.loads(run(*EVERYTHING, "--output", "json").out)
    assert (done["command"], done["ok"], done["changed"]) == ("istio-iptables", True, True)
    refused = json.loads(run("-b", "x", NETAPPLY_OUTPUT="json").out)
    assert not refused["ok"]
    assert refused["error"]["faults"][0]["path"] == "--istio-inbound-ports"


def test_help_lists_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["istio-iptables", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    flags = ["--" + name.replace("_", "-") for name in IstioSettings._fields[:-4]]
    assert all(flag in shown for flag in [*flags, "--layout", "--backend", "--state-dir", "--lock-timeout"])


# --- validation ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft", "iptables-legacy"])
@pytest.mark.parametrize("mode", ["REDIRECT", "TPROXY"])
def test_validation_sends_a_connection_that_is_captured(run: Run, backend: str, mode: str) -> None:
    ran = run(*EVERYTHING, "-m", mode, "--backend", backend, "--run-validation", "--iptables-probe-port=15099")
    assert ran.code == 0, ran.err
    assert ran.out.endswith("validation passed: the rules that stand capture a connection\n")


def test_validation_goes_by_the_first_address(netns: Netns, capsys: pytest.CaptureFixture[str]) -> None:
    add_addresses(netns, "fd99::2/64")
    words = ["--network-namespace", netns.path, *EVERYTHING, "--run-validation", "--probe-timeout"]
    assert main(["istio-iptables", *words, "2s"]) == 0
    netns.run("ip6tables-nft", "-t", "nat", "-F", "ISTIO_OUTPUT")
    assert main(["istio-iptables", *words, "100ms", "--skip-rule-apply"]) == 126
    assert "no connection to ::6 port 15002 came to port 15001 or 15006 within 0.1 s" in capsys.readouterr().err


def test_validation_waits_for_rules_that_another_program_puts_up(run: Run, pod: Netns) -> None:
    timer = threading.Timer(0.6, restore, (pod, "nft", case_of("istio/ipnets")["expect"]))
    timer.start()
    begun = time.monotonic()
    ran = run("--skip-rule-apply", "--run-validation", "--proxy-uid", "1337")
    timer.join()
    assert ran.code == 0, ran.err
    assert time.monotonic() - begun < 4


def test_validation_that_fails_says_why_with_exit_code_126(run: Run) -> None:
    ran = run("--skip-rule-apply", "--run-validation", "--probe-timeout", "300ms")
    assert ran.code == 126
    assert "(the call ended with: Connection refused)" in ran.err
    assert "run this as uid 1337" in ran.err


def test_validation_is_not_taken_in_by_calls_that_nobody_captured(run: Run, pod: Netns) -> None:
    over = threading.Event()

    def stray() -> None:
        """Answer the probe directly, and call the proxy's port directly."""
        with socket.create_server(("127.0.0.6", 15002)):
            while not over.wait(0.02):
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", 15006), 1).close()

    thread = threading.Thread(target=pod.enter, args=(stray,))
    thread.start()
    ran = run("--skip-rule-apply", "--run-validation", "--probe-timeout", "1s")
    over.set()
    thread.join()
    assert ran.code == 126
    assert "refused" not in ran.err


# --- killed --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft"])
def test_killed_at_any_moment_it_leaves_the_old_rules_or_the_new_ones_in_both_families(
    run: Run, pod: Netns, backend: str, figure: Callable[[str], None]
) -> None:
    """In legacy a table of a family is one step; what lies between is undone by the next run (test_promises)."""
    words = [*EVERYTHING, "--dual-stack", "--backend", backend, "-d"]
    pictures: list[str] = []
    for port in ("80", "443"):
        run(*words, port)
        pictures.append(pod.run("nft", "--stateless", "list", "ruleset"))
    found: list[int] = []
    for delay in range(16):
        now = delay % 2
        command = [interpreter(), "-m", "netapply", "istio-iptables", "--network-namespace", pod.path, *words]
        process = subprocess.Popen([*command, ("80", "443")[now]], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.04 + delay * 0.01)
        process.kill()
        process.wait()
        found.append(pictures.index(pod.run("nft", "--stateless", "list", "ruleset")))
    assert run(*words, "443").code == 0
    assert pod.run("nft", "--stateless", "list", "ruleset") == pictures[1]
    changes = sum(now == index % 2 for index, now in enumerate(found))
    figure(f"killed 16 times, 40 to 190 ms after the start: {changes} found as they should be, all whole")


# --- where it runs -------------------------------------------------------------------------------------------


def test_cni_mode_locks_the_namespace_and_a_container_what_it_can(tmp_path: Path) -> None:
    pod = tmp_path / "netns"
    pod.touch()
    env: dict[str, str] = {}
    choose_lock(IstioSettings(cni_mode=True, network_namespace=str(pod)), env)
    assert env == {"XTABLES_LOCKFILE": str(pod)}
    named = {"XTABLES_LOCKFILE": "/elsewhere"}
    choose_lock(IstioSettings(cni_mode=True, network_namespace=str(pod)), named)
    assert named == {"XTABLES_LOCKFILE": "/elsewhere"}
    usual: dict[str, str] = {}
    choose_lock(IstioSettings(), usual)
    assert not usual


IN_A_CONTAINER = """
set -e
mount --make-rprivate /
mount -t tmpfs -o ro none /run
mount --bind {scratch}/resolv.conf /etc/resolv.conf
mount --bind {scratch}/group /etc/group
{netapply} istio-iptables -b '*' -i '*' --redirect-dns --backend {backend}
{netapply} istio-iptables -b '*' -i '*' --redirect-dns --run-validation
{netapply} istio-clean-iptables
"""


@pytest.mark.parametrize("backend", ["nftables", "iptables-nft", "iptables-legacy"])
def test_an_init_container_needs_one_capability_and_nothing_writable(pod: Netns, tmp_path: Path, backend: str) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "resolv.conf").write_text("nameserver 10.96.0.10\n")
    (tmp_path / "group").write_text("root:x:0:\nmesh:x:4242:\n")
    netapply = "setpriv --bounding-set=-all,+net_admin --inh-caps=-all "
    netapply += f"env ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE=mesh PATH= {interpreter()} -m netapply"
    script = IN_A_CONTAINER.format(scratch=tmp_path, netapply=netapply, backend=backend)
    done = subprocess.run(
        ["nsenter", f"--net={pod.path}", "unshare", "--mount", "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={"PATH": os.environ["PATH"]},
        check=False,
    )
    # Who may not become the proxy's user cannot validate: with Istio neither.
    assert done.returncode == 126, done.stderr
    assert f"changed by {backend}" in done.stdout
    assert f"unchanged by {backend}" in done.stdout
    assert "journal: none is kept" in done.stderr
    kept = pod.run("nft", "list", "ruleset") if backend == "nftables" else json.dumps(saved(pod, backend[9:]))
    assert "4242" in kept
    assert "10.96.0.10" in kept


def interpreter() -> str:
    import sys

    return sys.executable


def test_the_cold_path_imports_nothing_that_is_slow_to_import(pod: Netns) -> None:
    code = (
        "import sys; from netapply.cli import main; main(sys.argv[1:]); "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    words = ["istio-iptables", "--network-namespace", pod.path, *EVERYTHING]
    done = subprocess.run([interpreter(), "-c", code, *words], capture_output=True, text=True, check=True, timeout=30)
    loaded = set(done.stdout.splitlines()[-1].split())
    slow = {"argparse", "asyncio", "dataclasses", "inspect", "ipaddress", "pathlib", "pyroute2", "structlog", "yaml"}
    assert not loaded & slow
