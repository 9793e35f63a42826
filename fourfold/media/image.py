"""Pictures: bytes -> RGB -> patches."""

from __future__ import annotations

import io
from contextlib import suppress

import numpy as np
from PIL import Image

from fourfold.config_media import ImageConfig
from fourfold.media.limits import DEFAULT_LIMITS, Limits, MediaError, check_container

KINDS = ("png", "jpeg", "gif", "webp", "bmp")
ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, limits: Limits = DEFAULT_LIMITS, mime: str | None = None) -> Image.Image:
    """The (first) picture of a PNG, JPEG, GIF, WebP or BMP file: RGB, upright, laid on white where transparent.

    ``mime``: what the sender called it, checked against the content. Raises :class:`MediaError`; size and pixel
    count are checked before any pixel is decoded.
    """
    kind = check_container(data, "image", KINDS, limits.image_bytes, mime)
    with open_picture(data, kind, "image", limits.image_pixels) as picture:
        try:
            picture.load()
            turn = None
            with suppress(Exception):  # a photo with damaged EXIF is still a photo
                turn = _UPRIGHT.get(picture.getexif().get(ORIENTATION, 1))
            rgb = flatten(picture)
        except Exception as error:  # decoders of hostile bytes raise anything
            raise MediaError(f"image: cannot be decoded ({error})") from error
    return rgb.transpose(turn) if turn is not None else rgb


def open_picture(data: bytes, kind: str, modality: str, max_pixels: int) -> Image.Image:
    """Opens a picture whose header promises at most ``max_pixels``; nothing is decoded yet."""
    if kind == "webp":
        # Opening a WebP already allocates its canvas, so its size is read here first.
        check_pixels(_webp_size(data), modality, max_pixels)
    try:
        picture = Image.open(io.BytesIO(data), formats=[kind])
    except Image.DecompressionBombError as error:
        raise MediaError(f"{modality}: {error}; the limit is {max_pixels} pixels") from error
    except Exception as error:
        raise MediaError(f"{modality}: cannot be decoded ({error})") from error
    check_pixels(picture.size, modality, max_pixels)
    return picture


def check_pixels(size: tuple[int, int], modality: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1 or width * height > max_pixels:
        raise MediaError(f"{modality}: is {width} x {height}; the limit is {max_pixels} pixels")


def _webp_size(data: bytes) -> tuple[int, int]:
    chunk, body = bytes(data[12:16]), bytes(data[20:30])
    if len(body) < 10:
        raise MediaError("image: is a truncated WebP")
    if chunk == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise MediaError("image: is a damaged WebP")


def flatten(picture: Image.Image) -> Image.Image:
    """RGB of a picture of any mode, on white where it is transparent."""
    if picture.mode.startswith("I"):  # 16 bits a pixel
        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def fit_grid(height: int, width: int, patch_size: int, max_patches: int) -> tuple[int, int]:
    """(rows, cols) of patches that keep the aspect of height x width best, rows * cols <= max_patches.

    A picture is shrunk to fit, and enlarged only to whole patches.
    """
    scale = min(1.0, (max_patches * patch_size**2 / (height * width)) ** 0.5) / patch_size
    rows = min(max(round(height * scale), 1), max_patches)
    cols = min(max(round(width * scale), 1), max_patches)
    while rows * cols > max_patches:  # both were rounded up: take back the one that overshoots more
        if rows > 1 and (cols == 1 or rows / height > cols / width):
            rows -= 1
        else:
            cols -= 1
    return rows, cols


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [height, width, 3], bicubic with antialiasing."""
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.asarray(resized)


def normalise(pixels: np.ndarray) -> np.ndarray:
    """uint8 0..255 -> float32 -1..1."""
    values = pixels.astype(np.float32)
    values *= 2 / 255
    values -= 1
    return values


def check_rgb(pixels: np.ndarray, modality: str, ndim: int) -> np.ndarray:
    """``pixels`` as a contiguous array; raises :class:`MediaError` unless it is uint8 [..., H, W, 3] and not empty."""
    pixels = np.ascontiguousarray(pixels)
    if pixels.dtype != np.uint8 or pixels.ndim != ndim or pixels.shape[-1] != 3 or not pixels.size:
        wanted = "[H, W, 3]" if ndim == 3 else "[F, H, W, 3]"
        raise MediaError(f"{modality}: must be uint8 {wanted} and not empty, not {pixels.dtype} {list(pixels.shape)}")
    return pixels


def image_patches(image: np.ndarray, cfg: ImageConfig) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """uint8 [H, W, 3] -> (values float32 [n, 3 * p * p], coords float32 [n, 3], (rows, cols)), n = rows * cols.

    The patches go row by row; a patch is [3, p, p] flattened, from -1 to 1; its coords are (0, row, column).
    """
    image = check_rgb(image, "image", 3)
    p = cfg.patch_size
    rows, cols = fit_grid(image.shape[0], image.shape[1], p, cfg.max_patches)
    pixels = normalise(resize(image, rows * p, cols * p))
    values = pixels.reshape(rows, p, cols, p, 3).transpose(0, 2, 4, 1, 3).reshape(rows * cols, cfg.features)
    return values, grid_coords(np.zeros(1), rows, cols), (rows, cols)


def grid_coords(seconds: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """float32 [len(seconds) * rows * cols, 3]: (second, row, column) of each patch, slice by slice, row by row."""
    coords = np.empty((len(seconds), rows, cols, 3), np.float32)
    coords[..., 0] = np.asarray(seconds)[:, None, None]
    coords[..., 1] = np.arange(rows)[:, None]
    coords[..., 2] = np.arange(cols)
    return coords.reshape(-1, 3)
