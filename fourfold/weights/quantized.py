"""A model out of any files into files of our own whose large weights are int8, int4 or fp8.

Every tensor's place is known before a number is read, so rows are written as they are quantised: what is in memory is
some rows, whatever the size of the model. Calibration alone needs the whole model.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold.model.transformer import Model
from fourfold.quant.calibrate import TOKENS, Chosen, calibrate, calibration_documents
from fourfold.quant.model import prepare, quantizable
from fourfold.quant.modules import FP8_BLOCK, INT4_GROUP, QuantizedStack, QuantizedWeight, check_kind
from fourfold.quant.section import SECTION, Quantization, stored_names
from fourfold.text.tokenizer import Tokenizer, TokenizerError
from fourfold.weights.checkpoint import (
    FLOAT32,
    NATIVE,
    Source,
    atomic_directory,
    derived_tensors,
    load_tokenizer,
    load_weights,
    open_source,
    progress_bar,
    read_config_values,
    resolve,
    write_json,
)
from fourfold.weights.export import SHARD_BYTES, Rows, require_empty, rows_of, token_ids_of, write_beside
from fourfold.weights.families.entries import Part, leaves
from fourfold.weights.stream import fold, missing_and_extra
from fourfold.weights.tensors import INDEX, NAMES, SINGLE, CheckpointError

CHUNK = 1 << 22  # numbers quantised at a time


@dataclass(frozen=True)
class Written:
    """What was written: where, how, and how many tensors and bytes of them; tokens: calibrated on, 0 if not."""

    path: Path
    kind: str
    group: int | None
    method: str
    tokens: int
    tensors: int
    bytes: int


def quantize(
    source: str | Path,
    destination: str | Path,
    kind: str,
    group: int = INT4_GROUP,
    calibration: Path | bool = False,
    tokens: int = TOKENS,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> Written:
    """Reads a model in any format, a bundled name too, and writes it quantised, whole or not at all.

    kind: "int8", "int4" or "fp8"; group: inputs per scale of int4; calibration: a file of texts or samples, or True
    for what :func:`calibration_documents` finds by itself; tokens: how much of it. What is kept wide is written in
    bf16, its islands in float32. Raises CheckpointError, also if ``destination`` holds something already, and
    ValueError for a kind, a group or data to calibrate on that are none.
    """
    check_kind(kind, group)
    path, destination = resolve(str(source)), Path(destination)
    require_empty(destination)
    try:
        tokenizer = load_tokenizer(path)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from None
    opened = open_source(path)
    if opened.quantization is not None:
        raise CheckpointError(f"{path}: holds {opened.quantization.kind} already; quantise the model it was made from")
    chosen, method, used = {}, "nearest", 0
    if calibration:
        chosen, used = _calibrated(opened, tokenizer, kind, group, calibration, tokens, progress)
        method = "gptq"
    with torch.device("meta"):
        model = Model(opened.cfg)
    section = Quantization(kind, tuple(quantizable(model)), group, method)
    target = _Target(opened, tokenizer, model, section, chosen)
    tensors, size = target.write(destination, shard_bytes, progress)
    return Written(destination, kind, group if kind == "int4" else None, method, used, tensors, size)


def _calibrated(
    opened: Source,
    tokenizer: Tokenizer,
    kind: str,
    group: int,
    calibration: Path | bool,
    tokens: int,
    progress: bool,
) -> tuple[Chosen, int]:
    data = None if calibration is True else Path(calibration)
    documents = calibration_documents(data, tokenizer, opened.cfg.media, tokens)
    model = load_weights(opened, torch.float32, tokenizer=tokenizer, progress=progress)
    total = sum(model.get_parameter(name).numel() for name in quantizable(model))
    with progress_bar(progress, "calibrating", total) as advance:
        return calibrate(model, documents, kind, group, advance=advance), sum(map(len, documents))


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: from byte ``start`` of the file with this number."""

    file: int
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Shards:
    """Files of tensors that are known by name, type and shape; their rows may come in any order."""

    def __init__(self, directory: Path, tensors: Mapping[str, Tensor], limit: int) -> None:
        self.directory = directory
        self.places: dict[str, Place] = {}
        self.total = sum(tensor.nbytes for tensor in tensors.values())
        shards = _split(tensors, limit)
        self.names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        if len(shards) == 1:
            self.names = [SINGLE]
        self.files: list[int] = []
        for number, names in enumerate(shards):
            self._open(number, {name: tensors[name] for name in names})

    def _open(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        # the widest types first, so that every tensor begins at a multiple of its type's size
        for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
            tensor = tensors[name]
            header[name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.nbytes],
            }
            at += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        file = os.open(self.directory / self.names[number], flags, 0o644)
        self.files.append(file)
        _write(file, len(text).to_bytes(8, "little") + text, 0)
        os.ftruncate(file, 8 + len(text) + at)
        for name, tensor in tensors.items():
            start = 8 + len(text) + header[name]["data_offsets"][0]
            self.places[name] = Place(number, start, tensor.dtype, tuple(tensor.shape))

    def put(self, name: str, leading: tuple[int, ...], start: int, rows: Tensor) -> None:
        """Rows ``start`` and on of ``tensor[leading]``."""
        place = self.places[name]
        shape = place.shape
        index = 0
        for size, at in zip(shape, (*leading, start), strict=False):
            index = index * size + at
        width = math.prod(shape[len(leading) + 1 :]) * place.dtype.itemsize
        flat = rows.detach().to(place.dtype).contiguous().reshape(-1).view(torch.uint8)
        _write(self.files[place.file], memoryview(flat.numpy()), place.start + index * width)

    def close(self) -> None:
        for file in self.files:
            os.close(file)
        self.files.clear()

    def write_index(self) -> None:
        if len(self.names) > 1:
            weight_map = {name: self.names[place.file] for name, place in sorted(self.places.items())}
            write_json(self.directory / INDEX, {"metadata": {"total_size": self.total}, "weight_map": weight_map})


def _write(file: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


def _split(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names of the tensors of each file: at most ``limit`` bytes together, or one tensor."""
    shards: list[list[str]] = []
    room = 0
    for name, tensor in tensors.items():
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= tensor.nbytes
    return shards


class _Target:
    """What is to be written, and where it comes from. ``model`` is on the meta device."""

    def __init__(
        self, opened: Source, tokenizer: Tokenizer, model: Model, section: Quantization, chosen: Chosen
    ) -> None:
        self.opened, self.tokenizer, self.section, self.chosen = opened, tokenizer, section, chosen
        derived, faults = derived_tensors(opened, tokenizer)
        wanted = {name: tensor for name, tensor in opened.wanted.items() if name not in derived}
        found, _ = missing_and_extra(opened.plan, wanted, opened.numbers, opened.ignored)
        if faults + found:
            raise CheckpointError(fold(faults + found, opened.path))
        self.rows: Rows = rows_of(opened, derived)
        self.weights = prepare(model, section.kind, group=section.group, only=section.weights)
        parameters = {name for name, _ in model.named_parameters()}
        self.tensors: dict[str, Tensor] = {
            name: tensor.to(torch.float32 if name.endswith(FLOAT32) else torch.bfloat16)
            if name in parameters
            else tensor
            for name, tensor in model.state_dict().items()
        }

    def write(self, directory: Path, shard_bytes: int, progress: bool) -> tuple[int, int]:
        """Returns the number of tensors and their bytes."""
        opened = self.opened
        beside = opened.path if opened.path.is_dir() else None
        values = read_config_values(opened.path / "config.json") if beside else {}
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        total = sum(tensor.numel() for tensor in opened.wanted.values())
        try:
            directory.parent.mkdir(parents=True, exist_ok=True)
            if (free := shutil.disk_usage(directory.parent).free) < size:
                raise CheckpointError(f"{directory}: needs {size:,} bytes, {free:,} are free")
            with atomic_directory(directory) as partial:
                shards = Shards(partial, self.tensors, shard_bytes)
                try:
                    with progress_bar(progress, f"writing {directory.name}", total) as advance:
                        for name in opened.wanted:
                            self._put(shards, name, advance)
                finally:
                    shards.close()
                shards.write_index()
                write_beside(partial, beside, self.tokenizer, token_ids_of(values))
                self.tokenizer.save(partial / "tokenizer.json")
                config = {"model_type": NATIVE, **opened.cfg.to_dict(), SECTION: self.section.to_dict()}
                write_json(partial / "config.json", config)  # last: without it nothing loads
        except OSError as error:
            raise CheckpointError(f"{directory}: cannot be written: {error}") from None
        return len(self.tensors), size

    def _put(self, shards: Shards, name: str, advance: Callable[[int], None]) -> None:
        shape = tuple(self.opened.wanted[name].shape)
        weight = self.weights.get(name)
        if weight is None:
            for start, stop in _ranges(shape):
                shards.put(name, (), start, self.rows(name, (), start, stop))
                advance(math.prod(shape[1:]) * (stop - start))
        else:
            for index in range(shape[0]) if isinstance(weight, QuantizedStack) else [None]:
                self._quantize(shards, name, weight, index, advance)
        if name in self.opened.plan:
            for leaf in leaves(self.opened.plan[name], shape):
                if isinstance(leaf.part, Part):
                    self.opened.numbers.release(leaf.part.name)

    def _quantize(
        self, shards: Shards, name: str, weight: QuantizedWeight, index: int | None, advance: Callable[[int], None]
    ) -> None:
        codes_name, scales_name = stored_names(name)
        leading = () if index is None else (index,)
        shape = tuple(weight.shape[len(leading) :])
        if (name, index) in self.chosen:
            codes, scales = self.chosen[name, index]
            shards.put(codes_name, leading, 0, codes)
            shards.put(scales_name, leading, 0, scales)
            advance(math.prod(shape))
            return
        for start, stop in _ranges(shape):
            try:
                codes, scales = weight.quantize(self.rows(name, leading, start, stop))
            except CheckpointError:
                raise
            except ValueError as error:
                raise CheckpointError(f"{self.opened.path}: {name}: {error}") from None
            shards.put(codes_name, leading, start, codes)
            shards.put(scales_name, leading, start // FP8_BLOCK[0] if weight.kind == "fp8" else start, scales)
            advance((stop - start) * shape[1])


def _ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Rows to do at a time: whole blocks of scales, of about ``CHUNK`` numbers."""
    height = shape[0]
    step = max(CHUNK // max(math.prod(shape[1:]), 1) // FP8_BLOCK[0], 1) * FP8_BLOCK[0]
    for start in range(0, height, step):
        yield start, min(start + step, height)
