"""The words of the everyday commands, described once: argparse learns them from here, and `read` does without it.

argparse takes a third of what a whole apply does, from the imports of gettext, locale and shutil to a parser for each
command. So what is written as the description says is read here, and all else (help, abbreviations, faults) is left to
argparse, which reads the same or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import Protocol

    class Takes(Protocol):
        """What is told of a command's words, as argparse.ArgumentParser.add_argument has it."""

        def add_argument(self, *names: str, **how: Any) -> object: ...


LAYOUTS = ("netapply", "istio", "istio-1.11", "istio-1.4")
BACKENDS = ("auto", "nftables", "iptables-nft", "iptables-legacy")


class Arguments:
    """What a command line says: an attribute for each of its words, and `command`."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def _apply(parser: Takes) -> None:
    plan(parser)
    namespace(parser)
    backend(parser)
    parser.add_argument("--quiet", action="store_true", help="print nothing when all is well")
    parser.add_argument(
        "--confirm",
        type=some_seconds,
        default=0.0,
        metavar="SECONDS",
        help="go back unless netapply confirm comes in time",
    )
    probe(parser)
    how = "have connection tracking forget the flows that the plan treats otherwise than what stood before"
    parser.add_argument("--flush-conntrack", action="store_true", help=how)
    alone(parser)
    reason(parser)


def _clean(parser: Takes) -> None:
    namespace(parser)
    backend(parser)
    alone(parser)
    reason(parser)


def _rollback(parser: Takes) -> None:
    namespace(parser)
    alone(parser)
    how = "how many states to go back; default 1"
    parser.add_argument("back", nargs="?", type=states, default=1, metavar="N", help=how)
    reason(parser)


def _history(parser: Takes) -> None:
    namespace(parser)


def reason(parser: Takes) -> None:
    """What the history is to say."""
    parser.add_argument("--reason", default="", metavar="TEXT", help="why, for the history")


def _recover(parser: Takes) -> None:
    namespace(parser)


def _render(parser: Takes) -> None:
    plan(parser)
    backend(parser, default="nftables", choices=BACKENDS[1:])


def _diff(parser: Takes) -> None:
    plan(parser)
    namespace(parser)
    backend(parser)


def _verify(parser: Takes) -> None:
    namespace(parser)
    parser.add_argument("plan", nargs="?", metavar="PLAN", help="a plan file; without one, what was last applied")
    backend(parser)
    parser.add_argument("--deep", action="store_true", help="also read back through libnftables, a reader not ours")
    probe(parser)


def _show(parser: Takes) -> None:
    namespace(parser)
    backend(parser)
    parser.add_argument("--all", action="store_true", help="everybody's rules, through libnftables")


#: These commands have nothing but flags, flags with one value and at most one word besides.
COMMANDS: Mapping[str, Callable[[Takes], None]] = {
    "apply": _apply,
    "clean": _clean,
    "recover": _recover,
    "rollback": _rollback,
    "history": _history,
    "render": _render,
    "diff": _diff,
    "verify": _verify,
    "show": _show,
}


def output(parser: Takes) -> None:
    """Every command has this."""
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="form of the output")


def plan(parser: Takes) -> None:
    """The plan file of a command that needs one."""
    parser.add_argument("plan", metavar="PLAN", help="a plan file in YAML, JSON or TOML; - is standard input")


def namespace(parser: Takes) -> None:
    """Where the command works, and its journal and lock."""
    where = "network namespace: a name, a path, pid:N or fd:N; the one that this runs in by default"
    parser.add_argument("-N", "--netns", metavar="NS", help=where)
    parser.add_argument("--host", action="store_true", help="allow the machine's own namespace")
    parser.add_argument("--lock-timeout", type=seconds, default=10.0, metavar="SECONDS", help="default 10")
    parser.add_argument("--state-dir", metavar="DIR", help="where the journal is; default /run/netapply")


def probe(parser: Takes) -> None:
    """Canary connections."""
    how = "send a connection of each kind, and say who answered; exit 126 where one goes elsewhere than the plan says"
    parser.add_argument("--probe", action="store_true", help=how)


def alone(parser: Takes) -> None:
    """Not through the agent."""
    parser.add_argument("--alone", action="store_true", help="do not go through the agent, though one runs")


def backend(parser: Takes, default: str = "auto", choices: tuple[str, ...] = BACKENDS) -> None:
    """The dialect and the arrangement of the rules."""
    known = ", ".join(choices)
    parser.add_argument("--backend", default=default, metavar="NAME", help=f"{known}; default {default}")
    layout(parser)


def layout(parser: Takes) -> None:
    """The arrangement of the rules, by which their chains are called."""
    parser.add_argument("--layout", default="netapply", choices=LAYOUTS, help="arrangement of the rules")


def states(text: str) -> int:
    """A number of states. Raises argparse's error, as only argparse tells of faults."""
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1000:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{text!r} is not a number of states from 1 on")
    return int(text)


def seconds(text: str) -> float:
    """A number of seconds. Raises argparse's error, as only argparse tells of faults."""
    return _seconds(text, 0.0)


def some_seconds(text: str) -> float:
    """The same, but more than none at all, which would be no trial."""
    return _seconds(text, 0.1)


def _seconds(text: str, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value <= 86_400:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{text!r} is not a number of seconds from {least:g} to 86400")
    return value


class _Words:
    """What a command takes, by name: switches, flags with a value, and words without a flag."""

    def __init__(self) -> None:
        self.said: dict[str, object] = {}
        self.switches: dict[str, str] = {}
        self.flags: dict[str, Callable[[str], None]] = {}
        self.others: list[Callable[[str], None]] = []
        self.needed = 0

    def add_argument(
        self,
        *names: str,
        action: str = "store",
        default: object = None,
        type: Callable[[str], object] = str,  # noqa: A002 - argparse's
        choices: Sequence[str] = (),
        nargs: str = "",
        **_: str,
    ) -> None:
        """See argparse, of which this is a small part."""
        name = names[-1].lstrip("-").replace("-", "_")

        def take(text: str) -> None:
            if choices and text not in choices:
                raise ValueError(text)
            self.said[name] = type(text)

        if action == "store_true":
            self.said[name] = False
            self.switches.update(dict.fromkeys(names, name))
            return
        self.said[name] = default
        if names[0].startswith("-"):
            self.flags.update(dict.fromkeys(names, take))
        else:
            self.others.append(take)
            self.needed += nargs != "?"

    def take(self, text: str, rest: Iterator[str]) -> None:
        """Take one word, and a flag's value with it. Raises an error of any kind."""
        if not _is_flag(text):
            self.others.pop(0)(text)
            self.needed -= 1
            return
        if text in self.switches:
            self.said[self.switches[text]] = True
            return
        name, joined, value = text.partition("=")
        if not joined and _is_flag(value := next(rest)):
            raise ValueError(text)
        self.flags[name](value)


def _is_flag(text: str) -> bool:
    return text.startswith("-") and text != "-"


def read(argv: Sequence[str]) -> Arguments | None:
    """What the command line says; None where argparse has to look at it."""
    if not argv or argv[0] not in COMMANDS:
        return None
    words = _Words()
    output(words)
    COMMANDS[argv[0]](words)
    rest = iter(argv[1:])
    try:
        for text in rest:
            words.take(text, rest)
    except Exception:  # noqa: BLE001 - whatever it is, argparse meets it too, and tells it
        return None
    if words.needed > 0:
        return None
    arguments = Arguments()
    vars(arguments).update(words.said, command=argv[0])
    return arguments
