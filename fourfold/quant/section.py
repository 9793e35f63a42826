"""What a config.json says of weights that are stored quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fourfold.quant.modules import INT4_GROUP, QuantizedStack, QuantizedWeight, check_kind

SECTION = "quantization"
METHODS = ("nearest", "gptq")
FIELDS = {"kind", "group", "method", "weights"}


@dataclass(frozen=True)
class Quantization:
    """weights: the parameters that are stored as ``codes`` and ``scales``, by the names they have in a wide model;
    group: inputs per scale of int4; method: how the codes were chosen."""

    kind: str
    weights: tuple[str, ...]
    group: int = INT4_GROUP
    method: str = "nearest"

    def to_dict(self) -> dict[str, Any]:
        group = {"group": self.group} if self.kind == "int4" else {}
        return {"kind": self.kind, **group, "method": self.method, "weights": list(self.weights)}

    @staticmethod
    def from_dict(values: Any) -> Quantization:
        """Raises ValueError that names the field."""
        if not isinstance(values, dict):
            raise ValueError(f"{SECTION}: must be a table")
        if strange := sorted(values.keys() - FIELDS):
            raise ValueError(f"{SECTION}.{strange[0]}: is unknown")
        kind, group, weights = values.get("kind"), values.get("group", INT4_GROUP), values.get("weights")
        method = values.get("method", METHODS[0])
        try:
            check_kind(kind, group)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{SECTION}: {error}") from None
        if method not in METHODS:
            raise ValueError(f"{SECTION}.method: is {method!r}; it is one of {', '.join(METHODS)}")
        if not isinstance(weights, list) or not all(isinstance(name, str) for name in weights):
            raise ValueError(f"{SECTION}.weights: must be a list of names")
        return Quantization(kind, tuple(weights), group, method)


def stored_names(weight: str) -> tuple[str, str]:
    """The names of codes and scales of a parameter."""
    stem = weight.removesuffix(".weight")
    return f"{stem}.codes", f"{stem}.scales"


def quantization_of(model: nn.Module) -> Quantization | None:
    """What to write beside the state dict of a model, or None if nothing in it is quantised.

    Raises ValueError if its weights are of several kinds.
    """
    found = {
        name if isinstance(module, QuantizedStack) else f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedWeight)
    }
    if not found:
        return None
    forms = {(module.kind, module.group) for module in found.values()}
    if len(forms) > 1:
        raise ValueError(f"{SECTION}: weights of several kinds cannot be stored: {sorted(forms)}")
    ((kind, group),) = forms
    return Quantization(kind, tuple(found), group)
