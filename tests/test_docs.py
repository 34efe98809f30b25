"""What README and docs say, held against the code: examples, commands, fields, the order of decisions, links."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from netapply import decide
from netapply.agent.planfiles import parse_plan_file
from netapply.backend import BUILT_IN, ENTRY_POINTS, Backend
from netapply.cli.arguments import build_parser
from netapply.documents import LIMITS, read_document
from netapply.errors import PlanError
from netapply.lookups import Lookups
from netapply.plan import API_VERSION, CapturePlan
from netapply.planfile import load_plan
from netapply.schema import json_schema
from tests.test_lint import CASES

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLAN_DOC, DESIGN_DOC, BACKEND_DOC = (ROOT / "docs" / f"{name}.md" for name in ("plan", "design", "writing-a-backend"))
LOOKUPS = Lookups({"envoy": 101}.get, {"mesh": 202}.get, lambda: ("10.0.0.53",), len)

each_document = pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))


class Block(NamedTuple):
    """A fenced block: where, the words after the fence, and what it holds."""

    path: Path
    line: int
    words: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks(path: Path) -> Iterator[Block]:
    """The fenced blocks of a document."""
    text = path.read_text()
    for found in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        yield Block(path, text.count("\n", 0, found.start()) + 1, tuple(found[1].split()), found[2])


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```(.*)\n((?:.*\n)*?)```$", "", path.read_text(), flags=re.MULTILINE)


def spans(path: Path) -> tuple[str, ...]:
    """What stands between backticks in a document's prose, in order."""
    return spans_of(prose(path))


def spans_of(text: str) -> tuple[str, ...]:
    """The same of a piece of prose."""
    return tuple(re.findall(r"`([^`\n]+)`", text))


def section(path: Path, title: str, *, deep: bool = False) -> str:
    """What stands below a heading, up to the next one; `deep`: up to the next one of its level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n", path.read_text(), re.MULTILINE)
    assert found, f"{path.name} has no section {title}"
    rest = path.read_text()[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} " if deep else r"^#+ ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def rows(text: str) -> Iterator[list[str]]:
    """The cells of each table row."""
    for line in text.splitlines():
        if line.startswith("|"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


PLANS = [block for path in DOCS for block in blocks(path) if block.words[:1] == ("yaml",)]


@pytest.mark.parametrize("block", [each for each in PLANS if "agent" in each.words], ids=str)
def test_every_plan_file_of_the_agent_that_is_shown_is_one(block: Block) -> None:
    document = read_document(block.text.encode(), "yaml", LIMITS, str(block))
    assert parse_plan_file("shown", document).selectors


@pytest.mark.parametrize("block", [each for each in PLANS if not {"faulty", "agent"} & {*each.words}], ids=str)
def test_every_plan_that_is_shown_loads(block: Block) -> None:
    load_plan(block.text, format="yaml", lookups=LOOKUPS)


@pytest.mark.parametrize("block", [each for each in PLANS if "faulty" in each.words], ids=str)
def test_every_faulty_plan_is_refused_with_the_faults_that_are_shown(block: Block) -> None:
    with pytest.raises(PlanError) as raised:
        load_plan(block.text, format="yaml", lookups=LOOKUPS)
    shown = [each.text for each in blocks(block.path) if each.line > block.line]
    assert shown[0].splitlines() == [str(fault) for fault in raised.value.faults]


def test_there_are_plans_of_both_kinds() -> None:
    assert sum("faulty" not in block.words for block in PLANS) >= 8
    assert any("faulty" in block.words for block in PLANS)


# --- the command ---------------------------------------------------------------------------------------------


def _commands(parser: argparse.ArgumentParser, said: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command, and every command of a command: `import` and `import istio`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, of in action.choices.items():
                yield said + name, of
                yield from _commands(of, f"{said}{name} ")


COMMANDS = dict(_commands(build_parser()))


def _command_of(words: list[str]) -> str:
    """The longest that the words name."""
    said = [word for word in words[1:] if not word.startswith("-")]
    known = [" ".join(said[:count]) for count in range(len(said), 0, -1)]
    return next((command for command in known if command in COMMANDS), "")


def shown_commands(path: Path) -> Iterator[list[str]]:
    """Every `netapply …` of a document as words: in its prose, and behind a prompt."""
    for text in spans(path):
        if text.startswith("netapply "):
            yield shlex.split(text)
    for block in blocks(path):
        if block.words == ("console",):
            for line in re.findall(r"^# (netapply .*)$", block.text, re.MULTILINE):
                yield shlex.split(line.partition(";")[0].partition("|")[0])


@each_document
def test_every_command_that_is_shown_exists_with_its_options(path: Path) -> None:
    for words in shown_commands(path):
        command = _command_of(words)
        assert command, words
        known = COMMANDS[command]._option_string_actions
        own = words[1 : words.index("--")] if "--" in words else words[1:]  # what follows is another command's
        assert all(word in known for word in own if word.startswith("-") and word != "-"), words


@each_document
def test_every_command_behind_a_prompt_can_be_parsed(path: Path) -> None:
    for block in blocks(path):
        if block.words == ("console",):
            for line in re.findall(r"^# netapply (.*)$", block.text, re.MULTILINE):
                build_parser().parse_args(shlex.split(line.partition(";")[0], comments=True))


@each_document
def test_every_option_that_is_named_is_one_of_a_command(path: Path) -> None:
    known = {option for command in COMMANDS.values() for option in command._option_string_actions}
    for text in spans(path):
        if text.startswith("--"):
            assert text.split()[0] in known, text


def test_the_readme_names_every_command() -> None:
    named = {_command_of(["netapply", *text.split()]) for text in spans(ROOT / "README.md")}
    assert {command for command in COMMANDS if not any(other.startswith(f"{command} ") for other in COMMANDS)} <= named


# --- fields --------------------------------------------------------------------------------------------------


class Property(NamedTuple):
    """A field by its path. `default` is as the schema writes it; a required one has none."""

    path: str
    required: bool
    default: Any


def properties(shape: dict[str, Any], at: str = "") -> Iterator[Property]:
    """Every field of the schema; of a group that can be written in no other way, what is in it alone."""
    for name, part in shape.get("properties", {}).items():
        path = f"{at}.{name}" if at else name
        if "properties" not in part:
            yield Property(path, name in shape.get("required", ()), part.get("default"))
        if path != "for_ipv6":  # its groups are those of the plan
            yield from properties(part, path)
    for other in shape.get("anyOf", ()):
        yield from properties(other, at)
    if "items" in shape:
        yield from properties(shape["items"], f"{at}[]")


FIELDS = {each.path: each for each in properties(json_schema())}


def shown_defaults() -> dict[str, str]:
    """Fields of the tables whose second column is Default, and what stands there."""
    found: dict[str, str] = {}
    head: list[str] = []
    for cells in rows(section(PLAN_DOC, "Fields", deep=True)):
        if cells[0][0] not in "`-":
            head = cells
        elif cells[0].startswith("`") and head[:2] == ["Field", "Default"]:
            found[cells[0].strip("`")] = cells[1].strip("`")
    return found


DEFAULTS = shown_defaults()
OWNERS = ("uids", "gids", "cgroups")  # of owners, which have a table of their own


def _value(text: str) -> Any:
    return read_document(f"value: {text}", "yaml", LIMITS, "a default")["value"]


def test_the_schema_is_walked_to_its_leaves() -> None:
    deep = {"outbound.exclude_for_owners[].uids", "interfaces.reroute[].interface", "log.rate", "proxy.self_calls.gids"}
    assert deep | {"apiVersion"} <= set(FIELDS)
    assert len(FIELDS) > 50


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_named_in_the_plans_document(field: str) -> None:
    assert field in spans(PLAN_DOC)


def test_every_field_has_a_row_with_its_default_and_there_are_no_others() -> None:
    owners = {path for path in FIELDS if path.endswith(OWNERS) and not path.startswith("proxy.uids")} - {"proxy.gids"}
    assert set(DEFAULTS) == set(FIELDS) - owners
    assert {path for path, default in DEFAULTS.items() if default == "required"} == {
        path for path in DEFAULTS if FIELDS[path].required
    }


def test_the_defaults_that_are_shown_are_those_of_the_plan() -> None:
    """All of them in one file are the plan of an empty file."""
    document: dict[str, Any] = {"apiVersion": API_VERSION}
    for path, default in DEFAULTS.items():
        *groups, name = path.split(".")
        if default != "required" and "[]" not in path and groups != ["log"]:
            at = document
            for group in groups:
                at = at.setdefault(group, {})
            at[name] = _value(default)
    assert load_plan(json.dumps(document), lookups=LOOKUPS) == CapturePlan()


def test_the_defaults_inside_of_lists_and_of_log_are_those_of_the_schema() -> None:
    inner = [path for path in DEFAULTS if "[]" in path or path.startswith("log.")]
    shown = {path: _value(DEFAULTS[path]) for path in inner if DEFAULTS[path] != "required"}
    assert shown == {path: FIELDS[path].default for path in shown}
    assert len(shown) == 3


def test_the_options_of_meshes_are_listed_for_every_field() -> None:
    """The parts of entries and of log apart, and owners as a whole."""
    title = "Where the options of your mesh are"
    listed = [cells[0].strip("`") for cells in rows(section(PLAN_DOC, title)) if cells[0].startswith("`")]
    parts = {path for path in DEFAULTS if "[]" in path or path.startswith("log.")}
    assert set(listed) == set(DEFAULTS) - parts - {"apiVersion", "kind"} | {"outbound.owners.exclude"}
    assert len(listed) == len(set(listed))


def test_every_doubt_has_a_row() -> None:
    """Each path that a rule of lint warns of, as its own tests have them."""
    shown = spans_of(section(PLAN_DOC, "What is doubted"))
    for rule, cases in CASES.items():
        for _, paths in cases:
            assert all(path.startswith(shown) for path in paths), (rule, paths)


# --- the order of decisions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["outbound", "inbound"])
def test_decisions_are_listed_in_the_order_in_which_they_are_taken(direction: str) -> None:
    """Against the paths of `decide`, each once; what is said of DNS is in a function of its own."""
    source = inspect.getsource(getattr(decide, f"_{direction}"))
    taken = list(dict.fromkeys(re.findall(r'path ?= ?f?"([a-z_.]+)', source)))
    listed = re.findall(r"^\d+\. `([a-z_.]+)`", section(PLAN_DOC, direction.capitalize()), re.MULTILINE)
    assert [path for path in listed if path != "dns.capture"] == taken


# --- names and links -----------------------------------------------------------------------------------------


@each_document
def test_every_file_that_is_named_exists(path: Path) -> None:
    for text in [*spans(path), *(block.text for block in blocks(path) if block.words == ("text",))]:
        for name in re.findall(r"\b(?:netapply|backends|tests|docs)/[\w./-]*", text.replace(API_VERSION, "")):
            assert (ROOT / name).exists(), name


@each_document
def test_every_name_of_the_library_exists(path: Path) -> None:
    for text in [*spans(path), *(block.text for block in blocks(path) if block.words == ("python",))]:
        for name in re.findall(r"\bnetapply(?:\.[A-Za-z_]\w*)+", text):
            if name != "netapply.backends":  # the group of entry points
                assert _resolves(name), name


def _resolves(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ImportError:
        return bool(module) and hasattr(importlib.import_module(module), attribute)
    return True


@each_document
def test_every_relative_link_leads_to_a_file_and_heading(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            there = (path.parent / name) if name else path
            assert there.exists(), target
            assert not anchor or anchor in _anchors(there), target


def _anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


def test_the_built_in_backends_are_registered_as_the_document_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][ENTRY_POINTS] == BUILT_IN


def test_the_members_of_a_backend_are_those_of_the_document() -> None:
    shown = [cells[0] for cells in rows(section(BACKEND_DOC, "What it is")) if cells[0].startswith("`")]
    members = [name for name in vars(Backend) if not name.startswith("_")]
    assert [re.sub(r"\(.*", "", name.strip("`")) for name in shown] == members


def test_the_places_that_the_type_checker_names_are_those_of_the_document() -> None:
    """Every file that ends a match of Match or Statement in assert_never."""
    closing = {
        str(file.relative_to(ROOT))
        for folder in ("netapply", "backends")
        for file in (ROOT / folder).rglob("*.py")
        if re.search(r"assert_never\((match|statement)\)", file.read_text())
    }
    step = re.search(r"^2\. `make types`.*?(?=^3\.)", DESIGN_DOC.read_text(), re.MULTILINE | re.DOTALL)
    assert step
    assert set(re.findall(r"`([\w/]+\.py)`", step[0])) == closing
