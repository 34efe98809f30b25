"""The OpenAPI 3.1 description of the socket API, made from the table of endpoints and the types of the values. Pure."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from netapply.agent import events
from netapply.agent.endpoints import ENDPOINTS, EVENT_VERSION, JSON_LINES, Endpoint
from netapply.results import RESULT_VERSION
from netapply.schema import json_schema

_SIMPLE: Mapping[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_REFUSALS = {
    "400": "The request is not well-formed HTTP.",
    "403": "This peer may not, on this socket.",
    "404": "There is no such thing, or no such namespace.",
    "409": "Something stands in the way.",
    "413": "The body is too large.",
    "422": "The plan or the query has faults: all of them are told, and nothing was touched.",
    "429": "Too many requests.",
    "500": "It failed; the error says what stands.",
    "503": "Not now: a lock, or too many connections.",
    "504": "It took too long, and was given up.",
}


def description() -> dict[str, Any]:
    """The whole document, JSON-able."""
    from netapply import __version__

    made: dict[str, Any] = {}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, made)
    made["Event"] = {"anyOf": [_schema(kind, made) for kind in get_args(events.Event)]}
    made["Error"] = _ERROR
    made["CapturePlan"] = json_schema()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "netapply agent",
            "version": __version__,
            "description": f"HTTP over a unix socket. Answers are {RESULT_VERSION}, events {EVENT_VERSION}.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "http://agent", "description": "any host name: the socket says which agent"}],
        "paths": paths,
        "components": {"schemas": dict(sorted(made.items()))},
    }


def _operation(endpoint: Endpoint, made: dict[str, Any]) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {
            "name": each.name,
            "in": "query",
            **({"required": True} if each.required else {}),
            "description": each.says,
            "schema": dict(each.schema),
        }
        for each in endpoint.query
    ]
    if "{namespace}" in endpoint.path:
        said = "A name, a path, or pid:N, percent-encoded."
        if endpoint.descriptors:
            said += ' "fd" is the descriptor that comes by SCM_RIGHTS; one beside a name must be of the same namespace.'
        schema = {"type": "string", "maxLength": 4096}
        parameters.insert(
            0, {"name": "namespace", "in": "path", "required": True, "description": said, "schema": schema}
        )
    operation: dict[str, Any] = {
        "operationId": endpoint.name,
        "summary": endpoint.summary,
        "description": f"Needs the right to {endpoint.verb}.",
        "parameters": parameters,
        "responses": {"200": _answer(endpoint.answer, made), **_refusals()},
    }
    if endpoint.body:
        plan: dict[str, Any] = {"schema": {"$ref": "#/components/schemas/CapturePlan"}}
        kinds = dict.fromkeys(("application/json", "application/yaml", "application/toml"), plan)
        operation["requestBody"] = {"required": True, "description": "A plan, as a plan file has it.", "content": kinds}
    return operation


def _answer(answer: Any, made: dict[str, Any]) -> dict[str, Any]:
    if isinstance(answer, str):
        schema: dict[str, Any] = {"type": "object"} if answer.endswith("json") else {"type": "string"}
        if answer == JSON_LINES:
            schema = {"$ref": "#/components/schemas/Event"}
        return {"description": "As the media type says.", "content": {answer: {"schema": schema}}}
    hints: Mapping[str, Any] = get_type_hints(answer) if isinstance(answer, type) else answer
    properties: dict[str, Any] = {
        "version": {"const": RESULT_VERSION},
        "command": {"type": "string"},
        "ok": {"const": True},
        **{name: _schema(kind, made) for name, kind in hints.items()},
    }
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"description": "Done.", "content": {"application/json": {"schema": schema}}}


def _refusals() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": said, "content": content} for status, said in _REFUSALS.items()}


_FAULT = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("path", "value", "accepted")},
    "required": ["path", "value", "accepted"],
}
_ERROR: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "version": {"const": RESULT_VERSION},
        "command": {"type": "string"},
        "ok": {"const": False},
        "error": {
            "type": "object",
            "properties": {
                **{name: {"type": "string"} for name in ("kind", "message", "next_step")},
                "faults": {"type": "array", "items": _FAULT},
            },
            "required": ["kind", "message", "next_step"],
        },
    },
    "required": ["version", "command", "ok", "error"],
}


def _schema(kind: Any, made: dict[str, Any]) -> dict[str, Any]:
    """The JSON Schema of what `jsonform.plain` makes of a value of this type."""
    if kind in _SIMPLE:
        return {"type": _SIMPLE[kind]}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(each, made) for each in arguments]}
    if origin in (tuple, list):
        return {"type": "array", "items": _schema(arguments[0], made)}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _schema(arguments[1], made)}
    if kind.__name__ not in made:
        made[kind.__name__] = {}  # before its fields: a value may hold its own kind
        properties = {name: _schema(each, made) for name, each in get_type_hints(kind).items()}
        made[kind.__name__] = {"type": "object", "properties": properties, "required": list(properties)}
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
