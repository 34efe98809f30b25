"""A picture in DOT, the language of Graphviz (https://graphviz.org/doc/info/lang.html). Pure."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from textwrap import wrap

from netapply.drawing.picture import ADDRESSED, SOURCES, TAKEN, Box, End, Picture, Row

_SANS, _MONO = "sans-serif", "monospace"
_WIDTH = 60  # characters of a rule in a line
_ROOM = "&#160;" * 3  # a viewer's font may be a little wider than the one that was measured
_HOOK, _CHAIN, _LINE, _PALE, _WAY = "#3b4a6b", "#55617a", "#cbd2dd", "#9aa4b5", "#d9680f"
_INK = "#1f2937"
_ROWS = {"": ("#ffffff", _INK), "unmet": ("#ffffff", _PALE), "passed": ("#ffffff", _INK), "matched": ("#fff1e3", _INK),
         "decided": ("#fbc78e", _INK)}  # fmt: skip
_ENDS = {"taken": ("#e7eafc", "#4452b8"), "addressed": ("#e3f5e9", "#2b8a57"), "dropped": ("#fde5e5", "#c03a3a")}


def to_dot(picture: Picture) -> str:
    """The picture, from left to right: who sends, hooks with their base chains, chains, who gets it."""
    return "\n".join(("digraph netapply {", *(f"  {line}" for line in _lines(picture)), "}", ""))


def _lines(picture: Picture) -> Iterator[str]:
    yield "rankdir=LR; nodesep=0.3; ranksep=0.6; pad=0.3; bgcolor=white; outputorder=edgesfirst;"
    yield f'fontname="{_SANS}"; fontsize=15; fontcolor="{_INK}"; labelloc=t; labeljust=l;'
    yield f"label=<{_caption(picture)}>;"
    yield f'node [shape=plain, fontname="{_SANS}", fontsize=11, fontcolor="{_INK}"];'
    yield f'edge [color="{_PALE}", fontname="{_SANS}", fontsize=10, fontcolor="{_PALE}", arrowsize=0.7];'
    for hook in picture.hooks:
        yield f"hook_{hook} [label=<{_hook(hook, [box for box in picture.boxes if box.hook == hook])}>];"
        if hook in SOURCES:
            style = f'shape=box, style="rounded", color="{_PALE}", margin="0.15,0.1"'
            yield f'from_{hook} [{style}, label="{SOURCES[hook]}"];'
            yield f"from_{hook} -> hook_{hook}:title:w{_way(taken=hook == picture.begins)};"
    yield f"{{ rank=same; {' '.join(f'hook_{hook}' for hook in picture.hooks)} }}"
    for box in (box for box in picture.boxes if not box.hook):
        yield f"{box.id} [label=<{_chain(box)}>];"
    yield f"{{ rank=sink; {' '.join(end.id for end in picture.ends)} }}"
    for end in picture.ends:
        yield _end(end)
    yield from _edges(picture)


def _caption(picture: Picture) -> str:
    said = (
        f'<BR ALIGN="LEFT"/><FONT COLOR="{_WAY}" POINT-SIZE="12">{escape(picture.said)}</FONT>' if picture.said else ""
    )
    return f'<B>{escape(picture.title)}</B>{said}<BR ALIGN="LEFT"/> <BR ALIGN="LEFT"/>'


def _hook(hook: str, boxes: list[Box]) -> str:
    rows = "".join(f"{_head(box.title, box.about, _CHAIN)}{''.join(map(_row, _numbered(box)))}" for box in boxes)
    head = f'<TR><TD PORT="title" COLSPAN="3" BGCOLOR="{_HOOK}"><FONT COLOR="white"><B>hook {hook}</B></FONT></TD></TR>'
    return _table(head + rows)


def _chain(box: Box) -> str:
    return _table(_head(box.title, "", _CHAIN) + "".join(map(_row, _numbered(box))))


def _table(rows: str) -> str:
    return f'<TABLE BORDER="0" CELLBORDER="1" CELLSPACING="0" CELLPADDING="5" COLOR="{_LINE}">{rows}</TABLE>'


def _head(title: str, about: str, colour: str) -> str:
    more = f'  <FONT POINT-SIZE="9">{escape(about)}</FONT>' if about else ""
    text = f'<FONT COLOR="white"><B>{escape(title)}</B>{more}</FONT>'
    return f'<TR><TD PORT="title" COLSPAN="3" ALIGN="LEFT" BGCOLOR="{colour}">{text}</TD></TR>'


def _numbered(box: Box) -> Iterator[tuple[str, Row]]:
    return ((_port(box, row), row) for row in box.rows)


def _port(box: Box, row: Row) -> str:
    return f"{box.id}_{row.position}"


def _row(numbered: tuple[str, Row]) -> str:
    port, row = numbered
    ground, ink = _ROWS[row.fate]
    lines = [*wrap(row.when, _WIDTH, break_long_words=False, break_on_hyphens=False), *([row.then] if row.then else [])]
    lines = [f"{escape(line)}{_ROOM}" for line in lines]
    head, tail = "".join(f'{line}<BR ALIGN="LEFT"/>' for line in lines[:-1]), lines[-1]
    then = f"{head}<B>{tail}</B>" if row.then else f"{head}{tail}"
    words = f'<FONT FACE="{_MONO}" POINT-SIZE="9" COLOR="{ink}">{then}<BR ALIGN="LEFT"/></FONT>'
    number = f'<FONT POINT-SIZE="9" COLOR="{_PALE}">{row.position or ""}</FONT>'
    path = f'<FONT POINT-SIZE="9" COLOR="{ink if row.fate == "decided" else _PALE}">{escape(row.path) or " "}</FONT>'
    cell = f'BGCOLOR="{ground}" ALIGN="LEFT"'
    return f'<TR><TD {cell}>{number}</TD><TD {cell}>{words}</TD><TD {cell} PORT="{port}">{path}</TD></TR>'


def _end(end: End) -> str:
    ground, border = _ENDS[end.kind]
    width, border = ("2.5", _WAY) if end.reached else ("1", border)
    text = escape(end.text).replace("\n", "<BR/>")
    style = f'shape=box, style="rounded,filled", margin="0.2,0.12", fillcolor="{ground}", color="{border}"'
    return f"{end.id} [{style}, penwidth={width}, label=<{f'<B>{text}</B>' if end.reached else text}>];"


def _edges(picture: Picture) -> Iterator[str]:
    for box in picture.boxes:
        start = f"hook_{box.hook}" if box.hook else box.id
        for port, row in _numbered(box):
            if row.goes:
                to = row.goes if any(end.id == row.goes for end in picture.ends) else f"{row.goes}:title:w"
                yield f"{start}:{port}:e -> {to}{_way(taken=row.fate in TAKEN)};"
    for hook in picture.hooks:
        taken = picture.fell_through and hook == picture.begins
        yield f"hook_{hook} -> {ADDRESSED}{_way(taken=taken, more='style=dashed' if not taken else '')};"
    if picture.again and {"output", "prerouting"} <= {*picture.hooks}:
        label = 'label="once more, over lo", style=dashed, constraint=false'
        yield f"hook_output -> hook_prerouting{_way(taken=True, more=label)};"


def _way(*, taken: bool, more: str = "") -> str:
    words = [f'color="{_WAY}", fontcolor="{_WAY}", penwidth=2.2' if taken else "", more]
    return f" [{', '.join(filter(None, words))}]" if any(words) else ""
