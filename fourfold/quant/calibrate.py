"""Codes chosen on what the layers of a model really read: block by block, on texts and media run through it.

Each block is calibrated on the inputs that it gets once the blocks before it are quantised, so it can make up for
some of their errors. What nothing ran through is rounded to the nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourfold import ops
from fourfold.config_media import MediaConfig
from fourfold.data import corpus as corpora
from fourfold.data.mixture import NANO_WEIGHTS, Mixture
from fourfold.data.skills import SKILLS
from fourfold.data.stream import SourceSpec, open_stream
from fourfold.model.moe import MoE
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model
from fourfold.quant.gptq import gptq
from fourfold.quant.model import STACKS, quantizable
from fourfold.quant.modules import INT4_GROUP, check_kind
from fourfold.text.tokenizer import Tokenizer, TokenizerError

TOKENS, ROW = 32_768, 1024  # positions to calibrate on, and the longest document among them
BUDGET = 2 * 2**30  # bytes of Hessians held at a time
FEWEST = 1.0  # tokens per input below which a Hessian is not trusted

Unit = tuple[str, int | None]  # a weight, or one expert's matrix of a stack
Chosen = dict[Unit, tuple[Tensor, Tensor]]


# ---------------------------------------------------------------- what to run through the model


def calibration_documents(
    data: Path | None, tokenizer: Tokenizer, media: MediaConfig, tokens: int = TOKENS, seed: int = 0
) -> list[Document]:
    """About ``tokens`` positions: of a .jsonl of samples (as for training) or a text file, or, without ``data``, of the
    built corpus, or where there is none of the skills that need none. Deterministic.

    Raises ValueError for data that cannot be read, or a tokenizer that is not ours where its tokens are needed.
    """
    found: list[Document] = []
    for document in _source(data, tokenizer, media, seed):
        found.append(document)
        tokens -= len(document)
        if tokens <= 0:
            break
    if not found:
        raise ValueError(f"--calibrate: {data} holds nothing to run through the model")
    return found


def _source(data: Path | None, tokenizer: Tokenizer, media: MediaConfig, seed: int) -> Iterator[Document]:
    if data is not None and not data.is_file():
        raise ValueError(f"--calibrate: {data} is not a file")
    if data is not None and data.suffix != ".jsonl":
        try:
            ids = tokenizer.encode(data.read_text())
        except UnicodeDecodeError:
            raise ValueError(f"--calibrate: {data} is neither .jsonl nor text") from None
        return (Document.text(piece) for at in range(0, len(ids), ROW) if len(piece := ids[at : at + ROW]) > 1)
    try:
        tokenizer.special("<|bos|>")
    except TokenizerError:
        raise ValueError("--calibrate: this model's tokenizer is not ours; name a file of plain text") from None
    if data is not None:
        stream = open_stream([SourceSpec("jsonl", str(data), long="split")], tokenizer, media, seed, max_tokens=ROW)
        return _once(stream, sum(1 for line in data.open("rb") if line.strip()))
    return skills_at_hand(tokenizer, media, "train", seed)


def built_corpus() -> corpora.Corpus:
    """Of what is built; empty where nothing is."""
    try:
        return corpora.load(None)
    except corpora.CorpusError:
        return corpora.Corpus(Path(), {})


def skills_at_hand(tokenizer: Tokenizer, media: MediaConfig, split: str, seed: int) -> Mixture:
    """The skills of the bundled model that this model has the senses for, and this place the data."""
    corpus = built_corpus()
    weights = {
        name: weight
        for name, weight in NANO_WEIGHTS.items()
        if SKILLS[name].modality in ("text", *media.modalities) and all(s in corpus for s in SKILLS[name].shards)
    }
    return Mixture(weights, corpus, tokenizer, media, split=split, seed=seed)


def _once(stream: Iterator[Document], count: int) -> Iterator[Document]:
    """A stream of samples begins anew at its end; here it ends."""
    for _ in range(count):
        yield next(stream)


# ---------------------------------------------------------------- what the layers read


@dataclass
class Hessian:
    """Sum of ``x x^T`` over ``count`` inputs x, float32 [K, K]."""

    total: Tensor
    count: int = 0

    def add(self, x: Tensor) -> None:
        """x: [n, K]."""
        self.total.addmm_(x.T, x)
        self.count += len(x)


class Reached(Exception):
    """All that this pass is for has been seen."""


def collect(model: Model, batches: Sequence[Sequence[Document]], units: Sequence[Unit]) -> dict[Unit, Hessian]:
    """The Hessians of some units, of all that enters their layers; of experts, as the router weighs it."""
    parameters = dict(model.named_parameters())
    found = {
        (name, expert): Hessian(torch.zeros(parameters[name].shape[-1], parameters[name].shape[-1]))
        for name, expert in units
    }
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for name in dict.fromkeys(name for name, _ in units):
            parent, _, child = name.rpartition(".")
            module = modules[parent]
            if isinstance(module, MoE):
                module.dispatch = partial(_experts, module, parent, found)
                stack.callback(setattr, module, "dispatch", None)
            else:
                handle = module.register_forward_pre_hook(partial(_linear, found[name, None]))
                stack.callback(handle.remove)
        last = modules[_block(units[-1][0])]
        stack.callback(last.register_forward_hook(_reached).remove)
        for batch in batches:
            try:
                model(pack(batch), logits="last", mtp=model.mtp is not None)
            except Reached:
                continue
    return found


def _reached(*_: Any) -> None:
    raise Reached


def _linear(hessian: Hessian, module: nn.Module, inputs: tuple[Any, ...]) -> None:
    hessian.add(inputs[0].detach().flatten(0, -2).float())


def _experts(
    module: MoE,
    name: str,
    found: dict[Unit, Hessian],
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    limit: float,
) -> Tensor:
    """In place of ``ops.experts``, which it calls."""
    gate_up_of, down_of = (f"{name}.{child}" for child in STACKS)
    for expert in range(len(gate_up)):
        inner, outer = found.get((gate_up_of, expert)), found.get((down_of, expert))
        if inner is None and outer is None:
            continue
        token, slot = (indices == expert).nonzero(as_tuple=True)
        share = weights[token, slot, None].float()
        if inner is not None:
            inner.add(x[token].float() * share)
        if outer is not None:
            gate, up = (x[token] @ gate_up[expert].T).chunk(2, dim=-1)
            outer.add(ops.swiglu(gate, up, limit).float() * share)
    return ops.experts(x, indices, weights, gate_up, down, limit)


def _block(name: str) -> str:
    """The part of the model that is calibrated as one."""
    path = name.split(".")
    return ".".join(path[: 2 if path[0] in ("layers", "engrams") else 1])


# ---------------------------------------------------------------- the passes


@torch.inference_mode()
def calibrate(
    model: Model,
    documents: Iterable[Document],
    kind: str,
    group: int = INT4_GROUP,
    budget: int = BUDGET,
    advance: Callable[[int], None] = lambda count: None,
) -> Chosen:
    """Codes and scales of all that can be calibrated; the weights of ``model`` become the numbers they stand for.

    kind: "int4" or "int8". budget: bytes of Hessians held at a time; more of them take more passes. advance: is told
    of each weight how many numbers it has. Tables of Engram, what is not reached (a drafter), and experts and layers
    that fewer tokens than inputs came to are rounded to the nearest. Raises ValueError.
    """
    check_kind(kind, group)
    if kind == "fp8":
        raise ValueError("--calibrate: fp8 rounds to the nearest; choose int4 or int8")
    batches = in_batches(documents)
    parameters = dict(model.named_parameters())
    chosen: Chosen = {}
    for units in _passes(model, parameters, budget):
        for (name, expert), hessian in collect(model, batches, units).items():
            weight = parameters[name] if expert is None else parameters[name][expert]
            mean = hessian.total / max(hessian.count, 1)
            trusted = hessian.count >= FEWEST * weight.shape[-1]
            try:
                if trusted:
                    chosen[name, expert] = gptq(weight, mean, kind, group)
                else:
                    nearest = ops.quantize_int8(weight) if kind == "int8" else ops.quantize_int4(weight, group)
                    chosen[name, expert] = nearest
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            codes, scales = chosen[name, expert]
            if kind == "int8":
                weight.copy_(ops.dequantize_int8(codes, scales))
            else:
                weight.copy_(ops.dequantize_int4(codes, scales, group, weight.shape[-1]))
            advance(weight.numel())
    return chosen


def in_batches(documents: Iterable[Document]) -> list[list[Document]]:
    """Documents that run together: of about as many positions as the longest may have."""
    batches: list[list[Document]] = []
    room = 0
    for document in documents:
        if len(document) > room:
            batches.append([])
            room = ROW
        batches[-1].append(document)
        room -= len(document)
    return batches


def _passes(model: Model, parameters: dict[str, nn.Parameter], budget: int) -> Iterator[list[Unit]]:
    """What is calibrated in one run of the model, in the order in which it is reached."""
    blocks: dict[str, list[Unit]] = {}
    for name in quantizable(model):
        if name.startswith("drafter.") or name.endswith(".embed.weight"):
            continue
        shape = parameters[name].shape
        experts = range(shape[0]) if len(shape) == 3 else [None]
        blocks.setdefault(_block(name), []).extend((name, expert) for expert in experts)

    def place(block: str) -> tuple[int, int, int]:
        kind, _, number = block.partition(".")
        return kind not in ("layers", "engrams"), int(number or 0), kind == "layers"

    for block in sorted(blocks, key=place):
        units: list[Unit] = []
        size = 0
        for unit in blocks[block]:
            bytes_ = 4 * parameters[unit[0]].shape[-1] ** 2
            if units and size + bytes_ > budget:
                yield units
                units, size = [], 0
            units.append(unit)
            size += bytes_
        yield units
