"""DSpark: a drafter that guesses the next ``block_size`` tokens at once (DeepSeek-V4.1).

It reads what entered a few late layers of the trunk. Each of its blocks turns that into keys of the last positions
and lets the drafted positions see those and one another, without a causal order. What the order of the tokens asks
for is added after: a matrix of low rank corrects the logits by the token before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import ModelConfig
from fourfold.config_media import MediaConfig
from fourfold.model.block import Block
from fourfold.model.compressed_attention import SharedKVAttention
from fourfold.model.context import Context, Rotary
from fourfold.model.norm import RMSNorm
from fourfold.model.residual import collapse
from fourfold.model.sequence import IGNORE, Packed


@dataclass
class Draft:
    """What was drafted: tokens int64 [B, block_size], the float32 logits [B, block_size, V] they were chosen from, and
    how likely each is to be right if those before it are, confidence float32 [B, block_size], as logits."""

    tokens: Tensor
    logits: Tensor
    confidence: Tensor


class DraftAttention(SharedKVAttention):
    """Window attention of drafted positions over keys of the trunk's last positions and over one another."""

    def keys(self, main: Tensor, rotary: Rotary) -> Tensor:
        """main: [T, d]. Returns [T, D]."""
        return rotary.turn(self.kv_layernorm(self.kv_proj(main)))

    def draft(self, x: Tensor, before: Tensor, visible: Tensor, ctx: Context) -> Tensor:
        """x: [B * L, d], normalised; before: [B, W, D] of :meth:`keys`; visible: bool [B, W]. Returns [B * L, d]."""
        batch, length = len(before), len(x) // max(len(before), 1)
        q = ctx.rotary.turn(self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).unflatten(-1, (self.heads, -1)))
        drafted = self.keys(x, ctx.rotary).unflatten(0, (batch, length))
        seen = F.pad(visible, (0, length), value=True)[:, None].expand(-1, length, -1)
        o = self.attend(q.unflatten(0, (batch, length)), torch.cat([before.to(drafted.dtype), drafted], dim=1), seen)
        return self.grouped_output(ctx.rotary.turn(o.flatten(0, 1), back=True))


class DraftBlock(Block):
    def __init__(self, cfg: ModelConfig, layer: int) -> None:
        super().__init__(cfg, layer)
        self.self_attn: DraftAttention = DraftAttention(cfg, layer)

    def draft(self, streams: Tensor, before: Tensor, visible: Tensor, ctx: Context) -> Tensor:
        """streams: [B * L, n, d]; before and visible as of :meth:`DraftAttention.draft`."""

        def attend(x: Tensor) -> Tensor:
            return self.self_attn.draft(self.input_layernorm(x), before, visible, ctx)

        streams = self.attn_residual(streams, attend, ctx)
        return self.mlp_residual(streams, lambda x: self.mlp(self.post_attention_layernorm(x), ctx), ctx)


class Drafter(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        drafter, d = cfg.drafter, cfg.hidden_size
        self.cfg = draft_config(cfg)
        self.main_proj = nn.Linear(len(drafter.target_layer_ids) * d, d, bias=False)
        self.main_norm = RMSNorm(d, cfg.rms_norm_eps)
        first = cfg.num_hidden_layers  # blocks past the trunk have a window alone
        self.blocks = nn.ModuleList(DraftBlock(self.cfg, first + n) for n in range(drafter.num_layers))
        self.collapse = collapse(cfg)
        self.norm = RMSNorm(d, cfg.rms_norm_eps)
        self.markov_embed = nn.Embedding(cfg.vocab_size, drafter.markov_rank)
        self.markov_head = nn.Linear(drafter.markov_rank, cfg.vocab_size, bias=False)
        self.confidence_proj = nn.Linear(d + drafter.markov_rank, 1, bias=False)

    def _blocks(self) -> list[DraftBlock]:
        return [block for block in self.blocks if isinstance(block, DraftBlock)]

    def keys(self, features: Tensor, positions: Tensor) -> Tensor:
        """What drafting needs of positions of the trunk: their keys in each block, [T, blocks, head_dim].

        features: [T, targets * d], the trunk's of ``positions`` int64 [T].
        """
        main = self.main_norm(self.main_proj(features))
        rotary = Rotary(positions, self.cfg.attention.rope_dim, self.cfg.rope)
        return torch.stack([block.self_attn.keys(main, rotary) for block in self._blocks()], dim=1)

    def draft(
        self,
        keys: Tensor,
        positions: Tensor,
        last: Tensor,
        embed: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor],
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> Draft:
        """Drafts what follows the tokens ``last``, int64 [B], of B sequences, which are sampled but not yet computed.

        keys: [B, W, blocks, head_dim] of :meth:`keys`, W > 0 computed positions, the newest last, of which the last
        ``sliding_window`` are read; positions: int64 [B, W], -1 where a sequence has none; embed: ids to rows [..., d];
        head: normalised rows to float32 logits; choose: logits [B, V] to ids [B], the largest where not given.
        """
        drafter, window = self.cfg.drafter, self.cfg.attention.sliding_window
        keys, positions = keys[:, -window:], positions[:, -window:]
        noise = last.new_full((len(last), drafter.block_size - 1), drafter.noise_token_id)
        tokens = torch.cat([last[:, None], noise], dim=1)
        ctx = self._context(tokens, positions.amax(-1) + 1)
        streams = embed(tokens.flatten())[:, None].expand(-1, self.cfg.residual.streams, -1)
        for number, block in enumerate(self._blocks()):
            streams = block.draft(streams, keys[:, :, number], positions >= 0, ctx)
        hidden = self.collapse(streams, ctx)
        logits = head(self.norm(hidden)).unflatten(0, tokens.shape)
        return self._in_order(hidden.unflatten(0, tokens.shape), logits, last, choose or (lambda row: row.argmax(-1)))

    def _in_order(self, hidden: Tensor, logits: Tensor, last: Tensor, choose: Callable[[Tensor], Tensor]) -> Draft:
        """Token by token: the token before corrects the logits and, with the hidden row, gives the confidence."""
        chosen, corrected, confidence = [], [], []
        with ops.float32_island(hidden):
            for place in range(logits.shape[1]):
                markov = ops.at_least_float32(self.markov_embed(last))
                corrected.append(logits[:, place] + F.linear(markov, self.markov_head.weight.to(markov.dtype)))
                row = torch.cat([hidden[:, place].to(markov.dtype), markov], dim=-1)
                confidence.append(F.linear(row, self.confidence_proj.weight.to(row.dtype))[:, 0])
                last = choose(corrected[-1])
                chosen.append(last)
        return Draft(*(torch.stack(parts, dim=1) for parts in (chosen, corrected, confidence)))

    def _context(self, tokens: Tensor, starts: Tensor) -> Context:
        """The drafted positions, packed: tokens [B, L] from positions ``starts`` [B] on."""
        batch, length = tokens.shape
        device = tokens.device
        positions = (starts[:, None] + torch.arange(length, device=device)).flatten()
        zeros = torch.zeros_like(positions)
        bounds = torch.arange(batch + 1, device=device) * length
        packed = Packed(tokens.flatten(), positions, zeros, zeros, torch.full_like(zeros, IGNORE), bounds)
        rotary = Rotary(positions, self.cfg.attention.rope_dim, self.cfg.rope)
        return Context(packed, rotary, rotary)


def draft_config(cfg: ModelConfig) -> ModelConfig:
    """The trunk's config as the drafter's blocks have it: all routed, with experts of their own, reading text alone."""
    return cfg.replace(
        **{
            "moe.n_routed_experts": cfg.drafter.n_routed_experts,
            "moe.num_experts_per_tok": cfg.drafter.num_experts_per_tok,
            "moe.first_k_dense_replace": 0,
            "moe.num_hash_layers": 0,
            "media": MediaConfig(),
        }
    )
