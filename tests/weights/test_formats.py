"""Stored weights and their scales: told apart by shape and dtype, decoded whole or by rows, refused by name."""

from __future__ import annotations

import random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourfold import ops
from fourfold.weights import formats
from fourfold.weights.formats import FORMATS, FormatError, decode, decode_rows, encode, scale_name

SCALED = [name for name, format in FORMATS.items() if format.block]
SHAPES = [(1, 2), (3, 32), (40, 64), (128, 128), (130, 260), (300, 34)]


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(name: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight and the scales that are written for x."""
    written = encode(x, name)
    weight = written.pop("weight")
    assert set(written) == ({FORMATS[name].scale} if FORMATS[name].block else set())
    return weight, written.get(FORMATS[name].scale)


def by_loops(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """e4m3 by the definition: each number times the scale of its block."""
    values, scales = weight.double(), scale.double()
    n, k = values.shape
    return torch.tensor([[values[i, j] * scales[i // block[0], j // block[1]] for j in range(k)] for i in range(n)])


# ---------------------------------------------------------------- decode and encode


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_read(name, shape, tmp_path):
    """Through a file; close to what it was, and written again it is the same file."""
    x = matrix(*shape)
    weight, scale = stored(name, x)
    save_file({"weight": weight} | ({} if scale is None else {"scale": scale}), tmp_path / "x.safetensors")
    read = load_file(tmp_path / "x.safetensors")
    y = decode(read["weight"], read.get("scale"))
    assert y.dtype == torch.float32 and y.shape == x.shape
    tolerance = {"fp32": 0, "bf16": 2**-8, "mxfp4": 0.25}.get(name, 2**-4)
    assert ((y - x).abs() <= tolerance * x.abs().max()).all()
    again, _ = stored(name, y)
    back = decode(*stored(name, y))
    torch.testing.assert_close(back, y, rtol=2**-22 if name == "fp8" else 0, atol=0)
    assert again.dtype == weight.dtype and again.shape == weight.shape


@pytest.mark.parametrize(
    ("name", "block", "scale_dtype"),
    [
        ("fp8", (128, 128), torch.float32),
        ("fp8_ue8m0", (128, 128), torch.float32),
        ("fp8_e8m0", (128, 128), torch.float8_e8m0fnu),
        ("fp8_e8m0_32", (32, 32), torch.float8_e8m0fnu),
        ("fp8_rows", (1, 32), torch.float8_e8m0fnu),
    ],
)
def test_fp8_by_loops(name, block, scale_dtype):
    """Blocks are found by the shape of the scales, whatever the config says or does not say."""
    weight, scale = stored(name, matrix(140, 136) * torch.logspace(-3, 3, 136))
    assert weight.dtype == torch.float8_e4m3fn and scale.dtype == scale_dtype
    assert tuple(scale.shape) == (-(-140 // block[0]), -(-136 // block[1]))
    wanted = by_loops(weight, scale.float(), block).float()
    for told in (None, block, (128, 128), (32, 32)):
        assert torch.equal(decode(weight, scale, told), wanted)
    assert torch.equal(decode(weight, scale, dtype=torch.bfloat16), wanted.bfloat16())
    if name != "fp8":
        assert (scale.float().log2() % 1 == 0).all()
    if scale_dtype == torch.float8_e8m0fnu:  # a reader without that dtype gives bytes
        assert torch.equal(decode(weight, scale.view(torch.uint8)), wanted)


def test_unusual_blocks_are_taken_when_told():
    codes, scales = ops.quantize_fp8(matrix(20, 48), (8, 16))
    assert torch.equal(decode(codes, scales, (8, 16)), ops.dequantize_fp8(codes, scales, (8, 16)))
    with pytest.raises(FormatError, match="8 x 16|shape"):
        decode(codes, scales)


def test_mxfp4_by_hand():
    """Low nibble first; one power of two per 32 inputs of a row."""
    weight = torch.zeros(2, 32, dtype=torch.int8)
    weight[0, 0], weight[1, 16], weight[1, 31] = 0x21, 0x70, -1  # codes (1, 2), (0, 7), (15, 15)
    scale = torch.tensor([[127, 128], [126, 130]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    wanted = torch.zeros(2, 64)
    wanted[0, :2] = torch.tensor([0.5, 1.0])
    wanted[1, 33], wanted[1, 62:] = 6.0 * 8, -6.0 * 8
    for w in (weight, weight.view(torch.uint8)):
        assert torch.equal(decode(w, scale), wanted)
    assert formats.decoded_shape(weight, scale) == (2, 64)


@pytest.mark.parametrize("name", SCALED)
def test_stacks_of_matrices(name):
    x = matrix(3, 40, 64)
    weight, scale = stored(name, x)
    assert torch.equal(decode(weight, scale), torch.stack([decode(*stored(name, part)) for part in x]))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_those_of_the_whole(name):
    weight, scale = stored(name, matrix(300, 66))
    whole = decode(weight, scale)
    rng = random.Random(0)
    cuts = [(0, 300), (0, 0), (300, 300), (128, 128), (127, 129), (128, 256), (31, 33), (299, 300)]
    for start, stop in cuts + [sorted(rng.choices(range(301), k=2)) for _ in range(20)]:
        rows = decode_rows(weight, scale, start, stop)
        assert torch.equal(rows, whole[start:stop]), (start, stop)
    assert decode_rows(weight, scale, 1, 3, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", SCALED)
def test_rows_read_no_other_row(name):
    """What lies outside may be garbage: it is not looked at."""
    weight, scale = stored(name, matrix(300, 66))
    wanted = decode(weight, scale)[130:140]
    weight, scale = weight.clone(), scale.clone()
    weight.view(torch.uint8)[:130], weight.view(torch.uint8)[140:] = 0x7F, 0x7F
    rows = FORMATS[name].block[0]
    outside = torch.ones(len(scale), dtype=torch.bool)
    outside[130 // rows : -(-140 // rows)] = False
    (scale if scale.dtype == torch.float32 else scale.view(torch.uint8))[outside] = 255
    assert torch.equal(decode_rows(weight, scale, 130, 140), wanted)


# ---------------------------------------------------------------- siblings


def test_the_scale_is_the_sibling():
    names = {"a.weight", "a.weight_scale_inv", "b.weight", "b.scale", "c.weight", "d.gate_up", "d.gate_up_scale_inv"}
    assert scale_name("a.weight", names) == "a.weight_scale_inv"
    assert scale_name("b.weight", names) == "b.scale"
    assert scale_name("c.weight", names) is None
    assert scale_name("d.gate_up", names) == "d.gate_up_scale_inv"
    with pytest.raises(FormatError, match="a.weight: has two scales"):
        scale_name("a.weight", names | {"a.scale"})


@pytest.mark.parametrize("name", SCALED)
def test_what_encode_names_is_found(name):
    names = {f"x.{part}" for part in encode(matrix(4, 4), name)}
    assert scale_name("x.weight", names) in names - {"x.weight"}


def test_config_blocks():
    assert formats.weight_block_size(None) is None and formats.weight_block_size({}) is None
    for name in ("fp8", "fp8_ue8m0", "fp8_e8m0", "fp8_e8m0_32"):
        config = formats.quantization_config(name)
        assert formats.weight_block_size(config) == FORMATS[name].block
        assert (config.get("scale_fmt") == "ue8m0") == (name != "fp8")
    for bad in ([128], [128, 0], [128, 1.5], "128", [True, 128], [128, 128, 128], 128):
        with pytest.raises(FormatError, match="weight_block_size"):
            formats.weight_block_size({"weight_block_size": bad})
    with pytest.raises(FormatError, match="mxfp4 is not fp8"):
        formats.quantization_config("mxfp4")


# ---------------------------------------------------------------- faults


E4M3 = torch.zeros(256, 256).to(torch.float8_e4m3fn)
PACKED = torch.zeros(4, 32, dtype=torch.int8)


@pytest.mark.parametrize(
    ("weight", "scale", "what"),
    [
        (E4M3, None, "float8_e4m3fn but has no scale"),
        (PACKED, None, "int8 but has no scale"),
        (torch.zeros(4, 6, dtype=torch.int64), None, "int64 but has no scale"),
        (torch.zeros(4, 4), torch.ones(1, 1), "float32 and has a scale"),
        (E4M3, torch.ones(2, 2, dtype=torch.float16), "its scale is float16"),
        (E4M3, torch.ones(2, 2, dtype=torch.int8), "its scale is int8"),
        (PACKED, torch.ones(4, 2), "its scale is float32"),
        (E4M3, torch.ones(2, 3), r"its scale has shape \[2, 3\].*\[2, 2\] \(128 x 128\).*\[8, 8\] \(32 x 32\)"),
        (E4M3, torch.ones(4), r"its scale has shape \[4\]"),
        (E4M3[0], torch.ones(2), "only matrices"),
        (PACKED, torch.ones(4, 1, dtype=torch.uint8), r"shape \[4, 64\] it must be \[4, 2\] \(1 x 32\)"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(weight, scale, what):
    with pytest.raises(FormatError, match=r"^layers\.3\.wq\.weight: .*" + what):
        decode(weight, scale, name="layers.3.wq.weight")
    if weight.dim() == 2:
        with pytest.raises(FormatError, match=r"^layers\.3\.wq\.weight: .*" + what):
            decode_rows(weight, scale, 0, 1, name="layers.3.wq.weight")


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 257)])
def test_rows_that_are_not_there(start, stop):
    with pytest.raises(FormatError, match="q.weight: .*no rows"):
        decode_rows(E4M3, torch.ones(2, 2), start, stop, name="q.weight")


def test_what_cannot_be_written():
    with pytest.raises(FormatError, match="'int3' is unknown; choose one of fp32"):
        encode(matrix(2, 2), "int3")
    with pytest.raises(FormatError, match="a.weight: has 33 columns"):
        encode(matrix(2, 33), "mxfp4", "a.weight")
    for name in SCALED:
        with pytest.raises(FormatError, match="a.weight: .*matrices"):
            encode(matrix(4), name, "a.weight")
        with pytest.raises(FormatError, match="a.weight: holds NaN"):
            encode(torch.full((2, 2), torch.nan), name, "a.weight")
