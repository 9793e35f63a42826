"""Arguments that several commands take."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from fourfold.serve.local import LocalModel

# Adds a command: its name, what runs it, and its help text.
Command = Callable[[str, Callable[[argparse.Namespace], int | None], str], argparse.ArgumentParser]
SOURCE_HELP = "nano, a directory (ours or Hugging Face's), a hub id or a .gguf file"
MODEL_HELP = f"{SOURCE_HELP} (default: nano)"


class Parser(argparse.ArgumentParser):
    """Bad usage costs one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="nano", metavar="MODEL", help=MODEL_HELP)
    add_numbers(parser)


def add_numbers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", help="fp32 or bf16 (default: fp32)")
    parser.add_argument("--quant", choices=("int8", "int4", "fp8"), help="quantise the large weights while loading")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """How the engine of :func:`load_engine` uses the machine."""
    parser.add_argument(
        "--memory",
        type=byte_count,
        metavar="SIZE",
        help="what weights, cache and workspace may take together, for example 8GiB (default: a cache of up to 1GiB)",
    )
    add_cache_format(parser, "as the weights")
    parser.add_argument(
        "--context-pages",
        metavar="DIR",
        help="keep the context in a temporary file here, and of it as much in memory as --memory allows",
    )
    parser.add_argument(
        "--context-pages-size", type=byte_count, default=10 * 2**30, metavar="SIZE", help="at most so much (10GiB)"
    )
    parser.add_argument("--context-cache", metavar="DIR", help="keep prefixes on disk here, over restarts too")
    parser.add_argument(
        "--context-cache-size", type=byte_count, default=10 * 2**30, metavar="SIZE", help="at most so much (10GiB)"
    )
    parser.add_argument(
        "--speculate",
        choices=("auto", "on", "off"),
        default="off",
        help="let the model's MTP block guess tokens ahead; the answers stay the same. Guessing and checking take time "
        "too, so it pays only where most guesses are right and few sequences run; auto stops it elsewhere "
        "(default: off)",
    )


def add_cache_format(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--cache-format",
        choices=("fp32", "bf16", "fp8", "int8"),
        help=f"the numbers that the context is kept in (default: {default})",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def load(args: argparse.Namespace) -> LocalModel:
    """The model of ``add_model``; its progress is shown to a terminal."""
    import fourfold

    return fourfold.load(args.model, dtype=args.dtype, quant=args.quant, progress=sys.stderr.isatty())


def load_engine(args: argparse.Namespace) -> LocalModel:
    """As :func:`load`, with the engine that ``add_engine`` describes; a model too large is refused before loading."""
    if args.memory is not None:
        from fourfold.serve.memory import check_weights
        from fourfold.weights.checkpoint import open_source, resolve

        source = open_source(resolve(args.model))
        stored = source.quantization and source.quantization.kind
        dtype = {"float32": "fp32", "bfloat16": "bf16"}.get(args.dtype, args.dtype)
        check_weights(source.cfg, args.memory, stored or args.quant or dtype or "fp32")
    model = load(args)
    model.engine_options = {
        "memory": args.memory,
        "cache_format": args.cache_format,
        "context_pages": args.context_pages,
        "context_pages_size": args.context_pages_size,
        "context_cache": args.context_cache,
        "context_cache_size": args.context_cache_size,
        "speculate": args.speculate,
    }
    return model


def port(text: str) -> int:
    if not text.isdecimal() or not int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; write a number from 0 to 65535")
    return int(text)


def byte_count(text: str) -> int:
    from fourfold.plan import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
