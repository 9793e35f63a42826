"""An image tower of its own in place of early fusion: a transformer over all patches of one picture, and the
aligner that makes one decoder row of every ``downsample`` x ``downsample`` of them (DeepSeek-V4.1).

A token's pixels are those of its patches, row by row, each [3, p, p]; its coords are the patch rows and columns of
its picture and its own number there. So every picture can be put together again, and must be there as a whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold import ops
from fourfold.config import RopeConfig
from fourfold.config_media import VisionConfig
from fourfold.model.norm import RMSNorm
from fourfold.model.sequence import END, IMAGE, Document, Patches


class VisionAttention(nn.Module):
    """Every patch sees every patch of its picture; rotary angles of its row, then of its column."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.heads = cfg.num_attention_heads
        self.wqkv = nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.wo = nn.Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, N, d]; cos, sin: [N, head_dim / 2]. Returns [B, N, d]."""
        q, k, v = self.wqkv(x).transpose(0, 1).unflatten(-1, (3, self.heads, -1)).unbind(2)  # [N, B, H, head_dim]
        q, k = (ops.apply_rope(t, cos, sin, interleaved=False) for t in (q, k))
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.wo(o.transpose(1, 2).flatten(2))
        return out


class VisionMLP(nn.Module):
    """``w2(silu(gate) * up)``; w1 holds the rows of the gate first."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(cfg.hidden_size, 2 * cfg.intermediate_size, bias=False)
        self.w2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x).chunk(2, dim=-1)
        out: Tensor = self.w2(F.silu(gate) * up)
        return out


class VisionBlock(nn.Module):
    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.attn = VisionAttention(cfg)
        self.norm2 = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = VisionMLP(cfg)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, N, d]. Returns [B, N, d]."""
        x = x + self.attn(self.norm1(x), cos, sin)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTower(nn.Module):
    """The transformer over the patches of pictures of one size."""

    def __init__(self, cfg: VisionConfig) -> None:
        super().__init__()
        self.rotary_dim = cfg.hidden_size // cfg.num_attention_heads // 2  # of rows; as much again of columns
        self.rope = RopeConfig(theta=cfg.rope_theta)
        self.patch_embed = nn.Linear(3 * cfg.patch_size**2, cfg.hidden_size)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [B, rows, columns, 3 * p * p]. Returns [B, rows, columns, hidden]."""
        rows, columns = pixels.shape[1:3]
        x = self.patch_embed(pixels).flatten(1, 2)
        frequencies = ops.rope_frequencies(self.rotary_dim, self.rope).to(x.device)
        place = torch.cartesian_prod(torch.arange(rows, device=x.device), torch.arange(columns, device=x.device))
        angles = (place[..., None] * frequencies).flatten(1)
        cos, sin = angles.cos(), angles.sin()
        for block in self.blocks:
            x = block(x, cos, sin)
        out: Tensor = self.norm(x).unflatten(1, (rows, columns))
        return out


class Aligner(nn.Module):
    """Neighbouring patches to one row of the decoder: zeros beyond the border, channel by channel, two layers."""

    def __init__(self, cfg: VisionConfig, dim: int) -> None:
        super().__init__()
        self.downsample = cfg.downsample
        self.w1 = nn.Linear(cfg.hidden_size * cfg.downsample**2, dim)
        self.w2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, rows, columns, hidden]. Returns [B, cells, dim], row by row of cells."""
        size = self.downsample
        padded = F.pad(x.permute(0, 3, 1, 2), (0, -x.shape[2] % size, 0, -x.shape[1] % size))
        cells = F.unfold(padded, size, stride=size).transpose(1, 2)
        out: Tensor = self.w2(F.gelu(self.w1(cells)))
        return out


def embed_images(tower: VisionTower, aligner: Aligner, patches: Patches) -> Tensor:
    """The decoder rows of the tokens of any number of pictures, [M, dim]; pictures of one size run together.

    Raises ValueError if a picture is not there as a whole.
    """
    size, values = aligner.downsample, patches.values.to(tower.patch_embed.weight.dtype)
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for first, rows, columns in whole_images(patches.coords, size):
        cells = -(-rows // size) * -(-columns // size)
        groups.setdefault((rows, columns), []).append(torch.arange(first, first + cells, device=values.device))
    out = values.new_empty(len(values), aligner.w2.out_features)
    for (rows, columns), members in groups.items():
        tokens = torch.stack(members)  # [B, cells]
        grid = values[tokens].unflatten(1, (-(-rows // size), -(-columns // size))).unflatten(-1, (size, size, -1))
        pixels = grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :rows, :columns]
        out = out.index_copy(0, tokens.flatten(), aligner(tower(pixels)).flatten(0, 1).to(out.dtype))
    return out


def whole_images(coords: Tensor, downsample: int) -> list[tuple[int, int, int]]:
    """The first token, the patch rows and the patch columns of each picture.

    coords: [M, 3], as they stand in the batch. Raises ValueError if a picture lacks tokens.
    """
    places = [tuple(place) for place in coords.long().tolist()]
    images, at = [], 0
    while at < len(places):
        rows, columns, _ = places[at]
        cells = -(-rows // downsample) * -(-columns // downsample)
        if cells < 1 or places[at : at + cells] != [(rows, columns, n) for n in range(cells)]:
            raise ValueError(f"image: has {rows} x {columns} patches, not all of them here; never cut one in two")
        images.append((at, rows, columns))
        at += cells
    return images


def after_image(document: Document, position: int) -> int:
    """``position``, or the end of the image that a cut before ``position`` would go through."""
    if not 0 < position < len(document) or document.modality[position - 1] != IMAGE:
        return position
    if document.marks[position - 1] == END:
        return position
    return position + int((document.marks[position:] == END).int().argmax()) + 1
