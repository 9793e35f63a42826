"""The image tower and its aligner against the formulas written out patch by patch."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fourfold.config_media import VisionConfig
from fourfold.media.vision import vision_patches
from fourfold.model.cache import Cache, PagePool, SequenceState
from fourfold.model.sequence import END, IMAGE, NEWLINE, NO_MARK, START, Patches, pack
from fourfold.model.vision import after_image, embed_images, whole_images
from tests.model import tiny, v41
from tests.model.plain import rms_norm

CFG = VisionConfig(**v41.VISION)


def media(**overrides):
    return tiny.model(v41.config(**overrides)).media


def patches_of(*pictures: np.ndarray) -> Patches:
    parts = [vision_patches(picture, CFG) for picture in pictures]
    values, coords = (torch.from_numpy(np.concatenate([p[n] for p in parts])) for n in (0, 1))
    return Patches(torch.arange(len(values)), values, coords)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@torch.no_grad()
def written_out(w: dict[str, Tensor], cfg: VisionConfig, pixels: Tensor) -> Tensor:
    """One picture, [3, height, width] in whole patches. Returns [cells, dim]."""
    p, heads, size = cfg.patch_size, cfg.num_attention_heads, cfg.hidden_size // cfg.num_attention_heads
    rows, columns = pixels.shape[1] // p, pixels.shape[2] // p
    places = [(r, c) for r in range(rows) for c in range(columns)]
    flat = torch.stack([pixels[:, r * p : (r + 1) * p, c * p : (c + 1) * p].flatten() for r, c in places])
    x = flat @ w["tower.patch_embed.weight"].T + w["tower.patch_embed.bias"]
    quarter = size // 4
    frequency = [cfg.rope_theta ** (-2 * i / (size // 2)) for i in range(quarter)]
    angles = torch.tensor([[r * f for f in frequency] + [c * f for f in frequency] for r, c in places])

    def turn(t: Tensor) -> Tensor:  # [N, size], halves paired
        a, b = t[:, : size // 2], t[:, size // 2 :]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=1)

    for block in range(cfg.num_hidden_layers):
        at = f"tower.blocks.{block}."
        normed = rms_norm(x, w[at + "norm1.weight"], cfg.rms_norm_eps)
        qkv = normed @ w[at + "attn.wqkv.weight"].T + w[at + "attn.wqkv.bias"]
        out = []
        for head in range(heads):
            q, k, v = (qkv[:, part * cfg.hidden_size + head * size :][:, :size] for part in range(3))
            out.append((turn(q) @ turn(k).T / math.sqrt(size)).softmax(-1) @ v)
        x = x + torch.cat(out, dim=1) @ w[at + "attn.wo.weight"].T + w[at + "attn.wo.bias"]
        hidden = rms_norm(x, w[at + "norm2.weight"], cfg.rms_norm_eps) @ w[at + "mlp.w1.weight"].T
        gate, up = hidden[:, : cfg.intermediate_size], hidden[:, cfg.intermediate_size :]
        x = x + (gate * gate.sigmoid() * up) @ w[at + "mlp.w2.weight"].T
    x = rms_norm(x, w["tower.norm.weight"], cfg.rms_norm_eps).view(rows, columns, -1)
    cells, d = [], cfg.downsample
    for r in range(0, rows, d):
        for c in range(0, columns, d):
            cell = torch.zeros(cfg.hidden_size, d, d)
            for i in range(min(d, rows - r)):
                for j in range(min(d, columns - c)):
                    cell[:, i, j] = x[r + i, c + j]
            y = w["aligner.w1.weight"] @ cell.flatten() + w["aligner.w1.bias"]
            y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
            cells.append(w["aligner.w2.weight"] @ y + w["aligner.w2.bias"])
    return torch.stack(cells)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 18), (14, 22), (20, 10), (6, 6)])
@torch.no_grad()
def test_the_tower_is_the_formula(height, width):
    """Grids that are multiples of the cell and grids that are not."""
    cfg = dataclasses.replace(CFG, min_pixels=1, max_image_tokens=100)
    module, image = media(), picture(height, width)
    values, coords, _ = vision_patches(image, cfg)
    assert coords[0].tolist() == [height / 2, width / 2, 0]
    pixels = torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1
    patches = Patches(torch.arange(len(values)), torch.from_numpy(values), torch.from_numpy(coords))
    got = embed_images(module.tower, module.aligner, patches)
    torch.testing.assert_close(got, written_out(module.state_dict(), cfg, pixels), rtol=0, atol=2e-5)


@torch.no_grad()
def test_pictures_do_not_see_one_another():
    """Several in a document, several documents in a batch, equal sizes and others."""
    module = media()
    pictures = [picture(20, 20, 1), picture(9, 21, 2), picture(20, 20, 3), picture(30, 12, 4)]
    together = embed_images(module.tower, module.aligner, patches_of(*pictures))
    alone = [embed_images(module.tower, module.aligner, patches_of(p)) for p in pictures]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    assert not torch.allclose(alone[0], alone[2], atol=1e-2)


@torch.no_grad()
def test_what_lies_beyond_the_border_is_not_read():
    module, patches = media(), patches_of(picture(20, 10))
    rows, columns, _ = patches.coords[0].long().tolist()
    assert rows % 3 or columns % 3
    grid = patches.values.view(-(-rows // 3), -(-columns // 3), 3, 3, -1).transpose(1, 2).clone()
    flat = grid.reshape(-(-rows // 3) * 3, -(-columns // 3) * 3, -1)
    flat[rows:], flat[:, columns:] = torch.nan, torch.nan
    spoilt = flat.view(grid.shape).transpose(1, 2).reshape(patches.values.shape)
    assert spoilt.isnan().any()
    got = embed_images(module.tower, module.aligner, dataclasses.replace(patches, values=spoilt))
    torch.testing.assert_close(got, embed_images(module.tower, module.aligner, patches))


@torch.no_grad()
def test_rows_of_an_image_span():
    cfg = v41.config()
    made, document = tiny.model(cfg), v41.document(cfg, 0)
    packed = pack([document, v41.document(cfg, 1)])
    rows = made.embed(packed)[:, 0]
    image = packed.modality == IMAGE
    assert (packed.tokens[image] == v41.IMAGE_ID).all()
    for mark in (START, NEWLINE, END):
        where = image & (packed.marks == mark)
        assert where.any()
        torch.testing.assert_close(rows[where], made.media.image_delimiters[mark - 1].expand(int(where.sum()), -1))
    where = image & (packed.marks == NO_MARK)
    wanted = embed_images(made.media.tower, made.media.aligner, packed.patches["image"])
    torch.testing.assert_close(rows[where], wanted)
    text = ~image
    torch.testing.assert_close(rows[text], made.embed_tokens.weight[packed.tokens[text]])


def test_images_have_a_router_bias_of_their_own():
    cfg = v41.config()
    made, document = tiny.model(cfg), v41.document(cfg, 0)
    plain = tiny.logits(made, document)
    with torch.no_grad():
        for block in made.layers:
            block.mlp.gate.media_bias[1:] += torch.randn(2, 8)  # video and sound
    torch.testing.assert_close(tiny.logits(made, document), plain, rtol=0, atol=0)
    with torch.no_grad():
        for block in made.layers:
            block.mlp.gate.media_bias[0] += torch.randn(8)
    changed = (tiny.logits(made, document) - plain).abs().amax(-1) > 1e-4
    first = int((document.modality == IMAGE).nonzero()[0])
    assert not changed[:first].any() and changed[first:].any()


def test_a_cut_image_is_refused():
    cfg = v41.config()
    made, document = tiny.model(cfg), v41.document(cfg, 0)
    cells = document.patches["image"].index
    inside = int(cells[1])
    with pytest.raises(ValueError, match="image: has .* patches, not all of them here"):
        tiny.logits(made, document.slice(0, inside))
    with pytest.raises(ValueError, match="never cut one in two"):
        pool, state = PagePool(cfg, 40, 4), SequenceState()
        made(pack([document.slice(inside, len(document))], starts=[inside]), cache=Cache(pool, [state]))
    for wrong in ([[0, 3, 0]], [[2, 3, 1]], [[4, 3, 0], [3, 4, 1]], [[4, 3, 0], [4, 3, 0]]):
        with pytest.raises(ValueError, match="never cut"):
            whole_images(torch.tensor(wrong, dtype=torch.float32), 3)
    assert whole_images(torch.tensor([[4, 3, 0], [4, 3, 1], [1, 2, 0]]).float(), 3) == [(0, 4, 3), (2, 1, 2)]


def test_cuts_move_behind_an_image():
    document = v41.document(v41.config(), 0)
    opened = (document.marks == START).nonzero()[:, 0].tolist()
    closed = (document.marks == END).nonzero()[:, 0].tolist()
    for position in range(len(document) + 1):
        spans = [stop + 1 for start, stop in zip(opened, closed, strict=True) if start < position <= stop]
        assert after_image(document, position) == (spans[0] if spans else position)


def test_media_without_a_tower_are_refused_by_name():
    made = tiny.model(v41.config())
    other = tiny.document(tiny.config(media=tiny.MEDIA), 60, 0)
    with pytest.raises(ValueError, match="modality: this model does not read audio, video"):
        tiny.logits(made, other)


def test_parameter_names():
    names = {name for name, _ in media().named_parameters()}
    block = {"norm1.weight", "attn.wqkv.weight", "attn.wqkv.bias", "attn.wo.weight", "attn.wo.bias", "norm2.weight"}
    block |= {"mlp.w1.weight", "mlp.w2.weight"}
    wanted = {f"tower.blocks.{n}.{name}" for n in range(2) for name in block}
    wanted |= {"tower.patch_embed.weight", "tower.patch_embed.bias", "tower.norm.weight", "image_delimiters"}
    assert names == wanted | {f"aligner.{n}.{kind}" for n in ("w1", "w2") for kind in ("weight", "bias")}


def test_gradients_reach_every_part():
    module = media()
    out = embed_images(module.tower, module.aligner, patches_of(picture(20, 10), picture(9, 9)))
    F.mse_loss(out, torch.ones_like(out)).backward()
    for name, parameter in [*module.tower.named_parameters(), *module.aligner.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
