"""What a model is: frozen dataclasses, read from TOML, without importing torch.

Every innovation has a value that switches it off and leaves the plain transformer:
``residual.kind = "plain"``, ``engram.layer_ids = []``, ``indexer.mode = "off"``,
``moe.n_routed_experts = 0``, ``mtp.num_layers = 0``, ``drafter.num_layers = 0``,
``media.image = media.video = media.audio = media.vision = None``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from fourfold.config_media import MediaConfig
from fourfold.fields import choose, from_dict, require

PRESETS = Path(__file__).resolve().parent / "presets"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions and their extension: YaRN (arXiv 2309.00071), linear, or that of Llama 3."""

    theta: float = 10000.0
    scaling: str = "yarn"
    factor: float = 1.0  # 1: no extension, whatever the scaling
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    mscale_all_dim: float = 0.0  # yarn: > 0 sharpens the softmax with the extension
    attention_factor: float = 1.0  # yarn: multiplies cosines and sines
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        require(self.theta > 0, "rope.theta", "must be > 0")
        require(self.factor >= 1, "rope.factor", "must be >= 1")
        choose("rope.scaling", self.scaling, ("yarn", "linear", "llama3"))
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            "rope.low_freq_factor",
            f"must be between 0 and high_freq_factor ({self.high_freq_factor})",
        )


@dataclass(frozen=True)
class AttentionConfig:
    """How positions read one another.

    ``mla``: multi-head latent attention (arXiv 2405.04434). ``gqa``: grouped-query attention.
    ``compressed``: a window beside pooled entries of everything older, CSA and HCA (arXiv 2606.19348).
    ``csa2``: the same with entries and selections shared by layers (DeepSeek-V4.1).
    """

    kind: str = "mla"
    num_attention_heads: int = 4
    # mla, compressed, csa2
    q_lora_rank: int = 0  # 0 (mla): queries straight from the hidden state, as V2-Lite
    qk_rope_head_dim: int = 16
    # mla
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    v_head_dim: int = 32
    # gqa, compressed, csa2
    head_dim: int = 32
    # gqa
    num_key_value_heads: int = 4
    qkv_bias: bool = False
    # compressed, csa2
    o_groups: int = 1
    o_lora_rank: int = 32
    sliding_window: int = 128
    compress_ratios: tuple[int, ...] = ()  # of each layer; 0: the window alone
    csa_ratio: int = 4  # compressed: layers of this ratio overlap their groups and select entries
    # csa2
    kv_source_layer_ids: tuple[int, ...] = ()
    index_source_layer_ids: tuple[int, ...] = ()
    candidate_source_layer_id: int = -1  # -1: every index layer looks at all entries
    candidate_topk_blocks: int = 2048
    candidate_block_size: int = 8

    def __post_init__(self) -> None:
        choose("attention.kind", self.kind, ("mla", "gqa", "compressed", "csa2"))
        for name in (
            *("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "num_key_value_heads"),
            *("o_groups", "o_lora_rank", "sliding_window", "csa_ratio"),
            *("candidate_topk_blocks", "candidate_block_size"),
        ):
            require(getattr(self, name) > 0, f"attention.{name}", "must be > 0")
        for name in ("qk_rope_head_dim", "head_dim"):
            size = getattr(self, name)
            require(size % 2 == 0 and size > 0, f"attention.{name}", "must be even and > 0")
        heads = self.num_attention_heads
        require(
            heads % self.num_key_value_heads == 0 or self.kind != "gqa",
            "attention.num_key_value_heads",
            f"must divide num_attention_heads ({heads})",
        )
        if not self.is_compressed:
            return
        require(self.q_lora_rank > 0, "attention.q_lora_rank", f"must be > 0 for kind {self.kind!r}")
        require(heads % self.o_groups == 0, "attention.o_groups", f"must divide num_attention_heads ({heads})")
        require(
            self.qk_rope_head_dim <= self.head_dim,
            "attention.qk_rope_head_dim",
            f"must be at most head_dim ({self.head_dim})",
        )
        require(all(r >= 0 for r in self.compress_ratios), "attention.compress_ratios", "must be >= 0")
        if self.kind == "csa2":
            self._check_sources()

    def _check_sources(self) -> None:
        compressing = [layer for layer, ratio in enumerate(self.compress_ratios) if ratio]
        for name in ("kv_source_layer_ids", "index_source_layer_ids"):
            sources = getattr(self, name)
            require(list(sources) == sorted(set(sources)), f"attention.{name}", "must ascend")
            require(
                set(sources) <= set(compressing), f"attention.{name}", "has a layer whose compress_ratios entry is 0"
            )
            require(sources[:1] == tuple(compressing[:1]), f"attention.{name}", "must begin with the first such layer")
        require(
            set(self.kv_source_layer_ids) <= set(self.index_source_layer_ids),
            "attention.index_source_layer_ids",
            "must hold every kv source",
        )
        ratio_of = self.compress_ratios
        for layer in compressing:
            source = max(s for s in self.kv_source_layer_ids if s <= layer)
            require(
                ratio_of[layer] == ratio_of[source],
                "attention.compress_ratios",
                f"layer {layer} has {ratio_of[layer]}, the source {source} of its entries {ratio_of[source]}",
            )
        require(
            self.candidate_source_layer_id == -1 or self.candidate_source_layer_id in self.index_source_layer_ids,
            "attention.candidate_source_layer_id",
            "must be -1 or an index source",
        )

    @property
    def is_compressed(self) -> bool:
        return self.kind in ("compressed", "csa2")

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that turn with the position."""
        return self.head_dim if self.kind == "gqa" else self.qk_rope_head_dim


@dataclass(frozen=True)
class IndexerConfig:
    """Lightning indexer of the sparse attention (DeepSeek-V3.2), one per group of layers.

    ``mode``: ``off`` (no indexer), ``dense`` (present, unused), ``warmup`` (dense attention, the
    indexer learns by KL and nothing else learns), ``sparse`` (attention over the selected keys).
    ``candidate_blocks`` > 0: keys are scored only in so many blocks of ``block_size`` (less one) whose summary scores
    best by queries of their own, and in those of the newest ``topk`` keys, and a key's score below one counts as one;
    ``first_layer``: layers before it have no indexer, they attend to the last ``topk`` positions, whatever the mode.
    Both for ``mla``.
    """

    mode: str = "off"
    n_heads: int = 32
    head_dim: int = 32
    topk: int = 64
    layers_per_indexer: int = 4
    first_layer: int = 0
    block_size: int = 32
    candidate_blocks: int = 0  # 0: every key is scored

    def __post_init__(self) -> None:
        choose("indexer.mode", self.mode, ("off", "dense", "warmup", "sparse"))
        for name in ("n_heads", "head_dim", "topk", "layers_per_indexer", "block_size"):
            require(getattr(self, name) > 0, f"indexer.{name}", "must be > 0")
        for name in ("candidate_blocks", "first_layer"):
            require(getattr(self, name) >= 0, f"indexer.{name}", "must be >= 0")
        reach = self.candidate_blocks * self.block_size
        require(
            not reach or reach >= self.topk,
            "indexer.candidate_blocks",
            f"holds {reach} keys in blocks of {self.block_size}, fewer than topk ({self.topk})",
        )

    @property
    def floor(self) -> float:
        """A score below counts as it. Scores are learnt as logits: what is needed among a million stands far above."""
        return 1.0 if self.candidate_blocks else -math.inf

    @property
    def rows_per_position(self) -> Fraction:
        """Keys and summaries that are cached of a position."""
        return 1 + (Fraction(1, self.block_size) if self.candidate_blocks else Fraction())

    def keeps_near(self, layer: int) -> bool:
        """Whether an ``mla`` layer attends to the last ``topk`` positions alone."""
        return self.mode != "off" and layer < self.first_layer

    def owned_by(self, layer: int) -> bool:
        """Whether an ``mla`` layer of the trunk has an indexer; those after it, up to the next one, share it."""
        past = layer - self.first_layer
        return self.mode != "off" and past >= 0 and past % self.layers_per_indexer == 0


@dataclass(frozen=True)
class MoEConfig:
    """Routed and shared experts (arXiv 2412.19437); ``n_routed_experts = 0`` makes every layer dense."""

    n_routed_experts: int = 0
    n_shared_experts: int = 1
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 128
    first_k_dense_replace: int = 1
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"  # a group is worth its two best experts; group_limited_greedy: its best; greedy
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    num_hash_layers: int = 0  # the first layers choose experts by a table of token ids
    swiglu_limit: float = 0.0  # > 0: bounds the gate from above and the up projection on both sides
    bias_update_speed: float = 1e-3

    def __post_init__(self) -> None:
        counts = ("n_routed_experts", "n_shared_experts", "first_k_dense_replace", "num_hash_layers")
        for name in (*counts, "swiglu_limit"):
            require(getattr(self, name) >= 0, f"moe.{name}", "must be >= 0")
        require(self.moe_intermediate_size > 0, "moe.moe_intermediate_size", "must be > 0")
        if not self.n_routed_experts:
            return
        choose("moe.scoring_func", self.scoring_func, ("sigmoid", "sqrtsoftplus", "softmax"))
        choose("moe.topk_method", self.topk_method, ("noaux_tc", "group_limited_greedy", "greedy"))
        require(self.n_group == 1 or self.topk_method != "greedy", "moe.n_group", "must be 1 for topk_method 'greedy'")
        require(
            0 < self.num_experts_per_tok <= self.n_routed_experts,
            "moe.num_experts_per_tok",
            f"must be between 1 and n_routed_experts ({self.n_routed_experts})",
        )
        require(
            self.n_group >= 1 and self.n_routed_experts % self.n_group == 0,
            "moe.n_group",
            f"must divide n_routed_experts ({self.n_routed_experts})",
        )
        require(
            1 <= self.topk_group <= self.n_group, "moe.topk_group", f"must be between 1 and n_group ({self.n_group})"
        )
        require(
            self.num_experts_per_tok <= self.topk_group * (self.n_routed_experts // self.n_group),
            "moe.topk_group",
            "keeps fewer experts than num_experts_per_tok",
        )


@dataclass(frozen=True)
class ResidualConfig:
    """``plain``; ``hc``: free hyper-connections; ``mhc``: doubly stochastic mixing (arXiv 2512.24880);
    ``mhc_single_pass``: each site reads with the weights that the site before it computed (DeepSeek-V4.1)."""

    kind: str = "plain"
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6

    def __post_init__(self) -> None:
        choose("residual.kind", self.kind, ("plain", "hc", "mhc", "mhc_single_pass"))
        require(self.hc_mult >= 1, "residual.hc_mult", "must be >= 1")
        require(self.hc_sinkhorn_iters >= 1, "residual.hc_sinkhorn_iters", "must be >= 1")

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
        require(self.max_ngram >= 2, "engram.max_ngram", "must be >= 2")
        for name in ("n_heads", "head_dim", "vocab_size"):
            require(getattr(self, name) > 0, f"engram.{name}", "must be > 0")


@dataclass(frozen=True)
class MTPConfig:
    """Multi-token prediction (arXiv 2412.19437): extra blocks that predict the token after the next."""

    num_layers: int = 0
    normed_input: bool = False  # V3: reads the trunk behind its final norm

    def __post_init__(self) -> None:
        require(self.num_layers in (0, 1), "mtp.num_layers", "must be 0 or 1")


@dataclass(frozen=True)
class DrafterConfig:
    """DSpark: blocks that draft ``block_size`` tokens at once from features of the trunk (DeepSeek-V4.1)."""

    num_layers: int = 0
    block_size: int = 5
    noise_token_id: int = 0
    target_layer_ids: tuple[int, ...] = ()
    markov_rank: int = 256
    n_routed_experts: int = 128
    num_experts_per_tok: int = 3

    def __post_init__(self) -> None:
        if not self.num_layers:
            return
        for name in ("num_layers", "block_size", "markov_rank", "n_routed_experts"):
            require(getattr(self, name) > 0, f"drafter.{name}", "must be > 0")
        require(bool(self.target_layer_ids), "drafter.target_layer_ids", "must name a layer")
        require(
            0 < self.num_experts_per_tok <= self.n_routed_experts,
            "drafter.num_experts_per_tok",
            f"must be between 1 and n_routed_experts ({self.n_routed_experts})",
        )


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    compress_rope: RopeConfig = field(default_factory=RopeConfig)  # of the layers that compress
    indexer: IndexerConfig = field(default_factory=IndexerConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    engram: EngramConfig = field(default_factory=EngramConfig)
    mtp: MTPConfig = field(default_factory=MTPConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    media: MediaConfig = field(default_factory=MediaConfig)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "max_position_embeddings"):
            require(getattr(self, name) > 0, name, "must be > 0")
        for layer in self.engram.layer_ids:
            require(
                0 <= layer < self.num_hidden_layers,
                "engram.layer_ids",
                f"has {layer}, outside 0..{self.num_hidden_layers - 1}",
            )
        require(
            not self.engram.layer_ids or 0 <= self.engram.pad_token_id < self.vocab_size,
            "engram.pad_token_id",
            f"must be between 0 and vocab_size - 1 ({self.vocab_size - 1})",
        )
        require(
            self.engram.compressed_vocab_size <= self.vocab_size,
            "engram.compressed_vocab_size",
            f"must be at most vocab_size ({self.vocab_size})",
        )
        a = self.attention
        require(self.indexer.mode == "off" or a.kind != "gqa", "indexer.mode", "must be 'off' for attention.kind 'gqa'")
        require(not self.indexer.candidate_blocks or a.kind == "mla", "indexer.candidate_blocks", "is for kind 'mla'")
        require(
            self.indexer.mode == "off" or self.indexer.head_dim >= a.qk_rope_head_dim,
            "indexer.head_dim",
            f"must be at least attention.qk_rope_head_dim ({a.qk_rope_head_dim})",
        )
        require(
            not a.is_compressed or len(a.compress_ratios) == self.num_hidden_layers,
            "attention.compress_ratios",
            f"has {len(a.compress_ratios)} entries, there are {self.num_hidden_layers} layers",
        )
        require(
            not self.moe.num_hash_layers or not self.media.modalities,
            "moe.num_hash_layers",
            "must be 0 in a model that reads media: only text has token ids to route by",
        )
        require(
            not self.drafter.num_layers or a.is_compressed,
            "drafter.num_layers",
            "must be 0 for attention.kind 'mla' and 'gqa': drafts read the window of compressed attention",
        )
        for layer in self.drafter.target_layer_ids:
            require(
                0 <= layer < self.num_hidden_layers,
                "drafter.target_layer_ids",
                f"has {layer}, outside 0..{self.num_hidden_layers - 1}",
            )

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """The named preset; ``overrides`` are dotted fields, e.g. ``**{"residual.kind": "plain"}``."""
        path = (PRESETS / f"{name}.toml").resolve()
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.toml")))
        require(path.is_file() and path.parent == PRESETS, "preset", f"{name!r} is unknown; choose one of {known}")
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
                require(isinstance(target.get(part), dict), dotted, "is not a field")
                target = target[part]
            require(last in target, dotted, "is not a field")
            target[last] = copy.deepcopy(value)  # a later override may reach into it
        return from_dict(type(self), values)
