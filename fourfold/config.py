"""What a model is: frozen dataclasses, read from TOML, without importing torch.

Every innovation has a value that switches it off and leaves the plain transformer:
``residual.kind = "plain"``, ``engram.layer_ids = []``, ``indexer.mode = "off"``,
``moe.n_routed_experts = 0``, ``mtp.num_layers = 0``, ``media.image = media.video = media.audio = None``.
"""

from __future__ import annotations

import copy
import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

T = typing.TypeVar("T")

PRESETS = Path(__file__).resolve().parent / "presets"


class ConfigError(ValueError):
    """A field that is unknown, of the wrong type or out of its limits; the message names the field."""


def _require(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{name}: {message}")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions and their YaRN extension (arXiv 2309.00071)."""

    theta: float = 10000.0
    factor: float = 1.0  # YaRN; 1 means none
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale_all_dim: float = 0.0  # > 0 sharpens the softmax with the extension

    def __post_init__(self) -> None:
        _require(self.theta > 0, "rope.theta", "must be > 0")
        _require(self.factor >= 1, "rope.factor", "must be >= 1")


@dataclass(frozen=True)
class AttentionConfig:
    """``mla``: multi-head latent attention (arXiv 2405.04434). ``gqa``: grouped-query attention."""

    kind: str = "mla"
    num_attention_heads: int = 4
    # mla
    q_lora_rank: int = 0  # 0: queries straight from the hidden state, as V2-Lite
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    # gqa
    num_key_value_heads: int = 4
    head_dim: int = 32

    def __post_init__(self) -> None:
        _require(self.kind in ("mla", "gqa"), "attention.kind", f"is {self.kind!r}; choose mla or gqa")
        for name in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "num_key_value_heads"):
            _require(getattr(self, name) > 0, f"attention.{name}", "must be > 0")
        for name in ("qk_rope_head_dim", "head_dim"):
            _require(
                getattr(self, name) % 2 == 0 and getattr(self, name) > 0, f"attention.{name}", "must be even and > 0"
            )
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0 or self.kind != "gqa",
            "attention.num_key_value_heads",
            f"must divide num_attention_heads ({self.num_attention_heads})",
        )


@dataclass(frozen=True)
class IndexerConfig:
    """Lightning indexer of the sparse attention (DeepSeek-V3.2), one per group of layers.

    ``mode``: ``off`` (no indexer), ``dense`` (present, unused), ``warmup`` (dense attention, the
    indexer learns by KL and nothing else learns), ``sparse`` (attention over the selected keys).
    """

    mode: str = "off"
    n_heads: int = 32
    head_dim: int = 32
    topk: int = 64
    layers_per_indexer: int = 4

    def __post_init__(self) -> None:
        modes = ("off", "dense", "warmup", "sparse")
        _require(self.mode in modes, "indexer.mode", f"is {self.mode!r}; choose one of {', '.join(modes)}")
        for name in ("n_heads", "head_dim", "topk", "layers_per_indexer"):
            _require(getattr(self, name) > 0, f"indexer.{name}", "must be > 0")


@dataclass(frozen=True)
class MoEConfig:
    """Routed and shared experts (arXiv 2412.19437); ``n_routed_experts = 0`` makes every layer dense."""

    n_routed_experts: int = 0
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 128
    first_k_dense_replace: int = 1
    scoring_func: str = "sigmoid"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    bias_update_speed: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("n_routed_experts", "n_shared_experts", "first_k_dense_replace"):
            _require(getattr(self, name) >= 0, f"moe.{name}", "must be >= 0")
        _require(self.moe_intermediate_size > 0, "moe.moe_intermediate_size", "must be > 0")
        if not self.n_routed_experts:
            return
        scorings = ("sigmoid", "sqrtsoftplus", "softmax")
        _require(
            self.scoring_func in scorings,
            "moe.scoring_func",
            f"is {self.scoring_func!r}; choose one of {', '.join(scorings)}",
        )
        _require(
            0 < self.num_experts_per_tok <= self.n_routed_experts,
            "moe.num_experts_per_tok",
            f"must be between 1 and n_routed_experts ({self.n_routed_experts})",
        )
        _require(
            self.n_group >= 1 and self.n_routed_experts % self.n_group == 0,
            "moe.n_group",
            f"must divide n_routed_experts ({self.n_routed_experts})",
        )
        _require(
            1 <= self.topk_group <= self.n_group, "moe.topk_group", f"must be between 1 and n_group ({self.n_group})"
        )
        _require(
            self.num_experts_per_tok <= self.topk_group * (self.n_routed_experts // self.n_group),
            "moe.topk_group",
            "keeps fewer experts than num_experts_per_tok",
        )


@dataclass(frozen=True)
class ResidualConfig:
    """``plain``; ``hc``: free hyper-connections; ``mhc``: doubly stochastic mixing (arXiv 2512.24880)."""

    kind: str = "plain"
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6

    def __post_init__(self) -> None:
        kinds = ("plain", "hc", "mhc")
        _require(self.kind in kinds, "residual.kind", f"is {self.kind!r}; choose one of {', '.join(kinds)}")
        _require(self.hc_mult >= 1, "residual.hc_mult", "must be >= 1")
        _require(self.hc_sinkhorn_iters >= 1, "residual.hc_sinkhorn_iters", "must be >= 1")

    @property
    def streams(self) -> int:
        return 1 if self.kind == "plain" else self.hc_mult


@dataclass(frozen=True)
class EngramConfig:
    """Conditional n-gram memory (arXiv 2601.07372); no ``layer_ids`` means none."""

    layer_ids: tuple[int, ...] = ()
    max_ngram: int = 3
    n_heads: int = 2
    head_dim: int = 16
    vocab_size: int = 20011  # the prime search starts here
    compressed_vocab_size: int = 0  # 0: that of the model
    pad_token_id: int = 2
    seed: int = 0
    short_conv: bool = False

    def __post_init__(self) -> None:
        _require(self.max_ngram >= 2, "engram.max_ngram", "must be >= 2")
        for name in ("n_heads", "head_dim", "vocab_size"):
            _require(getattr(self, name) > 0, f"engram.{name}", "must be > 0")


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction (arXiv 2412.19437): extra blocks that predict the token after the next."""

    num_layers: int = 0

    def __post_init__(self) -> None:
        _require(self.num_layers in (0, 1), "mtp.num_layers", "must be 0 or 1")


@dataclass(frozen=True)
class ImageConfig:
    """Square pixel patches of an image whose sides are multiples of ``patch_size``."""

    patch_size: int = 8
    max_patches: int = 64

    def __post_init__(self) -> None:
        _require(self.patch_size > 0, "media.image.patch_size", "must be > 0")
        _require(self.max_patches > 0, "media.image.max_patches", "must be > 0")

    @property
    def features(self) -> int:
        return 3 * self.patch_size**2


@dataclass(frozen=True)
class VideoConfig:
    """Tubelets: ``tubelet_frames`` x ``patch_size`` x ``patch_size`` pixels of evenly sampled frames."""

    patch_size: int = 8
    tubelet_frames: int = 2
    max_frames: int = 8
    max_patches: int = 16  # per tubelet slice

    def __post_init__(self) -> None:
        _require(self.patch_size > 0, "media.video.patch_size", "must be > 0")
        _require(self.tubelet_frames > 0, "media.video.tubelet_frames", "must be > 0")
        _require(
            self.max_frames % self.tubelet_frames == 0, "media.video.max_frames", "must be a multiple of tubelet_frames"
        )
        _require(self.max_patches > 0, "media.video.max_patches", "must be > 0")

    @property
    def features(self) -> int:
        return 3 * self.tubelet_frames * self.patch_size**2


@dataclass(frozen=True)
class AudioConfig:
    """Log-mel frames of mono sound (window 25 ms, hop 10 ms), ``frames_per_token`` to a token."""

    sample_rate: int = 16000
    n_mels: int = 64
    frames_per_token: int = 4
    max_seconds: float = 20.0

    def __post_init__(self) -> None:
        for name in ("sample_rate", "n_mels", "frames_per_token", "max_seconds"):
            _require(getattr(self, name) > 0, f"media.audio.{name}", "must be > 0")

    @property
    def features(self) -> int:
        return self.n_mels * self.frames_per_token


@dataclass(frozen=True)
class MediaConfig:
    """Early-fusion inputs; ``None`` leaves a modality out. ``hidden_size``: width inside the embedders."""

    hidden_size: int = 256
    image: ImageConfig | None = None
    video: VideoConfig | None = None
    audio: AudioConfig | None = None

    def __post_init__(self) -> None:
        _require(self.hidden_size > 0, "media.hidden_size", "must be > 0")

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(name for name in ("image", "video", "audio") if getattr(self, name) is not None)


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    indexer: IndexerConfig = field(default_factory=IndexerConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    engram: EngramConfig = field(default_factory=EngramConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    media: MediaConfig = field(default_factory=MediaConfig)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"):
            _require(getattr(self, name) > 0, name, "must be > 0")
        for layer in self.engram.layer_ids:
            _require(
                0 <= layer < self.num_hidden_layers,
                "engram.layer_ids",
                f"has {layer}, outside 0..{self.num_hidden_layers - 1}",
            )
        _require(
            not self.engram.layer_ids or 0 <= self.engram.pad_token_id < self.vocab_size,
            "engram.pad_token_id",
            f"must be between 0 and vocab_size - 1 ({self.vocab_size - 1})",
        )
        _require(
            self.engram.compressed_vocab_size <= self.vocab_size,
            "engram.compressed_vocab_size",
            f"must be at most vocab_size ({self.vocab_size})",
        )
        _require(
            self.indexer.mode == "off" or self.attention.kind == "mla",
            "indexer.mode",
            "needs attention.kind = 'mla'",
        )
        _require(
            self.indexer.mode == "off" or self.indexer.head_dim >= self.attention.qk_rope_head_dim,
            "indexer.head_dim",
            f"must be at least attention.qk_rope_head_dim ({self.attention.qk_rope_head_dim})",
        )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """The named preset; ``overrides`` are dotted fields, e.g. ``**{"residual.kind": "plain"}``."""
        path = (PRESETS / f"{name}.toml").resolve()
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.toml")))
        _require(path.is_file() and path.parent == PRESETS, "preset", f"{name!r} is unknown; choose one of {known}")
        return cls.from_dict(tomllib.loads(path.read_text())).replace(**overrides)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        return from_dict(cls, values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def replace(self, **overrides: Any) -> ModelConfig:
        """A copy with dotted fields replaced: ``cfg.replace(**{"moe.n_routed_experts": 0})``."""
        values = self.to_dict()
        for dotted, value in overrides.items():
            *path, last = dotted.split(".")
            target = values
            for part in path:
                _require(isinstance(target.get(part), dict), dotted, "is not a field")
                target = target[part]
            _require(last in target, dotted, "is not a field")
            target[last] = copy.deepcopy(value)  # a later override may reach into it
        return from_dict(type(self), values)


def from_dict(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """Builds a dataclass from plain data; unknown fields and wrong types raise :class:`ConfigError`."""
    _require(isinstance(values, dict), prefix or cls.__name__, "must be a table")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        _require(name in fields, f"{prefix}{name}", f"is not a field; known: {', '.join(fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        _require(name in values or not required, f"{prefix}{name}", "is missing")
    return cls(**{name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, f"{name}.")  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple:
        _require(isinstance(value, (list, tuple)), name, "must be a list")
        return tuple(_convert(typing.get_args(hint)[0], item, name) for item in value)
    if typing.get_origin(hint) is dict:
        _require(isinstance(value, dict), name, "must be a table")
        return {key: _convert(typing.get_args(hint)[1], item, f"{name}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and type(value) is int:
        return float(value)
    _require(type(value) is hint, name, f"must be of type {hint.__name__}, not {type(value).__name__}")
    return value


def parse_override(text: str) -> tuple[str, Any]:
    """``"moe.n_routed_experts=0"`` -> ``("moe.n_routed_experts", 0)``; values are TOML, bare words are strings."""
    key, equals, value = text.partition("=")
    _require(bool(equals and key), text, "write key=value")
    try:
        return key.strip(), tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()
