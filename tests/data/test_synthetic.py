"""Every generated answer is found again by other means than the generator's."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fourfold.data import synthetic
from fourfold.data.augment import paste, shift, vary_cloth, vary_emoji, vary_sound
from fourfold.data.corpus import is_test


def rngs(n: int) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in range(n)]


@pytest.mark.parametrize("split", ("train", "test"))
def test_arithmetic(split: str) -> None:
    for rng in rngs(200):
        problem = synthetic.arithmetic(rng, split, 3)
        assert problem.answer == eval(f"{problem.a}{problem.operator}{problem.b}") >= 0  # noqa: S307
        assert problem.held_out == (split == "test")
        assert (
            synthetic.Problem(problem.b, "+", problem.a).held_out
            == synthetic.Problem(problem.a, "+", problem.b).held_out
        )


def test_one_digit_tables_are_all_trained() -> None:
    assert not any(synthetic.Problem(a, o, b).held_out for o in "+-x" for a in range(10) for b in range(10))
    with pytest.raises(ValueError, match="digits"):
        synthetic.arithmetic(np.random.default_rng(0), "test", 1)


def test_worked_out_columns_are_each_right_and_end_in_the_answer() -> None:
    assert synthetic.work_out(synthetic.Problem(345, "+", 78)) == "5+8+0=13; 4+7+1=12; 3+0+1=4; 423"
    assert synthetic.work_out(synthetic.Problem(52, "-", 17)) == "12-7-0=5; 5-1-1=3; 35"
    for rng in rngs(200):
        problem = synthetic.arithmetic(rng, "train", 3)
        if problem.operator == "x":
            continue
        *columns, last = synthetic.work_out(problem).split("; ")
        assert all(eval(left) == int(right) for left, right in (column.split("=") for column in columns))  # noqa: S307
        digits = "".join(column[-1] for column in reversed(columns))
        carried = "1" if problem.operator == "+" and int(columns[-1].split("=")[1]) > 9 else ""
        assert int(carried + digits) == int(last) == problem.answer


@pytest.mark.parametrize("split", ("train", "test"))
def test_recall_answer_stands_in_the_passage(split: str) -> None:
    for rng in rngs(60):
        passage, question, answer = synthetic.recall(rng, split, 6)
        key = re.search(r"code of (\w+)|does (\w+)", question)
        assert key is not None
        name = key[1] or key[2]
        said = re.findall(rf"(?:code of {name} is|{name} likes) (\w+)\.", passage)
        assert said == [answer] and is_test(passage) == (split == "test")


def test_text_tasks() -> None:
    solve = {
        "reverse": lambda p: p.split(": ")[1][::-1],
        "capitals": lambda p: p.split(": ")[1].upper(),
        "sort": lambda p: " ".join(map(str, sorted(map(int, p.split(": ")[1].split())))),
        "count": lambda p: str(sum(x == p.split()[4] for x in p.split(" in ")[1].strip("?").split())),
        "compare": lambda p: str((max if "bigger" in p else min)(map(int, re.findall(r"\d+", p)))),
        "repeat": lambda p: p.removeprefix("Repeat: "),
        "first_last": lambda p: p.split(": ")[1].strip("?").split()[0 if "first" in p else -1],
        "next": lambda p: str(int(re.findall(r"\d+", p)[0]) + (1 if "after" in p else -1)),
    }
    seen = set()
    for rng in rngs(300):
        name, prompt, answer = synthetic.text_task(rng, "train")
        assert solve[name](prompt) == answer and not is_test(prompt)
        seen.add(name)
    assert seen == set(synthetic.TEXT_TASKS)
    assert all(is_test(synthetic.text_task(rng, "test")[1]) for rng in rngs(20))


def test_shapes_have_their_colours_and_areas() -> None:
    """Each shape's colour covers part of the picture, and shapes apart from each other in number and kind."""
    for rng in rngs(60):
        count = int(rng.integers(1, 5))
        picture, pairs = synthetic.shapes(rng, "train", count)
        assert picture.shape == (48, 48, 3) and len(set(pairs)) == count
        assert not any(synthetic.unseen_pair(*pair) for pair in pairs)
        distance = np.stack([np.abs(picture.astype(int) - np.array(rgb)).sum(-1) for rgb in synthetic.COLOURS.values()])
        near = np.where(distance.min(0) <= 54, distance.argmin(0), -1)  # shades vary by 18 in each channel
        for colour, _ in pairs:
            assert (near == list(synthetic.COLOURS).index(colour)).sum() >= 10, colour


@pytest.mark.parametrize(
    ("kind", "low", "high"), (("circle", 0.74, 0.82), ("square", 0.95, 1.0), ("cross", 0.45, 0.65), ("star", 0.2, 0.45))
)
def test_shape_fills_its_box_as_geometry_says(kind: str, low: float, high: float) -> None:
    for rng in rngs(300):
        picture, pairs = synthetic.shapes(rng, "train", 1, 64)
        if pairs[0][1] == kind:
            inside = np.abs(picture.astype(int) - picture[0, 0]).sum(-1) > 60
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            assert low <= inside.sum() / ((np.ptp(rows) + 1) * (np.ptp(columns) + 1)) <= high


def test_unseen_pairs_exist_and_are_drawn_in_tests_only() -> None:
    unseen = [(c, s) for c in synthetic.COLOURS for s in synthetic.SHAPES if synthetic.unseen_pair(c, s)]
    assert 2 <= len(unseen) <= 10
    for rng in rngs(20):
        assert any(synthetic.unseen_pair(*pair) for pair in synthetic.shapes(rng, "test", 2)[1])


def test_motion_goes_where_it_says_and_its_first_frame_does_not_tell() -> None:
    sprite = np.full((48, 48, 4), 255, np.uint8)
    starts = {name: [] for name in synthetic.DIRECTIONS}
    for name, (down, right) in synthetic.DIRECTIONS.items():
        for rng in rngs(120):
            clip = synthetic.motion(rng, sprite, name).astype(int)
            assert clip.shape == (8, 32, 32, 3)
            white = (clip == 255).all(-1)
            centres = [np.argwhere(frame).mean(0) for frame in white[:3]]
            moved = centres[2] - centres[0]
            if not (white[:3, 0].any() or white[:3, -1].any() or white[:3, :, 0].any() or white[:3, :, -1].any()):
                assert moved @ np.array([down, right]) >= 1 and abs(moved @ np.array([right, down])) <= 1.5
            starts[name].append(centres[0])
    means = np.array([np.mean(points, 0) for points in starts.values()])
    assert np.ptp(means, axis=0).max() < 1.5, "where a clip starts must not depend on where it goes"


def test_tones_have_the_pitch_they_claim() -> None:
    def pitch(wave: np.ndarray) -> float:
        return float(np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 16384)).argmax()) * 16000 / 16384

    for rng in rngs(30):
        for kind in synthetic.TONES:
            wave = synthetic.tone(rng, kind)
            first, last = pitch(wave[: len(wave) // 4]), pitch(wave[-len(wave) // 4 :])
            if kind in ("high", "low"):
                assert (first > 1150) == (kind == "high") and abs(first - last) < 20
            else:
                assert (last > 1.15 * first) == (kind == "rising")


def test_beeps_are_as_many_as_asked() -> None:
    for rng in rngs(20):
        for count in (1, 2, 3, 4):
            loud = np.convolve(np.abs(synthetic.beeps(rng, count)), np.ones(400) / 400, "same") > 0.05
            assert (np.diff(loud.astype(int)) == 1).sum() == count


def test_paste_composites_and_places() -> None:
    rgba = np.zeros((48, 48, 4), np.uint8)
    assert (paste(rgba, 32) == 255).all()
    rgba[..., 3], rgba[..., 0] = 255, 200
    picture = paste(rgba, 32, 0.5, (0, 1))
    assert (picture[:16, 16:] == [200, 0, 0]).all() and (picture[16:] == 255).all() and (picture[:, :16] == 255).all()


def test_variations_keep_shape_and_type() -> None:
    for rng in rngs(20):
        assert vary_emoji(rng, np.zeros((48, 48, 4), np.uint8)).shape[0] in (32, 48, 64)
        cloth = vary_cloth(rng, np.full((28, 28), 9, np.uint8))
        assert cloth.dtype == np.uint8 and cloth.shape in ((28, 28, 3), (56, 56, 3))
        wave = vary_sound(rng, np.sin(np.arange(8000)).astype(np.float32))
        assert wave.dtype == np.float32 and np.isfinite(wave).all() and np.abs(wave).max() <= 1
        assert 8000 / 1.14 < len(wave) < 8000 / 0.86 + 2 * 0.12 * 16000 + 2


def test_shift_moves_by_whole_pixels() -> None:
    picture = np.zeros((28, 28), np.uint8)
    picture[14, 14] = 7
    for rng in rngs(30):
        moved = shift(rng, picture)
        assert moved.sum() == 7 and np.abs(np.argwhere(moved)[0] - 14).max() <= 2
