import numpy as np
import pytest
import torch

from fourfold.media.limits import MediaError
from fourfold.model.sequence import Document, pack
from fourfold.serve.local import LocalModel, decode_media
from fourfold.serve.request import Delta, Finished
from fourfold.text.chat import Media, Message
from fourfold.weights.checkpoint import save_model
from tests.api.media import mp4, png, wav


@pytest.fixture
def local(model, tokenizer):
    local = LocalModel(model, tokenizer)
    yield local
    local.close()


def test_generate_whole_and_in_pieces(local):
    whole = local.generate("hello", max_tokens=8)
    assert isinstance(whole, str)
    assert "".join(local.generate("hello", max_tokens=8, stream=True)) == whole
    assert local.generate([Message("user", "hello")], max_tokens=8) == whole


def test_media_from_files_bytes_and_arrays(local, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    plain = local.generate("what is it?", max_tokens=8)
    answers = {
        local.generate("what is it?", images=[source], max_tokens=8)
        for source in (tmp_path / "a.png", str(tmp_path / "a.png"), png(), np.full((9, 12, 3), (220, 40, 40), np.uint8))
    }
    assert len(answers) == 1 and answers != {plain}
    *_, finished = local.events("what?", images=[png()], audios=[wav()], videos=[mp4()], max_tokens=1)
    assert min(finished.usage.image_tokens, finished.usage.audio_tokens, finished.usage.video_tokens) > 3


def test_events_tell_reasoning_and_usage(local):
    *deltas, finished = local.events("hello", max_tokens=30, thinking=True, temperature=1.0, seed=1)
    assert isinstance(finished, Finished) and finished.usage.reasoning_tokens > 0
    assert all(isinstance(d, Delta) for d in deltas) and deltas[0].kind == "reasoning"


def test_a_stream_that_is_left_is_cancelled(local):
    stream = local.generate("hello", max_tokens=400, temperature=1.0, seed=2, stream=True)
    next(stream)
    stream.close()
    assert local.generate("hello", max_tokens=2) is not None
    assert local.engine.stats()["waiting"] == 0


def test_media_beside_messages_are_refused(local):
    with pytest.raises(ValueError, match="content of the messages"):
        local.generate([Message("user", [Media("image", np.zeros((8, 8, 3), np.uint8))])], images=[png()])


def test_bad_options_are_refused_at_once(local):
    with pytest.raises(ValueError, match="temperature"):
        local.generate("hello", temperature=-1)
    with pytest.raises(ValueError, match="at most"):
        local.generate("hello", max_tokens=10_000, stream=True)
    with pytest.raises(ValueError, match="dtype.*int8"):
        LocalModel.load("nano", dtype="int8")


def test_load_gives_back_what_was_saved(local, tmp_path):
    save_model(tmp_path / "tiny", local.model, local.tokenizer)
    loaded = LocalModel.load(tmp_path / "tiny")
    assert torch.equal(loaded.logits([0, 4, 20]), local.logits([0, 4, 20]))
    half = LocalModel.load(tmp_path / "tiny", dtype="bf16")
    assert next(half.model.parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="neither bundled"):
        LocalModel.load(tmp_path / "absent")


def test_a_missing_modality_is_refused(local):
    text_only = local.config.replace(**{"media.image": None}).media
    with pytest.raises(MediaError, match="takes only text, video, audio"):
        decode_media("image", png(), text_only)


def test_logits_are_those_of_the_model(local, model):
    ids = [0, 4, 20, 21, 22]
    logits = local.logits(ids)
    with torch.inference_mode():
        expected = model(pack([Document.text(ids)])).logits
    assert logits.dtype == torch.float32 and logits.shape == (5, model.cfg.vocab_size)
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("ids", [[], [0, 99_999], [-1], [5] * 513])
def test_logits_refuse_what_is_no_sequence(local, ids):
    with pytest.raises(ValueError, match="ids"):
        local.logits(ids)
