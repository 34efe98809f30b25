"""The command line's words. Building the parser imports nothing but argparse."""

from __future__ import annotations

import argparse
from typing import NoReturn

from netapply.errors import NetapplyError

LAYOUTS = ("netapply", "istio", "istio-1.11", "istio-1.4")
BACKENDS = ("auto", "nftables", "iptables-nft", "iptables-legacy")

SUMMARY = {
    "apply": "make a namespace hold a plan, or leave it as it was",
    "clean": "remove all that is ours, in every dialect, without a plan",
    "render": "print the rules as iptables-save or nft would; touches nothing",
    "diff": "what apply would change in the live kernel (exit 0 nothing, 2 changes)",
    "verify": "whether the kernel still holds what was applied (exit 0 yes, 3 drift)",
    "show": "our live rules with their counters",
    "explain": "why a packet goes where it goes, by a plan or by the rules that stand",
    "detect": "which backends work here, and which one auto takes; changes nothing",
    "schema": "the JSON Schema of plan files",
    "import": "print another tool's settings as a plan file, each line with what it comes from; touches nothing",
    "istio": "flags and variables of istio-iptables, or a pod as istio-cni reads it",
    "demo": "send real packets through a plan in throwaway namespaces, in each dialect",
    "completion": "print a completion script for a shell",
    "istio-iptables": "what istio-iptables does, by the same flags and variables, in one transaction",
    "istio-clean-iptables": "remove what any version of Istio or netapply left, in every dialect",
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


def build_parser(*, lean: bool = False) -> argparse.ArgumentParser:
    """The whole command line; `lean` without the flags of Istio's commands, which read their words themselves."""
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
    _explain(_command(commands, "explain", namespace=True))
    _command(commands, "detect", namespace=True)
    _command(commands, "schema")
    _imports(commands.add_parser("import", help=SUMMARY["import"], description=SUMMARY["import"]))
    demo = _command(commands, "demo")
    demo.add_argument("--backend", action="append", choices=BACKENDS[1:], help="only this dialect; may be repeated")
    demo.add_argument("--mode", choices=("redirect", "tproxy", "both"), default="both", help="inbound mode")
    demo.add_argument("--keep", action="store_true", help="leave the namespaces, with the rules, to look around")
    completion = _command(commands, "completion")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    for name in ("istio-iptables", "istio-clean-iptables"):
        istio = commands.add_parser(name, help=SUMMARY[name], description=SUMMARY[name])
        if not lean:
            from netapply.cli.istio_arguments import add_flags

            add_flags(istio)
    return parser


def _imports(parser: argparse.ArgumentParser) -> None:
    peers = parser.add_subparsers(dest="peer", required=True, metavar="PEER", parser_class=Parser)
    istio = _command(peers, "istio")
    istio.add_argument("flags", nargs="*", metavar="-- FLAGS", help="flags of istio-iptables, after --")
    istio.add_argument("--env-file", metavar="FILE", help="variables, one NAME=value a line; those here are not read")
    istio.add_argument("--annotations", metavar="POD", help="a pod's manifest in YAML or JSON; - is standard input")
    istio.add_argument("--layout", default="istio", choices=LAYOUTS[1:], help="the version of Istio; default istio")
    istio.add_argument(
        "--ipv6", choices=("yes", "no"), help="whether IPv6 is captured; by the addresses here if left out"
    )
    istio.add_argument("--servers", metavar="A,B", help="the name servers; those of /etc/resolv.conf here if left out")


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


def _explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", nargs="?", metavar="PLAN", help="a plan file; without one, the rules that stand")
    words = "uid=, gid=, cgroup=, iface=, mark=, state=, an address and port; the rest is assumed, and told"
    for option, name in (("--from", "source"), ("--to", "destination")):
        parser.add_argument(
            option, dest=name, nargs="+", action="extend", default=[], metavar="WORD", help=f"of {option[2:]}: {words}"
        )
    parser.add_argument("--inbound", action="store_true", help="the packet comes in from elsewhere")
    parser.add_argument("--dns", action="store_true", help="a query: UDP to port 53 unless told otherwise")
    protocol = parser.add_mutually_exclusive_group()
    protocol.add_argument("--tcp", action="store_true", help="the default but for --dns")
    protocol.add_argument("--udp", action="store_true")
    parser.add_argument("--traffic-types", action="store_true", help="a table of the six traffic types of a sidecar")
    parser.add_argument("--all", action="store_true", help="in every dialect; with a plan")
    _backend(parser)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86_400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 86400")
    return value


def _backend(parser: argparse.ArgumentParser, default: str = "auto", choices: tuple[str, ...] = BACKENDS) -> None:
    known = ", ".join(choices)
    parser.add_argument("--backend", default=default, metavar="NAME", help=f"{known}; default {default}")
    parser.add_argument("--layout", default="netapply", choices=LAYOUTS, help="arrangement of the rules")
