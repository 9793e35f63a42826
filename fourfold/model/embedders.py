"""Early fusion: patches of pixels, tubelets and sound frames become rows of the same width as token embeddings.

There is no encoder: two linear maps with a nonlinearity between them, plus a linear map of where and when the
patch was, trained with everything else from the first step. Images may pass a tower instead.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourfold.config_media import MediaConfig
from fourfold.model.sequence import MODALITIES, NO_MARK, TEXT, Packed, Patches
from fourfold.model.vision import Aligner, VisionTower, embed_images

COORD_FREQUENCIES = 8  # per axis; sine and cosine of time, row and column: 48 features
COORD_PERIODS = (2.0, 512.0)  # shortest and longest, in patches (time: in tenths of a second)


def coord_features(coords: Tensor) -> Tensor:
    """Sines and cosines of time, row and column. coords: [M, 3]. Returns [M, 6 * COORD_FREQUENCIES]."""
    shortest, longest = COORD_PERIODS
    steps = torch.linspace(0, 1, COORD_FREQUENCIES, device=coords.device, dtype=coords.dtype)
    frequencies = 2 * math.pi / (shortest * (longest / shortest) ** steps)
    units = coords * torch.tensor([10.0, 1.0, 1.0], device=coords.device, dtype=coords.dtype)
    angles = (units[..., None] * frequencies).flatten(-2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class Embedder(nn.Module):
    """One modality."""

    def __init__(self, features: int, hidden: int, dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(features, hidden)
        self.out_proj = nn.Linear(hidden, dim)
        self.coord_proj = nn.Linear(6 * COORD_FREQUENCIES, dim, bias=False)
        self.delimiters = nn.Parameter(torch.empty(3, dim))  # START, NEWLINE, END

    def forward(self, values: Tensor, coords: Tensor) -> Tensor:
        """values: [M, features]; coords: [M, 3]. Returns [M, d]."""
        dtype = self.in_proj.weight.dtype
        content = self.out_proj(F.gelu(self.in_proj(values.to(dtype))))
        place: Tensor = self.coord_proj(coord_features(coords).to(dtype))
        return content + place


class MediaEmbedder(nn.Module):
    """Writes the rows of all continuous positions over the token embeddings of their placeholders."""

    def __init__(self, cfg: MediaConfig, dim: int) -> None:
        super().__init__()
        parts = {m: getattr(cfg, m) for m in cfg.embedded}
        self.embedders = nn.ModuleDict({m: Embedder(part.features, cfg.hidden_size, dim) for m, part in parts.items()})
        self.modalities = cfg.modalities
        if cfg.vision is not None:
            self.tower, self.aligner = VisionTower(cfg.vision), Aligner(cfg.vision, dim)
            self.image_delimiters = nn.Parameter(torch.empty(3, dim))  # START, NEWLINE, END

    def forward(self, rows: Tensor, packed: Packed) -> Tensor:
        """rows: [T, d], the embeddings of ``packed.tokens``. Returns [T, d].

        Raises ValueError for a modality that this model does not have, and for a cut image where it has a tower.
        """
        if packed.all_text:
            return rows
        present = {MODALITIES[m] for m in packed.modality.unique().tolist() if m != TEXT}
        if missing := present - set(self.modalities):
            raise ValueError(f"modality: this model does not read {', '.join(sorted(missing))}")
        for name in sorted(present):
            marked = (packed.modality == MODALITIES.index(name)) & (packed.marks != NO_MARK)
            where = marked.nonzero()[:, 0]
            rows = rows.index_copy(0, where, self._delimiters(name)[packed.marks[where] - 1].to(rows.dtype))
            if name in packed.patches:
                patches = packed.patches[name]
                rows = rows.index_copy(0, patches.index, self._content(name, patches).to(rows.dtype))
        return rows

    def _delimiters(self, name: str) -> Tensor:
        """[3, d]: the rows of START, NEWLINE and END."""
        if name not in self.embedders:
            return self.image_delimiters
        embedder = self.embedders[name]
        assert isinstance(embedder, Embedder)
        return embedder.delimiters

    def _content(self, name: str, patches: Patches) -> Tensor:
        """[M, d]: the rows of the patches themselves."""
        if name not in self.embedders:
            return embed_images(self.tower, self.aligner, patches)
        rows: Tensor = self.embedders[name](patches.values, patches.coords)
        return rows
