"""The everyday commands through the agent: where one keeps this machine's namespaces, what it does not know it undoes.

The namespace is opened here first, as without an agent: so the same is refused in the same words, and its descriptor
goes along to prove that both ends mean the same one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager

from netapply.cli import client
from netapply.cli.words import Arguments
from netapply.errors import ApplyError, NamespaceError, NetapplyError
from netapply.jsonform import result_of
from netapply.logins import Login, find_logins, spare, told_of, write_login
from netapply.namespace import Namespace
from netapply.nsfs import open_source
from netapply.plan import CapturePlan
from netapply.results import Result

#: Seconds after which the agent goes back by itself, if whoever proves a plan has died. A proof takes a few at most.
LONGEST_PROOF = 60.0


def find_agent(path: str) -> client.Client | None:
    """The agent behind this socket; None where nobody answers there, or we are nobody to it."""
    try:
        client.connect(path, 5.0).close()
    except (FileNotFoundError, ConnectionRefusedError, PermissionError):
        return None
    except OSError as error:
        raise client.unreachable(path, error) from error
    return client.Client(path)


def apply(
    agent: client.Client,
    arguments: Arguments,
    plan: CapturePlan,
    proof: Callable[[CapturePlan], None] | None = None,
) -> tuple[Result, tuple[str, ...], bool]:
    """Have the agent apply a plan, and keep it; with what is said of the logins that a trial leaves alone, and whether
    it is on trial.

    With `proof`, which is called here when all stands, with the plan that does, and raises where connections do not go
    where they should, only then: until it is through the plan is on trial. Raises NetapplyError.
    """
    from netapply.planfile import dump_plan

    words = {"backend": [arguments.backend], "layout": [arguments.layout]}
    if arguments.flush_conntrack:
        words["flush"] = ["true"]
    logins = _logins(arguments) if arguments.confirm else ()
    tried = spare(plan, logins, arguments.layout)
    seconds = arguments.confirm or (LONGEST_PROOF if proof else 0.0)
    if seconds:
        words |= {"confirm": [f"{seconds:g}"], "spare": [*map(write_login, logins)]}
    if proof and plan.activation != "now":
        raise NetapplyError(
            "a plan that waits for its proxy cannot be proven at once",
            next_step="netapply apply PLAN, and netapply verify PLAN --probe when the proxy listens",
        )
    with _named(arguments) as (name, fd):
        body = json.dumps(dump_plan(plan)).encode()
        result = result_of(agent.ask("PUT", f"/v1/namespaces/{name}{_query(arguments, words)}", body, fd=fd))
        # Not told by the result: what stood already may be on trial since before.
        on_trial = bool(seconds) and bool(agent.ask("GET", "/v1/namespaces/fd", fd=fd)["namespace"]["confirm_by"])
        if proof:
            _prove(agent, f"/v1/namespaces/{name}", fd, lambda: proof(tried), on_trial=on_trial)
            if on_trial and not arguments.confirm:
                agent.ask("POST", f"/v1/namespaces/{name}/confirm", fd=fd)
    return result, tuple(map(told_of, logins)), on_trial


def _logins(arguments: Arguments) -> tuple[Login, ...]:
    with Namespace.open(arguments.netns, host=arguments.host) as namespace:
        return find_logins(namespace)


def _prove(agent: client.Client, target: str, fd: int, proof: Callable[[], None], *, on_trial: bool) -> None:
    """Raises what `proof` raised; as an ApplyError where something had to be undone."""
    try:
        proof()
    except BaseException as error:
        if not on_trial:
            raise
        step = "prove that connections are captured"
        try:
            agent.ask("POST", f"{target}/back", fd=fd)
        except NetapplyError as second:
            raise ApplyError(step, error, restored=False, rollback=second) from error
        if not isinstance(error, Exception):
            raise
        raise ApplyError(step, error, restored=True) from error


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
            step = "netapply apply the earlier plan, which the agent then keeps; or --alone, if you mean it"
            if arguments.command == "migrate":
                step = "add --alone; then netapply apply PLAN --backend NAME, so that the agent keeps what stands"
            raise NetapplyError("the agent keeps this namespace, and would put its plan back", next_step=step)


def confirm(agent: client.Client, arguments: Arguments) -> None:
    """Keep what was applied on trial. Raises NetapplyError."""
    with _named(arguments) as (name, fd):
        agent.ask("POST", f"/v1/namespaces/{name}/confirm", fd=fd)


def extend(agent: client.Client, arguments: Arguments) -> None:
    """Give what is on trial more time. Raises NetapplyError."""
    with _named(arguments) as (name, fd):
        agent.ask("POST", f"/v1/namespaces/{name}/extend?seconds={arguments.seconds:g}", fd=fd)


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
