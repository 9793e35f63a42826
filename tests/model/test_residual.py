"""Residual sites: plain, hc and mhc."""

from __future__ import annotations

import pytest
import torch

from fourfold.model.probe import Probe
from fourfold.model.residual import HyperConnection, PlainResidual, StreamCollapse, residual_site
from fourfold.model.sequence import pack
from tests.model import tiny

KINDS = ["hc", "mhc"]


def site(kind: str, n: int = 4, fresh: bool = True) -> HyperConnection:
    torch.manual_seed(0)
    made = HyperConnection(tiny.config(**{"residual.kind": kind, "residual.hc_mult": n}), 0)
    made.reset_parameters(0.02)
    if not fresh:
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter)
    return made


def context(n: int, probe: Probe | None = None):
    made = tiny.model(tiny.config())
    return made.context(pack([tiny.text(n)]), None, probe)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_site_by_loops(kind, n):
    """Read by pre, write by post, mix by comb[from, to]: the maps that the probe saw."""
    made, probe = site(kind, n, fresh=False), Probe()
    x, seen = torch.randn(5, n, 24), []

    def sublayer(h):
        seen.append(h)
        return torch.tanh(h) * 3

    got = made(x, sublayer, context(5, probe))
    comb = probe.stream_maps[0]
    flat = x.flatten(1)
    mix = (flat @ made.fn.T) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
    for t in range(5):
        if kind == "mhc":
            pre = torch.sigmoid(mix[t, :n] * made.scale[0] + made.base[:n]) + 1e-6
            post = 2 * torch.sigmoid(mix[t, n : 2 * n] * made.scale[1] + made.base[n : 2 * n])
        else:
            pre = torch.tanh(mix[t, :n]) * made.scale[0] + made.base[:n]
            post = torch.tanh(mix[t, n : 2 * n]) * made.scale[1] + made.base[n : 2 * n]
        read = sum(pre[i] * x[t, i] for i in range(n))
        torch.testing.assert_close(seen[0][t], read, rtol=1e-4, atol=1e-5)
        for k in range(n):
            wanted = post[k] * torch.tanh(read) * 3 + sum(comb[t, j, k] * x[t, j] for j in range(n))
            torch.testing.assert_close(got[t, k], wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_comb_is_applied_transposed():
    """A static map that sends stream 0 to stream 1 alone; applied the other way it would go elsewhere."""
    made = site("hc", 3)
    made.scale.zero_()
    comb = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    made.base.copy_(torch.cat([torch.zeros(6), comb.flatten()]))
    x = torch.tensor([1.0, 2.0, 3.0])[None, :, None].expand(1, 3, 24)
    out = made(x, torch.zeros_like, context(1))
    assert out[0, :, 0].tolist() == [3.0, 1.0, 2.0]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_fresh_site_is_nearly_the_plain_residual(kind, n):
    """For identical streams, as they enter the first layer: all of them become x + f(x)."""
    made, x = site(kind, n), torch.randn(6, 24)
    streams = x[:, None].expand(-1, n, -1)

    def sublayer(h):  # behind a norm, as in every block
        return 2 * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)

    plain = PlainResidual()(x[:, None], sublayer, context(6))
    got = made(streams, sublayer, context(6))
    torch.testing.assert_close(got, plain.expand(-1, n, -1), rtol=0.05, atol=0.02)
    made.scale.zero_()  # without the dynamic part but for eps
    got = made(streams, sublayer, context(6))
    torch.testing.assert_close(got, plain.expand(-1, n, -1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 4])
def test_a_fresh_collapse_is_nearly_the_mean(n):
    torch.manual_seed(0)
    made = StreamCollapse(tiny.config(**{"residual.kind": "mhc", "residual.hc_mult": n}))
    made.reset_parameters(0.02)
    made.scale.zero_()
    x = torch.randn(5, n, 24)
    torch.testing.assert_close(made(x, context(5)), x.mean(1) * (1 if n > 1 else 0.5), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_collapse_by_loops():
    torch.manual_seed(0)
    made = StreamCollapse(tiny.config(**{"residual.kind": "mhc", "residual.hc_mult": 3}))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(4, 3, 24)
    for t, got in enumerate(made(x, context(4))):
        f = x[t].flatten()
        w = torch.sigmoid(made.fn @ f * torch.rsqrt(f.square().mean() + 1e-6) * made.scale + made.base) + 1e-6
        torch.testing.assert_close(got, sum(w[i] * x[t, i] for i in range(3)), rtol=1e-4, atol=1e-5)


def test_plain_has_no_parameters():
    cfg = tiny.config()
    assert not list(residual_site(cfg, 0).parameters()) and cfg.residual.streams == 1


# ---------------------------------------------------------------- gain


def deep(kind: str, fresh: bool = False) -> Probe:
    """The maps of 30 layers, unless ``fresh`` with random weights, scales and static parts."""
    cfg = tiny.config(**{"residual.kind": kind, "num_hidden_layers": 30})
    made, probe = tiny.Model(cfg) if fresh else tiny.model(cfg), Probe()
    with torch.no_grad():
        made(pack([tiny.text(20)]), probe=probe)
    return probe


def test_maps_of_mhc_are_doubly_stochastic():
    """Columns exactly, for the last of the 20 steps is theirs; rows as far as Sinkhorn has come."""
    for fresh, rows in ((True, 1e-3), (False, 0.05)):
        for comb in deep("mhc", fresh).stream_maps.values():
            assert (comb >= 0).all()
            assert (comb.sum(-2) - 1).abs().max() < 1e-5 and (comb.sum(-1) - 1).abs().max() < rows


def test_gain_is_bounded_by_mhc_alone():
    probe = deep("mhc")
    assert len(probe.stream_maps) == 60  # attention and feed-forward of every layer
    assert all(0.9 < gain < 1.1 for gain in probe.composite_gain())
    assert all(gain > 3 for gain in deep("hc").composite_gain())


def test_gain_is_of_the_product_in_order():
    """Sites run in depth order; new streams are comb^T times old ones."""
    a, b = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[0.0, 3.0], [-1.0, 0.0]])
    probe = Probe(stream_maps={1: b[None], 0: a[None]})
    product = b.T @ a.T
    assert probe.composite_gain() == (float(product.abs().sum(1).max()), float(product.abs().sum(0).max()))
    assert Probe().composite_gain() == (1.0, 1.0)
