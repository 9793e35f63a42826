"""serve, chat and generate: talking to a model."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold.cli.options import Command, add_engine, add_json, add_model, load_engine, port
from fourfold.cli.show import print_json, say

if TYPE_CHECKING:
    from fourfold.serve.local import LocalModel

MEDIA = ("image", "audio", "video")
CHAT_HELP = """/image F, /audio F, /video F  attach a file to the next message
/file F    put a text file into the next message
/think     think before answering, or no longer
/reset     forget the conversation
/exit      leave"""


def add_commands(command: Command) -> None:
    serve = command("serve", _serve, "answer OpenAI's protocol over HTTP, with a playground")
    add_model(serve)
    add_engine(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    serve.add_argument("--port", type=port, default=8000, help="port to listen on (default: %(default)s)")
    serve.add_argument(
        "--api-key",
        default=os.environ.get("FOURFOLD_API_KEY"),
        metavar="KEY",
        help="what every request must carry (default: $FOURFOLD_API_KEY, else nothing)",
    )

    chat = command("chat", _chat, "talk to a model in the terminal")
    add_model(chat)
    add_engine(chat)
    _sampling(chat)

    generate = command("generate", _generate, "answer one prompt")
    add_model(generate)
    add_engine(generate)
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="the user's message; - reads standard input")
    generate.add_argument("--system", metavar="TEXT", help="what comes before the conversation")
    for kind in MEDIA:
        generate.add_argument(f"--{kind}", action="append", default=[], metavar="F", help=f"attach {kind}; repeatable")
    _sampling(generate)
    add_json(generate)


def _sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (default: what the context holds)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="keep the likeliest tokens of this mass")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    parser.add_argument("--think", action="store_true", help="think before answering")


def _serve(args: argparse.Namespace) -> None:
    from fourfold.api.server import run_server

    model = load_engine(args)  # the server closes its engine
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
    from fourfold.serve.local import decode_media
    from fourfold.serve.request import Finished
    from fourfold.text.chat import Message

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    with contextlib.closing(load_engine(args)) as model:
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
            print_json(said)
        else:
            print()


def _chat(args: argparse.Namespace) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing and history)

    with contextlib.closing(load_engine(args)) as model:
        if sys.stdin.isatty():
            say(f"{args.model} reads {', '.join(('text', *model.config.media.modalities))}. /help lists the commands.")
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
                say(str(error))

    def command(self, name: str = "", argument: str = "") -> None:
        if name in (*MEDIA, "file"):
            self.attach(name, argument)
        elif name == "reset":
            self.messages.clear()
            self.attached.clear()
            say("the conversation is forgotten")
        elif name == "think":
            self.options["thinking"] = not self.options["thinking"]
            say(f"thinking is {'on' if self.options['thinking'] else 'off'}")
        else:
            say(CHAT_HELP)

    def attach(self, kind: str, file: str) -> None:
        from fourfold.serve.local import decode_media

        if not file:
            raise ValueError(f"/{kind}: name a file")
        path = Path(file).expanduser()
        if kind == "file":
            self.attached.append(path.read_text())
        else:
            self.attached.append(decode_media(kind, path, self.model.config.media))
        say(f"{path.name} goes with the next message")

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
