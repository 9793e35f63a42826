"""Loading a released checkpoint that is larger than memory, quantised on the way: time and peak memory.

Writes a checkpoint of random bfloat16 numbers with the names and shapes of ``--preset`` (V2-Lite: 31 GB) once, under
``--dir``, then loads it in a process of its own. The limit is what must be held at the end: the quantised weights.
Peak memory is that of the process without the pages of files, which the system may drop at any time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from _report import case, finish
from safetensors.torch import save_file

from fourfold.config import ModelConfig
from fourfold.model.transformer import Model
from fourfold.text.tokenizer import train_tokenizer
from fourfold.weights.checkpoint import load_model
from fourfold.weights.families import FAMILIES
from fourfold.weights.families.entries import disk_shapes

MODEL_TYPES = {"v2-lite": "deepseek_v2", "v2": "deepseek_v2", "v3": "deepseek_v3", "v4-flash": "deepseek_v4"}
SHARD = 4 * 2**30


def write(preset: str, directory: Path, layers: int | None) -> None:
    """The checkpoint, unless it is there; a few gigabytes at a time."""
    if (directory / "model.safetensors.index.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    cfg = ModelConfig.preset(preset, **({"num_hidden_layers": layers} if layers else {}))
    family = FAMILIES[MODEL_TYPES[preset]]
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Model(cfg).state_dict().items()}
    pool = torch.randn(1 << 26).mul_(0.02).bfloat16()
    shard: dict[str, torch.Tensor] = {}
    size, number, places = 0, 0, {}

    def flush() -> None:
        nonlocal size, number
        name = f"model-{number:05}.safetensors"
        save_file(shard, directory / name)
        places.update(dict.fromkeys(shard, name))
        shard.clear()
        size, number = 0, number + 1

    for at, (name, shape) in enumerate(disk_shapes(family.plan(cfg, "released"), shapes).items()):
        count = torch.Size(shape).numel()
        start = at * 7919 % (1 << 16)
        shard[name] = pool.repeat(-(-(start + count) // len(pool)))[start : start + count].reshape(shape).clone()
        size += 2 * count
        if size > SHARD:
            flush()
    flush()
    (directory / "config.json").write_text(json.dumps(family.to_config(cfg, "released")))
    train_tokenizer(["a tokenizer must be there; nothing is asked of it"], 300).save(directory / "tokenizer.json")
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def load(directory: Path, quant: str | None) -> None:
    """Loads and prints what it took, as JSON; runs in a process of its own."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, anonymous_bytes())

    before = anonymous_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    model, _ = load_model(directory, torch.bfloat16, quant, progress=True)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    print(json.dumps({"seconds": seconds, "peak": peak - before, "held": held}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    parser.add_argument("--dir", type=Path, default=Path("/tmp/fourfold-loading"), help="where the checkpoint lies")
    parser.add_argument("--preset", choices=MODEL_TYPES, default="v2-lite")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset's, for a smaller disk")
    parser.add_argument("--quant", choices=("int8", "int4"), default="int4")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return load(args.dir, args.quant)
    write(args.preset, args.dir, args.layers)
    size = sum(path.stat().st_size for path in args.dir.glob("*.safetensors"))
    command = [sys.executable, __file__, "--child", "--dir", str(args.dir), "--quant", args.quant]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    got = json.loads(run.stdout)
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gib = 2.0**30
    name = f"{args.preset}, {size / gib:.1f} GiB bfloat16 on disk, {ram / gib:.1f} GiB of memory, as {args.quant}"
    peak = got["peak"] / gib
    rate = size / gib / got["seconds"]
    finish(
        {
            f"{name}: peak memory": case(peak, None, got["held"] / gib, "GiB", [peak]),
            f"{name}: seconds": case(got["seconds"], None, None, "s", [got["seconds"]], read=f"{rate:.2f} GiB/s"),
        },
        args.json,
    )
    return None


if __name__ == "__main__":
    main()
