"""Plan files: what is accepted, what is refused and how, and what is made of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netapply.documents import Limits
from netapply.errors import PlanError
from netapply.lookups import Lookups, cgroup_id, read_servers, system_lookups
from netapply.plan import CapturePlan, Cgroup, IdRange, Mark, Owners, Reroute
from netapply.planfile import dump_plan, examine_plan, fingerprint, format_of, load_plan, read_plan
from netapply.ruleset import Cidr, PortRange
from netapply.spans import Spans, collapse, merge, span_of
from netapply.spelling import RefusedError, read_cidr, write_cidr

PLANS = sorted(Path(__file__).parent.joinpath("plans").iterdir())
HEAD = "apiVersion: netapply/v1\n"
USERS = {"envoy": 101, "root": 0}
CGROUPS = {"system.slice/x.service": 4711}
LOOKUPS = Lookups(USERS.get, {"mesh": 202}.get, lambda: ("10.0.0.53", "fd00::53"), lambda path: CGROUPS.get(path, 0))


def load(text: str, **options):
    return load_plan(text, lookups=LOOKUPS, **options)


def faults(text: str | bytes, **options) -> dict[str, tuple[str, str]]:
    with pytest.raises(PlanError) as caught:
        load_plan(text, lookups=options.pop("lookups", LOOKUPS), **options)
    return {fault.path: (fault.value, fault.accepted) for fault in caught.value.faults}


def blocks(*texts: str) -> tuple[Cidr, ...]:
    return tuple(map(read_cidr, texts))


# --- the whole file ------------------------------------------------------------------------------------------


def test_a_file_with_only_the_api_version_is_the_default_plan():
    assert load(HEAD) == CapturePlan()


def test_the_three_formats_say_the_same():
    yaml = HEAD + "proxy: {uids: [7]}\nipv6: skip\n"
    toml = 'apiVersion = "netapply/v1"\nipv6 = "skip"\n[proxy]\nuids = [7]\n'
    plan = load(yaml)
    assert load(toml) == plan
    assert load(json.dumps({"apiVersion": "netapply/v1", "ipv6": "skip", "proxy": {"uids": [7]}})) == plan


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_the_examples_load_and_come_back_from_their_dump(path: Path):
    plan = read_plan(path, lookups=LOOKUPS)
    assert load_plan(json.dumps(dump_plan(plan)), lookups=LOOKUPS) == plan


def test_every_fault_is_reported_at_once():
    found = faults(
        """
apiVersion: netapply/v2
proxy: {uid: 1, uids: [nobody-here], mark: 0x539/0xff, outbound_port: 70000}
inbound: {mode: on, ports: {include: [80, 9-5], exclude: 80}}
outbound: {cidrs: {exclude: [10.0.0.0/8, 10.0.0.1/8]}}
interfaces: {reroute: [lo]}
dns: {capture: servers, servers: []}
log:
  rate: 5
"""
    )
    assert set(found) == {
        "apiVersion",
        "proxy.uid",
        "proxy.uids[0]",
        "proxy.mark",
        "proxy.outbound_port",
        "inbound.mode",
        "inbound.ports.include[1]",
        "inbound.ports.exclude",
        "outbound.cidrs.exclude[1]",
        "interfaces.reroute[0].interface",
        "dns.servers",
        "log.prefix",
    }


def test_a_fault_says_the_value_and_the_accepted_form():
    found = faults(HEAD + "outbound: {cidrs: {exclude: [10.1.2.3/8]}}")
    assert found == {
        "outbound.cidrs.exclude[0]": ("'10.1.2.3/8'", "a block has no host bits: 10.0.0.0/8, or the address alone")
    }


def test_a_long_value_is_shortened():
    (value, _) = faults(HEAD + f"ipv6: {'x' * 1000}")["ipv6"]
    assert len(value) < 60


def test_the_api_version_is_required():
    assert set(faults("ipv6: skip")) == {"apiVersion"}


def test_an_unknown_field_gets_a_guess():
    found = faults(HEAD + "outbond: {}\nproxy: {inboundPort: 1}\nzzz: 1")
    assert found["outbond"][1] == "did you mean outbound?"
    assert found["proxy.inboundPort"][1] == "did you mean inbound_port?"
    assert found["zzz"][1].startswith("the fields here are apiVersion, kind, proxy")


@pytest.mark.parametrize("text", ["", "[]", "- 1", "5", "~", "netapply"])
def test_what_is_no_mapping_is_one_fault(text: str):
    assert set(faults(text, format="yaml")) == {"the plan"}


@pytest.mark.parametrize(
    ("text", "path"),
    [
        (HEAD + "ipv6: skip\nipv6: block", "ipv6"),
        ('{"apiVersion": "netapply/v1", "proxy": {"uids": [1], "uids": [2]}}', "proxy.uids"),
        ('apiVersion = "netapply/v1"\nipv6 = "skip"\nipv6 = "block"', "<plan>"),
    ],
)
def test_a_field_given_twice_is_a_fault(text: str, path: str):
    assert path in faults(text)


# --- documents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: &x 1", "an anchor or alias"),
        ("a: &x [1]", "an anchor or alias"),
        ("a: *x", "an anchor or alias"),
        ("&x a: 1", "a key that is not plain text"),
        ("a: {<<: {b: 1}}", "a merge key"),
        ("a: !!python/name:os.system x", "a tag"),
        ("a: ! x", "a tag"),
        ("? [a]\n: 1", "a key that is not plain text"),
        (HEAD + "---\n" + HEAD, "a second document"),
        ("a: " + "[" * 40 + "]" * 40, "deeper nesting"),
    ],
)
def test_yaml_is_plain_values_only(text: str, what: str):
    found = faults(text)
    assert [value for value, _ in found.values()] == [what]
    assert all(path.startswith("<plan>:") for path in found)


@pytest.mark.parametrize("text", ["a: [1", '{"a": ', '{"a": 1,}', "a = ", "a: *", "a: \x01", "a:\n\tb: 1"])
def test_text_that_is_not_well_formed_is_one_fault(text: str):
    ((_, accepted),) = faults(text).values()
    assert "well-formed" in accepted


def test_the_source_and_line_of_a_syntax_fault_are_told():
    assert set(faults(HEAD + "\n\nproxy: }\n", source="my.yaml")) == {"my.yaml:4"}


def test_bytes_that_are_not_utf8_are_a_fault():
    assert "UTF-8" in faults(b"\xff\xfe\x00")["<plan>"][1]


def test_a_byte_order_mark_is_skipped():
    assert load_plan(b"\xef\xbb\xbf" + HEAD.encode()) == CapturePlan()


def test_a_file_over_the_size_cap_is_refused_before_parsing():
    assert "at most 4194304 bytes" in faults(b"#" * (4 * 1024 * 1024 + 1))["<plan>"][1]
    assert load_plan(HEAD.encode(), limits=Limits(max_bytes=len(HEAD))) == CapturePlan()
    assert "bytes" in faults(HEAD, limits=Limits(max_bytes=len(HEAD) - 1))["<plan>"][1]


@pytest.mark.parametrize("file_format", ["yaml", "json", "toml"])
def test_too_many_entries_are_refused(file_format):
    entries = json.dumps([80] * 120)
    text = {
        "yaml": HEAD + f"inbound: {{ports: {{exclude: {entries}}}}}",
        "json": f'{{"apiVersion": "netapply/v1", "inbound": {{"ports": {{"exclude": {entries}}}}}}}',
        "toml": f'apiVersion = "netapply/v1"\n[inbound.ports]\nexclude = {entries}',
    }[file_format]
    assert load(text).inbound.ports.exclude == (PortRange(80, 80),)
    ((_, accepted),) = faults(text, limits=Limits(max_entries=100)).values()
    assert accepted == "a plan has at most 100 entries"


@pytest.mark.parametrize(
    "text",
    ['{"a":' * 50_000, "[" * 90_000, "a = " + "[" * 90_000, "a: " + "{a: " * 20_000, '{"a": ' + "9" * 5000 + "}",
     "a = " + "9" * 5000, ".".join(["a"] * 50_000) + " = 1", "a: \ud800", '"a' + "a" * 100_000],
    ids=["json", "toml-table", "toml", "yaml", "json-number", "toml-number", "toml-key", "surrogate", "quote"],
)  # fmt: skip
def test_hostile_text_is_refused_quickly(text: str):
    begin = time.monotonic()
    assert faults(text)
    assert time.monotonic() - begin < 2


def test_yaml_guesses_nothing_but_null_booleans_and_decimal_numbers():
    found = faults(HEAD + "inbound: {mode: off}\ncomments: yes\nproxy: {inbound_port: 0o17, outbound_port: 017}")
    assert found["inbound.mode"][0] == "'off'"
    assert found["comments"][0] == "'yes'"
    assert found["proxy.inbound_port"][0] == "'0o17'"
    assert found["proxy.outbound_port"][0] == "'017'"
    assert faults(HEAD + "inbound:\n  ports:\n    include:\n    - 1:30")["inbound.ports.include[0]"][0] == "'1:30'"


@settings(deadline=None)  # the first example imports the parsers
@given(st.binary(max_size=60) | st.text(max_size=60))
def test_any_text_loads_or_is_a_plan_error(data):
    for file_format in (None, "yaml", "json", "toml"):
        with suppress(PlanError):
            load_plan(data, format=file_format, lookups=LOOKUPS)


# --- files ---------------------------------------------------------------------------------------------------


def test_the_files_name_says_its_format():
    assert [format_of(name) for name in ("a.yml", "a.YAML", "b.json", "c.toml", "-", "d")] == [
        "yaml", "yaml", "json", "toml", None, None,
    ]  # fmt: skip


def test_standard_input_is_read_for_a_dash():
    code = "from netapply.planfile import read_plan; print(read_plan('-').ipv6)"
    done = subprocess.run(
        [sys.executable, "-c", code], input=HEAD + "ipv6: block", text=True, capture_output=True, check=True
    )
    assert done.stdout == "block\n"


@pytest.mark.parametrize("name", ["absent.yaml", ".", "nul\0byte"])
def test_a_file_that_cannot_be_read_is_a_plan_error(tmp_path: Path, name: str):
    with pytest.raises(PlanError, match="name a plan file that can be read"):
        read_plan(f"{tmp_path}/{name}")


def test_loading_imports_neither_slow_modules_nor_other_formats():
    code = (
        'import sys; from netapply.planfile import load_plan; load_plan(\'{"apiVersion": "netapply/v1"}\');'
        "slow = {'dataclasses', 'asyncio', 'pyroute2', 'structlog', 'ipaddress', 'inspect'};"
        "slow |= {'yaml', 'tomllib', 'difflib'};"
        "print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout == "[]\n", done


def test_ten_thousand_blocks_take_little_more_than_their_parse():
    text = json.dumps(
        {
            "apiVersion": "netapply/v1",
            "outbound": {"cidrs": {"exclude": [f"10.{i >> 8}.{i & 255}.0/24" for i in range(10_000)]}},
        }
    )
    times = []
    for _ in range(5):
        begin = time.thread_time()
        plan = load(text)
        times.append(time.thread_time() - begin)
    assert len(plan.outbound.cidrs.exclude) == 10_000
    assert min(times) < 0.2  # about 13 ms, 60 where coverage traces it; comparing each with each takes seconds


# --- values --------------------------------------------------------------------------------------------------


def test_ports_are_numbers_text_and_ranges_sorted_and_merged():
    plan = load(HEAD + 'inbound: {ports: {include: ["9000", 80, 8000-8100, "8050-8200", 80, 81]}}')
    assert plan.inbound.ports.include == ((80, 80), (81, 81), (8000, 8200), (9000, 9000))


@pytest.mark.parametrize(
    "port", ["0", "-1", "65536", '"08"', "1.5", "true", "null", '""', '"1-0"', "[]", "{}", '" 80"', '"٣"']
)
def test_what_is_no_port_is_refused(port: str):
    assert "inbound.ports.include[0]" in faults(HEAD + f"inbound: {{ports: {{include: [{port}]}}}}")
    assert "proxy.inbound_port" in faults(HEAD + f"proxy: {{inbound_port: {port}}}")


def test_owners_are_ids_ranges_names_and_cgroups():
    plan = load(
        HEAD
        + """
outbound:
  owners:
    include:
      uids: [2000-2999, 1000, envoy, "2500"]
      gids: [mesh]
      cgroups: [system.slice/x.service, absent.slice]
"""
    )
    assert plan.outbound.owners.include == Owners(
        (IdRange(101, 101), IdRange(1000, 1000), IdRange(2000, 2999)),
        (IdRange(202, 202),),
        (Cgroup("system.slice/x.service", 4711), Cgroup("absent.slice", 0)),
    )


@pytest.mark.parametrize("uid", ["4294967295", "-1", "nobody-here", "5-4", '"a b"', '"01"', "true", '"../x"'])
def test_what_is_no_owner_is_refused(uid: str):
    assert "outbound.owners.exclude.uids[0]" in faults(HEAD + f"outbound: {{owners: {{exclude: {{uids: [{uid}]}}}}}}")


@pytest.mark.parametrize("path", ["/abs", "a//b", "a/../b", ".", "..", "a/", "''", "a/./b", "a b", "x" * 512])
def test_what_is_no_cgroup_path_is_refused(path: str):
    text = HEAD + f"outbound: {{owners: {{exclude: {{cgroups: [{path}]}}}}}}"
    assert "outbound.owners.exclude.cgroups[0]" in faults(text)


@pytest.mark.parametrize(
    ("text", "mark"),
    [("1337", Mark(1337)), ('"1337"', Mark(1337)), ("0x539", Mark(0x539)), ("0x539/0xfff", Mark(0x539, 0xFFF)),
     ("1/1", Mark(1, 1))],
)  # fmt: skip
def test_marks_are_numbers_with_a_mask(text: str, mark: Mark):
    assert load(HEAD + f"proxy: {{mark: {text}}}").proxy.mark == mark


@pytest.mark.parametrize(
    "mark", ["0", "1/0", "0x10/0xf", "-1", "4294967296", "0x1/", "true", "1.5", "0x1ffffffff", "01"]
)
def test_marks_that_match_everything_or_nothing_are_refused(mark: str):
    assert "proxy.mark" in faults(HEAD + f"proxy: {{mark: {mark}}}")


@pytest.mark.parametrize("table", [0, 253, 254, 255, 1 << 32])
def test_the_systems_routing_tables_are_refused(table: int):
    assert "inbound.tproxy.table" in faults(HEAD + f"inbound: {{tproxy: {{table: {table}}}}}")


def test_none_switches_the_tunnel_port_and_the_log_off():
    for word in ("none", "null", "~"):
        plan = load(HEAD + f"proxy: {{tunnel_port: {word}}}\nlog: {word}")
        assert (plan.proxy.tunnel_port, plan.log) == (None, None)


def test_blocks_are_sorted_and_those_inside_others_dropped_and_noted():
    text = HEAD + "outbound: {cidrs: {include: ['fd00::/8', 10.0.0.0/8, 10.1.0.0/16, 9.9.9.9, 10.0.0.0/8]}}"
    loaded = examine_plan(text, lookups=LOOKUPS)
    assert loaded.plan.outbound.cidrs.include == blocks("9.9.9.9", "10.0.0.0/8", "fd00::/8")
    assert [entry.path for entry in loaded.redundant] == ["outbound.cidrs.include[2]", "outbound.cidrs.include[4]"]
    assert loaded.redundant[0].value == "'10.1.0.0/16'"


def test_a_block_that_ends_where_another_ends_lies_in_it():
    assert collapse(blocks("10.0.0.255", "10.0.0.0/24", "10.0.1.0", "10.0.1.0")) == blocks("10.0.0.0/24", "10.0.1.0")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("10.0.0.1/8", "10.0.0.0/8"),
        ("fd00::1/64", "fd00::/64"),
        ("::ffff:10.0.0.1", "plain IPv4"),
        ("::ffff:0:0/96", "plain IPv4"),
        ("fe80::1%eth0", "zone"),
        ("10.0.0.0/33", "0 to 32"),
        ("10.0.0.0/", "0 to 32"),
        ("10.0.0.0/08", "0 to 32"),
        ("10.0.0.0/-1", "0 to 32"),
        ("::/129", "0 to 128"),
        ("10.0.0", "such as"),
        ("010.0.0.1", "such as"),
        ("", "such as"),
        ("example.org", "such as"),
        ("1.2.3.4\0", "such as"),
        ("\ud800", "such as"),
        (5, "such as"),
        (None, "such as"),
    ],
)
def test_what_is_no_block_is_refused(text: object, says: str):
    with pytest.raises(RefusedError, match=says):
        read_cidr(text)


def test_loopback_blocks_lie_in_the_loopback():
    assert load(HEAD + "proxy: {loopback: [127.0.0.0/8]}").proxy.loopback == blocks("127.0.0.0/8")
    found = faults(HEAD + "proxy: {loopback: [10.0.0.1, 126.0.0.0/7, '::2', '::/0']}")
    assert set(found) == {f"proxy.loopback[{index}]" for index in range(4)}


@pytest.mark.parametrize("name", ["eth0", "br-1234567890ab", "veth+", "+", "eth0.100", "a@b"])
def test_interface_names(name: str):
    assert load(HEAD + f"interfaces: {{exclude: ['{name}']}}").interfaces.exclude == (name,)


@pytest.mark.parametrize(
    "name", ["", "a" * 16, "a/b", "a:b", "a b", "a+b", ".", "..", 'a"', "a++", "eth*", "é", "a\\b"]
)
def test_what_the_kernel_or_a_listing_cannot_carry_is_no_interface(name: str):
    assert "interfaces.exclude[0]" in faults(
        json.dumps({"apiVersion": "netapply/v1", "interfaces": {"exclude": [name]}})
    )


@pytest.mark.parametrize("prefix", ["", "x" * 30, 'a"', "a\n", "a\\", "é", None, 5])
def test_log_prefixes_fit_the_kernel(prefix: object):
    assert "log.prefix" in faults(json.dumps({"apiVersion": "netapply/v1", "log": {"prefix": prefix}}))


def test_a_reroute_is_a_name_or_a_mapping():
    text = HEAD + "interfaces: {reroute: [br0, {interface: vm+, include: '*', exclude: [10.0.0.0/8]}]}"
    assert load(text).interfaces.reroute == (Reroute("br0"), Reroute("vm+", "*", blocks("10.0.0.0/8")))
    assert "interfaces.reroute[0].interface" in faults(HEAD + "interfaces: {reroute: [{include: []}]}")


def test_dns_servers_come_from_resolv_conf_unless_listed():
    assert load(HEAD + "dns: {capture: servers}").dns.servers == blocks("10.0.0.53", "fd00::53")
    assert load(HEAD + "dns: {capture: servers, servers: resolv.conf}").dns.servers == blocks("10.0.0.53", "fd00::53")
    assert load(HEAD + "dns: {capture: servers, servers: [9.9.9.9]}").dns.servers == blocks("9.9.9.9")
    assert load(HEAD + "dns: {capture: all}").dns.servers == ()


def test_a_resolv_conf_without_servers_is_not_all_servers():
    assert "dns.servers" in faults(HEAD + "dns: {capture: servers}", lookups=LOOKUPS._replace(servers=lambda: ()))


def test_a_resolv_conf_that_cannot_be_read_is_one_fault():
    lookups = system_lookups(resolv_conf="/nonexistent/resolv.conf")
    assert set(faults(HEAD + "dns: {capture: servers}", lookups=lookups)) == {"dns.servers"}


def test_nothing_is_looked_up_without_need():
    lookups = Lookups(*[pytest.fail] * 4)
    assert load_plan(HEAD, lookups=lookups) == CapturePlan()


# --- contradictions ------------------------------------------------------------------------------------------

CONTRADICTORY = {
    "proxy: {uids: [0]}": "proxy.uids",
    "proxy: {gids: [0]}": "proxy.gids",
    "proxy: {uids: [], gids: []}": "proxy.uids",
    "proxy: {tunnel_port: 15006}": "proxy.tunnel_port",
    "dns: {capture: all, port: 15001}": "dns.port",
    "inbound: {ports: {include: [80, 81], exclude: [70-80]}}": "inbound.ports.include",
    "outbound: {ports: {include: [80], exclude: [80]}}": "outbound.ports.include",
    "outbound: {owners: {include: {uids: [5]}, exclude: {uids: [1-9]}}}": "outbound.owners.include.uids",
    "outbound: {owners: {include: {gids: [5]}, exclude: {gids: [5]}}}": "outbound.owners.include.gids",
    "outbound: {owners: {include: {cgroups: [a/b]}, exclude: {cgroups: [a]}}}": "outbound.owners.include.cgroups",
    "proxy: {self_calls: {uids: []}}": "proxy.self_calls",
    "outbound: {exclude_for_owners: [{protocol: tcp, ports: [1]}]}": "outbound.exclude_for_owners[0]",
    "outbound: {exclude_for_owners: [{protocol: tcp, ports: [], uids: [1]}]}": "outbound.exclude_for_owners[0].ports",
    "interfaces: {reroute: [br0, {interface: br0}]}": "interfaces.reroute[1].interface",
    "interfaces: {reroute: [lo]}": "interfaces.reroute[0].interface",
    "dns: {capture: servers, servers: []}": "dns.servers",
    "dns: {capture: all, addresses: [10.0.0.1, 10.0.0.2]}": "dns.addresses",
    "{dns: {capture: all, addresses: ['fd00::1']}, ipv6: skip}": "dns.addresses",
    "{outbound: {cidrs: {include: ['fd00::/8']}}, ipv6: skip}": "outbound.cidrs.include",
    "{interfaces: {reroute: [{interface: a, include: ['fd00::/8']}]}, ipv6: skip}": "interfaces.reroute[0].include",
    "{proxy: {mark: 1337}, inbound: {mode: tproxy}}": "inbound.tproxy.mark",
}

CONSISTENT = [
    "proxy: {uids: [0], gids: [0], allow_root: true}",
    "proxy: {uids: [], gids: [], mark: 0x1/0x1}",
    "{proxy: {uids: [], gids: []}, outbound: {cidrs: {include: []}}}",
    "{proxy: {uids: [], gids: []}, outbound: {owners: {include: {uids: [1000]}}}}",
    "dns: {capture: none, port: 15001}",
    "dns: {capture: all, port: 15001, addresses: [10.0.0.53]}",
    "inbound: {ports: {include: [8000-9000], exclude: [8080]}}",
    "outbound: {owners: {include: {uids: [1-9]}, exclude: {uids: [5]}}}",
    "outbound: {owners: {include: {cgroups: [ab]}, exclude: {cgroups: [a]}}}",
    "outbound: {owners: {exclude: {}}}",
    "proxy: {inbound_port: 15001}",
    "outbound: {owners: {include: {}}}",
    "interfaces: {exclude: [br0], reroute: [br+]}",
    "interfaces: {exclude: [br+], reroute: [br0]}",
    "{dns: {capture: servers, servers: ['fd00::1']}, ipv6: block}",
    "{dns: {capture: servers, servers: ['fd00::1']}, ipv6: skip}",
    "{outbound: {cidrs: {include: []}}, ipv6: skip}",
    "dns: {capture: all, addresses: [10.0.0.1, 'fd00::1']}",
    "{proxy: {mark: 1337}, inbound: {mode: redirect}}",
]


def _document(text: str) -> str:
    return text.replace("{", "{apiVersion: netapply/v1, ", 1) if text.startswith("{") else HEAD + text


@pytest.mark.parametrize("text", CONTRADICTORY)
def test_contradictions_are_faults(text: str):
    assert set(faults(_document(text), format="yaml")) == {CONTRADICTORY[text]}


@pytest.mark.parametrize("text", CONSISTENT)
def test_what_is_merely_unusual_loads(text: str):
    assert load(_document(text), format="yaml")


def test_a_field_with_a_fault_of_its_own_contradicts_nothing():
    assert set(faults(HEAD + "proxy: {outbound_port: none, tunnel_port: 15006}")) == {"proxy.outbound_port"}
    assert set(faults(HEAD + "outbound: 5\nproxy: {uids: [], gids: []}")) == {"outbound"}
    nobody = "outbound: {owners: {exclude: {uids: [nobody-here]}}}"
    assert set(faults(HEAD + "proxy: {uids: [], gids: []}\n" + nobody)) == {"outbound.owners.exclude.uids[0]"}


def test_the_proxys_ids_keep_their_order_and_are_said_once():
    """The first uid has rules of its own in Istio's layouts."""
    proxy = load(HEAD + "proxy: {uids: [2000, 1337, 2000], gids: [7, 5]}").proxy
    assert (proxy.uids, proxy.gids) == ((2000, 1337), (7, 5))


# --- fingerprints and spans ----------------------------------------------------------------------------------


def test_plans_that_mean_the_same_have_the_same_fingerprint():
    one = load(HEAD + "outbound: {cidrs: {exclude: [10.0.0.0/8, 10.1.0.0/16]}, owners: {exclude: {uids: [envoy]}}}")
    two = load(HEAD + "outbound: {owners: {exclude: {uids: [101]}}, cidrs: {exclude: [10.0.0.0/8]}}\nkind: CapturePlan")
    assert fingerprint(one) == fingerprint(two)
    assert len(fingerprint(one)) == 16
    assert fingerprint(one) != fingerprint(CapturePlan())


def test_a_cgroup_made_anew_changes_the_fingerprint():
    text = HEAD + "outbound: {owners: {exclude: {cgroups: [a.slice]}}}"
    marks = {
        fingerprint(load_plan(text, lookups=LOOKUPS._replace(cgroup=lambda _, inode=inode: inode))) for inode in (7, 8)
    }
    assert len(marks) == 2


cidrs = st.one_of(
    *[
        st.builds(
            lambda number, prefix, size=size: Cidr(
                (number >> (size * 8 - prefix) << (size * 8 - prefix)).to_bytes(size, "big"), prefix
            ),
            st.integers(0, (1 << size * 8) - 1),
            st.integers(0, size * 8),
        )
        for size in (4, 16)
    ]
)


@given(st.lists(cidrs))
def test_collapsed_blocks_hold_the_same_addresses_once(blocks: list[Cidr]):
    kept = collapse(blocks)
    spans = [span_of(cidr) for cidr in kept]
    assert set(kept) <= set(blocks)
    assert all(one.last < two.first for one, two in pairwise(spans))
    assert all(any(first <= span_of(b).first and span_of(b).last <= last for first, last in spans) for b in blocks)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)).map(lambda pair: PortRange(pair[0], sum(pair)))))
def test_merged_ranges_hold_the_same_ports_once(ranges: list[PortRange]):
    merged = merge(ranges)
    numbers = {n for first, last in ranges for n in range(first, last + 1)}
    assert [n for first, last in merged for n in range(first, last + 1)] == sorted(numbers)
    spans = Spans(ranges)
    for first in range(45):
        for last in (first, first + 3):
            wanted = set(range(first, last + 1))
            assert spans.cover(first, last) == (wanted <= numbers)
            assert spans.touch(first, last) == bool(wanted & numbers)


@given(cidrs)
def test_a_block_is_read_back_as_it_is_written(cidr: Cidr):
    try:
        assert read_cidr(write_cidr(cidr)) == cidr
    except RefusedError:
        assert cidr.packed.startswith(b"\0" * 10 + b"\xff\xff")


# --- the machine ---------------------------------------------------------------------------------------------


def test_resolv_conf_is_read_for_its_name_servers(tmp_path: Path):
    path = tmp_path / "resolv.conf"
    path.write_text("# x\nsearch a\nnameserver 10.0.0.1\nnameserver fe80::1%eth0 \nnameserver\n nameserver 10.0.0.1\n")
    assert read_servers(str(path)) == ("10.0.0.1", "fe80::1", "10.0.0.1")


def test_names_are_looked_up_in_the_systems_databases():
    system = system_lookups()
    assert (system.uid("root"), system.gid("root")) == (0, 0)
    assert (system.uid("no-such-user"), system.gid("no-such-group")) == (None, None)


def test_a_cgroup_is_known_by_its_directory(tmp_path: Path):
    tmp_path.joinpath("a.slice").mkdir()
    assert cgroup_id("a.slice", str(tmp_path)) == tmp_path.joinpath("a.slice").stat().st_ino
    assert system_lookups(cgroup_root=str(tmp_path)).cgroup("b.slice") == 0
