"""Every differentiable function of the reference has the gradient of what it computes, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fourfold.ops import reference
from fourfold.ops.cpu import streams

T, N, D = 3, 4, 5  # tokens, streams, features


def wide(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def causal(batch: int, queries: int, keys: int) -> Tensor:
    """The last ``queries`` of ``keys`` positions, each seeing its past."""
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(batch, -1, -1)


def rotation(tokens: int, pairs: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(tokens, pairs, dtype=torch.float64)
    return angles.cos(), angles.sin()


def site(doubly_stochastic: bool, n: int = N) -> tuple[Callable[..., object], tuple[Tensor, ...]]:
    inputs = (wide(T, n, D), wide(n * (n + 2), n * D), wide(n * (n + 2)), wide(3))
    rest = (doubly_stochastic, 6, 1e-6, 1e-6)
    return lambda x, fn, base, scale: reference.hyper_maps(x, fn, base, scale, *rest), inputs


def cases() -> dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]]:
    """Name -> (function of the differentiable inputs alone, those inputs)."""
    torch.manual_seed(0)
    visible = causal(2, 3, 5)
    pages = torch.tensor([[0, 2], [1, 0], [2, 1]])
    indices = torch.stack([torch.randperm(4)[:3] for _ in range(3)])
    valid = torch.rand(3, 3) < 0.6
    valid[:, 0] = True
    chosen = torch.stack([torch.randperm(4)[:2] for _ in range(T)])
    cos, sin = rotation(T, 3)
    return {
        "attention": (
            lambda q, k, v: reference.attention(q, k, v, visible, 0.7),
            (wide(2, 3, 4, 3), wide(2, 5, 2, 3), wide(2, 5, 2, 4)),
        ),
        "attention_probs": (
            lambda q, k: reference.attention_probs(q, k, visible, 0.7),
            (wide(2, 3, 4, 3), wide(2, 5, 2, 3)),
        ),
        "latent_attention": (
            lambda q, r, w, e: reference.latent_attention(q, r, w, e, pages, valid, 0.7, indices),
            (wide(3, 2, 3), wide(3, 2, 2), wide(2, 7, 4), wide(3, 2, 6)),
        ),
        "attention with sinks": (
            lambda q, k, v, s: reference.attention(q, k, v, visible, 0.4, s),
            (wide(2, 3, 4, D), wide(2, 5, 2, D), wide(2, 5, 2, D), wide(4)),
        ),
        "linear": (reference.linear, (wide(T, D), wide(4, D), wide(4))),
        "wide_linear": (reference.wide_linear, (wide(T, D), wide(4, D))),
        "pool": (reference.pool, (wide(2, 4, D), wide(2, 4, D))),
        "swiglu": (lambda gate, up: reference.swiglu(gate, up, 0.8), (wide(T, D), wide(T, D))),
        "experts": (
            lambda x, w, gate_up, down: reference.experts(x, chosen, w, gate_up, down),
            (wide(T, D), wide(T, 2), wide(4, 6, D), wide(4, D, 3)),
        ),
        "hyper_maps of mhc": site(True),
        "hyper_maps of hc": site(False),
        "hyper_maps of one stream": site(True, n=1),
        "collapse_streams": (
            lambda x, fn, base, scale: reference.collapse_streams(x, fn, base, scale, 1e-6, 1e-6),
            (wide(T, N, D), wide(N, N * D), wide(N), wide(1)),
        ),
        "mix_streams": (reference.mix_streams, (wide(T, N, D), wide(T, D), wide(T, N), wide(T, N, N))),
        "read_streams": (reference.read_streams, (wide(T, N, D), wide(T, N))),
        "sinkhorn": (lambda x: reference.sinkhorn(x, 6, 1e-6), (wide(T, N, N),)),
        "index_scores": (reference.index_scores, (wide(2, 3, 4, D), wide(2, 5, D), wide(2, 3, 4))),
        "block_summaries": (lambda k: reference.block_summaries(k, 2), (wide(2, 5, D),)),
        "rms_norm": (lambda x, w: reference.rms_norm(x, w, 1e-6), (wide(T, D), wide(D))),
        "rms_norm without weight": (lambda x: reference.rms_norm(x, None, 1e-6), (wide(T, D),)),
        "apply_rope interleaved": (lambda x: reference.apply_rope(x, cos, sin, interleaved=True), (wide(T, 2, 6),)),
        "apply_rope half-split": (lambda x: reference.apply_rope(x, cos, sin, interleaved=False), (wide(T, 6),)),
    }


@pytest.mark.parametrize("name", cases())
def test_gradient_of_the_reference(name):
    function, inputs = cases()[name]
    assert gradcheck(function, inputs)


def test_every_differentiable_op_is_checked():
    constants = {
        "FP8_BLOCK",
        "attention_mass",
        "candidate_keys",
        "chosen_positions",
        "ngram_rows",
        "rope_frequencies",
        "rope_tables",
        "select_positions",
        "select_topk",
        "yarn_mscale",
    }  # no gradient
    rounding = {  # or of inference alone
        name
        for name in reference.__all__
        if getattr(getattr(reference, name), "__module__", "").endswith((".blocks", ".quantized", ".rows", ".decode"))
    }
    assert {name.split()[0] for name in cases()} == set(reference.__all__) - constants - rounding


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("iterations", [1, 20])
def test_gradient_of_the_compiled_streams(n, iterations, monkeypatch):
    """The kernels' hand-written gradients against finite differences, not only against the reference."""
    monkeypatch.setattr(streams, "LONG", 1)
    torch.manual_seed(1)

    def one_site(x: Tensor, fn: Tensor, base: Tensor, scale: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        pre, post, comb = streams.hyper_maps(x, fn, base, scale, True, iterations, 1e-6, 1e-6)
        return streams.read_streams(x, pre), streams.mix_streams(x, y, post, comb)

    assert gradcheck(one_site, (wide(T, n, D), wide(n * (n + 2), n * D), wide(n * (n + 2)), wide(3), wide(T, D)))
