"""A model out of files and into them: our own directories, released ones of every family, GGUF files.

Nothing is ever unpickled. What is wrong is refused with one error that lists all of it, and nothing half-loaded is
ever returned.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fourfold.config import ModelConfig
from fourfold.fields import ConfigError
from fourfold.model.transformer import Model
from fourfold.quant.model import prepare
from fourfold.quant.modules import QuantizedWeight
from fourfold.quant.section import SECTION, Quantization, quantization_of
from fourfold.text.tokenizer import Tokenizer, TokenizerError, compress_vocabulary
from fourfold.weights.families import DIALECTS, FLOAT32, Family, family_of
from fourfold.weights.families.entries import Part, Plan, by_disk_name
from fourfold.weights.families.fields import GENERIC
from fourfold.weights.formats import FormatError, weight_block_size
from fourfold.weights.hub import from_hub, is_hub_id
from fourfold.weights.stream import Numbers, Sink, TensorSink, fold, missing_and_extra, stream
from fourfold.weights.tensors import CheckpointError, SafetensorsReader, TensorReader

BUNDLED = Path(__file__).parents[1] / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GGUF = ".gguf"
NATIVE = "fourfold"  # the model_type that transformers writes for our own models

__all__ = [
    "CheckpointError",
    "Source",
    "atomic_directory",
    "load_config",
    "load_model",
    "load_weights",
    "open_source",
    "read_tensors",
    "resolve",
    "save_model",
    "write_json",
]


def resolve(name: str) -> Path:
    """The directory of a bundled model's name, of a path or of a hub id, or a GGUF file.

    Raises CheckpointError if there is none.
    """
    if Path(name).suffix == GGUF and Path(name).is_file():
        return Path(name)
    for candidate in (BUNDLED / name, Path(name)):
        if (candidate / "config.json").is_file():
            return candidate
    if is_hub_id(name):
        return from_hub(name)
    bundled = ", ".join(sorted(p.parent.name for p in BUNDLED.glob("*/config.json"))) or "none"
    raise CheckpointError(
        f"model: {name!r} is neither bundled ({bundled}) nor a directory with a config.json nor a GGUF file"
    )


# ---------------------------------------------------------------- what a directory or file holds


@dataclass
class Source:
    """A checkpoint that is open but not yet read.

    family: None for our own format; plan: our names to disk names; numbers: what is on disk; quantization: of weights
    that are stored quantised, in our own format alone.
    """

    path: Path
    cfg: ModelConfig
    family: Family | None
    dialect: str
    numbers: Numbers
    plan: Plan
    wanted: dict[str, Tensor]  # our state_dict, on the meta device
    quantization: Quantization | None = None

    def ignored(self, name: str) -> bool:
        return self.family is not None and self.family.ignored(self.cfg, name)


def read_config_values(path: Path) -> dict[str, Any]:
    """A config.json as a table. Raises CheckpointError."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must be a table")
    return values


def load_config(path: Path) -> ModelConfig:
    """The ModelConfig of a directory, ours or a released one, or of a GGUF file. Raises CheckpointError."""
    path = Path(path)
    if path.suffix == GGUF and not path.is_dir():
        return _open_gguf(path)[0]
    return _read_config(path / "config.json")[0]


def _read_config(path: Path) -> tuple[ModelConfig, Family | None, dict[str, Any]]:
    values = read_config_values(path)
    native = values.get("model_type", NATIVE) == NATIVE
    try:
        family = None if native else family_of(values)
        if family is None:
            beside = GENERIC - set(ModelConfig.__dataclass_fields__) if "model_type" in values else frozenset()
            beside |= {SECTION}
            return ModelConfig.from_dict({k: v for k, v in values.items() if k not in beside}), None, {}
        return family.config(values), family, values
    except ConfigError as error:
        hint = "" if "model_type" in values else "; a released model would say its model_type"
        raise CheckpointError(f"{path}: {error}{hint}") from None


def _open_gguf(path: Path) -> tuple[ModelConfig, Family, TensorReader]:
    from fourfold.weights.gguf_view import GgufView

    view = GgufView(path)
    try:
        family = family_of(view.config)
        return family.config(view.config), family, view
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def open_source(path: Path) -> Source:
    """Reads configuration and headers, no numbers. Raises CheckpointError that lists the faults of both."""
    path = Path(path)
    faults, opened, numbers, quantization = [], None, None, None
    if path.suffix == GGUF and not path.is_dir():
        cfg, family, reader = _open_gguf(path)
        opened, numbers = (cfg, family, {}), Numbers(reader)
    else:
        try:
            opened = _read_config(path / "config.json")
            quantization = _read_quantization(path / "config.json") if opened[1] is None else None
        except CheckpointError as error:
            faults += error.faults
        try:
            block = weight_block_size(opened[2].get("quantization_config")) if opened else None
            numbers = Numbers(SafetensorsReader(path), block)
        except CheckpointError as error:
            faults += error.faults
        except FormatError as error:
            faults.append(f"{path}: {error}")
    if faults or opened is None or numbers is None:
        raise CheckpointError(*faults)
    return _source(path, opened[0], opened[1], numbers, quantization)


def _read_quantization(path: Path) -> Quantization | None:
    values = read_config_values(path)
    try:
        return Quantization.from_dict(values[SECTION]) if SECTION in values else None
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _source(
    path: Path, cfg: ModelConfig, family: Family | None, numbers: Numbers, quantization: Quantization | None
) -> Source:
    names = numbers.names()
    dialect = DIALECTS[any(name.startswith("model.") for name in names)]
    if family is not None:
        cfg = _without_absent_heads(cfg, family, dialect, set(names))
    with torch.device("meta"):
        model = Model(cfg)
    if quantization is not None:
        try:
            prepare(model, quantization.kind, group=quantization.group, only=quantization.weights)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
    wanted = model.state_dict()
    plan: Plan = {name: Part(name) for name in wanted} if family is None else family.plan(cfg, dialect)
    return Source(path, cfg, family, dialect, numbers, plan, wanted, quantization)


def _without_absent_heads(cfg: ModelConfig, family: Family, dialect: str, names: set[str]) -> ModelConfig:
    """Writers drop the heads that predict ahead but leave their count in the config: none there, none wanted."""
    for prefix in ("mtp", "drafter"):
        if not getattr(cfg, prefix).num_layers:
            continue
        plan = {ours: entry for ours, entry in family.plan(cfg, dialect).items() if ours.startswith(f"{prefix}.")}
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in Model(cfg).state_dict().items()}
        if not names & by_disk_name(plan, shapes).keys():
            cfg = cfg.replace(**{f"{prefix}.num_layers": 0})
    return cfg


# ---------------------------------------------------------------- loading


def load_model(
    path: Path, dtype: torch.dtype = torch.float32, quant: str | None = None, progress: bool = False
) -> tuple[Model, Tokenizer]:
    """The model, in evaluation mode and of ``dtype`` (buffers and float32 islands keep theirs), and its tokenizer.

    path: a directory of ours, a released one, or a GGUF file; quant: "int8", "int4" or "fp8", quantised while loading
    (files that are quantised already keep their kind); progress: a bar on the terminal. Raises CheckpointError that
    lists every fault.
    """
    path, faults = Path(path), []
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = load_tokenizer(path)
    except (TokenizerError, CheckpointError) as error:
        faults.append(str(error))
    try:
        source = open_source(path)
    except CheckpointError as error:
        raise CheckpointError(*faults, *error.faults) from None
    if tokenizer is not None and tokenizer.vocab_size > source.cfg.vocab_size:
        count = tokenizer.vocab_size
        faults.append(f"{path}: the tokenizer has {count} ids, vocab_size is {source.cfg.vocab_size}")
    model, wrong = _load(source, dtype, quant, progress, tokenizer, keep=not faults)
    if wrong:
        faults.append(fold(wrong, path))
    if model is None or tokenizer is None:
        raise CheckpointError(*faults)
    return model, tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer beside the weights, or inside a GGUF file. Raises TokenizerError or CheckpointError."""
    if path.suffix == GGUF and not path.is_dir():
        from fourfold.weights.gguf import GgufFile
        from fourfold.weights.gguf_tokenizer import read_tokenizer

        return read_tokenizer(GgufFile(path))[0]
    return Tokenizer.load(path / "tokenizer.json")


def load_weights(
    source: Source,
    dtype: torch.dtype = torch.float32,
    quant: str | None = None,
    progress: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Model:
    """As :func:`load_model`, from a source and without its tokenizer, which Engram alone needs (V4.1)."""
    model, faults = _load(source, dtype, quant, progress, tokenizer, keep=True)
    if model is None:
        raise CheckpointError(fold(faults, source.path))
    return model


def _load(
    source: Source, dtype: torch.dtype, quant: str | None, progress: bool, tokenizer: Tokenizer | None, keep: bool
) -> tuple[Model | None, list[str]]:
    """The model, filled tensor by tensor, or None and why not. Not ``keep``: only checks every number."""
    cfg = source.cfg
    with torch.device("meta"):
        model = Model(cfg)
    stored = source.quantization
    if stored is not None:
        if quant not in (None, stored.kind):
            return None, [f"the files hold {stored.kind}, which cannot become {quant}"]
        prepare(model, stored.kind, dtype, group=stored.group, only=stored.weights)
        quant = None  # nothing is left to be done
    parameters = {name for name, _ in model.named_parameters()}
    derived, faults = derived_tensors(source, tokenizer)
    wanted = {name: tensor for name, tensor in source.wanted.items() if name not in derived}
    faults += [f"{name} has no place in files of {_family_name(source)}" for name in wanted if name not in source.plan]
    plan = {name: entry for name, entry in source.plan.items() if name in wanted}
    found, readable = missing_and_extra(plan, wanted, source.numbers, source.ignored)
    faults += found
    keep = keep and not faults
    tensors: dict[str, Tensor] = {}
    sinks = _quantising(model, quant, dtype) if quant is not None and keep else {}

    def sink_of(name: str) -> Sink | None:
        if not keep or name in sinks:
            return sinks.get(name)
        meta = wanted[name]
        tensors[name] = torch.empty(meta.shape, dtype=final_dtype(name, meta, parameters, dtype))
        return TensorSink(tensors[name])

    total = sum(wanted[name].numel() for name in plan)
    with progress_bar(progress, f"loading {source.path.name}", total) as advance:
        faults += stream(plan, wanted, source.numbers, readable, sink_of, advance)
    faults += [fault for name, tensor in tensors.items() if (fault := _bad_choice(name, tensor, cfg))]
    faults += [fault for name, tensor in tensors.items() if stored and (fault := _bad_codes(name, tensor))]
    if faults or not keep:
        return None, faults
    model.load_state_dict(tensors | derived, assign=True, strict=quant is None)
    return model.eval(), []


class _QuantisingSink:
    """fp8 shares scales between rows, so the rows of a matrix wait until it is whole."""

    def __init__(self, weight: QuantizedWeight) -> None:
        self.weight = weight
        self.waiting: Tensor | None = None
        self.missing = 0

    def put(self, leading: tuple[int, ...], start: int, rows: Tensor) -> None:
        if rows.dim() == 2 and self.weight.kind == "fp8":
            if self.waiting is None:
                self.waiting = torch.empty(self.weight.shape[-2:], dtype=torch.float32)
                self.missing = self.weight.shape[-2]
            self.waiting[start : start + len(rows)] = rows
            self.missing -= len(rows)
            if not self.missing:
                self.weight.put(leading[0] if leading else None, 0, self.waiting)
                self.waiting = None
            return
        if rows.dim() == 3:  # whole experts, as our own files hold them
            for expert, matrix in enumerate(rows, start):
                self.weight.put(expert, 0, matrix.float())
        else:
            self.weight.put(leading[0] if leading else None, start, rows.float())


def _quantising(model: Model, kind: str, dtype: torch.dtype) -> dict[str, Sink]:
    """Replaces the large weights of ``model`` by empty quantised ones; sinks that fill them, by parameter name."""
    return {name: _QuantisingSink(weight) for name, weight in prepare(model, kind, dtype, "cpu").items()}


def final_dtype(name: str, meta: Tensor, parameters: set[str], dtype: torch.dtype) -> torch.dtype:
    """The dtype in memory: buffers keep theirs, islands stay float32."""
    if name not in parameters:
        return meta.dtype
    return torch.float32 if name.endswith(FLOAT32) and dtype.itemsize < 4 else dtype


def derived_tensors(source: Source, tokenizer: Tokenizer | None) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors that no released file holds: the map of token ids that Engram hashes by, made from the tokenizer."""
    name = "compression.ids"
    if source.family is None or name not in source.wanted or name in source.plan:
        return {}, []
    wanted = source.wanted[name]
    if tokenizer is None:
        return {name: torch.zeros(wanted.shape, dtype=wanted.dtype)}, [f"{name}: needs a tokenizer.json"]
    ids = torch.tensor(compress_vocabulary(tokenizer), dtype=wanted.dtype)
    size, expected = int(ids.max()) + 1, source.cfg.engram.compressed_vocab_size
    if size != expected or len(ids) > len(wanted):
        return {name: ids}, [f"tokenizer: has {size} distinct readings of its ids, the config's number is {expected}"]
    padded = torch.zeros(wanted.shape, dtype=wanted.dtype)
    padded[: len(ids)] = ids
    return {name: padded}, []


def _bad_choice(name: str, tensor: Tensor, cfg: ModelConfig) -> str | None:
    """Tables of choices point at what is there."""
    if not name.endswith("tid2eid") or not tensor.numel():
        return None
    low, high = (int(bound) for bound in tensor.aminmax())
    if 0 <= low and high < cfg.moe.n_routed_experts:
        return None
    return f"{name} names experts {low} to {high}; there are {cfg.moe.n_routed_experts}"


def _bad_codes(name: str, tensor: Tensor) -> str | None:
    """Codes and scales that no quantiser writes: files that are damaged, or meant otherwise."""
    if name.endswith(".scales") and tensor.numel() and not bool(tensor.amin() > 0):
        return f"{name} holds scales that are not positive"
    if name.endswith(".codes") and tensor.dtype is torch.int8 and tensor.numel() and int(tensor.amin()) == -128:
        return f"{name} holds -128; codes of int8 are from -127 to 127"
    return None


def _family_name(source: Source) -> str:
    return source.family.model_type if source.family else "our own"


@contextmanager
def progress_bar(shown: bool, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, in numbers read; or nothing."""
    if not shown:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)


def read_tensors(path: Path, model: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors that ``model`` wants, from one file in our own format, checked for name, shape and finiteness."""
    wanted = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    numbers = Numbers(SafetensorsReader(Path(path)))
    plan: Plan = {name: Part(name) for name in wanted}
    faults, readable = missing_and_extra(plan, wanted, numbers, lambda name: False)
    tensors = {
        name: torch.empty(tensor.shape, dtype=final_dtype(name, tensor, parameters, dtype))
        for name, tensor in wanted.items()
    }
    faults += stream(plan, wanted, numbers, readable, lambda name: TensorSink(tensors[name]))
    if faults:
        raise CheckpointError(fold(faults, Path(path)))
    return tensors


# ---------------------------------------------------------------- saving


def save_model(directory: Path, model: Model, tokenizer: Tokenizer, dtype: torch.dtype | None = None) -> None:
    """Writes a directory of our own in one step: it is there whole or not at all. Quantised weights stay so.

    ``dtype``: of the parameters on disk, but for the float32 islands.
    """
    quantization = quantization_of(model)
    section = {} if quantization is None else {SECTION: quantization.to_dict()}
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {
        name: (tensor if dtype is None else tensor.to(final_dtype(name, tensor, parameters, dtype))).contiguous()
        for name, tensor in model.state_dict().items()
    }
    with atomic_directory(directory) as partial:
        write_json(partial / "config.json", {"model_type": NATIVE, **model.cfg.to_dict(), **section})
        save_file(tensors, partial / "model.safetensors")
        tokenizer.save(partial / "tokenizer.json")


class atomic_directory:
    """A context that fills ``path + random suffix`` and renames it to ``path`` on success, replacing what was there."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.partial = Path(tempfile.mkdtemp(prefix=f".{self.path.name}-", dir=self.path.parent))
        self.partial.chmod(0o755)
        return self.partial

    def __exit__(self, failure: type[BaseException] | None, *_: Any) -> None:
        old = self.partial.with_name(f"{self.partial.name}-old")
        try:
            if failure is None:
                if self.path.exists():
                    self.path.rename(old)
                self.partial.rename(self.path)
        except BaseException:
            if old.exists() and not self.path.exists():
                old.rename(self.path)
            raise
        finally:
            for left in (self.partial, old):
                shutil.rmtree(left, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Writes through a temporary file in the same directory, so that a reader sees the old or the new text."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)
