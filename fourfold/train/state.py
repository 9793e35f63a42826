"""Checkpoints of a run: ``checkpoints/step-N`` holds the model, the optimizer and where the data stream was.

Each is written whole or not at all, so that whatever kills a run, the newest one loads.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fourfold.model.transformer import Model
from fourfold.text.tokenizer import Tokenizer
from fourfold.weights.checkpoint import atomic_directory, read_tensors, save_model, write_json


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = (run / "checkpoints").glob("step-*/state.json")
    return sorted((p.parent for p in found), key=lambda p: int(p.name.removeprefix("step-")))


def save(
    run: Path,
    step: int,
    model: Model,
    tokenizer: Tokenizer,
    optimizers: list[torch.optim.Optimizer],
    data: dict[str, Any],
    keep: int,
) -> Path:
    """Writes ``step-N`` after ``step`` steps and removes all but the newest ``keep``."""
    path = run / "checkpoints" / f"step-{step}"
    for partial in path.parent.glob(".step-*"):  # of a save that was killed
        shutil.rmtree(partial, ignore_errors=True)
    moments = {}
    for optimizer, names in zip(optimizers, _names(model, optimizers), strict=True):
        for index, entry in optimizer.state_dict()["state"].items():
            moments |= {f"{names[index]}:{key}": torch.as_tensor(value) for key, value in entry.items()}
    with atomic_directory(path) as partial:
        save_model(partial / "model", model, tokenizer)
        save_file(moments, partial / "optimizer.safetensors")
        write_json(partial / "state.json", {"step": step, "data": data})
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return path


def restore(path: Path, model: Model, optimizers: list[torch.optim.Optimizer]) -> tuple[int, dict[str, Any]]:
    """Loads a checkpoint into model and optimizers. Returns the steps done and the state of the data stream."""
    model.load_state_dict(read_tensors(path / "model" / "model.safetensors", model, torch.float32))
    entries: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(path / "optimizer.safetensors").items():
        parameter, key = name.rsplit(":", 1)
        entries.setdefault(parameter, {})[key] = tensor
    for optimizer, names in zip(optimizers, _names(model, optimizers), strict=True):
        found = {index: entries[name] for index, name in enumerate(names) if name in entries}
        optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})
    state = json.loads((path / "state.json").read_text())
    return state["step"], state["data"]


def _names(model: Model, optimizers: list[torch.optim.Optimizer]) -> list[list[str]]:
    """The parameter names of each optimizer, in its own order."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[by_id[id(p)] for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
