"""Tiny models of every family and what they are written as, made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fourfold.model.transformer import Model
from fourfold.text.tokenizer import Tokenizer, compress_vocabulary, train_tokenizer
from fourfold.weights.export import export_model
from fourfold.weights.families import FAMILIES
from tests.model import tiny
from tests.weights.released import VOCAB, tiny_config


@pytest.fixture(scope="session")
def family_tokenizer() -> Tokenizer:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog"] * 3, VOCAB - 4)


def make(model_type: str, tokenizer: Tokenizer) -> Model:
    """A tiny model of random numbers; what no file of its family holds is zero or follows from the tokenizer."""
    cfg = tiny_config(model_type)
    ids = compress_vocabulary(tokenizer)
    if cfg.engram.layer_ids:
        cfg = cfg.replace(**{"engram.compressed_vocab_size": max(ids) + 1})
    model = tiny.model(cfg, seed=len(model_type))
    for name, buffer in model.named_buffers():
        if name.endswith("media_bias"):
            buffer[1:] = 0
        elif name.endswith("gate.bias") and cfg.moe.scoring_func == "softmax":
            buffer.zero_()
        elif name.endswith("tid2eid"):
            buffer.copy_(torch.stack([torch.randperm(6)[:2] for _ in range(len(buffer))]))
        elif name == "compression.ids":
            buffer.zero_()[: len(ids)] = torch.tensor(ids)
    return model


@pytest.fixture(scope="session")
def models(family_tokenizer) -> dict[str, Model]:
    return {model_type: make(model_type, family_tokenizer) for model_type in FAMILIES}


@pytest.fixture(scope="session")
def directories(models, family_tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Each tiny model, as released files."""
    root = tmp_path_factory.mktemp("released")
    return {name: export_model(model, family_tokenizer, root / name, name).path for name, model in models.items()}


@pytest.fixture
def copied(directories, tmp_path) -> Callable[[str], Path]:
    """A copy of one of ``directories``, to break."""
    return lambda name: Path(shutil.copytree(directories[name], tmp_path / name))
