"""Numbers of few bits: what they can hold, how far off they are, and that packing loses nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fourfold import ops
from fourfold.ops.reference import blocks

BYTES = torch.arange(256, dtype=torch.uint8)
FP8_BLOCKS = [(128, 128), (32, 32), (1, 128), (1, 32), (3, 5)]
few = settings(max_examples=40, deadline=None, derandomize=True)

# Every format: quantise and dequantise, and the largest error allowed of each value.
FORMATS = {
    **{f"fp8 {b} float": (lambda x, b=b: ops.quantize_fp8(x, b), b) for b in FP8_BLOCKS},
    **{f"fp8 {b} ue8m0": (lambda x, b=b: ops.quantize_fp8(x, b, ue8m0=True), b) for b in FP8_BLOCKS},
    **{f"fp4 {g}": (lambda x, g=g: ops.quantize_fp4(x, g), g) for g in (32, 16)},
    **{f"int4 {g}": (lambda x, g=g: ops.quantize_int4(x, g), g) for g in (32, 64, 128)},
    "int8": (ops.quantize_int8, None),
}


def quantised(name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and the numbers they stand for."""
    quantise, block = FORMATS[name]
    codes, scales = quantise(x)
    if name.startswith("fp8"):
        return codes, scales, ops.dequantize_fp8(codes, scales, block)
    if name == "int8":
        return codes, scales, ops.dequantize_int8(codes, scales)
    return codes, scales, getattr(ops, f"dequantize_{name[:4].strip()}")(codes, scales, block, x.shape[-1])


def scale_of_each(name: str, scales: Tensor, x: Tensor) -> Tensor:
    """By loops over elements: the scale that each belongs to."""
    block = FORMATS[name][1] or x.shape[-1]
    rows, columns = block if isinstance(block, tuple) else (1, block)
    scales = (scales[..., None] if name == "int8" else scales).double()
    each = [[scales[i // rows, j // columns] for j in range(x.shape[1])] for i in range(x.shape[0])]
    return torch.tensor(each, dtype=torch.float64).view(x.shape)


@st.composite
def matrices(draw) -> Tensor:
    """[N, K] of any size about a block, each value of a magnitude of its own, zeros and extremes among them."""
    n, k = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 3, 31, 32, 33, 70, 130]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    centre, width = draw(st.integers(-140, 120)), draw(st.sampled_from([0, 3, 20]))
    exponents = torch.randint(-width, width + 1, (n, k), generator=generator) + centre
    x = torch.ldexp(torch.randn(n, k, generator=generator), exponents).clamp(-(2.0**127), 2.0**127)
    return x.masked_fill(torch.rand(n, k, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0])), 0.0)


# ---------------------------------------------------------------- error and idempotence


@pytest.mark.parametrize("name", FORMATS)
@given(x=matrices())
@few
def test_error_is_bounded(name, x):
    _, scales, y = quantised(name, x)
    assert y.shape == x.shape and y.isfinite().all()
    s, magnitude = scale_of_each(name, scales, x), x.abs().double()
    if name.startswith("fp8"):
        bound = torch.maximum(magnitude / 2**4, s / 2**10)
    elif name.startswith("fp4"):
        bound = torch.maximum(magnitude / 5, s / 4)
    else:
        bound = s / 2
    rounding = magnitude * 2**-20 + 2.0**-149  # of float32 itself
    assert ((y.double() - x.double()).abs() <= bound + rounding).all()


@pytest.mark.parametrize("name", FORMATS)
@given(x=matrices())
@few
def test_what_a_format_holds_it_keeps(name, x):
    """Exactly so where scales have few bits; a float32 scale may come back off by its last bit."""
    y = quantised(name, x)[2]
    again = quantised(name, y)[2]
    if "float" in name or name == "int8":
        torch.testing.assert_close(again, y, rtol=2**-22, atol=2.0**-149)
    else:
        assert torch.equal(again, y)


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_signs_and_empty_tensors(name):
    assert torch.equal(quantised(name, torch.zeros(3, 40))[2], torch.zeros(3, 40))
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(quantised(name, -x)[2], -quantised(name, x)[2])
    assert quantised(name, torch.zeros(0, 40))[2].shape == (0, 40)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_what_cannot_be_held_is_refused(name, bad):
    x = torch.ones(4, 40)
    x[2, 7] = bad
    with pytest.raises(ValueError, match=r"NaN, infinity or a magnitude beyond 2\^127"):
        quantised(name, x)


@pytest.mark.parametrize("name", FORMATS)
def test_leading_axes_are_independent(name):
    x = torch.randn(2, 3, 4, 40, generator=torch.Generator().manual_seed(0))
    y = quantised(name, x)[2]
    for i in range(2):
        for j in range(3):
            assert torch.equal(y[i, j], quantised(name, x[i, j])[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype):
    x = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name in FORMATS:
        assert torch.equal(quantised(name, x)[2], quantised(name, x.float())[2])


# ---------------------------------------------------------------- scales


@given(st.floats(2.0**-126, 2.0**127, width=32), st.sampled_from([448.0, 6.0]))
@few
def test_power_of_two_scale_is_the_smallest_that_fits(amax, largest):
    scale = blocks.power_of_two_scales(torch.tensor([amax]), largest).double().item()
    assert math.log2(scale) == int(math.log2(scale))
    assert amax <= largest * scale and (amax > largest * scale / 2 or scale == 2.0**-127)


@pytest.mark.parametrize("largest", [448.0, 6.0])
@pytest.mark.parametrize("k", [-100, -22, 0, 5, 90])
def test_power_of_two_scale_at_the_edge(largest, k):
    """amax = largest * 2^k still fits 2^k; the next float does not."""
    edge = torch.tensor([largest * 2.0**k])
    assert blocks.power_of_two_scales(edge, largest).item() == 2.0**k
    beyond = torch.nextafter(edge, torch.tensor([math.inf]))
    assert blocks.power_of_two_scales(beyond, largest).item() == 2.0 ** (k + 1)


def test_e8m0_bytes():
    decoded = ops.e8m0_decode(BYTES)
    assert decoded[:255].tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert decoded[255].isnan()
    assert torch.equal(ops.e8m0_encode(decoded[:255]), BYTES[:255])
    assert torch.equal(ops.e8m0_decode(BYTES.view(torch.float8_e8m0fnu))[:255], decoded[:255])
    for bad in (0.0, 3.0, -1.0, math.inf, math.nan, 2.0**-128):
        with pytest.raises(ValueError, match="powers of two"):
            ops.e8m0_encode(torch.tensor([1.0, bad]))


def test_fp8_float_scale_is_amax_over_448_of_each_block():
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    codes, scales = ops.quantize_fp8(x, (2, 32))
    assert scales.shape == (3, 3) and codes.dtype == torch.float8_e4m3fn
    for i in range(3):
        for j in range(3):
            block = np.s_[2 * i : 2 * i + 2, 32 * j : 32 * j + 32]
            assert scales[i, j] == x[block].abs().max() / 448
            assert codes[block].float().abs().max() == 448


def test_activations_have_a_floor():
    x = torch.logspace(-11, -5, 256).expand(2, -1)
    scale = 2.0 ** math.ceil(math.log2(1e-4 / 448))
    assert torch.equal(ops.simulate_fp8(x), (x / scale).to(torch.float8_e4m3fn).float() * scale)
    assert (ops.simulate_fp8(x)[:, 0] == 0).all()
    x = torch.randn(3, 2, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert ops.simulate_fp8(x, 32).dtype == ops.simulate_fp4(x).dtype == torch.bfloat16
    assert torch.equal(ops.simulate_fp8(x, 32)[1, 1, 64:96], ops.simulate_fp8(x[1:2, 1, 64:96], 32)[0])
    assert torch.equal(ops.simulate_fp4(x)[1, 1, 64:96], ops.simulate_fp4(x[1:2, 1, 64:96])[0])


def test_a_scale_for_every_block_and_no_more():
    codes, scales = ops.quantize_fp8(torch.ones(4, 40), (2, 32))
    for wrong in (scales[:1], scales[:, :1], scales.T[:, :1], torch.cat([scales, scales])):
        with pytest.raises(ValueError, match=r"need \[2, 2\]"):
            ops.dequantize_fp8(codes, wrong, (2, 32))


def test_rows_from_within_a_block():
    codes, scales = ops.quantize_fp8(torch.randn(9, 40, generator=torch.Generator().manual_seed(0)), (4, 32))
    whole = ops.dequantize_fp8(codes, scales, (4, 32))
    assert torch.equal(ops.dequantize_fp8(codes[5:9], scales[1:3], (4, 32), first_row=1), whole[5:9])


# ---------------------------------------------------------------- fp4 codes


def test_every_byte_of_nibbles_comes_back():
    assert torch.equal(ops.pack_nibbles(ops.unpack_nibbles(BYTES)), BYTES)
    assert ops.unpack_nibbles(torch.tensor([0xA3], dtype=torch.uint8)).tolist() == [3, 10]  # low nibble first
    codes = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    assert ops.pack_nibbles(codes).tolist() == [[0x21, 0x03]]
    assert torch.equal(ops.unpack_nibbles(ops.pack_nibbles(codes), 3), codes)


def test_every_byte_of_fp4_comes_back():
    values = ops.e2m1_decode(ops.unpack_nibbles(BYTES.view(torch.int8)))
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert values.tolist() == [
        v for b in range(256) for v in ((table + [-v for v in table])[n] for n in (b % 16, b // 16))
    ]
    assert torch.equal(ops.pack_nibbles(ops.e2m1_encode(values)), BYTES)  # minus zero keeps its sign


def test_every_byte_of_int4_comes_back():
    scales = torch.ones(256, 1, dtype=torch.bfloat16)
    values = ops.dequantize_int4(BYTES[:, None], scales)
    assert values.tolist() == [[b % 16 - 8, b // 16 - 8] for b in range(256)]
    held = (values.abs() <= 7).all(-1) & (values.abs().amax(-1) == 7)  # -8 is never written
    packed, again = ops.quantize_int4(values[held])
    assert torch.equal(packed[:, 0], BYTES[held]) and torch.equal(again, scales[held])


def test_every_e4m3_byte_comes_back():
    held = (BYTES & 0x7F) != 0x7F  # NaN
    codes = torch.cat([BYTES[held], torch.tensor([0x7E], dtype=torch.uint8)]).view(torch.float8_e4m3fn)[None]
    again, scales = ops.quantize_fp8(
        ops.dequantize_fp8(codes, torch.full((1, 1), 0.25), (1, 512)), (1, 512), ue8m0=True
    )
    assert scales.item() == 0.25 and torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


def test_fp4_rounds_to_nearest_and_ties_to_even():
    grid = torch.tensor(blocks.E2M1_VALUES)
    x = torch.arange(-900, 901) / 128  # the ties are among them
    got = ops.e2m1_encode(x)
    for value, code in zip(x.tolist(), got.tolist(), strict=True):
        distance = (grid - abs(value)).abs()
        nearest = (distance == distance.min()).nonzero()[:, 0].tolist()
        wanted = nearest[0] if len(nearest) == 1 else next(c for c in nearest if c % 2 == 0)
        assert code % 8 == wanted and (code >= 8) == (math.copysign(1, value) < 0), value
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    assert ops.e2m1_decode(ops.e2m1_encode(torch.tensor(ties))).tolist() == [0, 1, 1, 2, 2, 4, 4]


# ---------------------------------------------------------------- fp4 -> fp8


def fp4(n: int, k: int, exponents: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    packed = torch.randint(0, 256, (n, k // 2), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return packed, torch.ldexp(torch.ones(exponents.shape), exponents)


@pytest.mark.parametrize(("n", "k"), [(128, 128), (256, 384), (130, 160), (3, 32), (5, 24)])
def test_fp4_to_fp8_is_lossless(n, k):
    """Scales may span 2^14 within a tile: half of the smallest is then 2^-9, the finest that e4m3 has."""
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-14, 1, (n, -(-k // 32)), generator=generator) - 9
    exponents[0, 0] = -9
    packed, scales = fp4(n, k, exponents)
    codes, tile_scales = ops.fp4_to_fp8(packed, scales)
    wanted = ops.dequantize_fp4(packed, scales)
    assert codes.dtype == torch.float8_e4m3fn and tile_scales.shape == (-(-n // 128), -(-k // 128))
    assert torch.equal(ops.dequantize_fp8(codes, tile_scales, (128, 128)), wanted)
    assert tile_scales[0, 0] == 2.0**-9 / 2**6
    assert codes[:, :32][exponents[:, :1].expand(-1, min(k, 32)) == -9].float().abs().max() == 384


def test_fp4_to_fp8_refuses_what_would_change():
    exponents = torch.zeros(130, 8, dtype=torch.int64)
    exponents[5, 2] = -15
    packed, scales = fp4(130, 256, exponents)
    packed[5, 32] = 0x19  # -0.5 and 0.5 in the group of the small scale
    with pytest.raises(ValueError, match="values would change; the scales span 2\\^15"):
        ops.fp4_to_fp8(packed, scales)
    packed[5, 32:48] = 0x80  # zeros need no range
    ops.fp4_to_fp8(packed, scales)
    exponents[5, 2] = 0
    exponents[129, 7] = -40  # of another tile, alone in its row of tiles with ones: refused again
    with pytest.raises(ValueError, match="values would change"):
        ops.fp4_to_fp8(*fp4(130, 256, exponents))
    exponents[128:] = -40  # tiles of their own
    packed, scales = fp4(130, 256, exponents)
    assert torch.equal(
        ops.dequantize_fp8(*ops.fp4_to_fp8(packed, scales), (128, 128)), ops.dequantize_fp4(packed, scales)
    )


def test_fp4_to_fp8_of_the_smallest_scales():
    packed, scales = fp4(4, 64, torch.full((4, 2), -127))
    assert torch.equal(
        ops.dequantize_fp8(*ops.fp4_to_fp8(packed, scales), (128, 128)), ops.dequantize_fp4(packed, scales)
    )
    assert ops.e8m0_encode(ops.fp4_to_fp8(packed, scales)[1]).item() == 0  # 2^-6 of them has no byte
    with pytest.raises(ValueError, match="scales"):
        ops.fp4_to_fp8(packed, scales[:3])
    with pytest.raises(ValueError, match="group"):
        ops.fp4_to_fp8(packed, scales[:, :1], group=48 * 2)
