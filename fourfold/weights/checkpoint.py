"""A model directory: ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

Nothing is ever unpickled. A directory that is wrong is refused with one error that lists all that is wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fourfold.config import ModelConfig
from fourfold.fields import ConfigError
from fourfold.model.transformer import Model
from fourfold.text.tokenizer import Tokenizer, TokenizerError

BUNDLED = Path(__file__).parents[1] / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CheckpointError(ValueError):
    """A model directory that cannot be loaded; the message lists every fault."""


def resolve(name: str) -> Path:
    """The directory of a bundled model's name, or of a path. Raises CheckpointError if there is none."""
    for candidate in (BUNDLED / name, Path(name)):
        if (candidate / "config.json").is_file():
            return candidate
    bundled = ", ".join(sorted(p.parent.name for p in BUNDLED.glob("*/config.json"))) or "none"
    raise CheckpointError(f"model: {name!r} is neither bundled ({bundled}) nor a directory with a config.json")


def load_config(directory: Path) -> ModelConfig:
    path = Path(directory) / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    try:
        return ModelConfig.from_dict(values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Model, Tokenizer]:
    """The model, in evaluation mode and of ``dtype`` (buffers keep theirs), and its tokenizer.

    Raises CheckpointError; nothing half-loaded is ever returned.
    """
    directory = Path(directory)
    cfg = load_config(directory)
    with torch.device("meta"):
        model = Model(cfg)
    faults = []
    try:
        tokenizer = Tokenizer.load(directory / "tokenizer.json")
        if tokenizer.vocab_size > cfg.vocab_size:
            faults.append(f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, vocab_size is {cfg.vocab_size}")
    except TokenizerError as error:
        faults.append(str(error))
    try:
        tensors = read_tensors(directory / "model.safetensors", model, dtype)
    except CheckpointError as error:
        faults.append(str(error))
    if faults:
        raise CheckpointError("; ".join(faults))
    model.load_state_dict(tensors, assign=True)
    return model.eval(), tokenizer


def read_tensors(path: Path, model: Model, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors that ``model`` wants, checked for name, shape and finiteness."""
    wanted = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    faults, tensors = [], {}
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            faults += [f"{name} is missing" for name in sorted(wanted.keys() - names)]
            faults += [f"{name} is not part of this model" for name in sorted(names - wanted.keys())]
            for name in sorted(names & wanted.keys()):
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(wanted[name].shape):
                    faults.append(f"{name} has shape {list(shape)}, the model's is {list(wanted[name].shape)}")
                    continue
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    faults.append(f"{name} holds NaN or infinity")
                tensors[name] = tensor.to(dtype if name in parameters else wanted[name].dtype)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if faults:
        raise CheckpointError(f"{path}: " + "; ".join(faults))
    return tensors


def save_model(directory: Path, model: Model, tokenizer: Tokenizer, dtype: torch.dtype | None = None) -> None:
    """Writes a model directory in one step: it is there whole or not at all. ``dtype``: of the parameters on disk."""
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {
        name: (tensor.to(dtype) if dtype is not None and name in parameters else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }
    with atomic_directory(directory) as partial:
        write_json(partial / "config.json", model.cfg.to_dict())
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
