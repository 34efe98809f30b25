"""`netapply import istio`: Istio's settings, or a pod as istio-cni reads it, as a plan file with its sources."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netapply.cli import main
from netapply.compiler import compile_plan, compile_routing
from netapply.decide import decide
from netapply.errors import PlanError
from netapply.flow import Flow
from netapply.importers.annotations import ANNOTATIONS, SkippedError, read_pod
from netapply.importers.istio import VERSIONS, Facts, Version, plan_from_settings
from netapply.importers.istio_plans import Imported, import_plan
from netapply.importers.istio_settings import IstioSettings, parse_settings
from netapply.importers.provenance import ORIGINS
from netapply.importers.readings import Reading, read_flags
from netapply.plan import CapturePlan, Interfaces
from netapply.planfile import dump_plan, load_plan
from netapply.planwriter import write_plan
from netapply.schema import walk_fields
from tests.netns import Netns
from tests.strategies import flows, plans
from tests.test_istio_layout import CORPUS, SPLIT, every_setting, facts_of, groups, packed, rules_of

FACTS = Facts((packed("10.9.9.9"),), ("10.0.0.53",))
DOCUMENT = (Path(__file__).parent.parent / "docs" / "import.md").read_text()
SIDECAR = shlex.split("-p 15001 -z 15006 -u 1337 -m REDIRECT -i '*' -x '' -b '*' -d 15090,15021,15020")


def import_words(*words: str, env: dict[str, str] | None = None, version: Version = "istio") -> Imported:
    reading = read_flags(words, env or {})
    return import_plan(reading._replace(otherwise={"ipv6": "stated"}), version, FACTS)


def line_of(text: str, begin: str) -> str:
    """The one line of a file that begins so, blanks collapsed."""
    (found,) = (line for line in text.splitlines() if line.lstrip().startswith(begin))
    return " ".join(found.split())


# --- the writer ----------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(plan=plans, data=st.data())
def test_a_written_plan_is_read_back_as_it_was_whatever_its_comments(plan: CapturePlan, data: st.DataObject) -> None:
    try:
        plan = load_plan(json.dumps(dump_plan(plan)))
    except PlanError:
        return  # impossible in any file
    paths = [each.path for each in walk_fields() if "[]" not in each.path]
    comments = data.draw(st.dictionaries(st.sampled_from(paths), st.text(max_size=150), max_size=8))
    head = data.draw(st.lists(st.text(max_size=40), max_size=2))
    assert load_plan(write_plan(plan, comments, head=head), format="yaml") == plan


def test_a_plan_of_nothing_but_defaults_is_its_version() -> None:
    assert write_plan(CapturePlan(), {}) == "apiVersion: netapply/v1\n"


def test_names_that_yaml_would_take_for_something_else_are_in_quotes() -> None:
    plan = CapturePlan(interfaces=Interfaces(("null", "7", "on", "eth0", "br+")))
    text = write_plan(plan, {})
    assert '["null", "7", "on", eth0, br+]' in text
    assert load_plan(text) == plan


def test_a_comment_that_is_too_long_stands_above_its_line_and_a_long_list_takes_a_line_for_each_entry() -> None:
    made = import_words("-b", "*", "-d", ",".join(map(str, range(2000, 2020))))
    assert "    # -d …\n    exclude:\n      - 2000\n" not in made.text  # short enough: beside
    assert "    exclude:       # -d …\n      - 2000\n      - 2001\n" in made.text
    assert "  # " + "x" * 120 + "\n  uids: [1337]\n" in write_plan(CapturePlan(), {"proxy.uids": "x" * 120})


# --- settings ------------------------------------------------------------------------------------------------


def test_the_usual_sidecar_reads_like_this() -> None:
    assert import_words(*SIDECAR, version="istio-1.11").text == (
        """\
# Imported from istio-iptables -p 15001 -z 15006 -u 1337 -m REDIRECT -i '*' -x '' -b '*' -d 15090,15021,15020
# It decides as Istio 1.11 does.
# Lists are sorted when this is read, less what others cover, and so are their rules; nothing else changes.
#
# netapply apply PLAN --layout istio-1.11 --backend iptables
apiVersion: netapply/v1
proxy:
  uids: [1337]                          # -u 1337
  outbound_port: 15001                  # -p 15001
  inbound_port: 15006                   # -z 15006
  tunnel_exempt: [inbound]              # Istio: where the tunnel's port is left alone
  self_calls:                           # Istio: whose calls to their own address go back inbound
    uids: [1337]
inbound:
  mode: redirect                        # -m REDIRECT
  ports:
    include: "*"                        # -b '*'
    exclude: [22, 15090, 15021, 15020]  # -d 15090,15021,15020; Istio 1.11 leaves port 22 alone
  placement: last                       # Istio appends its rules
outbound:
  cidrs:
    include: "*"                        # -i '*'
    exclude: []                         # -x ''
  placement: last                       # Istio appends its rules
ipv6: skip                              # stated
"""
    )


def test_a_comment_says_flag_variable_or_second_name_as_they_were_written() -> None:
    env = {"ISTIO_SERVICE_CIDR": "10.0.0.0/8", "INVALID_DROP": "true", "ENVOY_PORT": "1", "PROXY_UID": ""}
    text = import_words("--envoy-port=15101", "-g5", "--redirect-dns", env=env).text
    assert line_of(text, "outbound_port") == "outbound_port: 15101 # --envoy-port 15101"
    assert line_of(text, "gids: [5] ") == "gids: [5] # -g 5"
    assert line_of(text, "include: [10") == "include: [10.0.0.0/8] # ISTIO_SERVICE_CIDR=10.0.0.0/8"
    assert line_of(text, "invalid") == "invalid: drop-all # INVALID_DROP=true"
    assert line_of(text, "capture") == "capture: servers # --redirect-dns"
    assert "uids: [1337]  # " not in text


@pytest.mark.parametrize(
    ("words", "version", "line"),
    [
        ("-u 2000", "istio", "gids: [2000] # -u 2000"),
        ("-b 80 -d 22", "istio", "exclude: [] # -d 22 has effect with all inbound ports (-b '*') alone"),
        ("-b *", "istio-1.11", "exclude: [22] # Istio 1.11 leaves port 22 alone"),
        ("-i 127.0.0.0/8", "istio", "loopback: capture # -i 127.0.0.0/8 has a block of loopback"),
        ("--capture-all-dns", "istio", "capture: none # --capture-all-dns has no effect without --redirect-dns"),
        ("-q 80,443 -o 443", "istio", "include: [80] # -q 80,443; what is excluded below is left out"),
        ("-b * -e 15108", "istio-1.4", "tunnel_port: null # Istio 1.4 has no tunnel"),
        ("-b * --dual-stack", "istio-1.4", "ipv6: skip # Istio 1.4 leaves IPv6 alone"),
        ("--dual-stack", "istio", "ipv6: skip # --dual-stack; stated"),
        ("", "istio", "placement: last # Istio appends its rules"),
    ],
)
def test_what_needs_more_than_a_name_is_explained(words: str, version: Version, line: str) -> None:
    text = import_words(*words.split(), version=version).text
    assert line in [" ".join(each.split()) for each in text.splitlines()]


#: A value for each flag that changes something. `*` among them in lists.
CHANGING = {
    "envoy_port": "1", "inbound_capture_port": "2", "inbound_tunnel_port": "3", "proxy_uid": "4", "proxy_gid": "5",
    "istio_inbound_interception_mode": "TPROXY", "istio_inbound_ports": "80", "istio_service_cidr": "127.0.0.0/8",
    "istio_service_exclude_cidr": "10.0.0.0/8", "istio_outbound_ports": "81", "istio_exclude_interfaces": "eth1",
    "istio_local_outbound_ports_exclude": "82", "kube_virt_interfaces": "eth2", "redirect_dns": "true",
    "drop_invalid": "true", "istio_outbound_ipv4_loopback_cidr": "127.0.0.0/8", "istio_outbound_owner_groups": "7",
    "istio_outbound_owner_groups_exclude": "8",
}  # fmt: skip


@pytest.mark.parametrize("setting", CHANGING)
def test_every_field_that_a_setting_changes_says_so_or_says_that_it_is_istios_way(setting: str) -> None:
    before = import_words()
    after = import_words(env={setting.upper(): CHANGING[setting]})
    changed = [
        path
        for path in ORIGINS
        if _at(dump_plan(before.plan), path) != _at(dump_plan(after.plan), path) and path in after.comments
    ]
    assert changed
    named = [path for path in changed if setting.upper() in after.comments[path]]
    assert named
    others = [after.comments[path] for path in changed if path not in named]
    assert all(comment.startswith(("Istio: ", "from resolv.conf")) for comment in others), after.text


def _at(document: Any, path: str) -> Any:
    for name in path.split("."):
        document = document[name]
    return document


def test_every_field_that_differs_from_an_empty_plan_has_its_origin() -> None:
    """So that no line is without a comment but those below a list or group that has one."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in CHANGING.items() if not name.endswith("_cidr")]
    made = import_words(*(word for word in words if "-owner-" not in word), "--istio-service-cidr=127.0.0.0/8")
    bare = [line for line in made.text.splitlines() if line[:1] != "#" and "# " not in line]
    groups_and_entries = [line for line in bare if line.endswith(":") or line.startswith("    ")]
    assert sorted({*bare} - {*groups_and_entries}) == ["apiVersion: netapply/v1"]


def test_a_value_with_a_line_break_stays_in_its_comment() -> None:
    made = import_words(env={"ENVOY_USER": "x\nipv6: block"}, version="istio")
    hostile = write_plan(made.plan, {"ipv6": "a\nipv6: block\r\u2028\x85b"}, head=("c\nd: e",))
    assert "# a\\nipv6: block\\r\\u2028\\x85b\n" in hostile
    assert load_plan(hostile) == made.plan


def test_what_is_not_of_a_plan_is_named_and_becomes_options_of_apply() -> None:
    text = import_words("--native-nftables", "--network-namespace", "/proc/7/ns/net", "--reconcile").text
    assert "# Not of a plan: --network-namespace /proc/7/ns/net, --reconcile, --native-nftables\n" in text
    assert "# netapply apply PLAN --layout istio --backend nftables -N /proc/7/ns/net\n" in text


def test_every_fault_is_reported_at_once_at_what_gave_it() -> None:
    words = ["--no-such", "-p", "70000", "--istio-service-cidr=10.0.0.0", "--dry-run=maybe"]
    with pytest.raises(PlanError) as raised:
        import_words(*words, env={"PROXY_UID": "nobody-here", "PROXY_GID": "1"})
    paths = [fault.path for fault in raised.value.faults]
    assert paths == ["argument", "-n", "PROXY_UID", "--istio-service-cidr", "-p"] or set(paths) == {
        "argument", "-n", "--dry-run", "PROXY_UID", "--istio-service-cidr", "-p"
    } - {"-n"}  # fmt: skip


def test_what_no_plan_file_holds_is_refused_with_what_asked_for_it() -> None:
    with pytest.raises(PlanError, match=r"proxy\.tunnel_port \(-e 15001\): 15001 is not accepted"):
        import_words("-e", "15001")


def test_the_document_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    command, shown = (
        re.search(rf"^```{kind}\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]  # both are there
        for kind in ("sh", "yaml")
    )
    words = shlex.split(command.partition(">")[0])[3:]
    out = run(capsys, "--ipv6", "no", *words)[1]
    assert out.replace("--ipv6 no", "the first address here is 10.9.9.9") == shown


# --- the same decisions, the same rules ----------------------------------------------------------------------


#: What Istio accepts and plan files do not, by the field that the fault names.
NO_FILE = ("proxy.inbound_port", "dns.servers", "outbound.cidrs.include")


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case["id"])
def test_rules_of_the_plan_file_are_istios_but_for_the_order_in_lists(case: dict[str, Any]) -> None:
    try:
        made = import_plan(read_flags(case["argv"], case["env"]), case["layout"], facts_of(case["setup"]))
    except PlanError as error:
        assert all(fault.path.startswith(NO_FILE) for fault in error.faults)
        return
    rules = rules_of(compile_plan(load_plan(made.text), SPLIT, case["layout"]))
    assert _sorted(rules) == _sorted(case["expect"])


def _sorted(rules: dict[str, dict[str, dict[str, list[str]]]]) -> dict[tuple[str, str, str], list[str]]:
    return {
        # Several owners are one rule.
        (family, table, chain): sorted(" ".join(sorted(line.split())) for line in lines)
        for family, tables in rules.items()
        for table, chains in tables.items()
        for chain, lines in chains.items()
    }


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=150, deadline=None)
@given(values=every_setting, owners=groups, flow=flows(), both=st.booleans())
def test_the_plan_file_decides_as_the_settings_do(
    version: Version, values: dict[str, Any], owners: tuple[str, str], flow: Flow, both: bool
) -> None:
    dns = values["redirect_dns"] and version != "istio-1.4"
    include, exclude = owners
    made = IstioSettings(
        **cast("dict[str, Any]", values | {"redirect_dns": dns}),
        istio_outbound_owner_groups=include,
        istio_outbound_owner_groups_exclude=exclude,
    )
    facts = Facts((packed("fd99::2"),) if both else (packed("10.9.9.9"),), ("10.0.0.5", "fd00::5"))
    wanted = plan_from_settings(made, version, facts)
    try:
        imported = import_plan(Reading(made, {}), version, facts)
    except PlanError as error:
        assert all(fault.path.startswith(NO_FILE) for fault in error.faults)
        return
    assert load_plan(imported.text) == imported.plan
    assert decide(imported.plan, flow).same_as(decide(wanted, flow))


# --- pods ----------------------------------------------------------------------------------------------------

PREFIX = "traffic.sidecar.istio.io/"


def pod(
    annotations: dict[str, Any] | None = None, env: dict[str, str] | None = None, **of_proxy: object
) -> dict[str, Any]:
    """An injected pod."""
    entries = [{"name": name, "value": value} for name, value in (env or {}).items()]
    proxy = {"name": "istio-proxy", "args": ["proxy", "sidecar"], "env": entries, **of_proxy}
    return {
        "kind": "Pod",
        "metadata": {"name": "a", "annotations": {"sidecar.istio.io/status": "{}"} | (annotations or {})},
        "spec": {"initContainers": [{"name": "istio-validation"}], "containers": [{"name": "app"}, proxy]},
    }


@pytest.mark.parametrize(
    ("given_pod", "flags"),
    [
        (pod(), ""),
        (pod({"sidecar.istio.io/interceptionMode": "TPROXY"}), "-m TPROXY"),
        (pod({f"{PREFIX}includeInboundPorts": "80, 81"}), "-b 80,81"),
        (pod({f"{PREFIX}includeInboundPorts": ""}), "-b="),
        (pod({f"{PREFIX}excludeInboundPorts": "22,15090"}), "-d 22,15090,15020,15021"),
        (pod({f"{PREFIX}excludeInboundPorts": ""}), "-d 15020,15021,15090"),
        (pod({f"{PREFIX}includeOutboundIPRanges": "10.0.0.0/8"}), "-i 10.0.0.0/8"),
        (pod({f"{PREFIX}excludeOutboundIPRanges": "10.0.0.0/8"}), "-x 10.0.0.0/8"),
        (pod({f"{PREFIX}includeOutboundPorts": "80"}), "-q 80"),
        (pod({f"{PREFIX}excludeOutboundPorts": "80"}), "-o 80"),
        (pod({f"{PREFIX}excludeInterfaces": "net1"}), "-c net1"),
        (pod({f"{PREFIX}kubevirtInterfaces": "net1"}), "-k net1"),
        (pod({f"{PREFIX}kubevirtInterfaces": "net1", "istio.io/reroute-virtual-interfaces": "net2"}), "-k net2"),
        (pod(env={"ISTIO_META_DNS_CAPTURE": "true"}), "--redirect-dns --capture-all-dns"),
        (pod(env={"INVALID_DROP": "1", "ISTIO_DUAL_STACK": "T"}), "--drop-invalid --dual-stack"),
        (pod(securityContext={"runAsUser": 2000, "runAsGroup": 0}), "-u 2000 -g 1337"),
    ],
)
def test_a_pod_gives_the_settings_that_istio_cni_takes(given_pod: dict[str, Any], flags: str) -> None:
    defaults = "-m REDIRECT -b * -i * -o 15020 -d 15020,15021,15090 -u 1337 -g 1337"
    reading = read_pod(given_pod, {}, "pod.yaml")
    assert not reading.faults
    wanted, found = parse_settings([*defaults.split(), *flags.split()], {}), reading.settings
    spaces = {name: value.replace(" ", "") for name, value in found._asdict().items() if isinstance(value, str)}
    assert found._replace(**spaces) == wanted


def test_a_pod_reads_like_this() -> None:
    annotations = {f"{PREFIX}excludeInboundPorts": "9090", f"{PREFIX}includeOutboundIPRanges": "10.0.0.0/8"}
    reading = read_pod(pod(annotations, {"ISTIO_META_DNS_CAPTURE": "true"}), {}, "pod.yaml")
    text = import_plan(reading, "istio", FACTS).text
    assert text.startswith("# Imported from pod a (pod.yaml), as istio-cni reads it\n")
    assert line_of(text, "exclude: [9090") == (
        "exclude: [9090, 15020, 15021, 15090] # excludeInboundPorts: '9090'; istio-cni adds 15020, 15021, 15090"
    )
    assert line_of(text, "include: [10") == "include: [10.0.0.0/8] # includeOutboundIPRanges: '10.0.0.0/8'"
    assert line_of(text, "exclude: [15020]") == "exclude: [15020] # istio-cni's default"
    assert line_of(text, "capture: all") == "capture: all # ISTIO_META_DNS_CAPTURE=true of istio-proxy"


def test_istio_cnis_own_environment_counts_as_far_as_istio_cni_reads_it() -> None:
    reading = read_pod(pod(), {"ISTIO_OUTBOUND_OWNER_GROUPS": "7", "ENVOY_PORT": "1"}, "pod.yaml")
    assert reading.settings.istio_outbound_owner_groups == "7"
    assert reading.settings.envoy_port == "15001"
    assert reading.given["istio_outbound_owner_groups"].text == "ISTIO_OUTBOUND_OWNER_GROUPS=7 of istio-cni"


def _without(part: str) -> dict[str, Any]:
    made = pod()
    if part == "status":
        made["metadata"]["annotations"].clear()
    else:
        made["spec"]["containers"].pop()
    return made


def _with(part: str, value: Any) -> dict[str, Any]:
    made = pod({"sidecar.istio.io/inject": "true"})
    if part == "labels":
        made["metadata"]["labels"] = value
    elif part == "hostNetwork":
        made["spec"]["hostNetwork"] = value
    else:
        made["spec"]["initContainers"].append(value)
    return made


@pytest.mark.parametrize(
    ("given_pod", "reason"),
    [
        (_without("status"), "no annotation sidecar.istio.io/status"),
        (_without("proxy"), "no container istio-proxy"),
        (pod({"sidecar.istio.io/inject": "false"}), "annotation sidecar.istio.io/inject is false"),
        (_with("labels", {"sidecar.istio.io/inject": "False"}), "label sidecar.istio.io/inject is False"),
        (_with("hostNetwork", True), "host's network"),
        (_with("init", {"name": "istio-init"}), "has container istio-init"),
        (pod(env={"DISABLE_ENVOY": "true"}), "DISABLE_ENVOY is true"),
        (pod(args=["proxy", "router"]), "its proxy is a router"),
    ],
)
def test_a_pod_that_istio_cni_leaves_alone_says_why(given_pod: dict[str, Any], reason: str) -> None:
    with pytest.raises(SkippedError, match=reason):
        read_pod(given_pod, {}, "pod.yaml")


def test_a_label_beats_the_annotation_as_with_istio_cni() -> None:
    made = pod({"sidecar.istio.io/inject": "false"})
    made["metadata"]["labels"] = {"sidecar.istio.io/inject": "true"}
    assert read_pod(made, {}, "pod.yaml").settings.istio_inbound_ports == "*"


def test_a_pod_with_istio_init_says_what_to_import_instead() -> None:
    args = ["istio-iptables", "-p", "15001", "-i", "*"]
    with pytest.raises(SkippedError) as raised:
        read_pod(_with("init", {"name": "istio-init", "args": args}), {}, "pod.yaml")
    assert raised.value.next_step == "import what that container says: netapply import istio -- -p 15001 -i '*'"


def test_an_unknown_annotation_of_capture_is_a_warning_with_a_guess() -> None:
    reading = read_pod(pod({f"{PREFIX}excludeOutboundPort": "1", "other.io/x": "y"}), {}, "pod.yaml")
    (warning,) = reading.warnings
    assert f"did you mean {PREFIX}excludeOutboundPorts?" in warning
    assert f"{PREFIX}kubevirtInterfaces" in ANNOTATIONS


def test_a_variable_that_is_no_boolean_is_a_warning_and_counts_as_false() -> None:
    reading = read_pod(pod(env={"INVALID_DROP": "maybe"}), {}, "pod.yaml")
    assert not reading.settings.drop_invalid
    assert "INVALID_DROP of istio-proxy is 'maybe'" in reading.warnings[0]


def test_every_fault_of_a_pod_is_reported_at_once() -> None:
    annotations = {
        "sidecar.istio.io/interceptionMode": "NONE",
        f"{PREFIX}includeOutboundIPRanges": "10.0.0.0/8, 10.0.0.0/99",
        f"{PREFIX}excludeInboundPorts": 9090,
        f"{PREFIX}includeInboundPorts": "80,,81",
        f"{PREFIX}excludeOutboundPorts": "80, 90:91",
        "istio.io/reroute-virtual-interfaces": "eth0, br+",
        f"{PREFIX}kubevirtInterfaces": "not read,",
        f"{PREFIX}excludeOutboundIPRanges": "*",
    }
    with pytest.raises(PlanError) as raised:
        import_plan(read_pod(pod(annotations, securityContext={"runAsUser": "x"}), {}, "pod.yaml"), "istio", FACTS)
    found = [(fault.path.removeprefix(PREFIX), fault.value) for fault in raised.value.faults]
    assert found == [
        (f"metadata.annotations: {PREFIX}excludeInboundPorts", "9090"),
        ("sidecar.istio.io/interceptionMode", "'NONE'"),
        ("includeInboundPorts", "''"),
        ("includeOutboundIPRanges", "' 10.0.0.0/99'"),
        ("excludeOutboundPorts", "' 90:91'"),
        ("istio.io/reroute-virtual-interfaces", "' br+'"),
        ("istio-proxy.securityContext.runAsUser", "'x'"),
        ("includeOutboundIPRanges", "10.0.0.0/99"),
        ("excludeOutboundIPRanges", "*"),
    ]


@pytest.mark.parametrize(
    "manifest",
    [[], "text", {"kind": "Deployment"}, {"metadata": []}, {"spec": {"containers": {}}}, {"spec": {"containers": [1]}}],
)
def test_what_is_no_pod_is_refused(manifest: Any) -> None:
    assert read_pod(manifest, {}, "pod.yaml").faults


# --- the command ---------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["import", "istio", *words])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_plan_is_on_standard_output_and_facts_may_be_stated(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--ipv6", "yes", "--servers", "10.0.0.5, fd00::5", "--", "-b", "*", "--redirect-dns")
    assert (code, err) == (0, "")
    assert line_of(out, "servers") == 'servers: [10.0.0.5, "fd00::5"] # --servers 10.0.0.5, fd00::5'
    assert line_of(out, "ipv6") == "ipv6: capture # --ipv6 yes"
    assert load_plan(out).ipv6 == "capture"


def test_the_first_address_here_decides_on_ipv6(netns: Netns, capsys: pytest.CaptureFixture[str]) -> None:
    netns.run("ip", "addr", "add", "2001:db8::7/64", "dev", "lo")
    _, out, _ = netns.enter(lambda: run(capsys))
    assert line_of(out, "ipv6") == "ipv6: capture # the first address here is 2001:db8::7"


def test_a_machine_without_addresses_is_told_how_to_state_them(
    netns: Netns, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = netns.enter(lambda: run(capsys))
    assert (code, out) == (1, "")
    assert "--ipv6" in err
    assert netns.enter(lambda: run(capsys, "--ipv6", "no"))[0] == 0


def test_variables_are_read_from_a_file_as_a_shell_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sidecar.env"
    file.write_text(
        "# a comment\n\nexport ISTIO_SERVICE_CIDR='*'\nISTIO_INBOUND_PORTS=80,81 # two\nPROXY_CONFIG='{}'\n"
    )
    code, out, _ = run(capsys, "--ipv6", "no", "--env-file", str(file))
    assert code == 0
    assert out.startswith(f"# Imported from istio-iptables, with {file}\n")
    assert line_of(out, "include: [80") == "include: [80, 81] # ISTIO_INBOUND_PORTS=80,81"
    file.write_text("no variable\nA='x\n")
    code, out, err = run(capsys, "--env-file", str(file))
    assert (code, out) == (1, "")
    assert f"{file}:1: 'no' is not accepted" in err
    assert f"{file}:2: " in err


def test_a_pod_is_read_from_a_file_and_takes_no_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pod.json"
    file.write_text(json.dumps(pod({f"{PREFIX}typo": "1"})))
    code, out, err = run(capsys, "--ipv6", "no", "--annotations", str(file))
    assert code == 0
    assert load_plan(out).outbound.ports.exclude
    assert f"warning: annotation {PREFIX}typo is unknown" in err
    assert run(capsys, "--annotations", str(file), "--", "-p", "1")[0] == 1
    file.write_text(json.dumps(_without("status")))
    code, out, err = run(capsys, "--annotations", str(file))
    assert (code, out) == (1, "")
    assert "istio-cni leaves pod a alone" in err


def test_json_has_the_plan_and_what_each_field_comes_from(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "-o", "json", "--ipv6", "no", "--", *SIDECAR)
    document = json.loads(out)
    assert code == 0
    assert document["comments"]["inbound.ports.exclude"] == "-d 15090,15021,15020"
    assert load_plan(json.dumps(document["plan"])) == load_plan(import_words(*SIDECAR).text)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("istio", "-u 2000,1337 -g 7,5,7 -i '*'"),
        ("istio-1.11", "-u 2000,1337 --redirect-dns -i '*'"),
        ("istio-1.4", "-b 8080 -i '*'"),
        ("istio", "-b '*' -z 15001"),
        ("istio", "-i '*' -c eth1 -k eth1"),
        ("istio", "--redirect-dns -i '*'"),
        ("istio", "-m TPROXY -b ''"),
    ],
)
def test_what_a_plan_file_merely_doubts_is_imported_with_the_rules_of_the_drop_in(version: Version, words: str) -> None:
    reading = read_flags(shlex.split(words), {"ISTIO_OUTBOUND_OWNER_GROUPS": ""})
    facts = Facts((b"\x0a\0\0\5",), ("fd00::53",))
    wanted = plan_from_settings(reading.settings, version, facts)
    wanted = wanted._replace(proxy=wanted.proxy._replace(gids=tuple(dict.fromkeys(wanted.proxy.gids))))
    made = import_plan(reading, version, facts).plan
    assert compile_plan(made, SPLIT, version) == compile_plan(wanted, SPLIT, version)
    assert compile_routing(made) == compile_routing(wanted)


@pytest.mark.parametrize("version", VERSIONS)
def test_applying_the_plan_file_gives_the_rules_of_the_drop_in(
    version: Version,
    tmp_path: Path,
    make_netns: Callable[..., Netns],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = shlex.split("-p 15001 -u 1337 -i '*' -x 10.0.0.0/8,172.16.0.0/12 -b '*' -d 15020,15021 -o 22 -k br0")
    saved: list[str] = []
    for way in ("drop-in", "plan file"):
        netns = make_netns()
        netns.run("ip", "addr", "add", "10.1.2.3/32", "dev", "lo")
        monkeypatch.setenv("XTABLES_LOCKFILE", str(tmp_path / "lock"))
        state = ["--state-dir", str(tmp_path / way)]
        (tmp_path / way).mkdir(mode=0o700)
        if way == "drop-in":
            command = ["istio-iptables", *words, "--network-namespace", netns.path]
        else:
            file = tmp_path / "plan.yaml"
            file.write_text(netns.enter(lambda: run(capsys, "--layout", version, "--", *words))[1])
            command = ["apply", str(file), "-N", netns.path]
        code = main([*command, "--layout", version, "--backend", "iptables-nft", *state])
        assert code == 0, capsys.readouterr().err
        saved.append(_rules(netns))
    assert "ISTIO_OUTPUT" in saved[0]
    assert saved[0] == saved[1]


def _rules(netns: Netns) -> str:
    return "\n".join(line for line in netns.run("iptables-nft-save").splitlines() if line[:1] not in "#:")
