"""The model, top to bottom: embed -> [engram] -> block x n -> collapse streams -> norm -> head.

Axes in comments: T packed positions, n residual streams, d hidden size, V vocabulary, N sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.model.block import Block
from fourfold.model.cache import Cache
from fourfold.model.compressed_attention import SharedKVAttention
from fourfold.model.context import Context, Rotary
from fourfold.model.decode import decoder
from fourfold.model.dspark import Drafter
from fourfold.model.embedders import MediaEmbedder
from fourfold.model.engram import Engram, TokenCompression
from fourfold.model.indexer import Indexer
from fourfold.model.linear import Linear
from fourfold.model.mla import MLA
from fourfold.model.moe import MoE
from fourfold.model.mtp import MTP
from fourfold.model.norm import RMSNorm
from fourfold.model.probe import Probe
from fourfold.model.residual import HyperConnection, StreamCollapse, collapse
from fourfold.model.sequence import IGNORE, TEXT, Packed


@dataclass
class Output:
    """Logits float32 [T, V] (or [N, V], [M, V]); while training also what the losses and the telemetry need.

    mtp_logits: on request, of the positions t where t + 1 has a target: a guess of token t + 2, as
    ``mtp_targets`` names them; index_loss: mean KL of the indexers;
    balance_loss: mean sequence-wise balance; index_recall: mean share of attention mass selected;
    loads: expert choices by MoE layer, int64 [modalities, E]; features: on request, [T, targets * d], what entered
    the drafter's target layers, the mean of all streams.
    """

    logits: Tensor
    mtp_logits: Tensor | None = None
    index_loss: Tensor | None = None
    index_recall: Tensor | None = None
    balance_loss: Tensor | None = None
    loads: dict[str, Tensor] | None = None
    features: Tensor | None = None


class Model(nn.Module):
    """The decoder. An ordinary module; construct it under ``torch.device("meta")`` to count or to load into."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.media = MediaEmbedder(cfg.media, cfg.hidden_size)
        e = cfg.engram
        self.engrams = nn.ModuleDict({str(layer): Engram(cfg, layer) for layer in e.layer_ids})
        self.compression = (
            TokenCompression(cfg.vocab_size, e.compressed_vocab_size or cfg.vocab_size, e.pad_token_id, e.max_ngram)
            if e.layer_ids
            else None
        )
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.num_hidden_layers))
        self.collapse = collapse(cfg)
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.lm_head = None if cfg.tie_word_embeddings else Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.mtp = MTP(cfg) if cfg.mtp.num_layers else None
        self.drafter = Drafter(cfg) if cfg.drafter.num_layers else None
        for name, module in self.named_modules():
            if isinstance(module, MoE):
                module.name = name
        if self.embed_tokens.weight.device.type != "meta":
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of ``initializer_range``, smaller where a sub-layer writes to the residual; norms one."""
        std = self.cfg.initializer_range
        into_residual = std / (2 * self.cfg.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "o_b_proj.weight", "down_proj.weight", "down_proj")):
                nn.init.normal_(parameter, std=into_residual)
            elif name.endswith(("bias", "sinks")):
                nn.init.zeros_(parameter)
            elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "q_weight", "k_weight")):
                nn.init.ones_(parameter)
            elif name.endswith("conv.weight"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=std)
        for module in self.modules():
            if isinstance(module, (HyperConnection, StreamCollapse)):
                module.reset_parameters(std)
            elif isinstance(module, Indexer):
                nn.init.ones_(module.k_norm.weight)

    def forward(
        self,
        packed: Packed,
        cache: Cache | None = None,
        probe: Probe | None = None,
        logits: str = "all",
        mtp: bool = False,
        balance: bool = False,
        features: bool = False,
    ) -> Output:
        """Runs N sequences of T positions together; with a cache, they continue it and it grows.

        logits: of "all" positions [T, V], of the "last" of each sequence [N, V], or of those with a "target" [M, V].
        mtp, balance, features: compute also the logits, the loss and the drafter's input of that name.
        Raises CacheFull, or ValueError if a sequence outgrows ``max_position_embeddings`` or has a foreign modality.
        """
        if logits not in ("all", "last", "target"):
            raise ValueError(f"logits: is {logits!r}; choose all, last or target")
        if features and self.drafter is None:
            raise ValueError("features: this model has no drafter")
        if mtp and cache is not None:
            raise ValueError("mtp: runs over whole sequences, without a cache")
        ctx = self.context(packed, cache, probe)
        ctx.balance = balance
        streams = self.embed(packed)
        grams = self.compression(ctx) if self.compression is not None else None
        targets = self.cfg.drafter.target_layer_ids if features else ()
        collected: dict[int, Tensor] = {}
        decode = decoder(self.layers, self.cfg, ctx)
        stops = sorted({0, len(self.layers), *targets, *map(int, self.engrams)})
        for first, last in pairwise(stops):
            if grams is not None and str(first) in self.engrams:
                streams = self.engrams[str(first)](streams, grams, ctx)
            if first in targets:
                collected[first] = streams.mean(1)
            if decode is not None:
                streams = decode(streams, first, last, ctx)
                continue
            for block in self.layers[first:last]:
                streams = block(streams, ctx)
        mtp_logits = self._mtp_logits(streams, ctx) if mtp and self.mtp is not None else None
        if cache is not None:
            cache.commit(self._history(packed))
        hidden = self.collapse(streams, ctx)
        if logits == "last":
            hidden = hidden[packed.cu_seqlens[1:] - 1]
        elif logits == "target":
            hidden = hidden[packed.targets != IGNORE]
        return Output(
            logits=self.head(self.norm(hidden)),
            mtp_logits=mtp_logits,
            index_loss=mean_of_queries(ctx.index_losses, ctx),
            index_recall=mean_of_queries(ctx.index_recalls, ctx),
            balance_loss=torch.stack(ctx.balance_losses).mean() if ctx.balance_losses else None,
            loads=ctx.loads or None,
            features=torch.cat([collected[layer] for layer in targets], dim=-1) if targets else None,
        )

    def set_indexer_mode(self, mode: str) -> None:
        """Switches between ``dense``, ``warmup`` and ``sparse``; a model without indexers has but ``dense``."""
        if self.cfg.indexer.mode == "off":
            return
        self.cfg = self.cfg.replace(**{"indexer.mode": mode})
        for module in self.modules():
            if isinstance(module, (MLA, SharedKVAttention)):
                module.mode = mode

    def embed(self, packed: Packed) -> Tensor:
        """Every position's row, copied to all streams: [T, n, d]."""
        rows = self.media(self.embed_tokens(packed.tokens), packed)
        return rows[:, None].expand(-1, self.cfg.residual.streams, -1)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits in float32. hidden: [..., d], normalised."""
        logits = ops.linear(hidden, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(hidden)
        return ops.at_least_float32(logits)

    def context(self, packed: Packed, cache: Cache | None, probe: Probe | None) -> Context:
        cfg = self.cfg
        if len(packed) and (length := int(packed.positions.max()) + 1) > cfg.max_position_embeddings:
            raise ValueError(f"positions: {length} exceed max_position_embeddings ({cfg.max_position_embeddings})")
        if cache is not None:
            cache.begin(packed.cu_seqlens.diff().tolist())
        a = cfg.attention
        rotary = Rotary(packed.positions, a.rope_dim, cfg.rope)
        compress = Rotary(packed.positions, a.rope_dim, cfg.compress_rope) if a.is_compressed else rotary
        ctx = Context(packed, rotary, compress, cache, probe, by_sequence=a.is_compressed)
        if cache is None:  # now, not within a layer that is computed again for its gradient
            _ = ctx.windows, rotary.tables, compress.tables
        return ctx

    def _mtp_logits(self, streams: Tensor, ctx: Context) -> Tensor:
        assert self.mtp is not None
        following = self.embed_tokens(following_tokens(ctx.packed))
        if self.cfg.mtp.normed_input:
            streams = self.norm(self.collapse(streams, ctx))[:, None].expand_as(streams)
        hidden = self.mtp(streams, following, ctx)
        return self.head(hidden[mtp_targets(ctx.packed) != IGNORE])

    @staticmethod
    def _history(packed: Packed) -> list[list[int]]:
        tokens = packed.tokens if packed.all_text else torch.where(packed.modality == TEXT, packed.tokens, -1)
        ids, bounds = tokens.tolist(), packed.cu_seqlens.tolist()
        return [ids[start:stop] for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]


def mean_of_queries(sums: list[Tensor], ctx: Context) -> Tensor | None:
    """Over all positions and layers, from the sums over the queries of each layer and window."""
    if not sums:
        return None
    return torch.stack(sums).sum() * (len(ctx.windows) / (len(sums) * len(ctx.packed)))


def following_tokens(packed: Packed) -> Tensor:
    """int64 [T]: the next token of the same sequence; its last position sees the first, whatever is packed behind."""
    following = packed.tokens.roll(-1)
    full = packed.cu_seqlens.diff() > 0
    following[packed.cu_seqlens[1:][full] - 1] = packed.tokens[packed.cu_seqlens[:-1][full]]
    return following


def mtp_targets(packed: Packed) -> Tensor:
    """int64 [T]: the token after the next, or ``IGNORE`` where that has no target or lies in another sequence."""
    targets = packed.targets.roll(-1)
    targets[packed.cu_seqlens[1:] - 1] = IGNORE
    return targets
