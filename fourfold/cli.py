"""The command line. Each command imports what it needs, so that ``fourfold --help`` answers at once.

Exit status: 0 done, 1 failed, 2 bad input (one line on standard error either way), 130 interrupted.
``FOURFOLD_TRACEBACK=1`` shows where an error came from.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from fourfold.config import ModelConfig
    from fourfold.plan import Plan
    from fourfold.serve.local import LocalModel

MEDIA = ("image", "audio", "video")
CHAT_HELP = """/image F, /audio F, /video F  attach a file to the next message
/file F    put a text file into the next message
/think     think before answering, or no longer
/reset     forget the conversation
/exit      leave"""


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fourfold", description="Train, study and serve one model for text, images, video and audio.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        return sub

    serve = command("serve", _serve, "answer OpenAI's protocol over HTTP, with a playground")
    _model(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=_port, default=8000, help="port to listen on (default: %(default)s)")
    serve.add_argument(
        "--api-key",
        default=os.environ.get("FOURFOLD_API_KEY"),
        metavar="KEY",
        help="what every request must carry (default: $FOURFOLD_API_KEY, else nothing)",
    )

    chat = command("chat", _chat, "talk to a model in the terminal")
    _model(chat)
    _sampling(chat)

    generate = command("generate", _generate, "answer one prompt")
    _model(generate)
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the user's message; - reads standard input")
    generate.add_argument("--system", metavar="TEXT", help="what comes before the conversation")
    for kind in MEDIA:
        generate.add_argument(f"--{kind}", action="append", default=[], metavar="F", help=f"attach {kind}; repeatable")
    _sampling(generate)
    _json(generate)

    inspect = command("inspect", _inspect, "say what a preset, a model or a weights file is made of")
    inspect.add_argument("target", metavar="PRESET|DIR|FILE.safetensors")
    _json(inspect)

    train = command("train", _train, "train from a recipe; continues an interrupted run by itself")
    train.add_argument("recipe", type=Path, metavar="RECIPE.toml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the recipe to replace")

    plan = command("plan", _plan, "say whether a model fits a machine and how fast it can be at best")
    plan.add_argument("target", metavar="PRESET|DIR")
    plan.add_argument("--quant", default="bf16", help="fp32, bf16, int8 or int4 (default: %(default)s)")
    plan.add_argument("--vram", type=_size, default=0, metavar="SIZE", help="memory of all GPUs (default: none)")
    plan.add_argument("--ram", type=_size, metavar="SIZE", help="main memory (default: this machine's)")
    plan.add_argument("--disk", type=_size, metavar="SIZE", help="room on disk (default: what is free here)")
    plan.add_argument("--context", type=int, default=4096, help="tokens per sequence (default: %(default)s)")
    plan.add_argument("--batch", type=int, default=1, help="sequences at once (default: %(default)s)")
    for memory, default in (("vram", "1000GB"), ("ram", "50GB"), ("disk", "2GB")):
        plan.add_argument(
            f"--{memory}-bandwidth", type=_size, default=default, metavar="SIZE", help="a second (default: %(default)s)"
        )
    _json(plan)

    evaluate = command("eval", _eval, "measure a model with a suite")
    evaluate.add_argument("suite", metavar="SUITE", help="module of fourfold.eval: media or bpb")
    evaluate.add_argument("--model", default="nano", metavar="MODEL", help="nano or a directory (default: nano)")
    evaluate.add_argument("--length", type=int, help="tokens of a test item")
    evaluate.add_argument("--task", help="one task of the suite")
    evaluate.add_argument("--samples", type=int, help="items per task")
    evaluate.add_argument("--seed", type=int, help="seed of the items")
    evaluate.add_argument("--json", type=Path, metavar="OUT", help="write the scores to this file")

    data = command("data", _data, "build or list training data")
    actions = data.add_subparsers(dest="action", required=True, metavar="build|list")
    build = actions.add_parser("build", help="fetch, convert and check a data set")
    build.add_argument("name", metavar="NAME")
    build.add_argument("--out", type=Path, metavar="DIR", help="where to (default: the data folder)")
    _json(actions.add_parser("list", help="the data sets that can be built"))
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="nano", metavar="MODEL", help="nano or a directory (default: nano)")
    parser.add_argument("--dtype", help="fp32 or bf16 (default: as stored)")


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: what the context holds)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="keep the likeliest tokens of this mass")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    parser.add_argument("--think", action="store_true", help="think before answering")


def _port(text: str) -> int:
    if not text.isdecimal() or not int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; write a number from 0 to 65535")
    return int(text)


def _size(text: str) -> int:
    from fourfold.plan import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


# ---------------------------------------------------------------- talking to a model


def _serve(args: argparse.Namespace) -> None:
    import fourfold
    from fourfold.api.server import run_server

    model = fourfold.load(args.model, dtype=args.dtype)  # the server closes its engine
    run_server(model.engine, Path(args.model).name, host=args.host, port=args.port, api_key=args.api_key)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
        "thinking": args.think,
    }


def _generate(args: argparse.Namespace) -> None:
    import fourfold
    from fourfold.serve.local import decode_media
    from fourfold.serve.request import Finished
    from fourfold.text.chat import Message

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with contextlib.closing(fourfold.load(args.model, dtype=args.dtype)) as model:
        media = [decode_media(kind, Path(f), model.config.media) for kind in MEDIA for f in getattr(args, kind)]
        system = [Message("system", args.system)] if args.system else []
        events = model.events([*system, Message("user", [*media, prompt])], **_options(args))
        said: dict[str, Any] = {"reasoning": "", "content": ""}
        for event in events:
            if isinstance(event, Finished):
                said |= {"finish_reason": event.reason, "usage": vars(event.usage)}
            elif args.json:
                said[event.kind] += event.text
            else:
                # the answer alone goes to standard output
                print(event.text, end="", flush=True, file=sys.stdout if event.kind == "content" else sys.stderr)
        if args.json:
            _print_json(said)
        else:
            print()


def _chat(args: argparse.Namespace) -> None:
    import fourfold

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history)

    with contextlib.closing(fourfold.load(args.model, dtype=args.dtype)) as model:
        if sys.stdin.isatty():
            _say(f"{args.model} reads {', '.join(('text', *model.config.media.modalities))}. /help lists the commands.")
        _Chat(model, _options(args)).run()


class _Chat:
    """A conversation; ``attached`` waits for the next message."""

    def __init__(self, model: LocalModel, options: dict[str, Any]) -> None:
        from rich.console import Console

        self.model, self.options = model, options
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.messages: list[Any] = []
        self.attached: list[Any] = []

    def run(self) -> None:
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            if line in ("/exit", "/quit"):
                return
            try:
                if line.startswith("/"):
                    self.command(*line[1:].split(maxsplit=1))
                elif line or self.attached:
                    self.answer(line)
            except (ValueError, OSError) as error:
                _say(str(error))

    def command(self, name: str = "", argument: str = "") -> None:
        if name in (*MEDIA, "file"):
            self.attach(name, argument)
        elif name == "reset":
            self.messages.clear()
            self.attached.clear()
            _say("the conversation is forgotten")
        elif name == "think":
            self.options["thinking"] = not self.options["thinking"]
            _say(f"thinking is {'on' if self.options['thinking'] else 'off'}")
        else:
            _say(CHAT_HELP)

    def attach(self, kind: str, file: str) -> None:
        from fourfold.serve.local import decode_media

        if not file:
            raise ValueError(f"/{kind}: name a file")
        path = Path(file).expanduser()
        if kind == "file":
            self.attached.append(path.read_text())
        else:
            self.attached.append(decode_media(kind, path, self.model.config.media))
        _say(f"{path.name} goes with the next message")

    def answer(self, line: str) -> None:
        """One turn. Ctrl-C ends the answer, not the conversation; a turn that fails leaves no trace."""
        from fourfold.serve.request import Finished
        from fourfold.text.chat import Message

        question = Message("user", [*self.attached, line])
        said = {"reasoning": "", "content": ""}
        events = self.model.events([*self.messages, question], **self.options)
        with contextlib.suppress(KeyboardInterrupt):
            for event in events:
                if not isinstance(event, Finished):
                    said[event.kind] += event.text
                    self.console.print(event.text, end="", style="dim" if event.kind == "reasoning" else None)
        self.console.print()
        self.attached.clear()
        self.messages += [question, Message("assistant", said["content"], reasoning=said["reasoning"] or None)]


# ---------------------------------------------------------------- looking at models


def _config(target: str) -> ModelConfig:
    """The configuration of a preset or of a model directory."""
    from fourfold.config import PRESETS, ModelConfig
    from fourfold.fields import ConfigError

    if (PRESETS / f"{target}.toml").is_file():
        return ModelConfig.preset(target)
    if not Path(target).is_dir():
        known = ", ".join(sorted(path.stem for path in PRESETS.glob("*.toml")))
        raise ConfigError(f"{target!r} is neither a directory nor one of the presets {known}")
    from fourfold.weights.checkpoint import load_config

    return load_config(Path(target))


def _inspect(args: argparse.Namespace) -> None:
    path = Path(args.target)
    if path.is_file() or path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        tensors = _tensors([path])
        _print_json({"tensors": tensors}) if args.json else _print_tensors(tensors)
        return
    from fourfold.counts import cache_bytes_per_token, count_parameters, weight_bytes

    cfg = _config(args.target)
    params = count_parameters(cfg)
    found: dict[str, Any] = {
        "params": params,
        "weight_bytes": {dtype: sum(weight_bytes(cfg, dtype).values()) for dtype in ("bf16", "int8", "int4")},
        "cache_bytes_per_token": cache_bytes_per_token(cfg)["total"],
        "config": cfg.to_dict(),
    }
    if path.is_dir():
        found["tensors"] = _tensors(sorted(path.glob("*.safetensors")))
    if args.json:
        _print_json(found)
        return
    rows = [(part.replace("_", " "), f"{count:,}") for part, count in params["by_part"].items() if count]
    _print_table(args.target, ("part", "parameters"), rows)
    print(f"total {params['total']:,}, active {params['active']:,} (without MTP and media)")
    sizes = ", ".join(f"{dtype} {_bytes(size)}" for dtype, size in found["weight_bytes"].items())
    print(f"weights {sizes}; cache {_bytes(found['cache_bytes_per_token'])} a token")
    if "tensors" in found:
        _print_tensors(found["tensors"])


def _tensors(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Name, dtype and shape of every tensor, from the headers alone. Only safetensors is ever opened."""
    from safetensors import SafetensorError, safe_open

    found = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
        if file.suffix != ".safetensors":
            raise ValueError(f"{file}: only .safetensors files are read (a pickle can run code)")
        try:
            with safe_open(file, framework="np") as handle:
                for name in handle.keys():  # noqa: SIM118  (not a dict)
                    view = handle.get_slice(name)
                    found.append({"name": name, "dtype": view.get_dtype(), "shape": list(view.get_shape())})
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    return found


def _print_tensors(tensors: list[dict[str, Any]]) -> None:
    from math import prod

    rows = [(t["name"], t["dtype"], " x ".join(map(str, t["shape"])), f"{prod(t['shape']):,}") for t in tensors]
    _print_table("tensors", ("name", "dtype", "shape", "numbers"), rows)
    print(f"{len(tensors)} tensors, {sum(prod(t['shape']) for t in tensors):,} numbers")


def _plan(args: argparse.Namespace) -> None:
    from fourfold.plan import plan

    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if args.ram is None else args.ram
    disk = shutil.disk_usage(".").free if args.disk is None else args.disk
    found = plan(
        _config(args.target),
        quant=args.quant,
        context=args.context,
        batch=args.batch,
        vram=args.vram,
        ram=ram,
        disk=disk,
        vram_bandwidth=args.vram_bandwidth,
        ram_bandwidth=args.ram_bandwidth,
        disk_bandwidth=args.disk_bandwidth,
    )
    _print_json(found.to_dict()) if args.json else _print_plan(args.target, found)


def _print_plan(target: str, found: Plan) -> None:
    names = [memory.name for memory in found.memories]
    rows = [
        (
            part.name.replace("_", " "),
            _bytes(part.size),
            _bytes(part.read),
            *(_bytes(part.placed[name]) if name in part.placed else "" for name in names),
            _bytes(part.missing) if part.missing else "",
        )
        for part in found.parts
    ]
    title = f"{target}, {found.quant}, {found.batch} x {found.context:,} tokens"
    _print_table(title, ("part", "size", "read a step", *names, "no room"), rows)
    sizes = ", ".join(f"{dtype} {_bytes(size)}" for dtype, size in found.weights.items())
    print(f"{found.parameters:,} parameters, {found.active:,} active; weights with MTP and media: {sizes}")
    print(f"cache: {_bytes(found.cache_bytes_per_token)} a token")
    decode, prefill = found.decode_flops, found.prefill_flops
    print(f"compute: {decode['total'] / 1e9:,.3g} GFLOP a decoded token, {prefill['total'] / 1e9:,.3g} a prompt token")
    if found.fits:
        print(f"fits; at most {found.tokens_per_second:,.3g} tokens/s, limited by reading {found.limited_by}")
    else:
        print(f"does not fit: {_bytes(found.missing)} too much")
    for heading, lines in (("assumed", found.assumptions), ("not modelled", found.not_modelled)):
        print(f"\n{heading}:")
        for line in lines:
            print(f"  - {line}")


def _print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else 200  # what is piped on is not cut to a window
    Console(highlight=False, width=width).print(table)


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} TiB"


# ---------------------------------------------------------------- training, evaluation, data


def _train(args: argparse.Namespace) -> None:
    if not args.recipe.is_file():
        raise ValueError(f"RECIPE.toml: {args.recipe} is not a file")
    from fourfold.fields import parse_override

    for override in args.overrides:
        parse_override(override)  # a slip of the pen is told before torch is loaded
    from fourfold.train.loop import train

    train(args.recipe, args.overrides)


def _eval(args: argparse.Namespace) -> None:
    import importlib
    import pkgutil

    import fourfold.eval

    suites = sorted(module.name for module in pkgutil.iter_modules(fourfold.eval.__path__))
    if args.suite not in suites:
        raise ValueError(f"SUITE: {args.suite!r} is unknown; choose one of {', '.join(suites)}")
    given = {name: getattr(args, name) for name in ("length", "task", "samples", "seed")}
    settings = {name: value for name, value in given.items() if value is not None}
    suite = importlib.import_module(f"fourfold.eval.{args.suite}")
    with contextlib.closing(fourfold.load(args.model)) as model:
        report = suite.run(model, settings)
    rows = [
        (task, str(score.get("n", "")), *(f"{value:.4g}" for key, value in score.items() if isinstance(value, float)))
        for task, score in report["scores"].items()
    ]
    metrics = [key for key, value in next(iter(report["scores"].values()), {}).items() if isinstance(value, float)]
    _print_table(f"{args.suite}, {args.model}", ("task", "n", *metrics), rows)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
        _say(f"scores written to {args.json}")


def _data(args: argparse.Namespace) -> int:
    from fourfold.data.build import RECIPES, build

    if args.action == "list":
        listed = {name: {shard: source.skill for shard, source in shards.items()} for name, shards in RECIPES.items()}
        if args.json:
            _print_json(listed)
            return 0
        for name, shards in listed.items():
            _print_table(name, ("part", "needed for"), list(shards.items()))
        return 0
    report = build(args.name, args.out)
    return 1 if report.missing else 0
