"""The whole command line for argparse: help, completion, faults, and the commands that `words` does not describe."""

from __future__ import annotations

import argparse
from typing import NoReturn

from netapply.cli import client, words
from netapply.cli.words import BACKENDS, LAYOUTS
from netapply.errors import NetapplyError

SUMMARY = {
    "apply": "make a namespace hold a plan, or leave it as it was",
    "clean": "remove all that is ours, in every dialect, without a plan",
    "recover": "finish or undo what a killed run left, as any other that changes something does first",
    "rollback": "bring back the state before the last change, or an earlier one",
    "migrate": "from one dialect to another under traffic, each flow captured once all the while; back on any failure",
    "history": "who changed what, when and why, with the result; of one namespace or of all",
    "render": "print the rules as iptables-save or nft would; touches nothing",
    "diff": "what apply would change in the live kernel (exit 0 nothing, 2 changes)",
    "verify": "whether the kernel still holds what was applied (exit 0 yes, 3 drift)",
    "show": "our live rules with their counters",
    "explain": "why a packet goes where it goes, by a plan or by the rules that stand",
    "graph": "draw the way of packets through hooks, chains and rules, as SVG or Mermaid",
    "detect": "which backends work here, and which one auto takes; changes nothing",
    "schema": "the JSON Schema of plan files",
    "import": "print another tool's settings as a plan file, each line with what it comes from; touches nothing",
    "istio": "flags and variables of istio-iptables, or a pod as istio-cni reads it",
    "agent": "hold plans in force in every namespace of this machine, as a service",
    "status": "what the agent keeps, at a glance (exit 0 all in force, 3 some not)",
    "watch": "what the agent does, as it happens: drift, who caused it, how soon it was healed",
    "top": "live counters of what the plans decide",
    "confirm": "keep what apply --confirm put on trial",
    "extend": "give what apply --confirm put on trial more time, from now on",
    "demo": "send real packets through a plan in throwaway namespaces, in each dialect",
    "conform": "does a backend mean what the plan says: the conformance suite, by packets in throwaway namespaces",
    "install-unit": "write the agent's units for systemd; says what to run then, and starts nothing",
    "doctor": "what could keep capture from working here, with evidence and a fix each (exit 0 nothing, 3 something)",
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

    for name, describe in words.COMMANDS.items():
        describe(_command(commands, name))
    _migrate(_command(commands, "migrate"))
    _explain(_command(commands, "explain"))
    _graph(_command(commands, "graph"))
    detect = _command(commands, "detect")
    words.namespace(detect)
    words.layout(detect)
    _command(commands, "schema")
    _agent(_command(commands, "agent"))
    for name in ("status", "watch", "top"):
        _looks(_command(commands, name))
    words.namespace(_command(commands, "confirm"))
    extend = _command(commands, "extend")
    extend.add_argument("seconds", type=words.some_seconds, metavar="SECONDS")
    words.namespace(extend)
    _imports(commands.add_parser("import", help=SUMMARY["import"], description=SUMMARY["import"]))
    demo = _command(commands, "demo")
    demo.add_argument("--backend", action="append", choices=BACKENDS[1:], help="only this dialect; may be repeated")
    demo.add_argument("--mode", choices=("redirect", "tproxy", "both"), default="both", help="inbound mode")
    demo.add_argument("--keep", action="store_true", help="leave the namespaces, with the rules, to look around")
    _conform(_command(commands, "conform"))
    _install(_command(commands, "install-unit"))
    doctor = _command(commands, "doctor")
    words.namespace(doctor)
    doctor.add_argument("plan", nargs="?", metavar="PLAN", help="a plan file: also what it needs and whom it exempts")
    doctor.add_argument("--report", metavar="FILE", help="write a tarball of all that a bug report needs, redacted")
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
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=SUMMARY[name], description=SUMMARY[name])
    words.output(parser)
    return parser


def _conform(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", required=True, metavar="NAME", help="built in, or registered by anybody")
    parser.add_argument("--level", choices=("core", "full", "stress"), default="core", help="default core")
    parser.add_argument("--junit", metavar="FILE", help="write a JUnit report there")
    parser.add_argument("--seed", type=int, metavar="N", help="an order of cases, and random plans, that N repeats")
    parser.add_argument("-k", dest="pattern", default="", metavar="PATTERN", help="only cases of this name or glob")
    parser.add_argument("--list", action="store_true", dest="only_list", help="print the cases, and run nothing")
    parser.add_argument(
        "--mutations", action="store_true", help="make mistakes in the backend's place, and tell which cases notice"
    )


def _agent(parser: argparse.ArgumentParser) -> None:
    """The defaults are those of netapply.agent.AgentConfig."""
    add = parser.add_argument
    add("--plans", default="/etc/netapply/plans.d", metavar="DIR", help='plan files, watched; "" for none')
    add("--state", default="/var/lib/netapply", metavar="DIR", help='what was asked for, kept; "" for nowhere')
    add("--journal", metavar="DIR", help="where the journal is; default /run/netapply")
    add("--socket", default=client.CONTROL, metavar="PATH", help="for everything")
    add("--read-socket", default=client.READ, metavar="PATH", help='for reading alone; "" for none')
    add("--read-group", default="", metavar="GROUP", help="whose members may read; root alone by default")
    add("--metrics", default="", metavar="ADDRESS:PORT", help="for Prometheus, on loopback; off by default")
    add("--host", action="store_true", help="allow the machine's own namespace")
    add("--owned", choices=("auto", "never"), default="never", help="native tables that nobody else can change")
    add("--poll", type=words.seconds, default=1.0, metavar="SECONDS", help="looks where the kernel tells nothing")
    add("--looks", type=float, default=40.0, metavar="N", help="of these at most so many a second, all together")
    add("--concurrency", type=int, default=0, metavar="N", help="worker threads at most; as many as serve by default")
    add("--lock-timeout", type=words.seconds, default=2.0, metavar="SECONDS", help="default 2")
    add("--log", choices=("auto", "json", "text"), default="auto", help="text on a terminal, else JSON")


def _install(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="flags of netapply agent, after --")
    parser.add_argument("--root", default="/", metavar="DIR", help="below which /etc is; / by default")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true", dest="only_print", help="print the files, and write none")
    what.add_argument("--remove", action="store_true", help="remove what was written")


def _migrate(parser: argparse.ArgumentParser) -> None:
    words.plan(parser)
    parser.add_argument("--to", required=True, metavar="NAME", help=f"{', '.join(BACKENDS[1:])}, or another's")
    parser.add_argument("--adopt", action="store_true", help="leave what Istio's own commands left behind as well")
    parser.add_argument("--no-probe", action="store_true", help="without canary connections on the way")
    words.layout(parser)
    words.namespace(parser)
    words.alone(parser)
    words.reason(parser)


def _looks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-N", "--netns", metavar="NS", help="only this namespace, by the name that status shows")
    parser.add_argument("--socket", metavar="PATH", help="the agent's; its usual places by default")


def _explain(parser: argparse.ArgumentParser) -> None:
    _flow(parser)
    parser.add_argument("--traffic-types", action="store_true", help="a table of the six traffic types of a sidecar")
    parser.add_argument("--all", action="store_true", help="in every dialect; with a plan")
    words.backend(parser)


def _graph(parser: argparse.ArgumentParser) -> None:
    _flow(parser)
    named = 'a connection of the six traffic types, as explain --traffic-types names it: "app to remote", or 2'
    parser.add_argument("--flow", metavar="NAME", help=named)
    parser.add_argument("--family", choices=("ip", "ip6"), help="ip or ip6; that of the flow, or ip")
    parser.add_argument("--format", choices=("svg", "mermaid", "dot"), default="svg", help="default svg, by Graphviz")
    words.backend(parser)


def _flow(parser: argparse.ArgumentParser) -> None:
    """Rules, of a plan or of a namespace, and a flow that meets them."""
    words.namespace(parser)
    parser.add_argument("plan", nargs="?", metavar="PLAN", help="a plan file; without one, the rules that stand")
    known = "uid=, gid=, cgroup=, iface=, mark=, state=, an address and port; the rest is assumed, and told"
    for option, name in (("--from", "source"), ("--to", "destination")):
        parser.add_argument(
            option, dest=name, nargs="+", action="extend", default=[], metavar="WORD", help=f"of {option[2:]}: {known}"
        )
    parser.add_argument("--inbound", action="store_true", help="the packet comes in from elsewhere")
    parser.add_argument("--dns", action="store_true", help="a query: UDP to port 53 unless told otherwise")
    protocol = parser.add_mutually_exclusive_group()
    protocol.add_argument("--tcp", action="store_true", help="the default but for --dns")
    protocol.add_argument("--udp", action="store_true")
