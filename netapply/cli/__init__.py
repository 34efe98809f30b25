"""The command. `main` parses, runs one command, prints its outcome or its error, and returns the exit code.

Exit codes: 0 done; 1 error, bad input included; 2 `diff` found changes; 3 `verify` found drift; 126 a connection
did not go where the plan says (`--probe`); 130 interrupted by SIGINT.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from netapply.errors import NetapplyError

if TYPE_CHECKING:
    from netapply.cli.arguments import UsageError

_AFTERWARDS = "netapply verify tells what stands; a run that had not ended was rolled back"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if argv is not None:
        return _run([*argv])
    gc.disable()  # an everyday command ends before cycles matter
    code = _run(sys.argv[1:])
    gc.freeze()  # nor when the interpreter ends, which would look at every object twice
    return code


def _run(words: Sequence[str]) -> int:
    try:
        return _begin(words)
    except KeyboardInterrupt:  # while what a command needs is read in, which takes as long as a short one
        sys.stderr.write(f"netapply: interrupted\n  next: {_AFTERWARDS}\n")
        return 130


def _begin(words: Sequence[str]) -> int:
    if words[:1] in (["istio-iptables"], ["istio-clean-iptables"]):
        from netapply.cli import istio  # reads Istio's words itself: argparse takes half as long as a whole apply

        return istio.main(words[0], words[1:], os.environ)
    return _main(words)


def _main(argv: Sequence[str]) -> int:
    from netapply.cli.words import Arguments, read

    arguments = read(argv)
    if arguments is None:
        gc.enable()  # the others may run for long
        from netapply.cli.arguments import UsageError, build_parser

        try:
            arguments = build_parser(lean=True).parse_args(argv, Arguments())
        except UsageError as error:
            return _misused(argv, error)
    from netapply.cli import commands, output

    printer = output.Printer(arguments.output, sys.stdout, sys.stderr)
    try:
        code = commands.COMMANDS[arguments.command](arguments, printer)
        printer.flush()
    except NetapplyError as error:
        printer.error(arguments.command, error)
        return error.exit_code
    except OSError as error:  # a system call that should not fail, did
        what = f"{_call(error)}: {error.strerror or error}"
        printer.error(arguments.command, NetapplyError(what, next_step=_AFTERWARDS))
        return 1
    except KeyboardInterrupt:
        printer.error(arguments.command, NetapplyError("interrupted", next_step=_AFTERWARDS))
        return 130
    return code


def _call(error: OSError) -> str:
    """The function that the system refused, and what it was asked about."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    name = last.tb_frame.f_code.co_qualname if last is not None else "a system call"
    return f"{name} {error.filename}" if error.filename else name


def _misused(argv: Sequence[str], error: UsageError) -> int:
    """Say what is wrong with the command line, in the form that it asks for."""
    from netapply.cli import output

    form = "json" if {"json", "--output=json", "-ojson"}.intersection(argv) else "text"
    printer = output.Printer(form, sys.stdout, sys.stderr)
    if form == "text":
        sys.stderr.write(error.usage)
    printer.error(argv[0] if argv and not argv[0].startswith("-") else "netapply", error)
    return error.exit_code
