"""Models out in the formats that other engines read, and from any format we read to any we write.

Tensors are written one by one, so that converting takes the memory of one shard, not of the model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from fourfold.config import ModelConfig
from fourfold.fields import ConfigError
from fourfold.model.transformer import Model
from fourfold.text.tokenizer import SPECIALS, Tokenizer, TokenizerError
from fourfold.weights import formats
from fourfold.weights.checkpoint import (
    FLOAT32,
    Source,
    atomic_directory,
    derived_tensors,
    load_tokenizer,
    open_source,
    progress_bar,
    read_config_values,
    resolve,
    write_json,
)
from fourfold.weights.families import FAMILIES, Family
from fourfold.weights.families.entries import Part, Piece, Plan, Stack, Zeros, by_disk_name, leaves
from fourfold.weights.stream import finite, fold, missing_and_extra
from fourfold.weights.tensors import INDEX, SINGLE, CheckpointError

NATIVE = "native"
SHARD_BYTES = 4 * 2**30
PLAIN = {"bf16": torch.bfloat16, "fp32": torch.float32}
# What lies beside weights and tokenizer and says how to talk to the model
BESIDE = ("tokenizer_config.json", "generation_config.json", "special_tokens_map.json", "chat_template.jinja")
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


@dataclass(frozen=True)
class Written:
    """What was written: the directory, in which family, dialect and storage, how many tensors and bytes of them."""

    path: Path
    family: str
    dialect: str
    storage: str
    tensors: int
    bytes: int


class Rows(Protocol):
    """Rows ``start:stop`` of ``tensor[leading]`` of one of our tensors."""

    def __call__(self, name: str, leading: tuple[int, ...], start: int, stop: int) -> Tensor: ...


def export_model(
    model: Model,
    tokenizer: Tokenizer,
    directory: Path,
    family: str,
    dialect: str = "released",
    storage: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Writes ``model`` as a directory of ``family`` (a model_type, or "native"), whole or not at all.

    dialect: "released" or "transformers"; storage: "bf16", "fp32", and where the family has them "fp8" and
    "fp8+fp4" (None: fp32 for a float32 model, else bf16). Raises CheckpointError that names what the family cannot
    express.
    """
    state = model.state_dict()

    def rows(name: str, leading: tuple[int, ...], start: int, stop: int) -> Tensor:
        return state[name][leading][start:stop]

    if storage is None:
        storage = "fp32" if model.embed_tokens.weight.dtype == torch.float32 else "bf16"
    target = _Target(model.cfg, family, dialect, storage)
    return target.write(Path(directory), rows, tokenizer, shard_bytes, {}, None, lambda count: None)


def convert(
    source: str | Path,
    destination: str | Path,
    family: str | None = None,
    dialect: str = "released",
    storage: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> Written:
    """Reads a model in any format, a bundled name too, and writes it anew as :func:`export_model` does.

    family: a model_type or "native"; None turns a released model into our own format, and one of ours into the
    first family that can express it. Raises CheckpointError, also if ``destination`` holds something already.
    """
    path, destination = resolve(str(source)), Path(destination)
    require_empty(destination)
    try:
        tokenizer = load_tokenizer(path)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from None
    opened = open_source(path)
    if opened.quantization is not None:
        raise CheckpointError(f"{path}: holds {opened.quantization.kind}; convert the model that it was made from")
    if family is None:
        family = _fitting(opened.cfg) if opened.family is None else NATIVE
    if storage is None:
        storage = "fp32" if _is_wide(opened) else "bf16"
    target = _Target(opened.cfg, family, dialect, storage)
    derived, faults = derived_tensors(opened, tokenizer)
    wanted = {name: tensor for name, tensor in opened.wanted.items() if name not in derived}
    found, readable = missing_and_extra(opened.plan, wanted, opened.numbers, opened.ignored)
    if faults + found:
        raise CheckpointError(fold(faults + found, path))
    beside = path if path.is_dir() else None
    values = read_config_values(path / "config.json") if beside else {}
    total = sum(tensor.numel() for tensor in opened.wanted.values())
    with progress_bar(progress, f"writing {destination.name}", total) as advance:
        rows = rows_of(opened, derived)
        return target.write(destination, rows, tokenizer, shard_bytes, token_ids_of(values), beside, advance)


def require_empty(destination: Path) -> None:
    """Raises CheckpointError if something is there already that writing would replace."""
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise CheckpointError(f"{destination}: is there already")


def _is_wide(source: Source) -> bool:
    entry = source.plan["embed_tokens.weight"]
    assert isinstance(entry, Part)
    return source.numbers.reader.dtype(entry.name) in ("F32", "F64")


def token_ids_of(values: Mapping[str, Any]) -> dict[str, Any]:
    inner = values.get("text_config")
    text = inner if isinstance(inner, dict) else {}
    return {name: found for name in TOKENS if (found := values.get(name, text.get(name))) is not None}


def _fitting(cfg: ModelConfig) -> str:
    """The first family that expresses ``cfg``."""
    refusals = []
    for name, family in FAMILIES.items():
        try:
            family.to_config(cfg, "released")
        except ConfigError as error:
            refusals.append(str(error))
            continue
        return name
    raise CheckpointError(
        f"no released family can express this model (--family fourfold writes it for transformers as it is): "
        f"{'; '.join(refusals)}"
    )


def rows_of(source: Source, derived: Mapping[str, Tensor]) -> Rows:
    """Reads what a range of rows consists of on disk, checked for NaN and infinity."""

    def rows(name: str, leading: tuple[int, ...], start: int, stop: int) -> Tensor:
        if name in derived:
            return derived[name][leading][start:stop]
        meta = source.wanted[name]
        parts = []
        entry = source.plan[name]
        for depth, index in enumerate(leading):  # down into the stack
            if isinstance(entry, Part):  # which our own files hold as one tensor
                chunk = source.numbers.rows(entry.name, index, index + 1)[0][leading[depth + 1 :]][start:stop]
                return _checked(chunk, entry.name, source)
            assert isinstance(entry, Stack)
            entry = entry.entries[index]
        if isinstance(entry, Stack):
            return torch.stack([rows(name, (*leading, i), 0, meta.shape[len(leading) + 1]) for i in range(start, stop)])
        shape = tuple(meta.shape[len(leading) :])
        for leaf in leaves(entry, shape):
            first, last = max(start - leaf.start, 0), min(stop - leaf.start, leaf.shape[0])
            if first >= last:
                continue
            if isinstance(leaf.part, Zeros):
                parts.append(torch.zeros((last - first, *leaf.shape[1:]), dtype=meta.dtype))
                continue
            for _, chunk in source.numbers.leaf(leaf, first, last):
                parts.append(_checked(chunk, leaf.part.name, source))
            source.numbers.release(leaf.part.name)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return rows


def _checked(rows: Tensor, name: str, source: Source) -> Tensor:
    if rows.is_floating_point() and not finite(rows):
        raise CheckpointError(f"{source.path}: {name} holds NaN or infinity")
    return rows


class _Target:
    """A family, dialect and storage that a configuration is to be written in. Raises CheckpointError if it cannot."""

    def __init__(self, cfg: ModelConfig, family: str, dialect: str, storage: str) -> None:
        if family != NATIVE and family not in FAMILIES:
            known = ", ".join((NATIVE, *FAMILIES))
            raise CheckpointError(f"family: is {family!r}; choose one of {known}")
        self.cfg, self.dialect, self.storage = cfg, dialect, storage
        self.family: Family | None = None if family == NATIVE else FAMILIES[family]
        storages = ("bf16", "fp32") if self.family is None else self.family.storages
        if storage not in storages:
            raise CheckpointError(f"storage: is {storage!r}; {family} has {', '.join(storages)}")
        with torch.device("meta"):
            model = Model(cfg)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.whole = {name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
        self.parameters = {name for name, _ in model.named_parameters()}
        if self.family is None:
            self.values: dict[str, Any] = cfg.to_dict()
            self.plan: Plan = {name: Part(name) for name in self.shapes}
            return
        try:
            self.values = self.family.to_config(cfg, dialect)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        self.plan = self.family.plan(cfg, dialect)

    def format(self, name: str, ours: str) -> str | None:
        """The number format of a disk tensor; None: as it is."""
        if ours in self.whole:
            return None
        if ours not in self.parameters or ours.endswith(FLOAT32):
            return "fp32"
        if self.storage in PLAIN or self.family is None:
            return self.storage
        return self.family.tensor_format(name, self.storage)

    def write(
        self,
        directory: Path,
        rows: Rows,
        tokenizer: Tokenizer,
        shard_bytes: int,
        token_ids: dict[str, Any],
        beside: Path | None,
        advance: Callable[[int], None],
    ) -> Written:
        if faults := self._unplaced(rows, tokenizer):
            kind = self.family.model_type if self.family else NATIVE
            raise CheckpointError(*(f"{kind} cannot express {fault}" for fault in faults))
        pieces = by_disk_name(self.plan, self.shapes)
        used: set[str] = set()
        try:
            with atomic_directory(directory) as partial:
                tensors, size = _write_shards(partial, self._encoded(pieces, rows, used, advance), shard_bytes)
                write_beside(partial, beside, tokenizer, token_ids)
                write_json(partial / "config.json", self._config(tokenizer, token_ids, used))
                tokenizer.save(partial / "tokenizer.json")
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot be written: {error}") from None
        kind = self.family.model_type if self.family else NATIVE
        return Written(directory, kind, self.dialect, self.storage, tensors, size)

    def _unplaced(self, rows: Rows, tokenizer: Tokenizer) -> list[str]:
        """Numbers of ours that would be lost: in a place that is zero in the family, or in none."""
        faults = []
        for name, shape in self.shapes.items():
            if name not in self.plan:
                if name != "compression.ids":
                    faults.append(f"the tensor {name}")
                elif not _follows(rows(name, (), 0, shape[0]), tokenizer):
                    faults.append("compression.ids that do not follow from the tokenizer")
                continue
            for leaf in leaves(self.plan[name], shape):
                if (
                    isinstance(leaf.part, Zeros)
                    and rows(name, leaf.leading, leaf.start, leaf.start + leaf.shape[0]).any()
                ):
                    faults.append(f"{name} other than zero")
        return faults

    def _encoded(
        self, pieces: dict[str, list[Piece]], rows: Rows, used: set[str], advance: Callable[[int], None]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, parts in pieces.items():
            found = [rows(p.ours, p.leaf.leading, p.leaf.start, p.leaf.start + p.leaf.shape[0]) for p in parts]
            part = parts[0].leaf.part
            assert isinstance(part, Part)
            tensor = found[0] if len(found) == 1 else torch.cat(found, dim=part.dim)
            advance(tensor.numel())
            chosen = self.format(name, parts[0].ours)
            if chosen is None or chosen in PLAIN:
                yield name, tensor.to(PLAIN[chosen] if chosen else tensor.dtype).contiguous()
                continue
            used.add(chosen)
            stem = name.removesuffix("weight")
            for suffix, encoded in formats.encode(tensor.float(), chosen, name).items():
                yield stem + suffix, encoded.contiguous()

    def _config(self, tokenizer: Tokenizer, token_ids: dict[str, Any], used: set[str]) -> dict[str, Any]:
        if self.family is None:
            return self.values
        dtype = "float32" if self.storage == "fp32" else "bfloat16"
        values = {**self.values, **token_ids, "dtype" if self.dialect == "transformers" else "torch_dtype": dtype}
        dense = used - {"mxfp4", "fp8_rows"}
        if dense:
            values["quantization_config"] = formats.quantization_config(min(dense))
            if "mxfp4" in used:
                (values if self.family.expert_dtype_on_top else values["quantization_config"])["expert_dtype"] = "fp4"
        return values


def _follows(ids: Tensor, tokenizer: Tokenizer) -> bool:
    from fourfold.text.tokenizer import compress_vocabulary

    expected = torch.zeros_like(ids)
    found = torch.tensor(compress_vocabulary(tokenizer), dtype=ids.dtype)
    expected[: len(found)] = found[: len(ids)]
    return torch.equal(ids.cpu(), expected.cpu())


def _write_shards(directory: Path, tensors: Iterator[tuple[str, Tensor]], limit: int) -> tuple[int, int]:
    """One file, or several of at most ``limit`` bytes (but one tensor) and their index. Returns tensors and bytes."""
    files: list[list[str]] = []
    batch: dict[str, Tensor] = {}
    batch_bytes = total = 0

    def flush() -> None:
        save_file(batch, directory / f"{len(files):05d}.safetensors", metadata={"format": "pt"})
        files.append(list(batch))
        batch.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if batch and batch_bytes + size > limit:
            flush()
            batch_bytes = 0
        batch[name] = tensor
        batch_bytes += size
        total += size
    flush()
    if len(files) == 1:
        (directory / "00000.safetensors").rename(directory / SINGLE)
        return len(files[0]), total
    index = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (directory / f"{number:05d}.safetensors").rename(directory / final)
        index |= dict.fromkeys(names, final)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})
    return len(index), total


def write_beside(directory: Path, beside: Path | None, tokenizer: Tokenizer, token_ids: dict[str, Any]) -> None:
    """How to talk to the model, copied from where it came from; or, for our own tokenizer, written."""
    for name in BESIDE:
        if beside is not None and (beside / name).is_file():
            shutil.copyfile(beside / name, directory / name)
    if beside is not None and (beside / "encoding").is_dir():
        (directory / "encoding").mkdir()
        for file in sorted((beside / "encoding").glob("*.py")):
            shutil.copyfile(file, directory / "encoding" / file.name)
    if set(SPECIALS) <= set(tokenizer.backend.get_vocab(with_added_tokens=True)):
        about = {f"{name}_token": f"<|{name}|>" for name in ("bos", "eos", "pad")}
        token_ids |= {f"{name}_token_id": tokenizer.special(f"<|{name}|>") for name in ("bos", "eos", "pad")}
        if not (directory / "tokenizer_config.json").exists():
            write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **about})
        if not (directory / "chat_template.jinja").exists():
            shutil.copyfile(CHAT_TEMPLATE, directory / "chat_template.jinja")
    if token_ids and not (directory / "generation_config.json").exists():
        write_json(directory / "generation_config.json", token_ids)
