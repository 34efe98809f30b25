"""The socket API: requests to calls of an Agent, and what it returns or raises to JSON.

curl --unix-socket /run/netapply-agent/control.sock http://agent/v1/namespaces
curl --unix-socket … -X PUT --data-binary @plan.yaml http://agent/v1/namespaces/pod-1
curl --unix-socket … -X PUT --data-binary @plan.yaml http://agent/v1/namespaces/%2Fvar%2Frun%2Fnetns%2Fpod-1

The namespace is a name, a path, pid:N, or "fd" for the descriptor that comes with the request. A descriptor beside a
name proves that both ends mean the same namespace, whatever their mount namespaces show.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Protocol
from urllib.parse import urlsplit

import structlog

from netapply.agent.asked import Asked, label, logins_of, plan_words, reason_of, refused, seconds_of, understand
from netapply.agent.endpoints import (
    EVENT_VERSION,
    JSON_LINES,
    METRICS_TEXT,
    find_endpoint,
)
from netapply.agent.events import Event
from netapply.agent.http import Admitted, Request, Response
from netapply.agent.model import AgentConfig, FailMode, Metrics, NamespaceStatus, Target
from netapply.agent.places import find_place
from netapply.agent.policy import Meter, Peer, Policy
from netapply.agent.prometheus import Decisions, exposition
from netapply.documents import LIMITS, Format
from netapply.errors import (
    ConflictError,
    LockError,
    NamespaceError,
    NetapplyError,
    PlanError,
    UnsupportedError,
)
from netapply.jsonform import error_fields, plain
from netapply.logins import spare
from netapply.nsfs import open_source
from netapply.plan import CapturePlan
from netapply.planfile import load_plan
from netapply.results import RESULT_VERSION, Result, RuleCounter

_log = structlog.stdlib.get_logger("netapply.agent")
_FORMATS: Mapping[str, Format] = {
    "application/json": "json",
    "application/toml": "toml",
    "application/yaml": "yaml",
    "text/yaml": "yaml",
}
_STATUS: tuple[tuple[type[NetapplyError], int], ...] = (
    (PlanError, 422),
    (UnsupportedError, 422),
    (NamespaceError, 404),
    (ConflictError, 409),
    (LockError, 503),
)
#: Namespaces that are told without a pause: a millisecond's worth.
_CHUNK = 32
#: A loop that has not come round for so many seconds, or so many polls, is stuck.
_STUCK, _STUCK_POLLS = 10.0, 5


class AgentLike(Protocol):
    """What the application needs of an Agent."""

    config: AgentConfig

    async def apply(
        self,
        target: Target,
        plan: CapturePlan,
        *,
        backend: str,
        layout: str,
        confirm_within: float,
        flush: bool,
        meant: CapturePlan | None,
        reason: str,
    ) -> Result: ...
    async def remove(self, target: Target, *, reason: str) -> Result: ...
    async def confirm(self, target: Target) -> None: ...
    def extend(self, target: Target, seconds: float) -> None: ...
    async def go_back(self, target: Target) -> None: ...
    async def register(self, target: Target) -> None: ...
    async def unregister(self, target: Target) -> None: ...
    async def reconcile(self, target: Target | None = None) -> None: ...
    async def counters(self, target: str) -> tuple[RuleCounter, ...]: ...
    def status(self) -> tuple[NamespaceStatus, ...]: ...
    def events(self) -> AsyncIterator[Event]: ...
    def metrics(self) -> Metrics: ...


class Application:
    """The API of one agent on one socket, by that socket's policy. `public_only`: metrics and health alone."""

    def __init__(
        self,
        agent: AgentLike,
        policy: Policy,
        meter: Meter,
        decisions: Decisions,
        *,
        public_only: bool = False,
    ) -> None:
        self._agent = agent
        self._policy = policy
        self._meter = meter
        self._decisions = decisions
        self._public_only = public_only

    # --- as http.Application ---------------------------------------------------------------------------------

    def admit(self, peer: Peer, method: str, target: str) -> Admitted | Response:
        """By the head alone: is there such a thing, and may this peer ask for it."""
        try:
            url = urlsplit(target)
        except ValueError as error:
            return self.fault(400, f"{target[:200]} cannot be read: {error}")
        found = find_endpoint(method, url.path)
        if isinstance(found, frozenset):
            if not found:
                return self.fault(404, f"{url.path[:200]} is nothing here; see /openapi.json")
            answer = self.fault(405, f"{method} is not for {url.path[:200]}")
            return answer._replace(headers=(("allow", ", ".join(sorted(found))),))
        endpoint, encoded = found
        if self._public_only and not endpoint.public:
            return self.fault(403, "only /metrics and /health are answered here")
        refusal = self._policy.refusal(peer, endpoint.verb)
        if refusal:
            return self.fault(403, refusal)
        wait = 0.0 if peer.uid in (0, self._policy.owner) else self._meter.ask(peer.uid)
        if wait:
            answer = self.fault(429, "too many requests")
            return answer._replace(headers=(("retry-after", str(int(wait) + 1)),))

        async def work(request: Request) -> Response:
            try:
                asked = understand(endpoint, encoded, url.query, request)
                return await _FUNCTIONS[endpoint.name](self, asked)
            except NetapplyError as error:
                return _failure(endpoint.name, error)
            except Exception as error:  # noqa: BLE001 - a fault of ours: the client is told, and the log has it all
                _log.exception("a request failed", endpoint=endpoint.name)
                return _failure(endpoint.name, NetapplyError(f"{type(error).__name__}; see the agent's log"))

        return Admitted(LIMITS.max_bytes if endpoint.body else 0, endpoint.descriptors, work)

    def fault(self, status: int, message: str) -> Response:
        """A refusal, in the form of all errors."""
        return _failure("request", NetapplyError(message), status)

    # --- the endpoints ---------------------------------------------------------------------------------------

    async def status(self, _: Asked) -> Response:
        # One by one: a heal must not wait for somebody who looks at a thousand namespaces.
        found: list[bytes] = []
        for index, each in enumerate(self._agent.status()):
            found.append(json.dumps(plain(each)).encode())
            if index % _CHUNK == 0:
                await asyncio.sleep(0)
        empty = _document("status", {"namespaces": []})
        return empty._replace(body=empty.body.replace(b"[]", b"[" + b",".join(found) + b"]"))

    async def status_of(self, asked: Asked) -> Response:
        sent = asked.request.descriptors
        there = os.fstat(sent[0]) if asked.namespace == "fd" and sent else None
        for each in self._agent.status():
            file = each.identity[:2] if each.identity else None
            if asked.namespace in (each.name, each.path) or (there and file == (there.st_dev, there.st_ino)):
                return _document("status", {"namespace": plain(each)})
        raise NamespaceError(f"the agent does not know {asked.namespace}", next_step="see `netapply status`")

    async def apply(self, asked: Asked) -> Response:
        words = plan_words(asked)
        kind = asked.request.headers.get("content-type", "").partition(";")[0].strip().lower()
        plan = await asyncio.to_thread(
            load_plan, asked.request.body, format=_FORMATS.get(kind), source="<body>", limits=LIMITS
        )
        target = await self._target(asked)
        tried = spare(plan, logins_of(asked), words.layout) if words.confirm else plan
        result = await self._agent.apply(
            target,
            tried,
            backend=words.backend,
            layout=words.layout,
            confirm_within=words.confirm,
            flush=words.flush,
            meant=plan if tried != plan else None,
            reason=reason_of(asked),
        )
        return _document("apply", plain(result))

    async def clean(self, asked: Asked) -> Response:
        result = await self._agent.remove(await self._target(asked), reason=reason_of(asked))
        return _document("clean", plain(result))

    async def confirm(self, asked: Asked) -> Response:
        await self._agent.confirm(await self._target(asked))
        return _document("confirm", {})

    async def extend(self, asked: Asked) -> Response:
        seconds = seconds_of(asked)
        self._agent.extend(await self._target(asked), seconds)
        return _document("extend", {"seconds": seconds})

    async def go_back(self, asked: Asked) -> Response:
        await self._agent.go_back(await self._target(asked))
        return _document("back", {})

    async def reconcile(self, asked: Asked) -> Response:
        await self._agent.reconcile(await self._target(asked))
        return _document("reconcile", {})

    async def reconcile_all(self, _: Asked) -> Response:
        await self._agent.reconcile()
        return _document("reconcile", {})

    async def register(self, asked: Asked) -> Response:
        await self._agent.register(await self._target(asked))
        return _document("register", {})

    async def unregister(self, asked: Asked) -> Response:
        await self._agent.unregister(await self._target(asked))
        return _document("unregister", {})

    async def counters(self, asked: Asked) -> Response:
        return _document("counters", {"rules": plain(await self._agent.counters(asked.namespace))})

    async def events(self, asked: Asked) -> Response:
        only = asked.query.get("namespace", [""])[0]
        return Response(200, kind=JSON_LINES, stream=_lines(self._agent.events(), only))

    async def metrics(self, _: Asked) -> Response:
        await self._decisions.refresh(self._agent)
        text = exposition(self._agent.metrics(), self._decisions)
        return Response(200, text.encode(), METRICS_TEXT)

    async def live(self, _: Asked) -> Response:
        return self._stuck("live") or _document("live", {})

    async def ready(self, _: Asked) -> Response:
        waiting = [each.name for each in self._agent.status() if each.state == "pending" and each.fingerprint]
        if waiting:
            said = f"{len(waiting)} namespaces wait for their plan, {waiting[0]} first"
            return _failure("ready", NetapplyError(said), 503)
        return self._stuck("ready") or _document("ready", {})

    async def openapi(self, _: Asked) -> Response:
        from netapply.agent.openapi import description

        return Response(200, json.dumps(description(), indent=1).encode())

    # --- what they need --------------------------------------------------------------------------------------

    def _stuck(self, command: str) -> Response | None:
        ago = time.monotonic() - self._agent.metrics().ticked
        if ago <= max(_STUCK, _STUCK_POLLS * self._agent.config.poll):
            return None
        return _failure(command, NetapplyError(f"the agent's loop has not come round for {ago:.0f} s"), 503)

    async def _target(self, asked: Asked) -> Target:
        labels = dict(label(each) for each in asked.query.get("label", ()))
        fail: FailMode = "open" if asked.query.get("fail") == ["open"] else "closed"
        sent = asked.request.descriptors
        if len(sent) > 1:
            raise refused("descriptors", str(len(sent)), "at most one, the namespace's")
        if asked.namespace == "fd":
            if not sent:
                raise NamespaceError("no descriptor came with the request", next_step="send it by SCM_RIGHTS")
            return Target(sent[0], labels, fail)
        if asked.namespace.startswith("fd:"):
            raise NamespaceError("the agent's descriptors are its own", next_step='write "fd", and send yours along')
        if sent:
            await asyncio.to_thread(_same, asked.namespace, sent[0])
        return Target(asked.namespace, labels, fail)


_FUNCTIONS: Mapping[str, Callable[[Application, Asked], Awaitable[Response]]] = {
    name: function
    for name, function in vars(Application).items()
    if not name.startswith("_") and name not in ("admit", "fault")
}


def _same(spec: str, fd: int) -> None:
    """Raise ConflictError unless what the agent finds under this name is what the client sent."""
    source = open_source(find_place(spec).spec)
    try:
        if not os.path.samestat(os.fstat(source.fd), os.fstat(fd)):
            step = "the agent sees other files than you: name it by a path that both see, or send a descriptor alone"
            raise ConflictError(f"{spec} is another namespace to the agent than to you", next_step=step)
    finally:
        os.close(source.fd)


async def _lines(events: AsyncIterator[Event], only: str) -> AsyncGenerator[bytes, None]:
    try:
        async for event in events:
            if only in ("", event.namespace) or event.kind == "lost":
                yield json.dumps({"version": EVENT_VERSION, **plain(event)}).encode() + b"\n"
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()  # no event is kept for who has left


def _document(command: str, body: Mapping[str, Any]) -> Response:
    whole = {"version": RESULT_VERSION, "command": command, "ok": True, **body}
    return Response(200, json.dumps(whole).encode() + b"\n")


def _failure(command: str, error: NetapplyError, status: int = 0) -> Response:
    status = status or next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
    whole = {"version": RESULT_VERSION, "command": command, "ok": False, "error": error_fields(error)}
    return Response(status, json.dumps(whole).encode() + b"\n")
