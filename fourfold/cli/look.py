"""inspect and plan: what a model is made of, and what it takes to run."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourfold.cli.options import Command, add_json, byte_count
from fourfold.cli.show import print_json, print_table, size_text

if TYPE_CHECKING:
    from fourfold.config import ModelConfig
    from fourfold.plan import Plan
    from fourfold.weights.checkpoint import Source
    from fourfold.weights.tensors import TensorReader

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def add_commands(command: Command) -> None:
    inspect = command("inspect", _inspect, "say what a preset, a model or a weights file is made of")
    presets = f"one of {_presets()}; a model directory; a .safetensors or .gguf file"
    inspect.add_argument("target", metavar="PRESET|DIR|FILE", help=presets)
    add_json(inspect)

    plan = command("plan", _plan, "say whether a model fits a machine and how fast it can be at best")
    plan.add_argument("target", metavar="PRESET|DIR|FILE.gguf", help=f"one of {_presets()}; a model directory or file")
    plan.add_argument("--quant", default="bf16", help="fp32, bf16, int8 or int4 (default: %(default)s)")
    plan.add_argument("--cache-format", default="bf16", help="fp32, bf16, fp8 or int8 (default: %(default)s)")
    plan.add_argument("--context-pages", action="store_true", help="let the context rest on disk too")
    plan.add_argument("--vram", type=byte_count, default=0, metavar="SIZE", help="memory of all GPUs (default: none)")
    plan.add_argument("--ram", type=byte_count, metavar="SIZE", help="main memory (default: this machine's)")
    plan.add_argument("--disk", type=byte_count, metavar="SIZE", help="room on disk (default: what is free here)")
    plan.add_argument("--context", type=int, help="tokens per sequence (default: 4096, or all that the model takes)")
    plan.add_argument("--batch", type=int, default=1, help="sequences at once (default: %(default)s)")
    for memory, default in (("vram", "1000GB"), ("ram", "50GB"), ("disk", "2GB")):
        plan.add_argument(
            f"--{memory}-bandwidth",
            type=byte_count,
            default=default,
            metavar="SIZE",
            help="a second (default: %(default)s)",
        )
    add_json(plan)


def _config(target: str) -> ModelConfig:
    """The configuration of a preset, a model directory or a GGUF file."""
    from fourfold.config import ModelConfig
    from fourfold.fields import ConfigError

    if _is_preset(target):
        return ModelConfig.preset(target)
    if not Path(target).exists():
        raise ConfigError(f"{target!r} is neither a directory nor a file nor one of the presets {_presets()}")
    from fourfold.weights.checkpoint import load_config

    return load_config(Path(target))


def _is_preset(target: str) -> bool:
    from fourfold.config import PRESETS

    return (PRESETS / f"{target}.toml").is_file()


def _presets() -> str:
    from fourfold.config import PRESETS

    return ", ".join(sorted(path.stem for path in PRESETS.glob("*.toml")))


def _inspect(args: argparse.Namespace) -> None:
    path = Path(args.target)
    if path.suffix in (".safetensors", *PICKLES) and not path.is_dir():
        tensors = _tensors(path)
        print_json({"tensors": tensors}) if args.json else _print_tensors(tensors)
        return
    from fourfold.counts import cache_bytes_per_sequence, cache_bytes_per_token, count_parameters, weight_bytes

    if not _is_preset(args.target) and (path.suffix == ".gguf" or any(path.glob("*.safetensors*"))):
        from fourfold.weights.checkpoint import open_source

        source = open_source(path)
        cfg, checkpoint = source.cfg, _checkpoint(source)
    else:
        cfg, checkpoint = _config(args.target), {}
    params = count_parameters(cfg)
    found: dict[str, Any] = {
        "params": params,
        "weight_bytes": {dtype: sum(weight_bytes(cfg, dtype).values()) for dtype in ("bf16", "int8", "int4")},
        "cache_bytes_per_token": cache_bytes_per_token(cfg)["total"],
        "cache_bytes_per_sequence": cache_bytes_per_sequence(cfg),
        "config": cfg.to_dict(),
        **checkpoint,
    }
    print_json(found) if args.json else _print_model(args.target, found)


def _checkpoint(source: Source) -> dict[str, Any]:
    """What a directory or a GGUF file holds, from the headers alone.

    family and dialect; faults: what the names, shapes and types of the tensors would be refused for; storage: part ->
    number format -> numbers of the model stored so; tensors: as they lie on disk.
    """
    from math import prod

    from fourfold.counts import part_of
    from fourfold.weights.families.entries import Part, leaves
    from fourfold.weights.stream import missing_and_extra

    reader = source.numbers.reader
    names = set(reader.names())
    storage: dict[str, dict[str, int]] = {}
    stored = _quantised(source, names)
    for weight, (kind, count) in stored.items():
        formats = storage.setdefault(part_of(weight), {})
        formats[kind] = formats.get(kind, 0) + count
    for ours, entry in source.plan.items():
        if ours.endswith((".codes", ".scales")):
            continue
        formats = storage.setdefault(part_of(ours), {})
        for leaf in leaves(entry, tuple(source.wanted[ours].shape)):
            if isinstance(leaf.part, Part) and leaf.part.name in names:
                kind = _number_format(leaf.part.name, reader, names)
                formats[kind] = formats.get(kind, 0) + prod(leaf.shape)
    return {
        "family": "fourfold" if source.family is None else source.family.model_type,
        "dialect": _dialect(source),
        "faults": missing_and_extra(source.plan, source.wanted, source.numbers, source.ignored)[0],
        "storage": storage,
        "tensors": _listed(reader),
    }


def _quantised(source: Source, names: set[str]) -> dict[str, tuple[str, int]]:
    """Weights of our own files that are stored as codes: their number format, and how many numbers they are."""
    found = {}
    if source.quantization is not None:
        from math import prod

        from fourfold.quant.section import stored_names

        section = source.quantization
        label = f"int4 in {section.group}s" if section.kind == "int4" else section.kind
        for weight in section.weights:
            codes = stored_names(weight)[0]
            if codes in names:
                found[weight] = label, prod(source.wanted[codes].shape) * (2 if section.kind == "int4" else 1)
    return found


def _dialect(source: Source) -> str:
    """Tensor names differ in some families alone, config.json in all."""
    from fourfold.weights.checkpoint import read_config_values

    if source.family is None:
        return "native"
    if source.path.suffix == ".gguf":
        return "gguf"
    values = read_config_values(source.path / "config.json")
    return "transformers" if "rope_parameters" in values else "released"


def _number_format(name: str, reader: TensorReader, names: set[str]) -> str:
    from fourfold.weights.formats import scale_name

    scale = scale_name(name, names)
    if scale is None:
        return reader.dtype(name)
    packed = reader.dtype(name) in ("I8", "U8")
    return f"{'E2M1' if packed else reader.dtype(name)} + {reader.dtype(scale)}"


def _print_model(target: str, found: dict[str, Any]) -> None:
    params, storage = found["params"], found.get("storage", {})
    rows = [
        (part.replace("_", " "), f"{count:,}", _formats(storage.get(part, {})))
        for part, count in params["by_part"].items()
        if count
    ]
    title = f"{target} ({found['family']}, {found['dialect']})" if storage else target
    columns = ("part", "parameters", "stored as") if storage else ("part", "parameters")
    print_table(title, columns, [row[: len(columns)] for row in rows])
    print(f"total {params['total']:,}, active {params['active']:,} (without {_beside(params)})")
    sizes = ", ".join(f"{dtype} {size_text(size)}" for dtype, size in found["weight_bytes"].items())
    tail = found["cache_bytes_per_sequence"]
    beside = f" and {size_text(tail)} a sequence" if tail else ""
    print(f"weights {sizes}; cache {size_text(found['cache_bytes_per_token'])} a token{beside}")
    if storage:
        print(f"{len(found['tensors']):,} tensors on disk")
    for fault in found.get("faults", ()):
        print(f"would not load: {fault}")


def _beside(params: dict[str, Any]) -> str:
    """The parts that are not in the total."""
    beside = {"mtp": "MTP", "drafter": "drafter", "media": "media"}
    biases = params["by_part"]["router_bias"]
    outside = sum(params["by_part"].values()) - params["total"]
    if biases and outside == biases + sum(params["by_part"][part] for part in beside):
        beside["router_bias"] = "router biases"
    return ", ".join(text for part, text in beside.items() if params["by_part"][part]) or "nothing"


def _formats(stored: dict[str, int]) -> str:
    if len(stored) < 2:
        return "".join(stored)
    total = sum(stored.values())
    return ", ".join(f"{kind} {count / total:.3%}" for kind, count in sorted(stored.items(), key=lambda f: -f[1]))


def _tensors(path: Path) -> list[dict[str, Any]]:
    """Every tensor of one file, from its header alone. Only safetensors is ever opened."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix in PICKLES:
        raise ValueError(f"{path}: only .safetensors and .gguf files are read (a pickle can run code)")
    from fourfold.weights.tensors import SafetensorsReader

    return _listed(SafetensorsReader(path))


def _listed(reader: TensorReader) -> list[dict[str, Any]]:
    return [{"name": n, "dtype": reader.dtype(n), "shape": list(reader.shape(n))} for n in sorted(reader.names())]


def _print_tensors(tensors: list[dict[str, Any]]) -> None:
    from math import prod

    rows = [(t["name"], t["dtype"], " x ".join(map(str, t["shape"])), f"{prod(t['shape']):,}") for t in tensors]
    print_table("tensors", ("name", "dtype", "shape", "numbers"), rows)
    print(f"{len(tensors)} tensors, {sum(prod(t['shape']) for t in tensors):,} numbers")


def _plan(args: argparse.Namespace) -> None:
    from fourfold.plan import plan

    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if args.ram is None else args.ram
    disk = shutil.disk_usage(".").free if args.disk is None else args.disk
    cfg = _config(args.target)
    found = plan(
        cfg,
        quant=args.quant,
        cache_format=args.cache_format,
        context_pages=args.context_pages,
        context=min(4096, cfg.max_position_embeddings) if args.context is None else args.context,
        batch=args.batch,
        vram=args.vram,
        ram=ram,
        disk=disk,
        vram_bandwidth=args.vram_bandwidth,
        ram_bandwidth=args.ram_bandwidth,
        disk_bandwidth=args.disk_bandwidth,
    )
    print_json(found.to_dict()) if args.json else _print_plan(args.target, found)


def _print_plan(target: str, found: Plan) -> None:
    names = [memory.name for memory in found.memories]
    rows = [
        (
            part.name.replace("_", " "),
            size_text(part.size),
            size_text(part.read),
            *(size_text(part.placed[name]) if name in part.placed else "" for name in names),
            size_text(part.missing) if part.missing else "",
        )
        for part in found.parts
    ]
    title = f"{target}, {found.quant}, {found.batch} x {found.context:,} tokens"
    print_table(title, ("part", "size", "read a step", *names, "no room"), rows)
    sizes = ", ".join(f"{dtype} {size_text(size)}" for dtype, size in found.weights.items())
    print(f"{found.parameters:,} parameters, {found.active:,} active; weights with all parts: {sizes}")
    tail = f", {size_text(found.cache_bytes_per_sequence)} a sequence" if found.cache_bytes_per_sequence else ""
    print(f"cache: {size_text(found.cache_bytes_per_token)} a token{tail}")
    decode, prefill = found.decode_flops, found.prefill_flops
    print(f"compute: {decode['total'] / 1e9:,.3g} GFLOP a decoded token, {prefill['total'] / 1e9:,.3g} a prompt token")
    if found.fits:
        print(f"fits; at most {found.tokens_per_second:,.3g} tokens/s, limited by reading {found.limited_by}")
    else:
        print(f"does not fit: {size_text(found.missing)} too much")
    for heading, lines in (("assumed", found.assumptions), ("not modelled", found.not_modelled)):
        print(f"\n{heading}:")
        for line in lines:
            print(f"  - {line}")
