"""Replaces the large weights of a model by quantised ones and leaves those that suffer from rounding alone."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from fourfold.model.engram import Engram
from fourfold.model.moe import MoE
from fourfold.model.transformer import Model
from fourfold.quant.modules import (
    INT4_GROUP,
    QuantizedLinear,
    QuantizedStack,
    QuantizedTable,
    QuantizedWeight,
    check_kind,
)

# The head and its corrections, the expansions that decoding folds into the queries, the first maps of the drafters
KEPT = {"lm_head", "markov_head", "confidence_proj", "kv_b_proj", "e_proj", "h_proj"}
# Discrete choices, poolings and media, each with all that belongs to it
KEPT_INSIDE = {"indexer", "compressor", "media"}
STACKS = ("gate_up_proj", "down_proj")


def is_kept(module: str) -> bool:
    """Whether the linear layer of this name stays in its dtype."""
    path = module.split(".")
    return path[-1] in KEPT or not KEPT_INSIDE.isdisjoint(path)


def quantizable(model: Model, head: bool = False) -> list[str]:
    """The names of the parameters that :func:`prepare` replaces; with that of the head, if it is wanted."""
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (not is_kept(name) or (head and name == "lm_head")):
            names.append(f"{name}.weight")
        elif isinstance(module, Engram):
            names.append(f"{name}.embed.weight")
        elif isinstance(module, MoE):
            names += [f"{name}.{child}" for child in STACKS]
    return names


def prepare(
    model: Model,
    kind: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    group: int = INT4_GROUP,
    only: Collection[str] | None = None,
) -> dict[str, QuantizedWeight]:
    """Puts empty quantised weights into ``model``, to be filled with ``put``. Returns them by parameter name.

    kind: "int8", "int4" or "fp8". The names are those that the replaced parameters had: ``….q_proj.weight``,
    ``….mlp.gate_up_proj``. dtype: that the modules will compute in, by default that of the replaced weights;
    device: of codes and scales, by default that of the weights, which may be meta; group: inputs per scale of int4;
    only: the parameters to replace, by default all that :func:`quantizable` names: linear layers, expert stacks and
    the tables of Engram. Norms, router, biases, sinks, stream maps, token embeddings and what :func:`is_kept` names
    are never replaced.
    """
    check_kind(kind, group)
    wanted = set(quantizable(model)) if only is None else set(only)
    if strange := sorted(wanted - set(quantizable(model, head=True))):
        raise ValueError(f"quantization.weights: this model cannot hold {strange[0]} quantised")
    made: dict[str, QuantizedWeight] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f"{name}.weight" in wanted:
            w = module.weight
            linear = QuantizedLinear(tuple(w.shape), kind, dtype or w.dtype, device or w.device, module.bias, group)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear.train(module.training))
            made[f"{name}.weight"] = linear
        elif isinstance(module, Engram) and f"{name}.embed.weight" in wanted:
            w = module.embed.weight
            table = QuantizedTable(tuple(w.shape), kind, dtype or w.dtype, device or w.device, group)
            module.embed = table.train(module.training)
            made[f"{name}.embed.weight"] = table
        elif isinstance(module, MoE):
            for child in STACKS:
                if f"{name}.{child}" not in wanted:
                    continue
                w = getattr(module, child)
                stack = QuantizedStack(tuple(w.shape), kind, dtype or w.dtype, device or w.device, group)
                delattr(module, child)  # a name that holds a parameter takes no module
                setattr(module, child, stack.train(module.training))
                made[f"{name}.{child}"] = stack
    return made


def quantize_model(model: Model, kind: str, group: int = INT4_GROUP) -> Model:
    """Quantises the weights of ``model`` in place; see :func:`prepare` for which. Returns it.

    Raises ValueError for an unknown kind or group, or a weight that holds NaN or infinity.
    """
    weights = dict(model.named_parameters())
    for name, quantized in prepare(model, kind, group=group).items():
        weight = weights.pop(name)
        try:
            if isinstance(quantized, QuantizedStack):
                for expert in range(len(quantized)):
                    quantized.put(expert, 0, weight[expert])
            else:
                quantized.put(None, 0, weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return model
