"""The controls of the media suite, on subjects whose behaviour is known."""

import numpy as np
import pytest

from fourfold.data.items import Item, ask
from fourfold.eval import media
from fourfold.text.chat import Media

CHOICES = ("dark", "bright")


def picture(level: int) -> Media:
    return Media("image", np.full((8, 8, 3), level, np.uint8))


ITEMS = [
    Item("light", ask("Is it dark or bright?", picture(level)), CHOICES[level > 128], CHOICES)
    for level in (10, 240) * 8
]


class Seeing:
    """Answers by the mean of the pixels."""

    def answers(self, conversations, thinking, max_tokens):
        images = [media.medium(Item("", list(c), "")).value for c in conversations]
        return [CHOICES[int(image.mean() > 128)] for image in images]


class Blind:
    """Always says the same."""

    def answers(self, conversations, thinking, max_tokens):
        return ["dark"] * len(conversations)


def test_a_subject_that_sees():
    answers = media.answer(Seeing(), ITEMS)
    controls = media.controls(Seeing(), ITEMS, answers)
    assert media.accuracy(ITEMS, answers) == 1
    assert controls == {"blanked": 0.5, "swap_changed": 1.0, "swap_followed": 1.0}


def test_a_subject_that_does_not():
    answers = media.answer(Blind(), ITEMS)
    controls = media.controls(Blind(), ITEMS, answers)
    assert media.accuracy(ITEMS, answers) == 0.5
    assert controls["blanked"] == 0.5 and controls["swap_changed"] == 0


def test_blank_media_keep_their_size_and_show_nothing():
    frames = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    video = media.blank(Media("video", (frames, np.array([0.0, 0.5]), np.ones(100, np.float32))))
    assert video.value[0].shape == frames.shape and np.ptp(video.value[0]) == 0
    assert not video.value[2].any() and len(video.value[2]) == 100
    sound = media.blank(Media("audio", np.ones(50, np.float32)))
    assert len(sound.value) == 50 and not sound.value.any()
    assert media.blank(None) is None


def test_swapped_media_come_from_items_with_another_answer_to_the_same_choices():
    other = Item("size", ask("Small or big?", picture(5)), "small", ("small", "big"))
    items = [*ITEMS[:3], other]
    assert media._donor(items, 0) == 1 and media._donor(items, 1) == 2 and media._donor(items, 2) == 1
    assert media._donor(items, 3) is None


def test_the_question_stays_when_the_medium_is_exchanged():
    changed = media.with_medium(ITEMS[0], picture(99))
    assert changed.messages[-1].content[1:] == ITEMS[0].messages[-1].content[1:]
    assert media.medium(changed).value.max() == 99 and media.medium(ITEMS[0]).value.max() == 10


@pytest.mark.parametrize("share, n", [(0.0, 10), (0.5, 100), (1.0, 3)])
def test_wilson_interval(share, n):
    low, high = media.wilson(share, n)
    assert -1e-9 <= low <= share <= high <= 1 + 1e-9
    z = 1.96
    for p in (low, high):  # the bounds are where the score test is just significant
        assert abs(share - p) == pytest.approx(z * (p * (1 - p) / n) ** 0.5, abs=1e-6)
