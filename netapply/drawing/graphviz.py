"""Graphviz's own library, in this process: DOT in, SVG out. No program is started.

Source: gvc.h and cgraph.h of Graphviz (https://graphviz.org/pdf/libguide.pdf).
"""

from __future__ import annotations

import ctypes
from threading import Lock

from netapply.errors import UnsupportedError

#: Debian and Fedora have 6, Graphviz 13 and later 7.
_LIBRARIES = (("libgvc.so.6", "libcgraph.so.6"), ("libgvc.so.7", "libcgraph.so.8"), ("libgvc.so", "libcgraph.so"))
_LOCK = Lock()  # Graphviz keeps its state in globals


def to_svg(dot: str) -> str:
    """The graph, laid out by `dot`, as an SVG document. Raises UnsupportedError where Graphviz is not installed."""
    gvc, cgraph = _libraries()
    with _LOCK:
        context = gvc.gvContext()
        graph = cgraph.agmemread(dot.encode())
        if not graph:
            raise UnsupportedError("Graphviz does not take the graph", next_step="--format dot prints it")
        data, length = ctypes.c_void_p(), ctypes.c_size_t()
        try:
            failed = gvc.gvLayout(context, graph, b"dot")
            failed = failed or gvc.gvRenderData(context, graph, b"svg", ctypes.byref(data), ctypes.byref(length))
            if failed:
                raise UnsupportedError("Graphviz cannot draw the graph", next_step="--format mermaid needs no Graphviz")
            return ctypes.string_at(data, length.value).decode().replace("\xa0", "&#160;")
        finally:
            if data:
                gvc.gvFreeRenderData(data)
            gvc.gvFreeLayout(context, graph)
            cgraph.agclose(graph)
            gvc.gvFreeContext(context)


def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    for names in _LIBRARIES:
        try:
            gvc, cgraph = map(ctypes.CDLL, names)
        except OSError:
            continue
        pointer = ctypes.c_void_p
        gvc.gvContext.restype = cgraph.agmemread.restype = pointer
        cgraph.agmemread.argtypes = [ctypes.c_char_p]
        gvc.gvLayout.argtypes = [pointer, pointer, ctypes.c_char_p]
        gvc.gvRenderData.argtypes = [pointer, pointer, ctypes.c_char_p, pointer, pointer]
        gvc.gvFreeLayout.argtypes = [pointer, pointer]
        gvc.gvFreeRenderData.argtypes = gvc.gvFreeContext.argtypes = cgraph.agclose.argtypes = [pointer]
        return gvc, cgraph
    raise UnsupportedError(
        "SVG is drawn by Graphviz's library, and libgvc is not here",
        next_step="install libgvc6 (Debian, Ubuntu) or graphviz-libs (Fedora), or take --format mermaid",
    )
