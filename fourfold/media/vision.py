"""Pictures for a model with an image tower: native size, whole patches, a bounded number of tokens (DeepSeek-V4.1)."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from fourfold.config_media import VisionConfig
from fourfold.media.image import check_rgb, normalise

GREY = 127


def image_tokens(rows: int, columns: int) -> int:
    """Positions of a picture of rows x columns tokens: every row ends in a mark, and two marks enclose it."""
    return rows * (columns + 1) + 2


def fit_sides(height: int, width: int, cfg: VisionConfig) -> tuple[int, int]:
    """The sides in pixels, whole patches, that a picture of height x width is brought to.

    A picture below ``min_pixels`` grows to that area; one that would take more than ``max_image_tokens`` shrinks.
    """
    tall, wide = float(height), float(width)
    if height * width < cfg.min_pixels:
        growth = math.sqrt(cfg.min_pixels / (height * width))
        tall, wide = float(int(height * growth)), float(int(width * growth))
    patch, cell = cfg.patch_size, cfg.patch_size * cfg.downsample
    sides = math.ceil(tall / patch) * patch, math.ceil(wide / patch) * patch
    if image_tokens(*(-(-side // cell) for side in sides)) <= cfg.max_image_tokens:
        return sides
    # columns w with r w (w + 1) = max_image_tokens - 2, r the aspect
    most = cfg.max_image_tokens - 2
    columns = math.sqrt(most / (tall / wide) + 0.25) - 0.5
    rows = columns * (tall / wide)
    if columns < 1:
        return most // 2 * cell, cell
    if rows < 1:
        return cell, (most - 1) * cell
    scale = min(math.floor(columns) * cell / wide, math.floor(rows) * cell / tall)
    return max(math.floor(tall * scale / patch), 1) * patch, max(math.floor(wide * scale / patch), 1) * patch


def place_on_grey(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [height, width, 3]: as large as it fits with its aspect kept, in the middle of grey."""
    tall, wide = image.shape[:2]
    inner_height, inner_width = height, width
    if wide / tall > width / height:
        inner_height = max(round(tall / wide * width), 1)
    else:
        inner_width = max(round(wide / tall * height), 1)
    resized = Image.fromarray(image).resize((inner_width, inner_height), Image.Resampling.BICUBIC)
    canvas = np.full((height, width, 3), GREY, np.uint8)
    top, left = round((height - inner_height) * 0.5), round((width - inner_width) * 0.5)
    canvas[top : top + inner_height, left : left + inner_width] = np.asarray(resized)
    return canvas


def vision_patches(image: np.ndarray, cfg: VisionConfig) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """uint8 [H, W, 3] -> (values float32 [n, features], coords float32 [n, 3], (rows, columns) of n tokens).

    A token's values are its ``downsample`` x ``downsample`` patches, each [3, p, p], row by row, zeros where the
    picture has none; its coords are the patch rows and columns of the picture, and its number in it.
    Raises MediaError unless the image is RGB and not empty.
    """
    image = check_rgb(image, "image", 3)
    p, size = cfg.patch_size, cfg.downsample
    height, width = fit_sides(*image.shape[:2], cfg)
    patch_rows, patch_columns = height // p, width // p
    rows, columns = -(-patch_rows // size), -(-patch_columns // size)
    pixels = np.zeros((rows * size * p, columns * size * p, 3), np.float32)
    pixels[:height, :width] = normalise(place_on_grey(image, height, width))
    values = pixels.reshape(rows, size, p, columns, size, p, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    coords = np.empty((rows * columns, 3), np.float32)
    coords[:] = patch_rows, patch_columns, 0
    coords[:, 2] = np.arange(rows * columns)
    return np.ascontiguousarray(values).reshape(rows * columns, cfg.features), coords, (rows, columns)
