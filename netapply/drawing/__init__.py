"""The way of packets through hooks, chains and rules, as SVG by Graphviz, or as Mermaid. Pure but for `graphviz`.

backend = find_backend("nftables")
to_mermaid(draw(backend, compile_plan(plan, backend.dialect), "ip"))
"""

from __future__ import annotations

from netapply.drawing.dot import to_dot
from netapply.drawing.mermaid import to_mermaid
from netapply.drawing.picture import Picture, draw

__all__ = ["Picture", "draw", "to_dot", "to_mermaid"]
