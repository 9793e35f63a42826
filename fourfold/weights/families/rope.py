"""Rotary positions as released files describe them, in the two ways they do, from and to our RopeConfig."""

from __future__ import annotations

import math
from typing import Any

from fourfold.config import RopeConfig
from fourfold.weights.families.fields import Fields


def _mscale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def read_rope(fields: Fields, max_positions: int, scaled_softmax: bool) -> dict[str, Any]:
    """Fields of a RopeConfig from ``rope_parameters`` (new) or ``rope_theta`` and ``rope_scaling`` (old).

    ``scaled_softmax``: the family multiplies the softmax by the square of what ``mscale_all_dim`` gives.
    """
    theta = fields.take("rope_theta", float, None)
    name = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    if name == "rope_parameters" and fields.values.get("rope_scaling") not in (None, fields.values[name]):
        fields.fault("rope_scaling", "stands beside rope_parameters and says something else")
    fields.ignore(["rope_scaling", "rope_parameters"])
    table = fields.table(name)
    inner = table.take("rope_theta", float, theta)
    if theta is not None and inner != theta:
        fields.fault("rope_theta", f"is {theta}, {name}.rope_theta is {inner}")
    table.expect("partial_rotary_factor", 1.0)
    return read_parameters(table, 10000.0 if inner is None else inner, max_positions, scaled_softmax)


def read_parameters(
    values: Fields, theta: float, max_positions: int, scaled_softmax: bool, attention_factor: float | None = None
) -> dict[str, Any]:
    """Fields of a RopeConfig from one table; ``attention_factor`` is for one without (None: as in YaRN's paper)."""
    kind = values.take("rope_type", str, None)
    old = values.take("type", str, None)
    if kind is not None and old is not None and kind != old:
        values.fault("type", f"is {old!r}, rope_type is {kind!r}")
    kind = kind or old or "default"
    rope: dict[str, Any] = {"theta": theta}
    if kind == "default":
        values.expect("factor", 1.0)
    elif kind in ("linear", "yarn", "llama3"):
        rope |= {"scaling": kind, "factor": values.take("factor", float)}
    else:
        values.fault("rope_type", f"is {kind!r}; default, linear, yarn and llama3 are supported")
        return rope
    if kind in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = values.take("original_max_position_embeddings", int, max_positions)
    if kind == "llama3":
        rope |= {name: values.take(name, float) for name in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        rope |= _read_yarn(values, rope["factor"], scaled_softmax, attention_factor)
    values.finish()
    if rope.get("factor", 1.0) < 1:
        values.fault("factor", f"is {rope['factor']}, must be at least 1")
    return rope


def _read_yarn(values: Fields, factor: float, scaled_softmax: bool, length: float | None) -> dict[str, float]:
    values.expect("truncate", True)
    mscale, all_dim = values.take("mscale", float, 0.0), values.take("mscale_all_dim", float, 0.0)
    if length is None:
        length = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor)
    return {
        "beta_fast": values.take("beta_fast", float, 32.0),
        "beta_slow": values.take("beta_slow", float, 1.0),
        "mscale_all_dim": all_dim if scaled_softmax else 0.0,
        "attention_factor": values.take("attention_factor", float, length),
    }


def write_parameters(rope: RopeConfig) -> dict[str, Any]:
    """The table that :func:`read_parameters` reads as ``rope``, without theta and the type; {} for none."""
    if rope.factor == 1:
        return {}
    values: dict[str, Any] = {"factor": rope.factor}
    if rope.scaling in ("yarn", "llama3"):
        values["original_max_position_embeddings"] = rope.original_max_position_embeddings
    if rope.scaling == "llama3":
        values |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        values |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        if rope.mscale_all_dim:
            values["mscale_all_dim"] = rope.mscale_all_dim
        if rope.mscale_all_dim and rope.attention_factor == 1:
            values["mscale"] = rope.mscale_all_dim  # equal ones leave cosines and sines alone
        elif rope.mscale_all_dim or rope.attention_factor != _mscale(rope.factor):
            values["attention_factor"] = rope.attention_factor
    return values


def write_rope(rope: RopeConfig, dialect: str) -> dict[str, Any]:
    """The fields of a config.json for one rope: ``rope_parameters``, or ``rope_theta`` and ``rope_scaling``."""
    values = write_parameters(rope)
    if dialect == "transformers":
        kind = rope.scaling if values else "default"
        return {"rope_parameters": {"rope_type": kind, "rope_theta": rope.theta, **values}}
    key = "rope_type" if rope.scaling == "llama3" else "type"  # the name of each one's time
    return {"rope_theta": rope.theta, "rope_scaling": {key: rope.scaling, **values} if values else None}
