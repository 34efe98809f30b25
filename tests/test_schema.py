"""The field table: the loader, the writer and the JSON Schema made from it agree."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import get_type_hints

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netapply import kinds
from netapply import plan as plan_types
from netapply.documents import Format
from netapply.errors import Fault, PlanError
from netapply.fields import FAULTY, Check, Choice, Either, Flag, Group, Groups, Kind, Named, Scalar, Short, Values
from netapply.lookups import Lookups
from netapply.plan import CapturePlan
from netapply.planfile import dump_plan, fingerprint, load_plan
from netapply.schema import PLAN, json_schema, walk_fields

PLANS = sorted(Path(__file__).parent.joinpath("plans").iterdir())
LOOKUPS = Lookups({"envoy": 101}.get, {"mesh": 202}.get, lambda: ("10.0.0.53",), len)
VALIDATOR = jsonschema.Draft202012Validator(json_schema())
HEAD = {"apiVersion": "netapply/v1"}

ports = st.integers(1, 65535)
port_ranges = ports | ports.map(str) | st.builds(lambda a, b: f"{min(a, b)}-{max(a, b)}", ports, ports)
ids = st.integers(0, 2**32 - 2)
id_ranges = ids | ids.map(str) | st.builds(lambda a, b: f"{min(a, b)}-{max(a, b)}", ids, ids)
ip6_addresses = st.ip_addresses(v=6).filter(lambda address: address.ipv4_mapped is None)
addresses = st.ip_addresses(v=4).map(str) | ip6_addresses.map(str)
names = st.from_regex(r"[a-z][a-z0-9]{0,6}\+?", fullmatch=True)
blocks = addresses | st.sampled_from(["10.0.0.0/8", "10.1.0.0/16", "fd00::/8", "::/0", "0.0.0.0/0", "127.0.0.1"])
GOOD: list[tuple[Scalar | Named, st.SearchStrategy]] = [
    (kinds.PORT, ports | ports.map(str)),
    (kinds.PORT_RANGE, port_ranges),
    (kinds.UID, ids | st.just("envoy")),
    (kinds.GID, ids | st.just("mesh")),
    (kinds.UID_RANGE, id_ranges | st.just("envoy")),
    (kinds.GID_RANGE, id_ranges | st.just("mesh")),
    (kinds.CGROUP, st.sampled_from(["a.slice", "a.slice/b.service", "..c/d"])),
    (kinds.MARK, st.sampled_from([1337, "0x539", "0x539/0xfff", "0x1000/0xf000", 1])),
    (kinds.TABLE, st.integers(1, 252) | st.integers(256, 2**32 - 1)),
    (kinds.CIDR, blocks),
    (kinds.LOOPBACK, st.sampled_from(["127.0.0.1", "127.0.0.0/8", "::1"])),
    (kinds.ADDRESS, addresses),
    (kinds.INTERFACE, names),
    (kinds.LOG_PREFIX, st.sampled_from(["x", "netapply: "])),
    (kinds.RATE, st.integers(1, 600)),
]
junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["*", "none", "all"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def documents(kind: Kind, noise: st.SearchStrategy | None = None) -> st.SearchStrategy:
    """Values as files write them; with `noise` anything may stand anywhere."""
    match kind:
        case Scalar() | Named():
            good = next(strategy for scalar, strategy in GOOD if scalar is kind)
        case Choice(words):
            good = st.sampled_from(words)
        case Flag():
            good = st.booleans()
        case Values(item=item) | Groups(item=item):
            good = st.lists(documents(item, noise), max_size=3)
        case Either(words=words, kind=inner):
            good = st.sampled_from(list(words)) | documents(inner, noise)
        case Short(group=inner, field=field):
            good = documents(inner, noise) | documents(inner.fields[field].kind, noise)
        case Group():
            good = _group_documents(kind, noise)
        case _:
            raise AssertionError(kind)
    return good if noise is None else st.one_of(good, good, good, noise)


def _group_documents(group: Group, noise: st.SearchStrategy | None) -> st.SearchStrategy:
    entries = {name: documents(field.kind, noise) for name, field in group.fields.items()}
    needed = {name: entries.pop(name) for name in list(entries) if name not in group.defaults}
    return st.fixed_dictionaries(needed, optional=entries)


def parse(document: object) -> tuple[CapturePlan, Check]:
    check = Check(LOOKUPS)
    return PLAN.parse(document, "", check), check


def attempt(text: str, file_format: Format) -> tuple[tuple[Fault, ...], CapturePlan]:
    try:
        return (), load_plan(text, format=file_format, lookups=LOOKUPS)
    except PlanError as error:
        return error.faults or (Fault("", "", ""),), CapturePlan()


relaxed = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], deadline=None)


@relaxed
@given(documents(PLAN))
def test_fields_that_are_right_are_read_and_admitted_by_the_schema(document: dict):
    plan, check = parse(document)
    assert not check.faults
    VALIDATOR.validate(document)
    assert plan is not FAULTY


@relaxed
@given(documents(PLAN))
def test_a_plan_written_and_read_is_the_same_plan(document: dict):
    plan, _ = parse(document)
    written = dump_plan(plan)
    again, check = parse(json.loads(json.dumps(written)))
    assert not check.faults
    assert again == plan
    assert dump_plan(again) == written
    assert fingerprint(again) == fingerprint(plan)
    VALIDATOR.validate(written)


@relaxed
@given(documents(PLAN, junk), st.sampled_from(["json", "yaml"]))
def test_any_document_loads_or_is_a_plan_error_and_what_loads_the_schema_admits(document: object, file_format):
    text = json.dumps(document) if file_format == "json" else yaml.safe_dump(document, default_flow_style=False)
    faults, plan = attempt(text, file_format)
    assert all(fault.path and fault.accepted and len(fault.value) < 80 for fault in faults)
    if not faults:
        VALIDATOR.validate(document)
        assert attempt(json.dumps(dump_plan(plan)), "json") == ((), plan)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.name)
def test_the_examples_are_valid_by_the_schema(path: Path):
    text = path.read_text()
    document = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    VALIDATOR.validate(document)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"apiVersion": "netapply/v2"},
        {**HEAD, "unknown": 1},
        {**HEAD, "proxy": {"outbound_port": 0}},
        {**HEAD, "proxy": {"mark": "x"}},
        {**HEAD, "outbound": {"cidrs": {"include": ["example.org"]}}},
        {**HEAD, "interfaces": {"reroute": [{"include": []}]}},
        {**HEAD, "interfaces": {"exclude": ["a" * 16]}},
        {**HEAD, "ipv6": "maybe"},
        {**HEAD, "log": {"rate": 5}},
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(document: dict):
    assert not VALIDATOR.is_valid(document)
    with pytest.raises(PlanError):
        load_plan(json.dumps(document), lookups=LOOKUPS)


def test_the_schema_is_a_schema_with_an_id_texts_and_defaults():
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == "urn:netapply:v1:capture-plan"
    assert schema["required"] == ["apiVersion"]
    assert schema["properties"]["ipv6"]["default"] == "capture"
    assert schema["properties"]["dns"]["properties"]["servers"]["default"] == "resolv.conf"
    assert json.loads(json.dumps(schema)) == schema


def test_the_schemas_defaults_are_the_plans():
    document = dict(HEAD)
    for name, part in json_schema()["properties"].items():
        group = part.get("properties")
        document[name] = (
            {key: value["default"] for key, value in group.items() if "default" in value} if group else None
        )
        if not group:
            document[name] = part.get("default", HEAD.get(name))
    assert load_plan(json.dumps(document), lookups=LOOKUPS) == CapturePlan()


def test_every_field_says_what_it_means():
    fields = list(walk_fields())
    assert len({each.path for each in fields}) == len(fields) > 50
    assert all(each.field.about for each in fields)


def test_every_field_of_the_plan_can_be_written_in_a_file():
    paths = {each.path for each in walk_fields()}

    def walk(of: type, at: str):
        for name in get_type_hints(of):
            yield (path := f"{at}{name}")
            nested = of._field_defaults.get(name)
            if hasattr(nested, "_fields") and path != "inbound.tproxy.mark":
                yield from walk(type(nested), f"{path}.")

    assert set(walk(plan_types.CapturePlan, "")) <= paths
