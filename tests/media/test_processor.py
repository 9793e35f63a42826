from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.config_media import AudioConfig, ImageConfig, MediaConfig, VideoConfig
from fourfold.media.audio import audio_patches
from fourfold.media.image import image_patches
from fourfold.media.limits import MediaError
from fourfold.media.processor import DocumentBuilder, build_document
from fourfold.media.video import video_patches
from fourfold.model.sequence import AUDIO, END, IGNORE, IMAGE, NEWLINE, NO_MARK, START, TEXT, VIDEO, Document, pack

from .clips import RATE, noise, tone

MEDIA = MediaConfig(
    image=ImageConfig(8, 64), video=VideoConfig(8, 2, 8, 16), audio=AudioConfig(RATE, 16, 4, max_seconds=2.0)
)
IDS = {"<|image|>": 13, "<|video|>": 14, "<|audio|>": 15}


class Specials:
    def special(self, name: str) -> int:
        return IDS[name]


def builder(media: MediaConfig = MEDIA) -> DocumentBuilder:
    return DocumentBuilder(media, Specials())


def runs(document: Document) -> list[tuple[int, int]]:
    """(modality, length) of each stretch of one modality."""
    out: list[list[int]] = []
    for modality in document.modality.tolist():
        if out and out[-1][0] == modality:
            out[-1][1] += 1
        else:
            out.append([modality, 1])
    return [tuple(run) for run in out]


def check(document: Document) -> None:
    """What holds for every document."""
    length = len(document)
    for tensor in (document.tokens, document.modality, document.marks, document.targets):
        assert tensor.dtype == torch.int64 and tensor.shape == (length,)
    names = {IMAGE: "image", VIDEO: "video", AUDIO: "audio"}
    for code, name in names.items():
        bare = torch.nonzero((document.modality == code) & (document.marks == NO_MARK))[:, 0]
        patches = document.patches.get(name)
        assert (patches.index if patches else torch.zeros(0)).tolist() == bare.tolist()
        if patches:
            features = getattr(MEDIA, name).features
            assert patches.index.dtype == torch.int64
            assert patches.values.dtype == patches.coords.dtype == torch.float32
            assert patches.values.shape == (len(bare), features) and patches.coords.shape == (len(bare), 3)
        assert (document.tokens[document.modality == code] == IDS[f"<|{name}|>"]).all()
        inside = document.marks[document.modality == code].tolist()
        assert inside.count(START) == inside.count(END)
    assert (document.marks[document.modality == TEXT] == NO_MARK).all()
    media_next = torch.cat([document.modality[1:] != TEXT, torch.ones(min(length, 1), dtype=torch.bool)])
    assert (document.targets[media_next] == IGNORE).all()


def test_text_targets():
    b = builder()
    b.text([5, 6], learn=False)
    b.text([7, 8], learn=True)
    b.text([9])
    document = b.build()
    check(document)
    assert document.tokens.tolist() == [5, 6, 7, 8, 9]
    assert document.targets.tolist() == [IGNORE, 7, 8, IGNORE, IGNORE]
    assert document.patches == {}


def test_all_learnt_text_is_the_plain_document():
    b = builder()
    b.text([3, 1, 4, 1], learn=True)
    built, plain = b.build(), Document.text([3, 1, 4, 1])
    for name in ("tokens", "modality", "marks", "targets"):
        assert getattr(built, name).tolist() == getattr(plain, name).tolist()


def test_empty():
    assert len(builder().build()) == 0
    b = builder()
    b.text([], learn=True)
    assert len(b.build()) == 0


def test_image_layout():
    image = noise(16, 24)
    b = builder()
    b.text([1])
    b.image(image)
    b.text([2], learn=True)
    document = b.build()
    check(document)
    row = [NO_MARK] * 3 + [NEWLINE]
    assert document.marks.tolist() == [NO_MARK, START, *row, *row, END, NO_MARK]
    assert runs(document) == [(TEXT, 1), (IMAGE, 10), (TEXT, 1)]
    assert document.targets.tolist() == [IGNORE] * 10 + [2, IGNORE]  # END foretells the answer
    values, coords, _ = image_patches(image, MEDIA.image)
    patches = document.patches["image"]
    assert patches.index.tolist() == [2, 3, 4, 6, 7, 8]
    assert (patches.values.numpy() == values).all() and (patches.coords.numpy() == coords).all()


def test_two_images_share_one_patch_table():
    b = builder()
    b.image(noise(8, 8))
    b.text([1, 2])
    b.image(noise(8, 16))
    document = b.build()
    check(document)
    assert document.patches["image"].index.tolist() == [1, 7, 8]


def test_audio_layout():
    wave = tone(0.1)
    b = builder()
    b.audio(wave)
    document = b.build()
    check(document)
    assert document.marks.tolist() == [START, NO_MARK, NO_MARK, NO_MARK, END]
    assert (document.patches["audio"].values.numpy() == audio_patches(wave, MEDIA.audio)[0]).all()


def test_silent_video_layout():
    frames, seconds = np.stack([noise(8, 16)] * 3), np.arange(3.0)
    b = builder()
    b.video(frames, seconds)
    document = b.build()
    check(document)
    assert document.marks.tolist() == [START, 0, 0, NEWLINE, 0, 0, NEWLINE, END]
    values, coords, _ = video_patches(frames, seconds, MEDIA.video)
    assert (document.patches["video"].values.numpy() == values).all()
    assert (document.patches["video"].coords.numpy() == coords).all()


def test_sound_is_interleaved_by_time():
    frames, seconds = np.stack([noise(8, 8)] * 6), np.arange(6) * 0.2  # slices at 0, 0.4, 0.8 s
    wave = tone(1.0)
    b = builder()
    b.video(frames, seconds, wave)
    document = b.build()
    check(document)
    assert runs(document) == [(VIDEO, 3), (AUDIO, 12), (VIDEO, 2), (AUDIO, 12), (VIDEO, 2), (AUDIO, 7), (VIDEO, 1)]
    assert document.marks[-1] == END and document.marks[0] == START
    sound = document.patches["audio"]
    assert (sound.values.numpy() == audio_patches(wave, MEDIA.audio)[0]).all()
    starts = document.patches["video"].coords[:, 0].tolist()
    for index, second in zip(sound.index.tolist(), sound.coords[:, 0].tolist(), strict=True):
        before = [s for i, s in zip(document.patches["video"].index.tolist(), starts, strict=True) if i < index]
        assert before[-1] <= second + 1e-6
        after = starts[len(before) :]
        assert not after or second < after[0]


def test_sound_shorter_than_the_clip():
    frames, seconds = np.stack([noise(8, 8)] * 6), np.arange(6.0)
    b = builder()
    b.video(frames, seconds, tone(0.5))
    document = b.build()
    check(document)
    assert [code for code, _ in runs(document)] == [VIDEO, AUDIO, VIDEO]
    assert document.marks.tolist()[-5:] == [NO_MARK, NEWLINE, NO_MARK, NEWLINE, END]


def test_sound_longer_than_the_model_takes_is_shared_out():
    frames, seconds = np.stack([noise(8, 8)] * 8), np.arange(8.0)  # slices at 0, 2, 4, 6 s
    b = builder()
    b.video(frames, seconds, tone(8.0))
    document = b.build()
    check(document)
    starts = document.patches["audio"].coords[:, 0]
    assert len(starts) == 48  # of 50 tokens in 2 s, 12 to each slice
    assert starts[::12].tolist() == pytest.approx([0, 2, 4, 6], abs=0.021)


def test_empty_sound_is_one_token_of_silence():
    b = builder()
    b.video(noise(8, 8)[None], np.zeros(1), np.zeros(0, np.float32))
    document = b.build()
    check(document)
    assert runs(document) == [(VIDEO, 3), (AUDIO, 3), (VIDEO, 1)]


@pytest.mark.parametrize("name", ["image", "video", "audio"])
def test_a_modality_the_model_lacks(name):
    b = builder(MediaConfig())
    give = {
        "image": lambda: b.image(noise(8, 8)),
        "video": lambda: b.video(noise(8, 8)[None], np.zeros(1)),
        "audio": lambda: b.audio(tone(0.1)),
    }
    with pytest.raises(MediaError, match=f"{name}: the model takes no {name}"):
        give[name]()


def test_sound_of_a_video_for_a_deaf_model():
    b = builder(MediaConfig(video=MEDIA.video))
    with pytest.raises(MediaError, match="audio.*takes: video"):
        b.video(noise(8, 8)[None], np.zeros(1), tone(0.1))


def test_too_long_a_sound():
    with pytest.raises(MediaError, match="limit is 2 s"):
        builder().audio(tone(2.1))


def test_a_refused_piece_leaves_no_trace():
    b = builder()
    b.text([1])
    with pytest.raises(MediaError):
        b.video(noise(8, 8)[None], np.zeros(1), np.array([np.nan], np.float32))
    b.text([2])
    assert b.build().tokens.tolist() == [1, 2]


def test_build_document():
    pieces = [
        SimpleNamespace(ids=[1, 2], learn=False),
        SimpleNamespace(modality="image", value=noise(8, 8)),
        SimpleNamespace(modality="video", value=(noise(8, 8)[None], np.zeros(1), tone(0.04))),
        SimpleNamespace(modality="audio", value=tone(0.04)),
        SimpleNamespace(ids=[3], learn=True),
    ]
    document = build_document(pieces, MEDIA, Specials())
    check(document)
    assert [code for code, _ in runs(document)] == [TEXT, IMAGE, VIDEO, AUDIO, VIDEO, AUDIO, TEXT]
    assert document.targets.tolist()[-2:] == [3, IGNORE]
    with pytest.raises(MediaError, match="smell"):
        build_document([SimpleNamespace(modality="smell", value=None)], MEDIA, Specials())


def test_of_an_encoded_chat():
    from fourfold.text.chat import Media, Message, encode_chat
    from fourfold.text.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["what is this"], 272)
    messages = [Message("user", ["what?", Media("image", noise(8, 8))]), Message("assistant", "noise")]
    document = build_document(encode_chat(messages, tokenizer, add_generation_prompt=False), MEDIA, tokenizer)
    check(document)
    learnt = [t for t in document.targets.tolist() if t != IGNORE]
    assert tokenizer.decode(learnt, skip_special=False) == "noise<|eos|>"


piece = st.one_of(
    st.tuples(st.just("text"), st.lists(st.integers(16, 99), max_size=5), st.booleans()),
    st.tuples(st.just("image"), st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.just("audio"), st.integers(0, 4000), st.none()),
    st.tuples(st.just("video"), st.integers(1, 10), st.one_of(st.none(), st.integers(0, 40_000))),
)


@settings(deadline=None, max_examples=80)
@given(st.lists(piece, max_size=5))
def test_any_document_keeps_its_rules(pieces):
    b = builder()
    learnt: list[int] = []
    position = 0
    for kind, first, second in pieces:
        if kind == "text":
            b.text(first, second)
            learnt += first[0 if position else 1 :] if second else []
        elif kind == "image":
            b.image(noise(first, second))
        elif kind == "audio":
            b.audio(tone(first / RATE))
        else:
            b.video(
                np.stack([noise(9, 9)] * first), np.arange(first) * 0.3, None if second is None else tone(second / RATE)
            )
        position = len(b.build())
    document = b.build()
    check(document)
    assert [t for t in document.targets.tolist() if t != IGNORE] == learnt
    if len(document):
        half = len(document) // 2
        packed = pack([document, document.slice(half, len(document))])
        assert len(packed) == 2 * len(document) - half
