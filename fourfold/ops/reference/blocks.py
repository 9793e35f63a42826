"""Numbers of few bits that share a scale with their block.

Formats: fp8 e4m3 with float32 or power-of-two scales (DeepSeek-V3, arXiv 2412.19437, section 3.3), fp4 E2M1 with
one power of two per 32 (OCP Microscaling 1.0), and symmetric int8 and int4. Scales multiply: ``x = code * scale``.
A block is (rows, columns) of the last two axes; the last block of an axis may be cut short. Every quantise function
computes in float32 and raises ValueError on NaN, infinity and magnitudes beyond 2^127.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Block = tuple[int, int]

E4M3_MAX, E2M1_MAX = 448.0, 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # codes 0..7; codes 8..15 are their negatives
E2M1_TIES = ((0.25, 0), (0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0))  # midpoint; 1: the tie goes up
SMALLEST = 2.0**-126  # smallest scale, the smallest normal float32: what keeps the scale of a block of zeros from 0
LARGEST = 2.0**127  # largest magnitude taken; rounded up, one beyond could leave float32
FP8_FLOOR = E4M3_MAX * SMALLEST  # least largest-magnitude that a block of weights is taken to have
ACTIVATION_FLOOR = 1e-4  # the same of activations
INT8_MAX, INT4_MAX = 127, 7
LOSSLESS_TILE = (128, 128)


# ---------------------------------------------------------------- blocks


def block_counts(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """The shape of the scales of a tensor [..., N, K]: [..., ceil(N / rows), ceil(K / columns)]."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def block_amax(x: Tensor, block: Block) -> Tensor:
    """Largest magnitude of each block of x [..., N, K], in the shape of :func:`block_counts`."""
    (rows, columns), (n, k) = block, block_counts(x.shape, block)[-2:]
    padded = F.pad(x.abs(), (0, k * columns - x.shape[-1], 0, n * rows - x.shape[-2]))
    return padded.unflatten(-1, (k, columns)).unflatten(-3, (n, rows)).amax((-3, -1))


def spread_scales(scales: Tensor, block: Block, rows: int, columns: int, first_row: int = 0) -> Tensor:
    """The scale of every element, [..., rows, columns], from row ``first_row`` of the first block on."""
    wide = scales.repeat_interleave(block[1], -1)[..., :columns]
    return wide.repeat_interleave(block[0], -2)[..., first_row : first_row + rows, :]


def scale_blocks(codes: Tensor, scales: Tensor, block: Block, first_row: int = 0) -> Tensor:
    """``code * scale`` in float32. codes: [..., N, K]; first_row: where in the first row of blocks codes begin.

    Raises ValueError unless there is one scale for every block.
    """
    *leading, rows, columns = codes.shape
    expected = block_counts((*leading, first_row + rows, columns), block)
    if tuple(scales.shape) != expected:
        raise ValueError(
            f"scales: have shape {list(scales.shape)}; values {list(codes.shape)} in blocks of "
            f"{block[0]} x {block[1]} need {list(expected)}"
        )
    return codes.float() * spread_scales(scales.float(), block, rows, columns, first_row)


def quantisable(x: Tensor) -> Tensor:
    """x in float32. Raises ValueError if a value is NaN, infinite or beyond 2^127."""
    x = x.float()
    if not (x.abs() <= LARGEST).all():
        raise ValueError("holds NaN, infinity or a magnitude beyond 2^127: it cannot be quantised")
    return x


# ---------------------------------------------------------------- powers of two


def power_of_two_scales(amax: Tensor, largest: float) -> Tensor:
    """The smallest ``2^k`` with ``amax <= largest * 2^k``, float32; that is ``2^ceil(log2(amax / largest))``.

    amax: float32, greater than 0. k is kept within -127..127, what one e8m0 byte holds.
    """
    mantissa, exponent = torch.frexp(amax)
    top, shift = torch.frexp(torch.tensor(largest))
    k = exponent - shift + (mantissa > top).int()
    return torch.ldexp(torch.ones_like(amax), k.clamp(-127, 127))


def e8m0_encode(scales: Tensor) -> Tensor:
    """uint8 b of scales ``2^(b - 127)``. Raises ValueError if a scale is no power of two within 2^-127..2^127."""
    mantissa, exponent = torch.frexp(scales.float())
    if not ((mantissa == 0.5) & (exponent >= -126) & (exponent <= 128)).all():
        raise ValueError("scales: not all are powers of two from 2^-127 to 2^127")
    return (exponent + 126).to(torch.uint8)


def e8m0_decode(codes: Tensor) -> Tensor:
    """float32 ``2^(b - 127)`` of bytes b, uint8 or float8_e8m0fnu; byte 255 is NaN."""
    codes = codes.view(torch.uint8)
    scales = torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes.int() - 127)
    return scales.masked_fill(codes == 255, torch.nan)


# ---------------------------------------------------------------- fp8


def quantize_fp8(x: Tensor, block: Block, ue8m0: bool = False, floor: float = FP8_FLOOR) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn codes [..., N, K] and float32 scales, one per block.

    ue8m0: scales are powers of two, so that scaling is exact. floor: lower bound of a block's largest magnitude.
    ``|error| <= max(|x| / 2^4, scale / 2^10)``.
    """
    x = quantisable(x)
    amax = block_amax(x, block).clamp_min(floor)
    scales = power_of_two_scales(amax, E4M3_MAX) if ue8m0 else amax / E4M3_MAX
    scaled = x / spread_scales(scales, block, *x.shape[-2:])
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scales


def dequantize_fp8(codes: Tensor, scales: Tensor, block: Block, first_row: int = 0) -> Tensor:
    """float32 [..., N, K]; arguments as of :func:`scale_blocks`."""
    return scale_blocks(codes, scales, block, first_row)


def simulate_fp8(x: Tensor, channels: int = 128, ue8m0: bool = True) -> Tensor:
    """Activations as an fp8 product sees them: one scale per token and ``channels``. x: [..., T, C], dtype kept."""
    block = (1, channels)
    codes, scales = quantize_fp8(x, block, ue8m0, ACTIVATION_FLOOR)
    return dequantize_fp8(codes, scales, block).to(x.dtype)


# ---------------------------------------------------------------- fp4


def e2m1_encode(x: Tensor) -> Tensor:
    """The nearest code of each value, uint8; ties go to the even code, magnitudes beyond 6 to 6."""
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for midpoint, up in E2M1_TIES:
        code += magnitude >= midpoint if up else magnitude > midpoint
    return code + 8 * x.signbit().to(torch.uint8)


def e2m1_decode(codes: Tensor) -> Tensor:
    """float32 values of codes 0..15."""
    table = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], device=codes.device)
    return table[codes.int()]


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [..., ceil(K / 2)] of codes 0..15, uint8 [..., K]: the even index in the low nibble, 0 past the end."""
    low, high = F.pad(codes, (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def unpack_nibbles(packed: Tensor, columns: int | None = None) -> Tensor:
    """uint8 [..., K] of bytes [..., ceil(K / 2)]. columns: K, where it is odd."""
    packed = packed.view(torch.uint8)
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)[..., :columns]


def quantize_fp4(x: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """MXFP4: packed E2M1 codes uint8 [..., N, ceil(K / 2)] and float32 powers of two [..., N, ceil(K / group)].

    ``|error| <= max(|x| / 5, scale / 4)``.
    """
    x, block = quantisable(x), (1, group)
    scales = power_of_two_scales(block_amax(x, block).clamp_min(E2M1_MAX * SMALLEST), E2M1_MAX)
    return pack_nibbles(e2m1_encode(x / spread_scales(scales, block, *x.shape[-2:]))), scales


def dequantize_fp4(packed: Tensor, scales: Tensor, group: int = 32, columns: int | None = None) -> Tensor:
    """float32 [..., N, K]. columns: K, where it is odd."""
    return scale_blocks(e2m1_decode(unpack_nibbles(packed, columns)), scales, (1, group))


def simulate_fp4(x: Tensor, group: int = 32) -> Tensor:
    """x [..., T, C] rounded to fp4 and back, dtype kept."""
    return dequantize_fp4(*quantize_fp4(x, group), group, x.shape[-1]).to(x.dtype)


def fp4_to_fp8(packed: Tensor, scales: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """The same numbers as e4m3 codes [..., N, K] with one power of two per 128 x 128 tile.

    A tile's scale is 2^-6 of its largest group's, so the largest value becomes 6 * 2^6 = 384. Raises ValueError if
    the scales within a tile lie too far apart for that to be exact.
    """
    values = e2m1_decode(unpack_nibbles(packed))
    if tuple(scales.shape) != block_counts(values.shape, (1, group)):
        raise ValueError(f"scales: have shape {list(scales.shape)}, values {list(values.shape)} in groups of {group}")
    if LOSSLESS_TILE[1] % group:
        raise ValueError(f"group: is {group}; a tile of {LOSSLESS_TILE[1]} columns must hold whole groups")
    tile = (LOSSLESS_TILE[0], LOSSLESS_TILE[1] // group)  # in groups
    tops = (block_amax(scales, tile) / 2**6).clamp_min(2.0**-127)
    ratios = scales.double() / spread_scales(tops, tile, *scales.shape[-2:])
    scaled = values * spread_scales(ratios, (1, group), *values.shape[-2:])
    codes = scaled.float().to(torch.float8_e4m3fn)
    if lost := int((codes.double() != scaled).sum()):
        spread = (scales.amax() / scales.amin()).log2().item()
        raise ValueError(
            f"fp4 to fp8: {lost} of {codes.numel()} values would change; the scales span 2^{spread:.0f}, "
            "exact is what stays within e4m3 of the largest of each 128 x 128 tile"
        )
    return codes, tops


# ---------------------------------------------------------------- integers


def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [..., N, K] within -127..127 and one float32 scale per row, [..., N]. ``|error| <= scale / 2``."""
    x = quantisable(x)
    scales = x.abs().amax(-1).clamp_min(INT8_MAX * SMALLEST) / INT8_MAX
    return (x / scales[..., None]).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8), scales


def dequantize_int8(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [..., N, K]."""
    return codes.float() * scales[..., None].float()


def quantize_int4(x: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """Packed codes uint8 [..., N, ceil(K / 2)] and bfloat16 scales [..., N, ceil(K / group)].

    A code is a nibble less 8, within -7..7, so a byte 0x88 is two zeros. ``|error| <= scale / 2``.
    """
    x, block = quantisable(x), (1, group)
    scales = (block_amax(x, block).clamp_min(INT4_MAX * SMALLEST) / INT4_MAX).bfloat16()
    codes = (x / spread_scales(scales.float(), block, *x.shape[-2:])).round().clamp(-INT4_MAX, INT4_MAX)
    return pack_nibbles((codes + 8).to(torch.uint8)), scales


def dequantize_int4(packed: Tensor, scales: Tensor, group: int = 32, columns: int | None = None) -> Tensor:
    """float32 [..., N, K]. columns: K, where it is odd."""
    return scale_blocks(unpack_nibbles(packed, columns).to(torch.int8) - 8, scales, (1, group))
