"""The command line. Each command imports what it needs, so that ``fourfold --help`` answers at once.

Exit status: 0 done, 1 failed, 2 bad input (one line on standard error either way), 130 interrupted.
``FOURFOLD_TRACEBACK=1`` shows where an error came from.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from fourfold.cli import look, quantise, talk, work
from fourfold.cli.options import Parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    args = build_parser().parse_args(argv)
    try:
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("FOURFOLD_TRACEBACK"):
            raise
        message = " ".join(str(error).split())
        print(f"fourfold {args.command}: {message or type(error).__name__}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fourfold", description="Train, study and serve one model for text, images, video and audio.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    talk.add_commands(command)
    look.add_commands(command)
    work.add_commands(command)
    quantise.add_commands(command)
    return parser
