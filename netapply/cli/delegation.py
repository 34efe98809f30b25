"""The everyday commands through the agent: where one keeps this machine's namespaces, what it does not know it undoes.

The namespace is opened here first, as without an agent: so the same is refused in the same words, and its descriptor
goes along to prove that both ends mean the same one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager

from netapply.cli import client
from netapply.cli.words import Arguments
from netapply.errors import NamespaceError, NetapplyError
from netapply.jsonform import result_of
from netapply.logins import Login, find_logins, told_of, write_login
from netapply.namespace import Namespace
from netapply.nsfs import open_source
from netapply.plan import CapturePlan
from netapply.results import Result


def find_agent(path: str) -> client.Client | None:
    """The agent behind this socket; None where nobody answers there, or we are nobody to it."""
    try:
        client.connect(path, 5.0).close()
    except (FileNotFoundError, ConnectionRefusedError, PermissionError):
        return None
    except OSError as error:
        raise client.unreachable(path, error) from error
    return client.Client(path)


def apply(agent: client.Client, arguments: Arguments, plan: CapturePlan) -> Result:
    """Have the agent apply a plan, and keep it. Raises NetapplyError."""
    from netapply.planfile import dump_plan

    words = {"backend": [arguments.backend], "layout": [arguments.layout]}
    said: tuple[str, ...] = ()
    if arguments.confirm:
        logins = _logins(arguments)
        said = tuple(map(told_of, logins))
        words |= {"confirm": [f"{arguments.confirm:g}"], "spare": [*map(write_login, logins)]}
    with _named(arguments) as (name, fd):
        body = json.dumps(dump_plan(plan)).encode()
        done = result_of(agent.ask("PUT", f"/v1/namespaces/{name}{_query(arguments, words)}", body, fd=fd))
    return done._replace(notes=(*done.notes, *said))


def _logins(arguments: Arguments) -> tuple[Login, ...]:
    with Namespace.open(arguments.netns, host=arguments.host) as namespace:
        return find_logins(namespace)


def clean(agent: client.Client, arguments: Arguments) -> Result | None:
    """Have the agent take down what it keeps there; None where it keeps nothing there. Raises NetapplyError."""
    with _named(arguments) as (name, fd):
        if not _keeps(agent, fd):
            return None
        if (arguments.backend, arguments.layout) != ("auto", "netapply"):
            raise NetapplyError(
                "the agent keeps this namespace, and would put back what is taken down of one dialect or layout",
                next_step="netapply clean without --backend and --layout; or --alone, if you mean it",
            )
        return result_of(agent.ask("DELETE", f"/v1/namespaces/{name}{_query(arguments, {})}", fd=fd))


def _query(arguments: Arguments, words: dict[str, list[str]]) -> str:
    if arguments.reason:
        words = {**words, "reason": [arguments.reason]}
    said = [f"{name}={client.quoted(word)}" for name, each in words.items() for word in each]
    return ("?" if said else "") + "&".join(said)


def refuse(agent: client.Client, arguments: Arguments) -> None:
    """Raise NetapplyError where the agent keeps the namespace: it would put its own plan back."""
    with _named(arguments) as (_, fd):
        if _keeps(agent, fd):
            raise NetapplyError(
                "the agent keeps this namespace, and would put its plan back",
                next_step="netapply apply the earlier plan, which the agent then keeps; or --alone, if you mean it",
            )


def refuse_extras(arguments: Arguments) -> None:
    """Raise NetapplyError for what the agent does not do."""
    if arguments.probe:
        raise NetapplyError(
            "the agent does not send canary connections",
            next_step="netapply apply PLAN, and then netapply verify PLAN --probe; or --alone, if you mean it",
        )
    if arguments.flush_conntrack:
        raise NetapplyError(
            "the agent does not have connection tracking forget flows", next_step="--alone, if you mean it"
        )


def confirm(agent: client.Client, arguments: Arguments) -> None:
    """Keep what was applied on trial. Raises NetapplyError."""
    with _named(arguments) as (name, fd):
        agent.ask("POST", f"/v1/namespaces/{name}/confirm", fd=fd)


def _keeps(agent: client.Client, fd: int) -> bool:
    try:
        return bool(agent.ask("GET", "/v1/namespaces/fd", fd=fd)["namespace"]["fingerprint"])
    except NamespaceError:
        return False


@contextmanager
def _named(arguments: Arguments) -> Generator[tuple[str, int]]:
    """How the agent is told of the namespace: its name, and a descriptor. Raises NamespaceError."""
    spec = arguments.netns
    with Namespace.open(spec, host=arguments.host, lock_timeout=arguments.lock_timeout):
        source = open_source(spec)
        try:
            yield _name(spec), source.fd
        finally:
            os.close(source.fd)


def _name(spec: str | None) -> str:
    """What the agent knows as the same; where there is no such name, the descriptor is all."""
    if spec is None or spec.startswith("fd:"):
        return "fd"
    return client.quoted(os.path.abspath(spec) if "/" in spec else spec)
