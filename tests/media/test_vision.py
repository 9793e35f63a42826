"""Preprocessing for a model with an image tower."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fourfold.config_media import AudioConfig, ImageConfig, MediaConfig, VisionConfig
from fourfold.fields import ConfigError
from fourfold.media.limits import MediaError
from fourfold.media.processor import DocumentBuilder
from fourfold.media.vision import fit_sides, image_tokens, place_on_grey, vision_patches
from fourfold.model.sequence import END, IMAGE, NEWLINE, NO_MARK, START, TEXT

V41 = VisionConfig()  # the released values
SMALL = VisionConfig(patch_size=2, max_image_tokens=22, min_pixels=64, image_token_id=9)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("size", "sides"),
    [
        ((544, 544), (546, 546)),  # 39 patches on a side
        ((600, 800), (602, 812)),
        ((272, 272), (546, 546)),  # half the smallest side: grows to 544
        ((100, 400), (280, 1092)),  # to 272 x 1088
        ((1, 1), (546, 546)),
        ((22, 20), (574, 518)),
        ((20, 22), (518, 574)),  # to 518.7 x 570.6, fractions dropped before whole patches are made
    ],
)
def test_small_pictures_grow_and_sides_are_whole_patches(size, sides):
    assert fit_sides(*size, V41) == sides


def test_large_pictures_shrink_to_the_limit():
    # sqrt(1022 + 1/4) - 1/2 = 31.47: at most 31 x 31 tokens of 42 pixels
    assert fit_sides(4000, 4000, V41) == (31 * 42, 31 * 42)
    assert image_tokens(31, 31) == 994 <= 1024 < image_tokens(32, 32)
    # r = 2: w = sqrt(511 + 1/4) - 1/2 = 22.11, h = 44.2; both floors keep the aspect
    assert fit_sides(6000, 3000, V41) == (44 * 42, 22 * 42)
    # r = 1/2: w = 44.71, h = 22.36; 22 rows keep 44 columns
    assert fit_sides(3000, 6000, V41) == (22 * 42, 44 * 42)
    # r = 3/4: w = 36.42, h = 27.3; 36 columns would give 27 rows
    assert fit_sides(3000, 4000, V41) == (27 * 42, 36 * 42)
    # r = 2/3: w = 38.66, h = 25.77; 25 rows give 37.5 columns: 112 patches
    assert fit_sides(4000, 6000, V41) == (25 * 42, 112 * 14)


def test_needles_keep_one_token_across():
    assert fit_sides(100_000, 2, V41) == (511 * 42, 42)
    assert fit_sides(2, 100_000, V41) == (42, 1021 * 42)
    assert image_tokens(511, 1) == 1024 == image_tokens(1, 1021)
    for size in ((100_000, 1), (1, 100_000)):
        values, coords, grid = vision_patches(picture(*size), V41)
        assert len(values) == grid[0] * grid[1] and image_tokens(*grid) <= 1024


@given(
    height=st.integers(1, 20_000),
    width=st.integers(1, 20_000),
    patch=st.integers(1, 16),
    downsample=st.integers(1, 4),
    most=st.integers(4, 1200),
    least=st.integers(1, 400_000),
)
@settings(max_examples=300, deadline=None)
def test_every_picture_fits(height, width, patch, downsample, most, least):
    cfg = VisionConfig(patch_size=patch, downsample=downsample, max_image_tokens=most, min_pixels=least)
    tall, wide = fit_sides(height, width, cfg)
    assert tall >= patch and wide >= patch and tall % patch == wide % patch == 0
    assert image_tokens(*(math.ceil(side / (patch * downsample)) for side in (tall, wide))) <= most


@pytest.mark.parametrize(
    ("size", "sides"), [((30, 50), (40, 40)), ((50, 30), (40, 60)), ((20, 20), (20, 40)), ((7, 9), (14, 18))]
)
def test_a_picture_stands_in_the_middle_of_grey(size, sides):
    """As Pillow's pad does it."""
    image = picture(*size)
    wanted = ImageOps.pad(Image.fromarray(image), sides[::-1], color=(127, 127, 127))
    np.testing.assert_array_equal(place_on_grey(image, *sides), np.asarray(wanted))


def test_pixels_of_a_token():
    """Of each patch of the token, row by row: all of red, then green, then blue."""
    cfg = VisionConfig(patch_size=2, downsample=3, max_image_tokens=50, min_pixels=1)
    image = picture(8, 14)  # 4 x 7 patches: 2 x 3 tokens
    values, coords, grid = vision_patches(image, cfg)
    assert grid == (2, 3) and values.shape == (6, 108) and values.dtype == coords.dtype == np.float32
    assert coords.tolist() == [[4, 7, n] for n in range(6)]
    pixels = image.astype(np.float64) / 127.5 - 1
    for token in range(6):
        for place in range(9):
            row, column = token // 3 * 3 + place // 3, token % 3 * 3 + place % 3
            patch = values[token, place * 12 : (place + 1) * 12]
            wanted = pixels[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].transpose(2, 0, 1).reshape(-1)
            np.testing.assert_allclose(patch, wanted if len(wanted) else np.zeros(12), atol=1e-6)


@pytest.mark.parametrize(
    "bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_what_is_no_picture_is_refused(bad):
    with pytest.raises(MediaError, match="image: must be uint8"):
        vision_patches(bad, SMALL)


def test_layout_of_a_document():
    builder = DocumentBuilder(MediaConfig(vision=SMALL), tokenizer=None)
    builder.text([5, 6])
    builder.image(picture(12, 18))  # 2 x 3 tokens
    builder.text([7], learn=True)
    builder.image(picture(10, 10))  # 2 x 2 tokens
    document = builder.build()
    row = [NO_MARK] * 3 + [NEWLINE]
    small = [NO_MARK] * 2 + [NEWLINE]
    assert document.marks.tolist() == [0, 0, START, *row, *row, END, 0, START, *small, *small, END]
    assert document.modality.tolist() == [TEXT] * 2 + [IMAGE] * 10 + [TEXT] + [IMAGE] * 8
    assert document.tokens.tolist() == [5, 6] + [9] * 10 + [7] + [9] * 8
    assert document.targets[11] == 7 and (document.targets != -100).sum() == 1
    patches = document.patches["image"]
    assert patches.index.tolist() == [3, 4, 5, 7, 8, 9, 14, 15, 17, 18]
    assert patches.coords.tolist() == [[6, 9, n] for n in range(6)] + [[5, 5, n] for n in range(4)]


def test_a_tower_beside_other_media():
    class Tokenizer:
        def special(self, name: str) -> int:
            return {"<|audio|>": 3}[name]  # asked for no other

    config = MediaConfig(vision=SMALL, audio=AudioConfig())
    builder = DocumentBuilder(config, Tokenizer())
    builder.audio(np.zeros(1600, np.float32))
    builder.image(picture(12, 12))
    assert set(builder.build().patches) == {"audio", "image"}
    with pytest.raises(MediaError, match="video: the model takes no video"):
        builder.video(np.zeros((1, 8, 8, 3), np.uint8), np.zeros(1))
    with pytest.raises(ConfigError, match="media.vision"):
        MediaConfig(vision=SMALL, image=ImageConfig())
