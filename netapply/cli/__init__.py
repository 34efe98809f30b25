"""The command. `main` parses, runs one command, prints its outcome or its error, and returns the exit code.

Exit codes: 0 done; 1 error, bad input included; 2 `diff` found changes; 3 `verify` found drift.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from netapply.cli.arguments import build_parser
from netapply.errors import NetapplyError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    from netapply.cli import commands, output

    printer = output.Printer(arguments.output, sys.stdout, sys.stderr)
    try:
        return commands.COMMANDS[arguments.command](arguments, printer)
    except NetapplyError as error:
        printer.error(arguments.command, error)
        return error.exit_code
    except BrokenPipeError:
        # The reader of a pipe has gone (`netapply show | head`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        printer.error(arguments.command, NetapplyError("interrupted; what had begun was rolled back"))
        return 130
