"""Released families: one file each, built from shared readers of configs and plans of names."""

from __future__ import annotations

from typing import Any

from fourfold.fields import ConfigError
from fourfold.weights.families.base import DIALECTS, FLOAT32, Family
from fourfold.weights.families.llama import DEEPSEEK, LLAMA, QWEN2
from fourfold.weights.families.v2 import V2
from fourfold.weights.families.v3 import V3
from fourfold.weights.families.v4 import V4
from fourfold.weights.families.v32 import V32
from fourfold.weights.families.v41 import V41

FAMILIES: dict[str, Family] = {f.model_type: f for f in (LLAMA, QWEN2, DEEPSEEK, V2, V3, V32, V4, V41)}

__all__ = ["DIALECTS", "FAMILIES", "FLOAT32", "Family", "family_of"]


def family_of(values: dict[str, Any]) -> Family:
    """The family of a released config.json. Raises ConfigError for a model_type that is none of ours."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(f"model_type: is {kind!r}; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[kind]
