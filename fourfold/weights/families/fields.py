"""Reads a released ``config.json`` field by field: every fault is collected, every field must be accounted for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fourfold.fields import ConfigError

REQUIRED: Any = object()
MOST_LAYERS = 10_000

# What libraries write beside a model's fields; none changes what it computes.
GENERIC = frozenset(
    """
    architectures auto_map dtype torch_dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id
    _name_or_path _attn_implementation_autoset id2label label2id problem_type return_dict output_attentions
    output_hidden_states chunk_size_feed_forward is_encoder_decoder model_type pretraining_tp task_specific_params
    aux_loss_alpha seq_aux output_router_logits router_aux_loss_coef router_jitter_noise n_predict quantization_config
    """.split()
)


class Fields:
    """The values of one table of a config.json, each taken once.

    A field that is missing or of a wrong type becomes a fault and a stand-in is returned, so that reading goes on;
    :meth:`check` raises ConfigError with all faults, among them the fields that nobody took.
    """

    def __init__(self, values: Any, prefix: str = "", faults: list[str] | None = None) -> None:
        self.prefix = prefix
        self.faults = [] if faults is None else faults
        if not isinstance(values, dict):
            self.fault("", "must be a table")
            values = {}
        self.values: dict[str, Any] = values
        self.left = dict.fromkeys(values)

    def fault(self, name: str, message: str) -> None:
        self.faults.append(f"{self.prefix}{name}: {message}")

    def __contains__(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def take(self, name: str, kind: type, default: Any = REQUIRED) -> Any:
        """A field of type ``kind``; null counts as absent. Without a default it must be there."""
        self.left.pop(name, None)
        value = self.values.get(name)
        if value is None:
            if default is REQUIRED:
                self.fault(name, "is missing")
                return STAND_INS[kind]
            return default
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            self.fault(name, f"must be of type {kind.__name__}, not {type(value).__name__}")
            return STAND_INS[kind] if default is REQUIRED else default
        return value

    def layers(self) -> int:
        """``num_hidden_layers``, of a size that makes sense: lists of that length are built from it."""
        count = self.take("num_hidden_layers", int)
        if not 0 < count <= MOST_LAYERS:
            self.fault("num_hidden_layers", f"is {count}, must be between 1 and {MOST_LAYERS}")
            return 1
        return count

    def items(self, name: str, kind: type, default: Any = REQUIRED) -> tuple[Any, ...]:
        """A list whose items are of type ``kind``."""
        values = self.take(name, list, default)
        if not all(type(value) is kind for value in values):
            self.fault(name, f"must be a list of {kind.__name__}")
            return ()
        return tuple(values)

    def table(self, name: str) -> Fields:
        """A table inside; its faults are collected here. Absent is empty."""
        return Fields(self.take(name, dict, {}), f"{self.prefix}{name}.", self.faults)

    def expect(self, name: str, *allowed: Any, why: str = "") -> None:
        """A field that, where it is there, must have one of these values; any other is not supported."""
        self.left.pop(name, None)
        value = self.values.get(name)
        if value is not None and not any(type(a) in (type(value), float) and a == value for a in allowed):
            choices = " or ".join(repr(a) for a in allowed) if allowed else "absent"
            self.fault(name, f"is {value!r}, only {choices} is supported" + (f": {why}" if why else ""))

    def agree(self, name: str, value: Any, says: str) -> None:
        """A field that says again what others say: where it is there, it must be ``value``."""
        self.left.pop(name, None)
        found = self.values.get(name)
        if found is not None and found != value:
            self.fault(name, f"is {found!r}, but {says} makes it {value!r}")

    def ignore(self, names: Iterable[str]) -> None:
        for name in names:
            self.left.pop(name, None)

    def finish(self) -> None:
        """Every field that was not taken is a fault."""
        for name in self.left:
            self.fault(name, "is not a field that is known here")
        self.left = {}

    def check(self) -> None:
        """Raises ConfigError that lists all faults."""
        if self.faults:
            raise ConfigError("; ".join(self.faults))


STAND_INS: dict[type, Any] = {int: 1, float: 1.0, str: "", bool: False, list: [], dict: {}}
