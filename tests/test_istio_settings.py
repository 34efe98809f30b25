"""Istio's command line and environment are read as Istio reads them, and refused where it refuses them."""

from __future__ import annotations

import socket

import pytest

from netapply.errors import Fault, PlanError
from netapply.importers.istio import Facts, plan_from_settings
from netapply.importers.istio_settings import IstioSettings, parse_settings, read_command, seconds
from netapply.plan import IdRange, OwnerRules, Owners
from netapply.ruleset import PortRange


def packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


HERE = Facts((packed("10.9.9.9"),), (), {"istio-proxy": 101, "envoy": 102}, {"mesh": 202})


def faults_of(settings: IstioSettings, facts: Facts = HERE) -> list[Fault]:
    with pytest.raises(PlanError) as raised:
        plan_from_settings(settings, "istio", facts)
    return list(raised.value.faults)


# --- words ---------------------------------------------------------------------------------------------------


def test_a_flag_beats_the_environment_in_all_its_forms() -> None:
    env = {"ENVOY_PORT": "1", "PROXY_UID": "2", "INVALID_DROP": "true", "DRY_RUN": ""}
    read = parse_settings(["--envoy-port=3", "-b*", "-d", "", "--redirect-dns", "-n=false"], env)
    expected = IstioSettings("3", proxy_uid="2", istio_inbound_ports="*", redirect_dns=True, drop_invalid=True)
    assert read == expected


def test_letters_stand_together_and_the_last_of_a_flag_counts() -> None:
    read = parse_settings(["-p", "1", "-np15002", "-z=3", "-o", "-x"], {})
    assert read == IstioSettings("15002", "3", dry_run=True, istio_local_outbound_ports_exclude="-x")


def test_the_second_name_of_a_variable_beats_the_first() -> None:
    assert not parse_settings([], {"REDIRECT_DNS": "true", "ISTIO_META_DNS_CAPTURE": "false"}).redirect_dns
    assert parse_settings([], {"DUAL_STACK": "0", "ISTIO_DUAL_STACK": "T"}).dual_stack
    assert parse_settings([], {"INVALID_DROP": "1"}).drop_invalid


@pytest.mark.parametrize("word", ["", "yes", "TrUe"])
def test_a_variable_that_is_no_boolean_is_false_even_where_it_is_a_second_name(word: str) -> None:
    env = {"REDIRECT_DNS": "true", "ISTIO_META_DNS_CAPTURE": word}
    assert not parse_settings([], env).redirect_dns
    assert parse_settings(["--redirect-dns"], env).redirect_dns


def test_what_an_injected_init_container_says_is_understood() -> None:
    words = ["-p", "15001", "-x", "", "--log_output_level=default:info", "--log_as_json", "--run-validation"]
    notes: list[str] = []
    assert parse_settings(words, {}, notes) == IstioSettings("15001", run_validation=True)
    assert not notes


def test_what_istio_passes_over_in_silence_is_told() -> None:
    notes: list[str] = []
    env = {"ENVOY_PORT": "tcp://10.96.0.7:80", "DRY_RUN": "yes"}
    assert parse_settings(["init", "--dual-stack", "--", "-p", "1"], env, notes) == IstioSettings(dual_stack=True)
    said = ("'init'", "'-p'", "'1'", "ENVOY_PORT", "DRY_RUN")
    assert all(name in note for name, note in zip(said, notes, strict=True))


def test_every_fault_of_the_command_line_is_named() -> None:
    with pytest.raises(PlanError) as raised:
        parse_settings(
            ["--no-such-flag", "--envoy_port=1", "-y", "--dry-run=maybe", "-p"],
            {"PROBE_TIMEOUT": "5", "IPTABLES_PROBE_PORT": "http", "FORCE_IPTABLES_BINARY": "xtables"},
        )
    found = {fault.path: fault.value for fault in raised.value.faults if fault.path != "argument"}
    strange = {fault.value for fault in raised.value.faults if fault.path == "argument"}
    assert strange == {"--no-such-flag", "--envoy_port=1", "-y"}
    assert found == {
        "--dry-run": "maybe", "--envoy-port": "nothing", "--probe-timeout": "5", "--iptables-probe-port": "http",
        "--force-iptables-binary": "xtables",
    }  # fmt: skip


def test_flags_of_ours_stand_beside_istios_with_variables_of_their_own() -> None:
    own = {"layout": lambda text: "" if text == "istio" else "write istio", "state_dir": lambda _: ""}
    faults: list[Fault] = []
    env = {"NETAPPLY_LAYOUT": "istio", "NETAPPLY_STATE_DIR": "/a", "LAYOUT": "x"}
    read = read_command(["--state-dir", "/b", "-p1"], env, own, faults, [])
    assert read == (IstioSettings("1"), {"layout": "istio", "state_dir": "/b"})
    read_command(["--layout=other"], {}, own, faults, [])
    assert faults == [Fault("--layout", "other", "write istio")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("5s", 5), ("1m30s", 90), ("500ms", 0.5), ("1.5h", 5400), (".5s", 0.5), ("0", 0), ("-3s", -3), ("1us", 1e-6)]
    + [(wrong, None) for wrong in ("", "5", "s", "1..s", ".s", "5 s", "+-1s", "1s2")],
)
def test_a_duration_is_read_as_go_reads_it(text: str, expected: float | None) -> None:
    assert seconds(text) == expected


# --- values --------------------------------------------------------------------------------------------------


def test_what_istio_refuses_is_refused_together() -> None:
    bad = IstioSettings(
        envoy_port="99999",
        istio_service_cidr="10.0.0.0",
        istio_service_exclude_cidr="*",
        istio_inbound_ports="*,80",
        istio_outbound_ports="http",
        istio_exclude_interfaces="a-name-of-16-chars",
        istio_outbound_ipv4_loopback_cidr="10.0.0.0/8",
        istio_outbound_owner_groups="nobody-here",
        proxy_uid="somebody",
    )
    named = [(fault.path, fault.value) for fault in faults_of(bad, Facts())]
    assert sorted(named) == sorted(
        [
            ("--envoy-port", "99999"),
            ("--istio-service-cidr", "10.0.0.0"),
            ("--istio-service-exclude-cidr", "*"),
            ("--istio-inbound-ports", "*"),
            ("--istio-outbound-ports", "http"),
            ("--istio-exclude-interfaces", "a-name-of-16-chars"),
            ("ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "10.0.0.0/8"),
            ("ISTIO_OUTBOUND_OWNER_GROUPS", "nobody-here"),
            ("--proxy-uid", "somebody"),
            ("--proxy-gid", "somebody"),
            ("addresses", "none but loopback and link-local"),
        ]
    )


def test_settings_that_nobody_reads_are_not_refused() -> None:
    settings = IstioSettings(istio_inbound_tproxy_mark="", istio_inbound_tproxy_route_table="local")
    assert plan_from_settings(settings, "istio", HERE).inbound.mode == "redirect"
    tproxy = settings._replace(istio_inbound_interception_mode="TPROXY")
    assert [fault.value for fault in faults_of(tproxy)] == ["nothing", "local"]


def test_ports_are_written_as_iptables_reads_them() -> None:
    settings = IstioSettings(istio_inbound_ports="*", istio_local_exclude_ports="80,8000:8100,:9, 60000:,0,")
    excluded = plan_from_settings(settings, "istio", HERE).inbound.ports.exclude
    assert excluded == tuple(PortRange(*each) for each in [(80, 80), (8000, 8100), (0, 9), (60000, 65535), (0, 0)])


def test_numbers_that_iptables_takes_for_others_are_refused() -> None:
    octal = IstioSettings(envoy_port="015001", proxy_uid="010", istio_outbound_ports="0x50,080,80:090")
    assert [fault.value for fault in faults_of(octal)] == ["010", "010", "015001", "0x50", "080", "80:090"]


def test_a_block_with_a_space_beside_it_is_refused_with_the_reason() -> None:
    (fault,) = faults_of(IstioSettings(istio_service_cidr="10.0.0.0/8, fd00::/8"))
    assert (fault.value, fault.accepted) == ("fd00::/8", "write a block as 10.0.0.0/8, with no spaces around it")


def test_an_address_alone_is_a_block_to_1_4_and_to_no_other() -> None:
    settings = IstioSettings(istio_service_exclude_cidr="10.9.0.1")
    excluded = plan_from_settings(settings, "istio-1.4", HERE).outbound.cidrs.exclude
    assert not isinstance(excluded, str)
    assert [str(block) for block in excluded] == ["10.9.0.1/32"]
    assert [fault.value for fault in faults_of(settings)] == ["10.9.0.1"]


def test_the_proxy_is_the_envoy_user_unless_it_is_named() -> None:
    def ids(facts: Facts = HERE, **given: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        proxy = plan_from_settings(IstioSettings(**given), "istio", facts).proxy
        return proxy.uids, proxy.gids

    assert ids() == ((101,), (101,))
    assert ids(envoy_user="envoy") == ((102,), (102,))
    assert ids(Facts(HERE.addresses)) == ((1337,), (1337,))
    assert ids(proxy_uid="3,4") == ((3, 4), (3, 4))
    assert ids(proxy_uid="envoy", proxy_gid="mesh,5") == ((102,), (202, 5))


def test_groups_are_excluded_only_where_every_group_is_included() -> None:
    def owners(include: str, exclude: str = "", version: str = "istio") -> OwnerRules:
        settings = IstioSettings(istio_outbound_owner_groups=include, istio_outbound_owner_groups_exclude=exclude)
        return plan_from_settings(settings, version, HERE).outbound.owners  # type: ignore[arg-type]

    assert owners("*", "mesh,7-9") == OwnerRules("*", Owners(gids=(IdRange(202, 202), IdRange(7, 9))))
    assert owners("mesh", "nobody-here") == OwnerRules(Owners(gids=(IdRange(202, 202),)))
    assert len(owners("*", ",".join(map(str, range(70)))).exclude.gids) == 70
    assert [fault.value for fault in faults_of(IstioSettings(istio_outbound_owner_groups="1," * 65))] == ["65 groups"]


def test_no_group_at_all_is_what_an_empty_variable_says_to_todays_istio_alone() -> None:
    settings = parse_settings([], {"ISTIO_OUTBOUND_OWNER_GROUPS": "", "INBOUND_CAPTURE_PORT": ""})
    assert settings.inbound_capture_port == "15006"
    assert plan_from_settings(settings, "istio", HERE).outbound.owners == OwnerRules(Owners())
    assert plan_from_settings(settings, "istio-1.11", HERE).outbound.owners == OwnerRules()


def test_ipv6_is_decided_by_the_first_address_that_is_not_local() -> None:
    local = tuple(map(packed, ("127.0.0.1", "169.254.1.1", "::1", "fe80::1", "ff02::1")))
    both = Facts((*local, packed("10.9.9.9"), packed("fd99::2")))
    assert plan_from_settings(IstioSettings(), "istio", both).ipv6 == "skip"
    assert plan_from_settings(IstioSettings(dual_stack=True), "istio", both).ipv6 == "capture"
    assert plan_from_settings(IstioSettings(), "istio", Facts((*local, packed("fd99::2")))).ipv6 == "capture"
    assert plan_from_settings(IstioSettings(), "istio", Facts((packed("::ffff:10.9.9.9"),))).ipv6 == "skip"
    assert [fault.path for fault in faults_of(IstioSettings(), Facts(local))] == ["addresses"]


def test_resolvers_that_are_no_addresses_are_passed_over() -> None:
    facts = HERE._replace(servers=("10.0.0.53", "resolver.example", "fd00::53"))
    dns = plan_from_settings(IstioSettings(redirect_dns=True), "istio", facts).dns
    assert [str(block) for block in dns.servers] == ["10.0.0.53/32", "fd00::53/128"]
    assert plan_from_settings(IstioSettings(redirect_dns=True), "istio", HERE).dns.capture == "none"
