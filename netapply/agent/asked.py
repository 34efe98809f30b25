"""A request's path and query as values: what is asked, of which namespace, in which words. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import parse_qsl, unquote

from netapply.agent.endpoints import LONGEST_CONFIRM, Endpoint
from netapply.agent.http import Request
from netapply.compiler import LAYOUTS
from netapply.errors import Fault, PlanError
from netapply.logins import Login, read_login
from netapply.values import NamedTuple

_MOST_WORDS = 64


class Asked(NamedTuple):
    """A request, understood: `namespace` is decoded, `query` holds what is known of it alone."""

    endpoint: Endpoint
    namespace: str
    query: Mapping[str, list[str]]
    request: Request


def understand(endpoint: Endpoint, encoded: str, query: str, request: Request) -> Asked:
    """The names and values of a request. Raises PlanError with everything that is wrong with them."""
    known = {each.name: each for each in endpoint.query}
    found: dict[str, list[str]] = {}
    faults: list[Fault] = []
    if query.count("&") >= _MOST_WORDS:
        raise refused("query", "so many words", f"at most {_MOST_WORDS}")
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in known:
            found.setdefault(name, []).append(value)
        else:
            faults.append(Fault("query", name[:80], f"known here are {', '.join(known) or 'none'}"))
    faults += [
        Fault(name, "more than once", "give it once")
        for name, values in found.items()
        if name not in ("label", "spare") and values[1:]
    ]
    namespace = unquote(encoded)
    if "\0" in namespace or len(namespace) > 4096:
        faults.append(Fault("namespace", "such a name", "a name, a path, pid:N or fd"))
    if faults:
        raise PlanError(tuple(faults))
    return Asked(endpoint, namespace, found, request)


class PlanWords(NamedTuple):
    """What is said of an apply beside its plan; `confirm` in seconds, 0.0 for no trial."""

    backend: str
    layout: str
    confirm: float
    flush: bool


def plan_words(asked: Asked) -> PlanWords:
    """The words of an apply. Raises PlanError."""
    said = {name: values[0] for name, values in asked.query.items()}
    faults: list[Fault] = []
    backend, layout = said.get("backend", "auto"), said.get("layout", "netapply")
    flush = said.get("flush", "false")
    for name, value, known in (
        ("layout", layout, tuple(LAYOUTS)),
        ("fail", said.get("fail", "closed"), ("open", "closed")),
        ("flush", flush, ("true", "false")),
    ):
        if value not in known:
            faults.append(Fault(name, value[:80], f"one of {', '.join(known)}"))
    confirm = _seconds("confirm", said["confirm"], faults) if "confirm" in said else 0.0
    if faults:
        raise PlanError(tuple(faults))
    return PlanWords(backend, layout, confirm, flush == "true")


def seconds_of(asked: Asked) -> float:
    """The seconds of an extension. Raises PlanError."""
    faults: list[Fault] = []
    seconds = _seconds("seconds", asked.query.get("seconds", ["nothing"])[0], faults)
    if faults:
        raise PlanError(tuple(faults))
    return seconds


def _seconds(name: str, word: str, faults: list[Fault]) -> float:
    try:
        seconds = float(word)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= LONGEST_CONFIRM:
        faults.append(Fault(name, word[:80], "seconds, more than 0 and at most 86400"))
    return seconds


def logins_of(asked: Asked) -> tuple[Login, ...]:
    """The logins that an apply on trial is to leave alone. Raises PlanError."""
    faults: list[Fault] = []
    found: list[Login] = []
    for text in asked.query.get("spare", ()):
        login = read_login(text)
        if login is None:
            faults.append(Fault("spare", text[:80], "two addresses of one family and a port, with commas between"))
        else:
            found.append(login)
    if faults:
        raise PlanError(tuple(faults))
    return tuple(found)


def reason_of(asked: Asked) -> str:
    """For the history, which knows of its own that the agent did it, and not who asked."""
    peer, said = asked.request.peer, asked.query.get("reason", [""])[0]
    return f"uid {peer.uid}, process {peer.pid}{': ' if said else ''}{said}"


def label(text: str) -> tuple[str, str]:
    """Key and value of a label. Raises PlanError."""
    key, equals, value = text.partition("=")
    if not (key and equals) or "," in text:
        raise refused("label", text[:80], "key=value, without a comma")
    return key, value


def refused(where: str, value: str, accepted: str) -> PlanError:
    """The error for one thing that is wrong."""
    return PlanError((Fault(where, value, accepted),))
