"""Prefixes on disk: they survive a restart, and no file can do harm."""

import logging
import os
import random

import numpy as np
import pytest
import torch

from fourfold.model.sequence import Document
from fourfold.model.transformer import Model
from fourfold.serve.disk import SUFFIX
from fourfold.serve.engine import Engine
from fourfold.text.chat import Media
from tests.serve.test_engine import answer, ask, request, settle
from tests.serve.test_tails import compressed  # noqa: F401

IDS = [20 + n % 200 for n in range(100)]


@pytest.fixture
def start(model, tokenizer, tmp_path):
    def start(used=model, **options):
        return Engine(used, tokenizer, page_size=8, context_cache=tmp_path / "cache", **options)

    return start


def units(tmp_path):
    return sorted((tmp_path / "cache").glob(f"*{SUFFIX}"))


def ask_ids(engine, ids=IDS, **options):
    return answer(engine, request(Document.text(ids), 6, **options))


def test_a_prefix_survives_a_restart(start, tmp_path):
    with start() as engine:
        cold, end = ask_ids(engine)
        assert end.usage.cached_tokens == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in units(tmp_path))
    with start() as engine:
        assert engine.stats()["disk_pages"] >= 12 and engine.stats()["cached_pages"] == 0
        warm, end = ask_ids(engine)
        assert warm == cold and end.usage.cached_tokens == 96
        assert ask_ids(engine, IDS[:50])[1].usage.cached_tokens == 48  # any page can be the last
        assert ask_ids(engine, salt="ann")[1].usage.cached_tokens == 0
        settle(engine)


def test_the_answer_is_kept_too_and_media_are(start, tokenizer):
    image = Media("image", np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8))
    with start() as engine:
        prompt = ask(engine, "what is it?", image)
        wanted = request(prompt, 40, temperature=1.0, seed=4)
        cold, _ = answer(engine, wanted)
        pages = len(prompt) // 8
    with start() as engine:
        assert engine.stats()["disk_pages"] > pages
        warm, end = answer(engine, wanted)
        assert warm == cold and end.usage.cached_tokens == (len(prompt) - 1) // 8 * 8


def test_tails_survive_as_well(compressed, start):  # noqa: F811
    with start(compressed) as engine:
        cold, _ = ask_ids(engine)
    with start(compressed) as engine:
        warm, end = ask_ids(engine)
        assert warm == cold and end.usage.cached_tokens == 96


def test_what_memory_gives_up_comes_back_from_disk(start, tokenizer, model):
    rng = random.Random(0)
    texts = [[rng.randrange(20, 280) for _ in range(64)] for _ in range(6)]
    with start(pages=16) as engine:
        first = [ask_ids(engine, ids)[0] for ids in texts]
        engine._disk.flush()
        for ids, text in zip(texts, first, strict=True):
            again, end = ask_ids(engine, ids)
            assert again == text and end.usage.cached_tokens == 56
        settle(engine)


def damage_truncate(data):
    return data[: len(data) // 2]


def damage_flip_page(data):
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


def damage_header(data):
    return data[:60] + b"#" + data[61:]


@pytest.mark.parametrize(
    "damage", [damage_truncate, damage_flip_page, damage_header, lambda _: b"", lambda _: os.urandom(300)]
)
def test_a_damaged_unit_is_dropped_with_a_warning_and_recomputed(start, tmp_path, caplog, damage):
    with start() as engine:
        cold, _ = ask_ids(engine)
    victim = max(units(tmp_path), key=lambda path: path.stat().st_size)
    victim.write_bytes(damage(victim.read_bytes()))
    with caplog.at_level(logging.WARNING), start() as engine:
        warm, end = ask_ids(engine)
        assert warm == cold and end.usage.cached_tokens < 96
        assert str(victim) in caplog.text
        engine._disk.flush()
    with start() as engine:
        assert ask_ids(engine)[1].usage.cached_tokens == 96  # it was written again


def test_a_unit_with_another_ones_content_is_dropped(start, tmp_path, caplog):
    with start() as engine:
        ask_ids(engine)
        other, _ = ask_ids(engine, IDS[::-1])
    a, b = (path for path in units(tmp_path) if path.stat().st_size == max(p.stat().st_size for p in units(tmp_path)))
    head = a.read_bytes()[: 44 + int.from_bytes(a.read_bytes()[8:12], "little")]
    rest = b.read_bytes()[44 + int.from_bytes(b.read_bytes()[8:12], "little") :]
    a.write_bytes(head + rest)
    with caplog.at_level(logging.WARNING), start() as engine:
        assert ask_ids(engine, IDS[::-1])[0] == other
        assert ask_ids(engine)[1].usage.cached_tokens in (0, 96)
        assert engine.alive


def test_another_models_pages_are_never_used(start, model, tmp_path):
    torch.manual_seed(5)
    other = Model(model.cfg)
    with start() as engine:
        ask_ids(engine)
    before = units(tmp_path)
    with start(other) as engine:
        assert engine.stats()["disk_pages"] == 0
        assert ask_ids(engine)[1].usage.cached_tokens == 0
    with start() as engine:
        assert ask_ids(engine)[1].usage.cached_tokens == 96
    assert set(before) <= set(units(tmp_path))


def test_pages_keep_their_format_and_those_of_another_are_not_read(start, tmp_path):
    cold = {}
    for numbers in ("int8", "fp8"):
        with start(cache_format=numbers) as engine:
            cold[numbers], end = ask_ids(engine)
            assert end.usage.cached_tokens == 0
            settle(engine)
    with start() as engine:  # in float32
        assert engine.stats()["disk_pages"] == 0
    for numbers in ("fp8", "int8"):
        with start(cache_format=numbers) as engine:
            warm, end = ask_ids(engine)
            assert warm == cold[numbers] and end.usage.cached_tokens == 96


def test_the_quota_holds_and_the_oldest_go_first(start, tmp_path):
    with start() as engine:
        ask_ids(engine)
        engine._disk.flush()
        one = engine.stats()["disk_bytes"]
    quota = int(2.5 * one)
    with start(context_cache_size=quota) as engine:
        for n in range(5):
            ask_ids(engine, IDS[n + 1 :] + IDS[: n + 1])
            engine._disk.flush()
            assert sum(p.stat().st_size for p in units(tmp_path)) == engine.stats()["disk_bytes"] <= quota
        assert ask_ids(engine)[1].usage.cached_tokens == 0
    with start(context_cache_size=one // 2) as engine:
        assert engine.stats()["disk_bytes"] <= one // 2


def test_a_full_disk_ends_the_caching_and_not_the_service(start, tmp_path, caplog, monkeypatch):
    with start() as engine:
        cold, _ = ask_ids(engine)
        engine._disk.flush()
        here = len(units(tmp_path))

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.replace", full)
        with caplog.at_level(logging.WARNING):
            for n in range(1, 4):
                ask_ids(engine, IDS[n:])
            engine._disk.flush()
        assert caplog.text.count("No space left") == 1 and str(tmp_path) in caplog.text
        assert len(units(tmp_path)) == here and not list((tmp_path / "cache").glob("*.part"))
        assert ask_ids(engine)[0] == cold


def test_a_file_that_vanishes_is_a_miss(start, tmp_path):
    with start() as engine:
        cold, _ = ask_ids(engine)
    with start() as engine:
        for path in units(tmp_path):
            path.unlink()
        assert ask_ids(engine)[0] == cold


def test_one_engine_at_a_time(start):
    with start(), pytest.raises(ValueError, match="in use by another engine"):
        start()


def test_what_a_killed_engine_left_half_written_goes(start, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x.part").write_bytes(b"half")
    with start():
        assert not list((tmp_path / "cache").glob("*.part"))
