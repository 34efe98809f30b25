"""A picture in Mermaid (https://mermaid.js.org/syntax/flowchart.html). Pure."""

from __future__ import annotations

from collections.abc import Iterator

from netapply.drawing.picture import ADDRESSED, MET, SOURCES, TAKEN, Box, Picture, Row

_CLASSES = (
    "classDef chain fill:#f6f7fa,stroke:#cbd2dd,color:#1f2937",
    "classDef rule fill:#ffffff,stroke:#cbd2dd,color:#1f2937",
    "classDef unmet fill:#ffffff,stroke:#e5e9f0,color:#9aa4b5",
    "classDef passed fill:#ffffff,stroke:#8d98aa,color:#1f2937",
    "classDef matched fill:#fff1e3,stroke:#d9680f,color:#1f2937",
    "classDef decided fill:#fbc78e,stroke:#d9680f,stroke-width:3px,color:#1f2937",
    "classDef taken fill:#e7eafc,stroke:#4452b8,color:#1f2937",
    "classDef addressed fill:#e3f5e9,stroke:#2b8a57,color:#1f2937",
    "classDef dropped fill:#fde5e5,stroke:#c03a3a,color:#1f2937",
    "classDef reached stroke:#d9680f,stroke-width:3px",
)


def to_mermaid(picture: Picture) -> str:
    """The picture as a flowchart, from top to bottom: a box for each chain, its rules below one another."""
    return "\n".join(_Chart(picture).lines()) + "\n"


class _Chart:
    """Lines of a flowchart. Links are counted: their style is told by number."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture
        self._links = 0
        self._taken: list[int] = []

    def lines(self) -> Iterator[str]:
        picture = self._picture
        yield "---"
        yield f"title: {_quoted(': '.join(filter(None, (picture.title, picture.said))))}"
        yield "---"
        yield "flowchart TB"
        for box in picture.boxes:
            yield from self._box(box)
        for end in picture.ends:
            yield f"  {end.id}([{_quoted(end.text)}]):::{end.kind}"
        for hook in picture.hooks:
            yield from self._hook(hook)
        if picture.again:
            yield self._again()
        for box in picture.boxes:
            for row in box.rows:
                if row.goes:
                    to = row.goes if row.goes in {end.id for end in picture.ends} else f"{row.goes}_first"
                    yield self._link(_id(box, row), to, taken=row.fate in TAKEN)
        yield from (f"  {line}" for line in _CLASSES)
        for end in picture.ends:
            if end.reached:
                yield f"  class {end.id} reached"
        if self._taken:
            yield f"  linkStyle {','.join(map(str, self._taken))} stroke:#d9680f,stroke-width:3px"

    def _box(self, box: Box) -> Iterator[str]:
        title = f"hook {box.hook}: {box.title} ({box.about})" if box.hook else box.title
        yield f"  subgraph {box.id} [{_quoted(title)}]"
        yield f"    {box.id}_first(( )):::rule"
        before = f"{box.id}_first"
        for row in box.rows:
            number = f"{row.position}  " if row.position else ""
            words = [f"{number}{row.when}".strip(), row.then, f"({row.path})" if row.path else ""]
            yield f"    {_id(box, row)}[{_quoted(chr(10).join(filter(None, words)))}]:::{row.fate or 'rule'}"
            yield f"  {self._link(before, _id(box, row), taken=row.fate in MET)}"
            before = _id(box, row)
        yield "  end"
        yield f"  class {box.id} chain"

    def _hook(self, hook: str) -> Iterator[str]:
        """Its base chains, one behind the other, from who sends to where it was addressed."""
        begins = hook == self._picture.begins
        before = f"from_{hook}"
        if hook in SOURCES:
            yield f"  {before}([{_quoted(SOURCES[hook])}])"
        for box in (box for box in self._picture.boxes if box.hook == hook):
            if before:
                yield self._link(before, f"{box.id}_first", taken=begins and any(row.fate in MET for row in box.rows))
            before = _id(box, box.rows[-1]) if box.rows else f"{box.id}_first"
        yield self._link(before, ADDRESSED, taken=begins and self._picture.fell_through)

    def _again(self) -> str:
        """From hook output to hook prerouting."""
        last = [box for box in self._picture.boxes if box.hook == "output"][-1]
        first = next(box for box in self._picture.boxes if box.hook == "prerouting")
        return self._link(last.id, f"{first.id}_first", taken=True, arrow='-. "once more, over lo" .->')

    def _link(self, start: str, end: str, *, taken: bool, arrow: str = "-->") -> str:
        if taken:
            self._taken.append(self._links)
        self._links += 1
        return f"  {start} {arrow} {end}"


def _id(box: Box, row: Row) -> str:
    return f"{box.id}_{row.position or 'more'}"


def _quoted(text: str) -> str:
    """In quotes, with the entities and line breaks of Mermaid."""
    safe = "".join(f"#{ord(each)};" if each in '"#<>&`' else each for each in text)
    return f'"{safe.replace(chr(10), "<br/>")}"'
