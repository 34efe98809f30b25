"""The command line's words. Building the parser imports nothing but argparse."""

from __future__ import annotations

import argparse
from typing import NoReturn

from netapply.errors import NetapplyError

BACKENDS = ("auto", "nftables", "iptables-nft", "iptables-legacy")

SUMMARY = {
    "apply": "make a namespace hold a plan, or leave it as it was",
    "clean": "remove all that is ours, in every dialect, without a plan",
    "render": "print the rules as iptables-save or nft would; touches nothing",
    "diff": "what apply would change in the live kernel (exit 0 nothing, 2 changes)",
    "verify": "whether the kernel still holds what was applied (exit 0 yes, 3 drift)",
    "show": "our live rules with their counters",
    "detect": "which backends work here, and which one auto takes; changes nothing",
    "schema": "the JSON Schema of plan files",
    "demo": "send real packets through a plan in throwaway namespaces, in each dialect",
    "completion": "print a completion script for a shell",
}


class UsageError(NetapplyError):
    """The command line cannot be understood. `usage` says how it is meant."""

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


class Parser(argparse.ArgumentParser):
    """argparse, but with exit code 1 for bad input: 2 is `diff`'s."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of ending the process."""
        raise UsageError(message, self.format_usage())


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    from netapply import __version__

    parser = Parser(prog="netapply", description="Transparent traffic capture: one plan, three dialects, no binary.")
    parser.add_argument("--version", action="version", version=f"netapply {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    apply = _command(commands, "apply", namespace=True, plan=True)
    _backend(apply)
    apply.add_argument("--quiet", action="store_true", help="print nothing when all is well")
    clean = _command(commands, "clean", namespace=True)
    _backend(clean)
    render = _command(commands, "render", plan=True)
    _backend(render, default="nftables", choices=BACKENDS[1:])
    diff = _command(commands, "diff", namespace=True, plan=True)
    _backend(diff)
    verify = _command(commands, "verify", namespace=True)
    verify.add_argument("plan", nargs="?", metavar="PLAN", help="a plan file; without one, what was last applied")
    _backend(verify)
    verify.add_argument("--deep", action="store_true", help="also read back through libnftables, a reader not ours")
    show = _command(commands, "show", namespace=True)
    _backend(show)
    show.add_argument("--all", action="store_true", help="everybody's rules, through libnftables")
    _command(commands, "detect", namespace=True)
    _command(commands, "schema")
    demo = _command(commands, "demo")
    demo.add_argument("--backend", action="append", choices=BACKENDS[1:], help="only this dialect; may be repeated")
    demo.add_argument("--mode", choices=("redirect", "tproxy", "both"), default="both", help="inbound mode")
    demo.add_argument("--keep", action="store_true", help="leave the namespaces, with the rules, to look around")
    completion = _command(commands, "completion")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return parser


def _command(
    commands: argparse._SubParsersAction[Parser],  # pyright: ignore[reportPrivateUsage]  # it has no public name
    name: str,
    *,
    namespace: bool = False,
    plan: bool = False,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=SUMMARY[name], description=SUMMARY[name])
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="form of the output")
    if plan:
        parser.add_argument("plan", metavar="PLAN", help="a plan file in YAML, JSON or TOML; - is standard input")
    if namespace:
        parser.add_argument(
            "-N",
            "--netns",
            metavar="NS",
            help="network namespace: a name, a path, pid:N or fd:N; the one that this runs in by default",
        )
        parser.add_argument("--host", action="store_true", help="allow the machine's own namespace")
        parser.add_argument("--lock-timeout", type=_seconds, default=10.0, metavar="SECONDS", help="default 10")
        parser.add_argument("--state-dir", metavar="DIR", help="where the journal is; default /run/netapply")
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 86400")
    return value


def _backend(parser: argparse.ArgumentParser, default: str = "auto", choices: tuple[str, ...] = BACKENDS) -> None:
    known = ", ".join(choices)
    parser.add_argument("--backend", default=default, metavar="NAME", help=f"{known}; default {default}")
    parser.add_argument("--layout", default="netapply", choices=("netapply",), help="arrangement of the rules")
