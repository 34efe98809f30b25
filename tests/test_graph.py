"""`netapply graph`: what is drawn is what `explain` says, and both forms can be read."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

import netapply
from netapply.backend import BUILT_IN, find_backend
from netapply.cli import main
from netapply.compiler import compile_plan
from netapply.drawing import Picture, draw, graphviz, to_dot, to_mermaid
from netapply.drawing.picture import MET
from netapply.errors import UnsupportedError
from netapply.explain import explain
from netapply.plan import CapturePlan, Dns, Inbound, Outbound
from netapply.ruleset import FAMILIES, Accept, Base, Chain, Cidr, Rule, Ruleset, Table
from netapply.traffic import cast_of_plan, legs
from tests.netns import Netns

DOCS = Path(__file__).resolve().parents[1] / "docs"
GOLDEN = Path(__file__).parent / "data" / "graph.mmd"
PLANS = {
    "sidecar": CapturePlan(),
    "dns": CapturePlan(dns=Dns(capture="all")),
    "tproxy": CapturePlan(inbound=Inbound(mode="tproxy")),
}
SVG = "{http://www.w3.org/2000/svg}"


def texts_of(svg: str) -> Counter[str]:
    """What a picture says, wherever it stands; the spaces of our own aside."""
    found = (text.text or "" for text in ET.fromstring(svg).iter(f"{SVG}text"))  # our own
    return Counter(text.replace("\xa0", " ").strip() for text in found)


def ids_of(picture: Picture) -> set[str]:
    return {box.id for box in picture.boxes} | {end.id for end in picture.ends}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("backend", BUILT_IN)
def test_of_each_connection_the_rules_that_matched_and_the_one_that_decided_stand_out(backend: str, name: str) -> None:
    dialect = find_backend(backend)
    plan = PLANS[name]
    rules = compile_plan(plan, dialect.dialect)
    for leg in legs(cast_of_plan(plan)):
        seen = explain(dialect, rules, leg.flow, plan)
        picture = draw(dialect, rules, leg.flow.family, seen, plan)
        rows = [(box.title, row) for box in picture.boxes for row in box.rows]
        decided = [(title, row.position) for title, row in rows if row.fate == "decided"]
        assert decided == [(f"{at.table.split()[1]} {at.chain}", at.position) for at in seen.decided[-1:]]
        met = {(*step.place.table.split()[1:], *step.place[1:3]) for sight in seen.sights for step in sight.steps}
        drawn = {(*title.split(" "), row.position) for title, row in rows if row.fate in MET}
        assert drawn == met
        (reached,) = (end for end in picture.ends if end.reached)
        kinds = {"bypass": "addressed", "drop": "dropped"}
        assert reached.kind == kinds.get(seen.decision.verdict, "taken")
        assert {row.goes for _, row in rows if row.goes} <= ids_of(picture)


@pytest.mark.parametrize("backend", BUILT_IN)
@pytest.mark.parametrize("family", FAMILIES)
def test_svg_and_mermaid_have_every_rule_with_its_plan_path(backend: str, family: netapply.ruleset.Family) -> None:
    dialect = find_backend(backend)
    picture = draw(dialect, compile_plan(PLANS["dns"], dialect.dialect), family)
    svg, mermaid = graphviz.to_svg(to_dot(picture)), to_mermaid(picture)
    said = texts_of(svg)
    for box in picture.boxes:
        for row in box.rows:
            assert said[row.then]
            assert said[row.path]
            assert f"{row.then}<br/>({row.path})" in mermaid.replace("#34;", '"')


def test_the_mermaid_text_of_a_flow(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"apiVersion": "netapply/v1", "inbound": {"ports": {"exclude": [15020]}}}')
    assert main(["graph", str(plan), "--backend", "nftables", "--flow", "remote to agent", "--format", "mermaid"]) == 0
    assert capsys.readouterr().out == GOLDEN.read_text()


def test_the_rules_that_stand_in_a_namespace_are_drawn(netns: Netns, capsys: pytest.CaptureFixture[str]) -> None:
    with netapply.open(netns.path) as capture:
        capture.apply(CapturePlan(), backend="iptables-legacy")
    assert main(["graph", "-N", netns.path, "--inbound", "--to", ":8080", "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format"] == "svg"
    assert texts_of(told["picture"])["-j REDIRECT --to-ports 15006"] == 3
    assert "#fbc78e" in told["picture"]


def test_a_long_run_of_rules_alike_is_drawn_by_its_ends() -> None:
    blocks = tuple(Cidr(bytes((10, 0, 2 * low, 0)), 24) for low in range(30))
    dialect = find_backend("iptables-legacy")
    plan = CapturePlan(outbound=Outbound(cidrs=Outbound().cidrs._replace(exclude=blocks)))
    rules = compile_plan(plan, dialect.dialect)
    picture = draw(dialect, rules, "ip")
    assert sum(len(box.rows) for box in picture.boxes) < 40
    assert any(re.fullmatch(r"… 2\d more of the kind", row.when) for box in picture.boxes for row in box.rows)


@given(name=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20))
def test_whatever_a_chain_is_called_the_picture_can_be_read(name: str) -> None:
    chains = (Chain("nat-output", (Rule((), Accept()),), Base("nat", "output", 0)), Chain(name, (Rule((), Accept()),)))
    picture = draw(find_backend("nftables"), Ruleset((Table("inet", "netapply", chains),)), "ip")
    mermaid = to_mermaid(picture)
    assert "<script" not in mermaid.lower()
    assert mermaid.count('"') % 2 == 0
    printable = "".join(each for each in name if each.isprintable())
    if printable == name and name.strip() == name and "  " not in name:
        assert texts_of(graphviz.to_svg(to_dot(picture)))[f"netapply {name}"] == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--flow", "7"], "there are: remote to app (1)"),
        (["--flow", "2", "--to", ":80"], "leave out --from"),
        (["--to", "10.0.0.1:80", "--family", "ip6"], "do not meet"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text('{"apiVersion": "netapply/v1"}')
    assert main(["graph", str(plan), *words]) == 1
    assert said in capsys.readouterr().err


def test_without_graphviz_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphviz, "_LIBRARIES", (("libgvc.so.0", "libcgraph.so.0"),))
    with pytest.raises(UnsupportedError, match="libgvc is not here"):
        graphviz.to_svg("digraph {}")


@pytest.mark.parametrize("number", ["1", "2", "3", "4", "5", "6"])
def test_the_pictures_of_the_docs_are_those_of_today(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`make pictures` draws them anew. Where things stand is a matter of the Graphviz that drew them."""
    plan = DOCS / "pictures" / "capture.yaml"
    assert main(["graph", str(plan), "--backend", "nftables", "--flow", number]) == 0
    assert texts_of(capsys.readouterr().out) == texts_of((DOCS / "pictures" / f"type-{number}.svg").read_text())
