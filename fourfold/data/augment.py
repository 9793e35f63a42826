"""What training does to a picture or a sound so that the model learns the thing and not the file."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fourfold.data.synthetic import background

Rng = np.random.Generator
WHITE = np.full(3, 255, np.float32)


def paste(
    rgba: np.ndarray, size: int, scale: float = 1.0, place: tuple[float, float] = (0.5, 0.5), behind: np.ndarray = WHITE
) -> np.ndarray:
    """RGBA uint8 [S, S, 4] at ``scale`` of a ``size`` canvas, ``place`` in the room left over.

    Returns uint8 [size, size, 3].
    """
    side = max(round(size * scale), 1)
    picture = Image.fromarray(rgba)
    if picture.size != (side, side):
        picture = (
            picture.convert("RGBa").resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0).convert("RGBA")
        )
    pixels = np.asarray(picture, np.float32)
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = behind
    top, left = (round((size - side) * p) for p in place)
    alpha = pixels[..., 3:] / 255
    canvas[top : top + side, left : left + side] *= 1 - alpha
    canvas[top : top + side, left : left + side] += pixels[..., :3] * alpha
    return np.round(canvas).astype(np.uint8)


def vary_emoji(rng: Rng, rgba: np.ndarray) -> np.ndarray:
    """An emoji on a canvas of 32, 48 or 64 pixels, somewhat smaller and off centre, white or anything behind it."""
    size = int(rng.choice((32, 48, 64), p=(0.15, 0.6, 0.25)))
    plain = rng.random() < 0.4
    behind = WHITE if plain else background(rng, size, size)
    picture = paste(rgba, size, rng.uniform(0.7, 1.0), (rng.random(), rng.random()), behind)
    return brighten(rng, picture)


def brighten(rng: Rng, picture: np.ndarray) -> np.ndarray:
    """Contrast about mid grey and brightness, a little of each."""
    varied = (picture.astype(np.float32) - 128) * rng.uniform(0.8, 1.1) + 128 + rng.uniform(-15, 15)
    return np.clip(np.round(varied), 0, 255).astype(np.uint8)


def shift(rng: Rng, picture: np.ndarray, most: int = 2) -> np.ndarray:
    """Moved by up to ``most`` pixels, black coming in. uint8 [H, W]."""
    down, right = (int(v) for v in rng.integers(-most, most + 1, 2))
    moved = np.zeros_like(picture)
    height, width = picture.shape
    moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = picture[
        max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
    ]
    return moved


def vary_cloth(rng: Rng, picture: np.ndarray) -> np.ndarray:
    """Grey uint8 [28, 28], shifted and brightened, at its own size or (a quarter) enlarged to 56.

    Never mirrored: shoes point left.
    """
    moved = shift(rng, picture)
    if rng.random() < 0.25:
        moved = np.asarray(Image.fromarray(moved).resize((56, 56), Image.Resampling.BILINEAR))
    grey = np.clip(np.round(moved * rng.uniform(0.75, 1.2)), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, -1)


def vary_sound(rng: Rng, wave: np.ndarray, rate: int = 16000, stretch: float = 0.13) -> np.ndarray:
    """float32 [S]: other speed and pitch, silence around, a telephone's band (a quarter), noise, loudness."""
    factor = rng.uniform(1 - stretch, 1 + stretch)
    at = np.arange(0, len(wave) - 1, factor)
    faster = np.interp(at, np.arange(len(wave)), wave)
    before, after = (int(rate * rng.uniform(0, 0.12)) for _ in range(2))
    varied = np.pad(faster, (before, after)).astype(np.float32)
    if rng.random() < 0.25:
        spectrum = np.fft.rfft(varied)
        spectrum[int(len(spectrum) * rng.uniform(0.42, 0.55)) :] = 0
        varied = np.fft.irfft(spectrum, len(varied)).astype(np.float32)
    if rng.random() < 0.6:
        level = np.abs(varied).max(initial=1e-6) * 10 ** rng.uniform(-3.0, -1.2)
        varied += level * rng.standard_normal(len(varied), np.float32)
    return np.clip(varied * rng.uniform(0.15, 1.0), -1, 1)
