"""quantize: a model with smaller weights, and what that costs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from fourfold.cli.options import SOURCE_HELP, Command, add_json
from fourfold.cli.show import print_json, print_table, say, size_text

AUTO = "auto"


def add_commands(command: Command) -> None:
    quantize = command("quantize", _quantize, "write a model with its large weights in int8, int4 or fp8")
    quantize.add_argument("source", metavar="SRC", help=SOURCE_HELP)
    quantize.add_argument("destination", type=Path, metavar="DST", help="a directory that is not there yet, or empty")
    quantize.add_argument("--to", required=True, metavar="KIND", help="int8, int4 or fp8")
    quantize.add_argument(
        "--group", type=int, default=32, metavar="N", help="int4: inputs per scale, 32 (default) to 128"
    )
    quantize.add_argument(
        "--calibrate",
        nargs="?",
        const=AUTO,
        metavar="DATA",
        help="choose the codes on what runs through the model: a .jsonl of samples, a text file, or nothing for the "
        "built corpus or the generated skills; takes the memory of the whole model in fp32",
    )
    quantize.add_argument(
        "--tokens", type=int, default=32_768, metavar="N", help="calibrate on so many (default: 32768)"
    )
    quantize.add_argument("--report", type=Path, metavar="OUT.json", help="measure the result beside SRC")
    quantize.add_argument(
        "--samples", type=int, default=50, metavar="N", help="items a task in the report (default: 50)"
    )
    add_json(quantize)


def _quantize(args: argparse.Namespace) -> None:
    from fourfold.weights.quantized import quantize

    for name in ("tokens", "samples"):
        if getattr(args, name) < (name == "tokens"):
            raise ValueError(f"--{name}: is {getattr(args, name)}; must be at least {int(name == 'tokens')}")
    calibration = {None: False, AUTO: True}.get(args.calibrate, args.calibrate)
    shown = sys.stderr.isatty()
    done = quantize(
        args.source,
        args.destination,
        args.to,
        args.group,
        Path(calibration) if isinstance(calibration, str) else calibration,
        args.tokens,
        progress=shown,
    )
    said: dict[str, Any] = {**vars(done), "path": str(done.path)}
    if args.report is not None:
        data = Path(calibration) if isinstance(calibration, str) else None
        said["report"] = _report(args, data)
        args.report.write_text(json.dumps(said, indent=2) + "\n")
        say(f"report written to {args.report}")
    if args.json:
        print_json(said)
        return
    group = f" in groups of {done.group}" if done.group else ""
    chosen = f"chosen on {done.tokens:,} tokens" if done.tokens else "rounded to the nearest"
    print(f"{done.path}: {done.kind}{group}, {chosen}; {done.tensors:,} tensors, {size_text(done.bytes)}")
    if args.report is not None:
        _print_report(said["report"])


def _report(args: argparse.Namespace, data: Path | None) -> dict[str, Any]:
    import fourfold
    from fourfold.counts import weight_bytes
    from fourfold.eval.fidelity import compare

    with (
        contextlib.closing(fourfold.load(args.source)) as reference,
        contextlib.closing(fourfold.load(str(args.destination))) as model,
    ):
        found = compare(model, reference, args.samples, data)
        found["bytes"] = {"quantised": _bytes(args.destination), "bf16": sum(weight_bytes(model.config).values())}
    return found


def _bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def _print_report(report: dict[str, Any]) -> None:
    def both(score: dict[str, float], key: str) -> str:
        return f"{score[key]:.4g} / {score[f'{key}_reference']:.4g}" if key in score else ""

    rows = [
        (
            name,
            f"{score['n']:,}",
            f"{score['kl']:.5f}",
            f"{score['same_choice']:.2%}",
            both(score, "perplexity"),
            both(score, "bits_per_byte"),
        )
        for name, score in report["tokens"].items()
    ]
    columns = ("held-out tokens", "n", "KL, nats", "same choice", "perplexity / before", "bits a byte / before")
    print_table("", columns, rows)
    if report["tasks"]:
        tasks = [
            (name, str(t["n"]), f"{t['accuracy']:.1%}", f"{t['accuracy_reference']:.1%}", f"{t['same_answer']:.1%}")
            for name, t in report["tasks"].items()
        ]
        mean = report["mean"]
        tasks.append(("mean", "", f"{mean['accuracy']:.1%}", f"{mean['accuracy_reference']:.1%}", ""))
        print_table("", ("task", "n", "accuracy", "before", "same answer"), tasks)
    small, wide = report["bytes"]["quantised"], report["bytes"]["bf16"]
    print(f"weights {size_text(small)}, {small / wide:.1%} of {size_text(wide)} in bf16")
