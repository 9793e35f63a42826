"""DeepSeek-V4.1 in the plainest PyTorch, from its description alone: the judge of our model.

``transformers`` has no class for it. Everything here is float32, one sequence, whole at once; tensors go by the
names of the released files. Nothing of the package is used but the numbers the hash needs from a tokenizer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def frequencies(c: dict[str, Any], compressing: bool) -> Tensor:
    dim = c["qk_rope_head_dim"]
    theta = c["compress_rope_theta"] if compressing else c["rope_theta"]
    w = theta ** (-torch.arange(0, dim, 2).float() / dim)
    if not compressing:
        return w
    s = c["rope_scaling"]
    at = [
        dim * math.log(s["original_max_position_embeddings"] / (2 * math.pi * s[b])) / (2 * math.log(theta))
        for b in ("beta_fast", "beta_slow")
    ]
    low, high = max(math.floor(at[0]), 0), min(math.ceil(at[1]), dim - 1)
    ramp = ((torch.arange(dim // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return w / s["factor"] * ramp + w * (1 - ramp)


def turn(x: Tensor, positions: Tensor, w: Tensor, sign: int = 1) -> Tensor:
    """The last dims of x [T, ..., D] as complex numbers times e^(i position w)."""
    dim = 2 * len(w)
    z = torch.view_as_complex(x[..., -dim:].reshape(*x.shape[:-1], -1, 2).contiguous())
    angle = sign * positions.float()[:, None] * w
    while angle.dim() < z.dim():
        angle = angle.unsqueeze(1)
    z = torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    return torch.cat([x[..., :-dim], z], dim=-1)


def maps(w: Weights, site: str, streams: Tensor, c: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    n, eps = c["hc_mult"], c["hc_eps"]
    flat = streams.flatten(1)
    mix = (flat @ w[site + "_fn"].T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + c["rms_norm_eps"])
    base, scale = w[site + "_base"], w[site + "_scale"]
    pre = torch.sigmoid(mix[:, :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (mix[:, 2 * n :] * scale[2] + base[2 * n :]).view(-1, n, n).softmax(-1) + eps
    comb = comb / (comb.sum(1, keepdim=True) + eps)
    for _ in range(c["hc_sinkhorn_iters"] - 1):
        comb = comb / (comb.sum(2, keepdim=True) + eps)
        comb = comb / (comb.sum(1, keepdim=True) + eps)
    return pre, post, comb


def expert(x: Tensor, w: Weights, name: str, limit: float) -> Tensor:
    gate = (x @ w[name + ".w1.weight"].T).clamp(max=limit)
    up = (x @ w[name + ".w3.weight"].T).clamp(-limit, limit)
    return (F.silu(gate) * up) @ w[name + ".w2.weight"].T


def moe(x: Tensor, w: Weights, name: str, c: dict[str, Any], image: Tensor, k: int) -> Tensor:
    scores = F.softplus(x @ w[name + ".gate.weight"].T).sqrt()
    biased = scores + w[name + ".gate.bias"]
    if f"{name}.gate.bias_vl" in w:
        biased = torch.where(image[:, None], scores + w[name + ".gate.bias_vl"], biased)
    chosen = biased.topk(k, dim=-1).indices
    weights = scores.gather(-1, chosen)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * c["routed_scaling_factor"]
    out = expert(x, w, name + ".shared_experts", c["swiglu_limit"])
    for t in range(len(x)):
        for e, share in zip(chosen[t].tolist(), weights[t], strict=True):
            out[t] = out[t] + share * expert(x[t], w, f"{name}.experts.{e}", c["swiglu_limit"])
    return out


def heads_out(o: Tensor, w: Weights, name: str, c: dict[str, Any]) -> Tensor:
    groups = o.flatten(1).view(len(o), c["o_groups"], -1)
    a = w[name + ".wo_a.weight"].view(c["o_groups"], c["o_lora_rank"], -1)
    return torch.einsum("tgi,goi->tgo", groups, a).flatten(1) @ w[name + ".wo_b.weight"].T


def queries(x: Tensor, w: Weights, name: str, c: dict[str, Any]) -> tuple[Tensor, Tensor]:
    latent = rms(x @ w[name + ".wq_a.weight"].T, w[name + ".q_norm.weight"], c["rms_norm_eps"])
    return latent, (latent @ w[name + ".wq_b.weight"].T).view(len(x), c["num_attention_heads"], c["head_dim"])


def with_sink(q: Tensor, keys: Tensor, seen: Tensor, sink: Tensor) -> Tensor:
    """q: [T, H, D]; keys: [S, D]; seen: [T, S]. Returns [T, H, D]."""
    logits = torch.einsum("thd,sd->ths", q, keys) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~seen[:, None], -math.inf)
    top = logits.amax(-1, keepdim=True)
    p = (logits - top).exp()
    p = p / (p.sum(-1, keepdim=True) + (sink[None, :, None] - top).exp())
    return torch.einsum("ths,sd->thd", p, keys)


class Shared:
    """What later layers borrow: entries, index keys, the selection and the candidates."""

    entries: Tensor
    index_keys: Tensor
    chosen: Tensor
    candidates: Tensor | None = None


def newest_first_topk(scores: Tensor, k: int) -> Tensor:
    """bool like scores [T, n]: the k largest finite ones of each row; of equals the newest."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for t, row in enumerate(scores.tolist()):
        finite = [j for j in range(len(row)) if row[j] > -math.inf]
        chosen[t, sorted(finite, key=lambda j: (-row[j], -j))[:k]] = True
    return chosen


def attention(x: Tensor, w: Weights, layer: int, c: dict[str, Any], shared: Shared) -> Tensor:
    name, eps, ratio = f"layers.{layer}.attn", c["rms_norm_eps"], c["compress_ratios"][layer]
    at = torch.arange(len(x))
    freq = frequencies(c, ratio > 0)
    latent_q, q = queries(x, w, name, c)
    q = turn(q, at, freq)
    kv = turn(rms(x @ w[name + ".wkv.weight"].T, w[name + ".kv_norm.weight"], eps), at, freq)
    back = at[:, None] - at
    keys, seen = kv, (back >= 0) & (back < c["sliding_window"])
    if ratio:
        count = len(x) // ratio
        places = torch.arange(count) * ratio
        visible = torch.arange(count) < ((at + 1) // ratio)[:, None]
        if layer in c["kv_source_layer_ids"]:
            k = x @ w[name + ".compressor.wkv.weight"].T
            if ratio > 1:
                s = x @ w[name + ".compressor.wgate.weight"].T
                k, s = (v[: count * ratio].view(count, ratio, -1) for v in (k, s))
                k = (k * s.softmax(1)).sum(1)
            latent = rms(k, w[name + ".compressor.norm.weight"], eps)
            index_key = rms(latent @ w[name + ".indexer.wk.weight"].T, w[name + ".indexer.k_norm.weight"], eps)
            shared.index_keys = turn(index_key, places, freq)
            shared.entries = turn(latent, places, freq)
        if layer in c["index_source_layer_ids"]:
            n, dim = c["index_n_heads"], c["index_head_dim"]
            iq = turn((latent_q @ w[name + ".indexer.wq_b.weight"].T).view(len(x), n, dim), at, freq)
            share = (x @ w[name + ".indexer.weights_proj.weight"].T) * dim**-0.5 * n**-0.5
            scores = torch.einsum("tn,tnj->tj", share, torch.einsum("tnd,jd->tnj", iq, shared.index_keys).relu())
            scores = scores.masked_fill(~visible, -math.inf)
            if shared.candidates is not None:
                scores = scores.masked_fill(~shared.candidates, -math.inf)
            if layer == c["candidate_source_layer_id"]:
                size = c["candidate_block_size"]
                padded = F.pad(scores, (0, -count % size), value=-math.inf)
                blocks = padded.view(len(x), -1, size).amax(-1)
                newest = (visible.sum(-1) - 1).clamp_min(0) // size
                forced = F.one_hot(newest, blocks.shape[-1]).bool() & visible.any(-1, keepdim=True)
                kept = newest_first_topk(blocks.masked_fill(forced, 1e30), c["candidate_topk_blocks"])
                shared.candidates = kept.repeat_interleave(size, dim=-1)[:, :count]
            shared.chosen = newest_first_topk(scores, c["index_topk"])
        keys, seen = torch.cat([kv, shared.entries]), torch.cat([seen, shared.chosen], dim=-1)
    o = with_sink(q, keys, seen, w[name + ".attn_sink"])
    return heads_out(turn(o, at, freq, -1), w, name, c)


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def engram_primes(c: dict[str, Any]) -> list[list[list[int]]]:
    used: set[int] = set()
    layers = []
    for _ in c["engram_layer_ids"]:
        orders = []
        for _ in range(c["engram_max_ngram"] - 1):
            heads, last = [], c["engram_vocab_size"] - 1
            for _ in range(c["engram_n_heads"]):
                last = next(n for n in range(last + 1, 2**31) if n not in used and is_prime(n))
                used.add(last)
                heads.append(last)
            orders.append(heads)
        layers.append(orders)
    return layers


def engram(streams: Tensor, w: Weights, layer: int, c: dict[str, Any], ids: list[int], image: Tensor) -> Tensor:
    """ids: compressed ids, the pad's at dead positions counted by ``image``."""
    name, n, d, eps = f"layers.{layer}.engram", c["hc_mult"], c["hidden_size"], c["rms_norm_eps"]
    size, orders = c["engram_compressed_vocab_size"], c["engram_max_ngram"]
    bound = max(1, (np.iinfo(np.int64).max // size) // 2)
    draws = np.random.default_rng(10007 * layer).integers(0, bound, size=orders, dtype=np.int64)
    multipliers = [2 * int(r) + 1 for r in draws]
    primes = engram_primes(c)[c["engram_layer_ids"].index(layer)]
    out = streams.clone()
    for t in range(len(ids)):
        if image[t]:
            continue
        grams = []
        for back in range(orders):
            alive = t - back >= 0 and not any(image[t - b] for b in range(back + 1))
            grams.append(ids[t - back] if alive else c["engram_pad_compressed"])
        rows, offset, mixed = [], 0, grams[0] * multipliers[0]
        for order in range(1, orders):
            mixed ^= grams[order] * multipliers[order]
            for prime in primes[order - 1]:
                rows.append(offset + mixed % prime)
                offset += prime
        e = w[name + ".embed.weight"][rows].flatten()
        both = w[name + ".wkv.weight"] @ e
        keys, value = both[: n * d].view(n, d), both[n * d :]
        for m in range(n):
            dot = rms(streams[t, m], w[name + ".q_weight"][m], eps) @ rms(keys[m], w[name + ".k_weight"][m], eps)
            dot = dot / math.sqrt(d)
            gate = torch.sigmoid(torch.sign(dot) * dot.abs().clamp_min(1e-6).sqrt())
            out[t, m] = streams[t, m] + gate * value
    return out


def vision(pixels: Tensor, w: Weights, c: dict[str, Any]) -> Tensor:
    """pixels: [rows * patch, cols * patch, 3], normalised. Returns the image's tokens [cells, d], row by row."""
    v, p = c["vision"], c["vision"]["patch_size"]
    rows, cols = pixels.shape[0] // p, pixels.shape[1] // p
    patches = pixels.view(rows, p, cols, p, 3).permute(0, 2, 4, 1, 3).reshape(rows * cols, -1)
    x = patches @ w["vision.patch_embed.proj.weight"].T + w["vision.patch_embed.proj.bias"]
    heads = v["num_attention_heads"]
    dim = v["hidden_size"] // heads
    freq = v["rope_theta"] ** (-torch.arange(0, dim // 2, 2).float() / (dim // 2))
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    angle = torch.cat([row.reshape(-1, 1) * freq, col.reshape(-1, 1) * freq], dim=-1)[:, None]

    def spin(z: Tensor) -> Tensor:
        a, b = z.chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)

    for n in range(v["num_hidden_layers"]):
        name = f"vision.blocks.{n}"
        y = rms(x, w[name + ".norm1.weight"], 1e-6)
        y = y @ w[name + ".attn.wqkv.weight"].T + w[name + ".attn.wqkv.bias"]
        q, k, val = (z.view(-1, heads, dim) for z in y.chunk(3, dim=-1))
        scores = torch.einsum("qhd,khd->hqk", spin(q), spin(k)) * dim**-0.5
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), val).flatten(1)
        x = x + y @ w[name + ".attn.wo.weight"].T + w[name + ".attn.wo.bias"]
        y = rms(x, w[name + ".norm2.weight"], 1e-6)
        gate, up = (y @ w[name + ".mlp.w1.weight"].T).chunk(2, dim=-1)
        x = x + (F.silu(gate) * up) @ w[name + ".mlp.w2.weight"].T
    x = rms(x, w["vision.norm.weight"], 1e-6).view(rows, cols, -1)
    side = v["downsample"]
    x = F.pad(x.permute(2, 0, 1), (0, -cols % side, 0, -rows % side))
    x = F.unfold(x[None], side, stride=side)[0].T
    x = F.gelu(x @ w["aligner.w1.weight"].T + w["aligner.w1.bias"])
    return x @ w["aligner.w2.weight"].T + w["aligner.w2.bias"]


def block(
    streams: Tensor, read: Tensor, w: Weights, name: str, c: dict[str, Any], attend: Any, image: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    for site, norm, f in (
        ("hc_attn", "attn_norm", attend),
        ("hc_ffn", "ffn_norm", lambda x: moe(x, w, f"{name}.ffn", c, image, k)),
    ):
        pre, post, comb = maps(w, f"{name}.{site}", streams, c)
        y = f(rms((read[..., None] * streams).sum(1), w[f"{name}.{norm}.weight"], c["rms_norm_eps"]))
        streams = post[..., None] * y[:, None] + torch.einsum("tjk,tjd->tkd", comb, streams)
        read = pre
    return streams, read


def one_hot(length: int, n: int) -> Tensor:
    return F.one_hot(torch.zeros(length, dtype=torch.int64), n).float()


def trunk(
    w: Weights, c: dict[str, Any], ids: list[int], compressed: list[int], images: list[tuple[int, Tensor]] = ()
) -> tuple[Tensor, Tensor]:
    """Logits [T, V] and the drafter's features [T, targets * d].

    ids: with every image already laid out as START, rows each ended by NEWLINE, END, all of the image's id;
    images: where each begins, and its pixels. compressed: the compressed id of every token.
    """
    x = w["embed.weight"][ids]
    image = torch.tensor([i == c["image_token_id"] for i in ids])
    for start, pixels in images:
        p = c["vision"]["patch_size"] * c["vision"]["downsample"]
        wide = -(-pixels.shape[1] // p)
        tokens = vision(pixels, w, c).split(wide)
        rows = [torch.cat([r, w["image_newline"][None]]) for r in tokens]
        span = torch.cat([w["image_start"][None], *rows, w["image_end"][None]])
        x[start : start + len(span)] = span
    n = c["hc_mult"]
    streams, read, shared = x[:, None].repeat(1, n, 1), one_hot(len(ids), n), Shared()
    features = []
    for layer in range(c["num_hidden_layers"]):
        if layer in c["dspark_target_layer_ids"]:
            features.append(streams.mean(1))
        if layer in c["engram_layer_ids"]:
            streams = engram(streams, w, layer, c, compressed, image)
        streams, read = block(
            streams,
            read,
            w,
            f"layers.{layer}",
            c,
            lambda y, layer=layer: attention(y, w, layer, c, shared),
            image,
            c["num_experts_per_tok"],
        )
    x = rms((read[..., None] * streams).sum(1), w["norm.weight"], c["rms_norm_eps"])
    return x @ w["head.weight"].T, torch.cat(features, dim=-1)


def draft(w: Weights, c: dict[str, Any], features: Tensor, token: int) -> tuple[list[int], Tensor, Tensor]:
    """Greedy drafts after the newly sampled ``token``, which follows len(features) verified positions.

    Returns the drafted tokens, their logits [block, V] with the Markov head's share, and confidence logits [block].
    """
    eps, n, size = c["rms_norm_eps"], c["hc_mult"], c["dspark_block_size"]
    main = rms(features @ w["mtp.0.main_proj.weight"].T, w["mtp.0.main_norm.weight"], eps)
    past, freq = len(features), frequencies(c, False)
    x = w["embed.weight"][[token] + [c["dspark_noise_token_id"]] * (size - 1)]
    at = torch.arange(past, past + size)
    streams, read = x[:, None].repeat(1, n, 1), one_hot(size, n)
    text = torch.zeros(size, dtype=torch.bool)
    for stage in range(c["num_nextn_predict_layers"]):
        name = f"mtp.{stage}.attn"

        def keys_of(y: Tensor, positions: Tensor, name: str = name) -> Tensor:
            return turn(rms(y @ w[name + ".wkv.weight"].T, w[name + ".kv_norm.weight"], eps), positions, freq)

        def attend(y: Tensor, name: str = name, keys_of: Any = keys_of) -> Tensor:
            q = turn(queries(y, w, name, c)[1], at, freq)
            ring = torch.arange(max(0, past - c["sliding_window"]), past)
            keys = torch.cat([keys_of(main[ring], ring), keys_of(y, at)])
            o = with_sink(q, keys, torch.ones(size, len(keys), dtype=torch.bool), w[name + ".attn_sink"])
            return heads_out(turn(o, at, freq, -1), w, name, c)

        streams, read = block(streams, read, w, f"mtp.{stage}", c, attend, text, c["dspark_num_experts_per_tok"])
    x = (read[..., None] * streams).sum(1)
    last = f"mtp.{c['num_nextn_predict_layers'] - 1}"
    logits = rms(x, w[last + ".norm.weight"], eps) @ w["head.weight"].T
    tokens, confidence, previous = [], [], token
    for i in range(size):
        markov = w[last + ".markov_head.embed.weight"][previous]
        confidence.append(w[last + ".confidence_head.proj.weight"][0] @ torch.cat([x[i], markov]))
        logits[i] = logits[i] + w[last + ".markov_head.head.weight"] @ markov
        previous = int(logits[i].argmax())
        tokens.append(previous)
    return tokens, logits, torch.stack(confidence)
