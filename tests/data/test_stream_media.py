"""Samples with media: tar shards and what they may hide, Parquet with bytes, Hugging Face data sets."""

from __future__ import annotations

import base64
import gzip
import io
import json
import struct
import tarfile
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fourfold.config_media import AudioConfig, MediaConfig
from fourfold.data.pack import merge
from fourfold.data.stream import Bad, SourceSpec, Stream, open_batches, open_stream
from fourfold.text.tokenizer import Tokenizer

Entry = tuple[str, bytes] | tarfile.TarInfo


def picture(shade: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((16, 24, 3), shade, np.uint8)).save(out, kind)
    return out.getvalue()


def sound(samples: int = 800) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes((np.sin(np.arange(samples) / 5) * 9000).astype(np.int16).tobytes())
    return out.getvalue()


def ask(*parts: Any, answer: str = "yes") -> bytes:
    messages = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages}).encode()


def write_tar(path: Path, entries: list[Entry]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
            else:
                member = tarfile.TarInfo(entry[0])
                member.size = len(entry[1])
                archive.addfile(member, io.BytesIO(entry[1]))
    return path


def link(name: str, to: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, to
    return member


def stream_of(path: Path, tokenizer: Tokenizer, media: MediaConfig, **options: Any) -> Stream:
    return open_stream([SourceSpec("tar", str(path), name="tar")], tokenizer, media, **options)


def said(stream: Stream, n: int) -> list[str]:
    documents = [next(stream) for _ in range(n)]
    return [stream.tokenizer.decode(d.targets[d.targets >= 0].tolist()) for d in documents]


def captions(n: int) -> list[Entry]:
    entries: list[Entry] = []
    for i in range(n):
        entries += [(f"d/{i:03}.jpg", picture(i, "JPEG")), (f"d/{i:03}.txt", f"caption {i}".encode())]
    return entries


def test_tar_samples_of_every_modality(tmp_path: Path, tokenizer: Tokenizer, media: MediaConfig) -> None:
    clip = io.BytesIO()
    frames = [Image.fromarray(np.full((16, 16, 3), shade, np.uint8)) for shade in (10, 90, 200)]
    frames[0].save(clip, "GIF", save_all=True, append_images=frames[1:], duration=100)
    both = ask({"type": "image", "image": "0.jpg"}, {"type": "text", "text": "?"}, {"type": "image", "image": "1.jpg"})
    entries: list[Entry] = [
        ("./a/1.txt", b"only words"),
        ("./a/2.png", picture(9)),
        ("./a/2.txt", b"a grey square"),
        ("./a/3.wav", sound()),
        ("./a/3.json", ask({"type": "audio", "audio": "wav"})),
        ("b/3.gif", clip.getvalue()),
        ("b/3.txt", b"it brightens"),
        ("b/4.0.jpg", picture(1, "JPEG")),
        ("b/4.1.jpg", picture(2, "JPEG")),
        ("b/4.json", both),
        ("b/4.pkl", b"\x80\x04never read"),
    ]
    path = write_tar(tmp_path / "a.tar", [link("b", "", tarfile.DIRTYPE), *entries])
    stream = stream_of(path, tokenizer, media)
    documents = [next(stream) for _ in range(5)]
    assert [set(d.patches) for d in documents] == [set(), {"image"}, {"audio"}, {"video"}, {"image"}]
    said_ = [tokenizer.decode(d.targets[d.targets >= 0].tolist()) for d in documents]
    assert said_ == ["only words", "a grey square", "yes", "it brightens", "yes"] and not stream.bad
    assert documents[1].tokens[0] == tokenizer.special("<|bos|>")
    assert float(documents[4].patches["image"].values.max()) < -0.9, "both pictures are the dark ones"


@pytest.mark.parametrize("name", ("a.tar", "a.tar.gz", "a.tgz"))
def test_tar_goes_on_from_any_sample(tmp_path: Path, tokenizer: Tokenizer, media: MediaConfig, name: str) -> None:
    path = write_tar(tmp_path / name, captions(30))
    stream = stream_of(path, tokenizer, media)
    states, tickets, texts = [], [], []
    for _ in range(30):
        states.append(stream.state())
        ticket, document = stream.draw()
        tickets.append(ticket)
        texts.append(tokenizer.decode(document.targets[document.targets >= 0].tolist()))
    assert texts == [f"caption {n}" for n in range(30)]
    for point in (0, 1, 13, 29):
        resumed = stream_of(path, tokenizer, media)
        resumed.restore(states[point])
        assert said(resumed, min(3, 30 - point)) == texts[point : point + 3]
    again = stream_of(path, tokenizer, media).again([tickets[n] for n in (20, 3, 7)])
    assert [tokenizer.decode(d.targets[d.targets >= 0].tolist()) for d in again] == [texts[n] for n in (20, 3, 7)]


def test_packed_media_go_on_as_if_never_stopped(tmp_path: Path, tokenizer: Tokenizer, media: MediaConfig) -> None:
    write_tar(tmp_path / "a.tar", captions(24))
    specs = [SourceSpec("tar", str(tmp_path))]

    def lanes(rank: int = 0, world: int = 1) -> Any:
        return open_batches(specs, tokenizer, media, 96, 2, 0, rank, world, waiting=5)

    whole, pair = lanes(), [lanes(rank, 2) for rank in range(2)]
    for _ in range(4):
        packed, parts = next(whole), [next(one) for one in pair]
        values = np.concatenate([part.patches["image"].values for part in parts])
        assert np.array_equal(packed.patches["image"].values, values)
    resumed = lanes()
    resumed.restore(json.loads(json.dumps(merge(one.state() for one in pair))))
    for _ in range(3):
        expected, found = next(whole), next(resumed)
        assert expected.tokens.equal(found.tokens)
        assert expected.patches["image"].values.equal(found.patches["image"].values)


def bad_samples(tmp_path: Path, tokenizer: Tokenizer, media: MediaConfig, entries: list[Entry]) -> list[Bad]:
    """What is said of a shard whose good samples are the first and the last."""
    around = [("0.txt", b"first"), *entries, ("z.txt", b"last")]
    stream = stream_of(write_tar(tmp_path / "a.tar", around), tokenizer, media)
    assert said(stream, 2) == ["first", "last"]
    return stream.take_bad()


def test_every_bad_tar_sample_is_named(tmp_path: Path, tokenizer: Tokenizer, media: MediaConfig) -> None:
    cut = picture(3)
    cases: list[tuple[list[Entry], str]] = [
        ([("../../up.txt", b"x")], "leads out of the archive"),
        ([("/etc/abs.txt", b"x")], "leads out of the archive"),
        ([("a/../b.txt", b"x")], "leads out of the archive"),
        ([link("sym.txt", "/etc/passwd")], "is a link, a device or sparse"),
        ([link("hard.txt", "0.txt", tarfile.LNKTYPE)], "is a link, a device or sparse"),
        ([link("fifo.txt", "", tarfile.FIFOTYPE)], "is a link, a device or sparse"),
        ([("cut.png", cut[: len(cut) // 2]), ("cut.txt", b"x")], "MediaError: image"),
        ([("not.png", b"<svg/>"), ("not.txt", b"x")], "of no known format"),
        ([("alone.png", picture(3))], "empty: has neither"),
        ([("pickle.pkl", b"\x80\x04")], "empty: has neither"),
        ([("json.json", b"{")], "is not JSON"),
        ([("list.json", b"[1]")], "is a list, not an object"),
        ([("utf.txt", b"\xff")], "UnicodeDecodeError"),
        ([("silent.wav", sound(0)), ("silent.txt", b"x")], "MediaError: audio"),
        ([("long.txt", b"rain " * 5000)], "too long"),
        ([("p.json", ask({"type": "image", "image": "/etc/passwd"}))], "no file of the sample"),
        ([("q.json", ask({"type": "image_url", "image_url": {"url": "https://a.example/b.png"}}))], "no file of the"),
        ([("r.json", ask({"type": "image"}))], "more than the sample has"),
        ([("s.json", ask({"type": "input_audio", "input_audio": {"data": "!!"}}))], "is not base64"),
        ([(f"many.{n}.txt", b"x") for n in range(65)], "64 files"),
    ]
    named = bad_samples(tmp_path, tokenizer, media, [entry for entries, _ in cases for entry in entries])
    assert [bad.index for bad in named] == list(range(1, len(cases) + 1))
    for bad, (_, reason) in zip(named, cases, strict=True):
        assert reason in bad.reason


def test_large_files_are_not_read(
    tmp_path: Path, tokenizer: Tokenizer, media: MediaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fourfold.data.sharded.MAX_GROUP", 50_000)
    (bad,) = bad_samples(tmp_path, tokenizer, media, [("big.txt", b"x" * 60_000)])
    assert "more than 50000 bytes" in bad.reason


def test_a_modality_that_the_model_lacks_is_a_bad_sample(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (bad,) = bad_samples(tmp_path, tokenizer, MediaConfig(audio=AudioConfig()), captions(1))
    assert "image: the model takes only text, audio" in bad.reason


def hostile(kind: str) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        member = tarfile.TarInfo("1.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"good"))
    data = whole.getvalue()[:1024]
    second = bytearray(tarfile.TarInfo("2.txt").tobuf())
    if kind == "garbage":
        return data + b"\x01" * 512
    if kind == "cut":
        member = tarfile.TarInfo("2.txt")
        member.size = 100_000
        return data + member.tobuf() + b"x" * 512
    if kind == "negative":
        second[124:136] = b"\xff" * 8 + struct.pack(">i", -1024)
    if kind == "header":  # a name of half an exabyte
        second[156:157] = tarfile.XHDTYPE
        second[124:136] = b"\x80" + bytes(3) + struct.pack(">q", 1 << 59)
    checksum = 256 + sum(second[:148]) + sum(second[156:])
    second[148:156] = b"%06o\0 " % checksum
    return data + bytes(second)


@pytest.mark.parametrize("kind", ("garbage", "cut", "negative", "header"))
@pytest.mark.parametrize("suffix", (".tar", ".tar.gz"))
def test_a_damaged_tar_costs_what_follows_the_damage(
    tmp_path: Path, tokenizer: Tokenizer, media: MediaConfig, kind: str, suffix: str
) -> None:
    data = hostile(kind)
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(data) if suffix == ".tar.gz" else data)
    stream = stream_of(tmp_path, tokenizer, media)
    assert said(stream, 3) == ["good"] * 3
    assert any(bad.reason.startswith("the rest of the shard") for bad in stream.take_bad())


def test_a_tar_bomb_is_given_up(
    tmp_path: Path, tokenizer: Tokenizer, media: MediaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fourfold.data.sharded.EXPANSION_SLACK", 1 << 16)
    write_tar(tmp_path / "a.tar.gz", [("0.txt", b"good"), ("1.bin", bytes(6 << 20)), ("2.txt", b"never reached")])
    stream = stream_of(tmp_path, tokenizer, media)
    assert said(stream, 2) == ["good"] * 2
    assert any("a bomb" in bad.reason for bad in stream.take_bad())


def test_parquet_and_jsonl_carry_media_as_bytes(tmp_path: Path, tokenizer: Tokenizer, media: MediaConfig) -> None:
    messages = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "grey"}]},
    ]
    images = [{"bytes": picture(7), "path": "/etc/passwd"}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages, "images": images}]), tmp_path / "a.parquet")
    url = "data:image/png;base64," + base64.b64encode(picture(7)).decode()
    spoken = {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound()).decode(), "format": "wav"}}
    line = ask({"type": "image_url", "image_url": {"url": url}}, spoken)
    (tmp_path / "b.jsonl").write_bytes(line)
    specs = [SourceSpec("parquet", str(tmp_path)), SourceSpec("jsonl", str(tmp_path))]
    found = {}
    stream = open_stream(specs, tokenizer, media)
    for _ in range(20):
        ticket, document = stream.draw()
        found[ticket[0].split(":")[0]] = document
    assert set(found["parquet"].patches) == {"image"} and set(found["jsonl"].patches) == {"image", "audio"}
    assert not stream.bad


def test_hugging_face_data_sets(
    tmp_path: Path, tokenizer: Tokenizer, media: MediaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    texts = [f"sample {n}" for n in range(12)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    for half in range(2):
        lines = [json.dumps({"text": text}) for text in texts[half * 6 : half * 6 + 6]]
        (tmp_path / "files" / f"{half}.jsonl").write_text("\n".join(lines))
    for name, first in (("saved", 0), ("files", 0)):
        stream = open_stream([SourceSpec("hf", str(tmp_path / name))], tokenizer, media)
        for _ in range(first + 5):
            next(stream)
        state = json.loads(json.dumps(stream.state()))
        rest = said(stream, 7)
        resumed = open_stream([SourceSpec("hf", str(tmp_path / name))], tokenizer, media)
        resumed.restore(state)
        assert said(resumed, 7) == rest
        assert len(set(rest)) == 7 and set(rest) <= set(texts)
