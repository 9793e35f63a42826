"""A recipe: everything that decides a training run, read from TOML."""

from __future__ import annotations

import math
import tomllib
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.data.stream import SourceSpec
from fourfold.fields import ConfigError, choose, from_dict, parse_override, require
from fourfold.weights.checkpoint import open_source, resolve

# ---------------------------------------------------------------- schedules: what the peak rate is multiplied by
# at ``step`` of ``steps``; all warm up linearly over ``warmup`` steps and go down to ``end``.


def linear(step: int, steps: int, warmup: int, decay_share: float, end: float) -> float:
    """Constant, then a straight line over the last ``decay_share`` of all steps."""
    left = min(1.0, (steps - step) / max(1, int(steps * decay_share)))
    return warm(step, warmup) * (end + (1 - end) * left)


def wsd(step: int, steps: int, warmup: int, decay_share: float, end: float) -> float:
    """Warm-up, stable, decay: constant, then half a cosine over the last ``decay_share`` (as DeepSeek-V4)."""
    left = min(1.0, (steps - step) / max(1, int(steps * decay_share)))
    return warm(step, warmup) * (end + (1 - end) * (1 - math.cos(math.pi * left)) / 2)


def cosine(step: int, steps: int, warmup: int, decay_share: float, end: float) -> float:
    """Half a cosine from the end of the warm-up to the last step; there is no ``decay_share``."""
    done = min(1.0, max(0, step - warmup) / max(1, steps - warmup))
    return warm(step, warmup) * (end + (1 - end) * (1 + math.cos(math.pi * done)) / 2)


def warm(step: int, warmup: int) -> float:
    return min(1.0, (step + 1) / max(1, warmup))


SCHEDULES = {"linear": linear, "wsd": wsd, "cosine": cosine}

# ---------------------------------------------------------------- the recipe


@dataclass(frozen=True)
class Phase:
    """A stretch of the run. ``indexer``: its mode (``IndexerConfig``); ``mtp``: weight of the MTP loss;
    ``span``: positions are skipped at random so that they reach up to it (``train.length``; 0: none is);
    ``weights``: the mixture from here on, skills or names of sources (empty: as before)."""

    steps: int
    indexer: str = "dense"
    mtp: float = 0.0
    span: int = 0
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        modes = ("dense", "warmup", "sparse")
        if self.indexer not in modes:
            raise ConfigError(f"phases.indexer: is {self.indexer!r}; choose one of {', '.join(modes)}")
        for name in ("steps", "mtp", "span"):
            if getattr(self, name) < 0:
                raise ConfigError(f"phases.{name}: must be >= 0")


@dataclass(frozen=True)
class Optimizer:
    """``kind``: muon (matrices of hidden layers; AdamW elsewhere) or adamw. ``schedule``: one of ``SCHEDULES``.

    ``accumulate``: micro-batches of a step. ``skip_sigma``: a step whose loss or gradient norm is further above the
    recent mean, in standard deviations, is not taken.
    """

    kind: str = "muon"
    lr: float = 3e-3
    lr_end: float = 1e-4
    schedule: str = "linear"
    warmup_steps: int = 100
    decay_share: float = 0.5
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.1
    engram_lr_scale: float = 5.0
    indexer_lr: float = 1e-3
    clip: float = 1.0
    accumulate: int = 1
    skip_sigma: float = 6.0

    def __post_init__(self) -> None:
        if self.kind not in ("muon", "adamw"):
            raise ConfigError(f"optimizer.kind: is {self.kind!r}; choose muon or adamw")
        choose("optimizer.schedule", self.schedule, tuple(SCHEDULES))
        require(self.accumulate >= 1, "optimizer.accumulate", "must be at least 1")
        require(self.skip_sigma > 0, "optimizer.skip_sigma", "must be > 0 (inf: only what is not finite is skipped)")
        if self.lr <= 0:
            raise ConfigError("optimizer.lr: must be > 0")
        if len(self.betas) != 2:
            raise ConfigError("optimizer.betas: must be two numbers")

    def lr_scale(self, step: int, steps: int) -> float:
        """What the learning rates are multiplied by at ``step`` of ``steps``."""
        schedule = SCHEDULES[self.schedule]
        return schedule(step, steps, self.warmup_steps, self.decay_share, self.lr_end / self.lr)


@dataclass(frozen=True)
class Parallel:
    """How many processes share the work: ``dp_replicate`` groups of ``dp_shard``, each holding one copy of the model
    in shards; the experts of a layer are spread over ``ep`` of them."""

    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard", "ep"):
            require(getattr(self, name) >= 1, f"parallel.{name}", "must be at least 1")
        require(
            self.world_size % self.ep == 0,
            "parallel.ep",
            f"is {self.ep}; must divide dp_replicate * dp_shard ({self.world_size})",
        )

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard


@dataclass(frozen=True)
class Recipe:
    """``model``: dotted overrides of the preset. What is learnt from: ``weights``, skill -> share of documents
    (data.mixture), or ``sources`` (data.stream). ``init``: a model to begin with, which then stands for the preset and
    the tokenizer. ``recompute``: blocks keep no activations for the backward pass."""

    out: str
    phases: tuple[Phase, ...]
    weights: dict[str, float] = field(default_factory=dict)
    sources: tuple[SourceSpec, ...] = ()
    preset: str = "nano"
    init: str = ""
    model: dict[str, Any] = field(default_factory=dict)
    corpus: str = ""  # directory of the built data; empty: the default place
    tokenizer: str = ""  # tokenizer.json; empty: trained on the corpus
    seed: int = 0
    row: int = 512
    rows: int = 8
    bf16: bool | None = None  # autocast; None: where the processor has products of bfloat16
    recompute: bool = False
    balance_weight: float = 0.0  # of the sequence-wise balance loss
    log_every: int = 10
    save_every: int = 200
    keep: int = 2
    peak_flops: float = 0.0  # of the machine, for MFU; 0: measured by a matrix product
    optimizer: Optimizer = field(default_factory=Optimizer)
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self) -> None:
        for name in ("row", "rows", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1")
        if not self.phases:
            raise ConfigError("phases: there must be at least one")
        require(self.peak_flops >= 0, "peak_flops", "must be >= 0")
        require(bool(self.weights) != bool(self.sources), "weights", "give either weights of skills or [[sources]]")
        names = {source.label for source in self.sources}
        for phase in self.phases:
            unknown = phase.weights.keys() - names if self.sources else ()
            require(not unknown, "phases.weights", f"{', '.join(sorted(unknown))} is no source of this recipe")
        self._check_spans()
        require(not (self.init and self.tokenizer), "tokenizer", "is that of init where init is given")

    def _check_spans(self) -> None:
        span = max(phase.span for phase in self.phases)
        if not span:
            return
        cfg = self.config()
        require(
            span <= cfg.max_position_embeddings,
            "phases.span",
            f"is {span}; must be at most model.max_position_embeddings ({cfg.max_position_embeddings})",
        )
        require(not cfg.attention.is_compressed, "phases.span", "must be 0 where positions are pooled in their groups")

    def in_bf16(self, device: torch.device) -> bool:
        return ops.multiplies_bfloat16(device) if self.bf16 is None else self.bf16

    @property
    def steps(self) -> int:
        return sum(p.steps for p in self.phases)

    def phase(self, step: int) -> Phase:
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        return self.phases[-1]

    @cached_property
    def changes(self) -> dict[int, tuple[SourceSpec, ...]]:
        """What is read from each step on at which that changes, beginning with 0."""
        begins, found = 0, {0: self._sources(self.weights)}
        for phase in self.phases:
            if phase.steps and phase.weights:
                found[begins] = self._sources(phase.weights)
            begins += phase.steps
        return found

    def sources_at(self, step: int) -> tuple[SourceSpec, ...]:
        """What ``step`` reads."""
        return self.changes[max(begin for begin in self.changes if begin <= step)]

    def _sources(self, weights: dict[str, float]) -> tuple[SourceSpec, ...]:
        if not self.sources:
            return (SourceSpec("skills", self.corpus, name="skills", skills=weights),)
        if not weights:
            return self.sources
        return tuple(replace(source, weight=weights.get(source.label, 0.0)) for source in self.sources)

    def config(self) -> ModelConfig:
        """The model's. TOML has no null, so media are switched off by ``model.media.image = "off"``."""
        values = dict(_dotted(self.model))
        off = {name: None for name, value in values.items() if name.startswith("media.") and value == "off"}
        if self.init:
            return open_source(resolve(self.init)).cfg.replace(**values | off)
        return ModelConfig.preset(self.preset, **values | off)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def load(path: Path, overrides: list[str]) -> Recipe:
        """Reads TOML and applies ``key=value`` overrides, e.g. ``model.residual.kind=plain``.

        Raises ConfigError, which names the field.
        """
        try:
            values = tomllib.loads(Path(path).read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"recipe: {path} cannot be read: {error}") from None
        for text in overrides:
            key, value = parse_override(text)
            *parents, last = key.split(".")
            target = values
            for part in parents:
                target = target.setdefault(part, {})
                if not isinstance(target, dict):
                    raise ConfigError(f"{key}: {part} is not a table")
            target[last] = value
        return from_dict(Recipe, values)


def _dotted(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in table.items():
        pairs += _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs
