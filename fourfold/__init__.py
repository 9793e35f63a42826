"""Fourfold: an open implementation of the announced DeepSeek V4, to train, study, quantise and serve.

``ff.ModelConfig.preset("v4")`` says what a model is, ``ff.Model(cfg)`` is an ordinary ``nn.Module``, and
``ff.load("nano")`` gives a trained one that generates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fourfold.config import ModelConfig
from fourfold.fields import ConfigError

if TYPE_CHECKING:
    from fourfold.model.transformer import Model
    from fourfold.serve.local import LocalModel

__version__ = "0.1.0"
__all__ = ["ConfigError", "Model", "ModelConfig", "load"]


def load(name: str = "nano", dtype: str | None = None, quant: str | None = None, progress: bool = False) -> LocalModel:
    """The model called ``name`` (bundled) or stored in the directory or GGUF file ``name``, ready to generate.

    quant: "int8" or "int4", of the large weights; progress: a bar on stderr while loading.
    """
    from fourfold.serve.local import LocalModel

    return LocalModel.load(name, dtype=dtype, quant=quant, progress=progress)


def __getattr__(name: str) -> Any:
    """``Model`` is imported on first use, so that reading a config does not load torch."""
    if name == "Model":
        from fourfold.model.transformer import Model

        return Model
    raise AttributeError(f"module 'fourfold' has no attribute {name!r}")
