"""The standard library's `socket` to type checkers, and at run time the part of it that is written in C.

What socket.py adds (enumerations of all constants, selectors, files, context managers) takes as long to import as a
dialect, and nobody here needs it.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as in `values`
if TYPE_CHECKING:
    import socket as socket  # noqa: PLC0414 - it is exported
else:
    import _socket as socket

__all__ = ["socket"]
