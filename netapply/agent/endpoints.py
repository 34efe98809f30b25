"""What the socket API offers, as a table: the application finds its functions by it, and OpenAPI is made from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from netapply.agent.model import NamespaceStatus
from netapply.agent.policy import Verb
from netapply.results import Result, RuleCounter
from netapply.values import NamedTuple

#: Of each line of /v1/events. A field is never removed or changed within one version.
EVENT_VERSION = "netapply.event/v1"
JSON_LINES = "application/x-ndjson"
METRICS_TEXT = "text/plain; version=0.0.4; charset=utf-8"
#: The longest time to confirm an apply in: a day.
LONGEST_CONFIRM = 86_400.0

Method: TypeAlias = Literal["GET", "PUT", "POST", "DELETE"]
Schema: TypeAlias = Mapping[str, Any]


class Parameter(NamedTuple):
    """One of the query: its name, what it says, its type as JSON Schema has it, and whether it has to be there."""

    name: str
    says: str
    schema: Schema
    required: bool = False


class Endpoint(NamedTuple):
    """One thing that can be asked; `name` is the application's function for it.

    `answer` is what the JSON holds beside version, command and ok: a value's type for all its fields, or types by name;
    or it is a media type. `body`: a plan. `descriptors`: a descriptor of the namespace may come with it. `public`:
    answered on the metrics address too, where nobody is known.
    """

    method: Method
    path: str
    verb: Verb
    name: str
    summary: str
    answer: Any
    query: tuple[Parameter, ...] = ()
    body: bool = False
    descriptors: bool = False
    public: bool = False


_ALL = "/v1/namespaces"
_ONE = "/v1/namespaces/{namespace}"
_TEXT: Schema = {"type": "string"}
_LABEL = Parameter("label", "key=value; may be repeated.", {"type": "array", "items": _TEXT})
_FAIL = Parameter(
    "fail", "For activation on-listen: capture while the proxy does not listen.", {"enum": ["open", "closed"]}
)
_CONFIRM = Parameter(
    "confirm",
    "Seconds in which to confirm, or what was before comes back.",
    {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_CONFIRM},
)
_SPARE = Parameter(
    "spare",
    "FAR,HERE,PORT: the addresses and our port of a login that is left alone until confirm; may be repeated.",
    {"type": "array", "items": _TEXT},
)
_SECONDS = _CONFIRM._replace(name="seconds", says="Seconds to confirm in, from now.", required=True)
_FLUSH = Parameter(
    "flush", "Have connection tracking forget the flows that would be treated otherwise.", {"enum": ["true", "false"]}
)
_REASON = Parameter("reason", "Why, for the history.", _TEXT)
_PLAN_WORDS = (
    Parameter("backend", "The dialect; auto unless given.", _TEXT),
    Parameter("layout", "The arrangement of the rules; netapply unless given.", _TEXT),
    _FAIL,
    _CONFIRM,
    _SPARE,
    _FLUSH,
    _LABEL,
    _REASON,
)
_OF = (Parameter("namespace", "Only of this namespace, by the name that the status shows.", _TEXT),)

ENDPOINTS = (
    Endpoint("GET", _ALL, "read", "status", "Every namespace at a glance.", {"namespaces": list[NamespaceStatus]}),
    Endpoint(
        "GET",
        _ONE,
        "read",
        "status_of",
        "One namespace at a glance.",
        {"namespace": NamespaceStatus},
        descriptors=True,
    ),
    Endpoint(
        "PUT",
        _ONE,
        "change",
        "apply",
        "Make the namespace hold a plan, and keep it so.",
        Result,
        query=_PLAN_WORDS,
        body=True,
        descriptors=True,
    ),
    Endpoint(
        "DELETE",
        _ONE,
        "change",
        "clean",
        "Take down all that is ours, and keep nothing.",
        Result,
        query=(_REASON,),
        descriptors=True,
    ),
    Endpoint("POST", f"{_ONE}/confirm", "change", "confirm", "Keep what is on trial.", {}, descriptors=True),
    Endpoint(
        "POST",
        f"{_ONE}/extend",
        "change",
        "extend",
        "Give what is on trial more time.",
        {"seconds": float},
        query=(_SECONDS,),
        descriptors=True,
    ),
    Endpoint("POST", f"{_ONE}/back", "change", "go_back", "Bring back what was before.", {}, descriptors=True),
    Endpoint("POST", f"{_ONE}/reconcile", "change", "reconcile", "Look now, and put it right.", {}, descriptors=True),
    Endpoint("POST", "/v1/reconcile", "change", "reconcile_all", "Look everywhere now, and put all right.", {}),
    Endpoint(
        "PUT",
        f"{_ONE}/labels",
        "change",
        "register",
        "Make a namespace known by labels, for plan files that select by them.",
        {},
        query=(_LABEL,),
        descriptors=True,
    ),
    Endpoint(
        "DELETE",
        f"{_ONE}/labels",
        "change",
        "unregister",
        "Forget labels and what stands for them.",
        {},
        descriptors=True,
    ),
    Endpoint(
        "GET", f"{_ONE}/counters", "read", "counters", "Our live rules with counters.", {"rules": list[RuleCounter]}
    ),
    Endpoint("GET", "/v1/events", "read", "events", "What happens from now on, a line each.", JSON_LINES, query=_OF),
    Endpoint("GET", "/metrics", "read", "metrics", "For Prometheus.", METRICS_TEXT, public=True),
    Endpoint("GET", "/health/live", "read", "live", "200 while the agent's loop comes round.", {}, public=True),
    Endpoint("GET", "/health/ready", "read", "ready", "200 once no plan waits for its first time.", {}, public=True),
    Endpoint("GET", "/openapi.json", "read", "openapi", "This description.", "application/json"),
)


def find_endpoint(method: str, path: str) -> tuple[Endpoint, str] | frozenset[str]:
    """The endpoint for an encoded path, and its namespace, still encoded; or the methods that the path has."""
    methods: set[str] = set()
    for endpoint in ENDPOINTS:
        namespace = _match(endpoint.path.split("/"), path.split("/"))
        if namespace is not None:
            if endpoint.method == method:
                return endpoint, namespace
            methods.add(endpoint.method)
    return frozenset(methods)


def _match(pattern: list[str], words: list[str]) -> str | None:
    """What stands for {namespace}, "" where the pattern has none; None if the words do not fit."""
    if len(pattern) != len(words):
        return None
    namespace = ""
    for wanted, word in zip(pattern, words, strict=True):
        if wanted == "{namespace}" and word:
            namespace = word
        elif wanted != word:
            return None
    return namespace
