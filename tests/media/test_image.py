import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fourfold.config_media import ImageConfig
from fourfold.media.image import decode_image, fit_grid, image_patches
from fourfold.media.limits import Limits, MediaError, sniff

from .clips import noise, picture_file, sound_file, tone, video_file


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP", "GIF", "JPEG"])
def test_formats(kind):
    array = np.kron(np.array([[0, 255], [255, 0]], np.uint8), np.ones((8, 16), np.uint8))[..., None].repeat(3, 2)
    data = picture_file(array, kind, **({"lossless": True} if kind == "WEBP" else {}))
    image = decode_image(data)
    assert image.mode == "RGB" and image.size == (32, 16)
    assert np.abs(np.asarray(image).astype(int) - array).max() <= (8 if kind == "JPEG" else 0)
    assert sniff(data) == kind.lower()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_transparent_is_white(kind):
    array = np.zeros((4, 4, 4), np.uint8)
    array[0, :, 3] = 255  # one opaque black row
    array[1, :, 3] = 128
    pixels = np.asarray(decode_image(picture_file(array, kind, **({"lossless": True} if kind == "WEBP" else {}))))
    assert (pixels[0] == 0).all() and (pixels[2:] == 255).all()
    assert np.abs(pixels[1].astype(int) - 127).max() <= 1


def test_transparent_palette_colour_is_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.putpixel((0, 0), 1)
    out = io.BytesIO()
    image.save(out, "PNG", transparency=0)
    pixels = np.asarray(decode_image(out.getvalue()))
    assert pixels[0, 0].tolist() == [255, 0, 0] and (pixels[1:] == 255).all()


def test_sixteen_bits_and_other_modes():
    deep = np.array([[0, 256 * 100], [256 * 200 + 7, 65535]], np.uint16)
    pixels = np.asarray(decode_image(picture_file(deep)))
    assert pixels[..., 1].tolist() == [[0, 100], [200, 255]]
    for mode, kind in [("L", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("CMYK", "JPEG"), ("P", "GIF")]:
        out = io.BytesIO()
        Image.new(mode, (3, 2), 255 if mode == "1" else 0).save(out, kind)
        assert decode_image(out.getvalue()).mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(orientation):
    scene = np.zeros((16, 24, 3), np.uint8)
    scene[:8, :8] = 255  # bright top left corner
    undo = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}.get(orientation)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    stored = Image.fromarray(scene)
    if undo:
        stored = stored.transpose(turns[undo])
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    stored.save(out, "JPEG", quality=100, exif=exif)
    pixels = np.asarray(decode_image(out.getvalue())).astype(int)
    assert pixels.shape == scene.shape and np.abs(pixels - scene).mean() < 8


def test_damaged_exif_does_not_matter():
    data = picture_file(noise(8, 8), "JPEG", exif=b"Exif\0\0" + b"MM\0\x2a" + b"\xff" * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about the EXIF
        assert decode_image(data).size == (8, 8)


def test_one_pixel():
    image = decode_image(picture_file(np.full((1, 1, 3), 7, np.uint8)))
    values, coords, grid = image_patches(np.asarray(image), ImageConfig(8, 64))
    assert grid == (1, 1) and values.shape == (1, 192) and coords.tolist() == [[0, 0, 0]]
    assert np.allclose(values, 7 / 255 * 2 - 1)


def _png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def _bomb(width: int, height: int) -> bytes:
    rows = zlib.compress(b"\0" * 1000)
    chunk = b"IDAT" + rows
    return _png_header(width, height) + struct.pack(">I", len(rows)) + chunk + struct.pack(">I", zlib.crc32(chunk))


def _webp_header(chunk: bytes, body: bytes) -> bytes:
    content = b"WEBP" + chunk + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(content)) + content


SIZE_13 = (16383 | 16383 << 14).to_bytes(4, "little")


@pytest.mark.parametrize(
    "data",
    [
        _bomb(8001, 8000),
        _bomb(20000, 20000),  # Pillow's own check comes first
        b"GIF89a" + struct.pack("<HH3xcHHHH", 60000, 60000, b"\x2c", 0, 0, 60000, 60000) + b"\0\x02\0\x3b",
        _webp_header(b"VP8X", b"\0\0\0\0" + b"\xff\xff\xff" * 2),
        _webp_header(b"VP8L", b"\x2f" + SIZE_13 + b"\0" * 8),
        _webp_header(b"VP8 ", b"\0\0\0\x9d\x01\x2a" + b"\xff\x3f\xff\x3f" + b"\0" * 8),
        b"BM" + struct.pack("<IHHIIiiHHI", 100, 0, 0, 54, 40, 30000, 30000, 1, 24, 0) + b"\0" * 100,
    ],
)  # fmt: skip
def test_bombs_are_refused_by_their_header(data):
    with pytest.raises(MediaError, match="64000000"):
        decode_image(data)


def test_pixel_and_byte_caps():
    data = picture_file(noise(10, 10))
    assert decode_image(data, Limits(image_pixels=100)).size == (10, 10)
    with pytest.raises(MediaError, match="10 x 10; the limit is 99 pixels"):
        decode_image(data, Limits(image_pixels=99))
    with pytest.raises(MediaError, match=f"{len(data)} bytes; the limit is 50"):
        decode_image(data, Limits(image_bytes=50))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_truncated_at_any_place(kind):
    data = picture_file(noise(24, 24), kind)
    for length in [*range(0, 40), len(data) // 2, len(data) - 40]:
        with pytest.raises(MediaError, match="image"):
            decode_image(data[:length])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        b"#EXTM3U\nhttp://127.0.0.1/",
        b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0" * 40,  # JPEG 2000
        b"II*\0" + b"\0" * 40,  # TIFF
        b"RIFF\x04\0\0\0WEBP",
        _webp_header(b"ABCD", b"\0" * 20),
        _webp_header(b"VP8L", b"\x2f" + b"\xff" * 20),
        _png_header(0, 5),
    ],
)
def test_what_is_no_picture(data):
    with pytest.raises(MediaError, match="image"):
        decode_image(data)


def test_lying_about_the_format():
    for data in (sound_file(tone(0.1)), video_file(2)):
        with pytest.raises(MediaError, match="give one of png"):
            decode_image(data)
    png = picture_file(noise(4, 4))
    assert decode_image(png, mime="IMAGE/PNG; charset=x").size == (4, 4)
    assert decode_image(png, mime="application/octet-stream").size == (4, 4)
    with pytest.raises(MediaError, match="declared image/jpeg but is png"):
        decode_image(png, mime="image/jpeg")
    with pytest.raises(MediaError, match="must be bytes"):
        decode_image("data:image/png;base64,AAAA")  # type: ignore[arg-type]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP"]), st.data())
def test_damage_raises_nothing_else(kind, data):
    file = bytearray(picture_file(noise(12, 12), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(file), Limits(image_pixels=100_000)).mode == "RGB"
    except MediaError:
        pass


@settings(deadline=None, max_examples=400)
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([1, 4, 8, 16]), st.integers(1, 300))
def test_grid_fits_and_keeps_the_aspect(height, width, patch, most):
    rows, cols = fit_grid(height, width, patch, most)
    assert 1 <= rows * cols <= most
    assert rows <= -(-height // patch) and cols <= -(-width // patch)  # enlarged to whole patches only
    # The aspect is off by no more than rounding a side does.
    if rows > 3 and cols > 3:
        assert 0.6 < rows / cols / (height / width) < 1.7


@pytest.mark.parametrize(
    ("size", "grid"),
    [((64, 64), (8, 8)), ((72, 72), (8, 8)), ((1000, 1000), (8, 8)), ((8, 8), (1, 1)), ((5, 3), (1, 1)),
     ((1, 9000), (1, 64)), ((9000, 1), (64, 1)), ((3000, 1000), (14, 4)), ((32, 16), (4, 2)), ((10, 12), (1, 2))],
)  # fmt: skip
def test_grids(size, grid):
    assert fit_grid(*size, 8, 64) == grid


def test_grid_does_not_waste_the_budget():
    assert fit_grid(100, 100, 1, 7) == (2, 3) or fit_grid(100, 100, 1, 7) == (3, 2)
    rows, cols = fit_grid(480, 640, 8, 256)
    assert rows * cols > 230


@pytest.mark.parametrize("shape", [(64, 64), (24, 40), (8, 8), (16, 8)])
def test_the_picture_is_rebuilt_from_its_patches(shape):
    image = noise(*shape)
    values, coords, (rows, cols) = image_patches(image, ImageConfig(8, 64))
    assert (rows * 8, cols * 8) == shape
    assert values.dtype == coords.dtype == np.float32
    assert values.min() >= -1 and values.max() <= 1
    rebuilt = np.zeros((*shape, 3))
    for patch, (time, row, col) in zip(values, coords.astype(int), strict=True):
        assert time == 0
        rebuilt[row * 8 : row * 8 + 8, col * 8 : col * 8 + 8] = patch.reshape(3, 8, 8).transpose(1, 2, 0)
    assert np.allclose(rebuilt, (image / 255 - 0.5) / 0.5, atol=1e-6)
    assert coords[:, 1:].tolist() == [[r, c] for r in range(rows) for c in range(cols)]


def test_shrinking_keeps_the_picture():
    y, x = np.mgrid[0:300, 0:200]
    image = np.stack([y * 255 / 299, x * 255 / 199, np.full_like(y, 90.0)], -1).astype(np.uint8)
    values, _, (rows, cols) = image_patches(image, ImageConfig(4, 24))
    assert (rows, cols) == (6, 4)
    pixels = values.reshape(rows, cols, 3, 4, 4).transpose(0, 3, 1, 4, 2).reshape(24, 16, 3) * 127.5 + 127.5
    assert np.abs(pixels[:, 0, 0] - (np.arange(24) + 0.5) / 24 * 255).max() < 6
    assert np.abs(pixels[0, :, 1] - (np.arange(16) + 0.5) / 16 * 255).max() < 6
    assert np.abs(pixels[..., 2] - 90).max() < 2


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_malformed_arrays(array):
    with pytest.raises(MediaError, match="image: must be uint8"):
        image_patches(array, ImageConfig())
