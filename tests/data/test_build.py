"""Fetching, hashing, writing and loading shards, with made-up packages and sources."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fourfold.data import fetch as fetching
from fourfold.data.build import HASHES, RECIPES, Source, build, mismatches
from fourfold.data.corpus import CorpusError, Shard, flatten, is_test, load, read_shard, write_shard
from fourfold.data.fetch import FetchError, fetch, find
from fourfold.data.labels import EMOJI, emoji_names
from fourfold.data.sources import clean_html, clean_rst, read_idx, sha256, shorten
from fourfold.data.voices import RATE, resample, trim


def numbers(cache: Path) -> Shard:
    return Shard(
        "numbers",
        {"values": np.arange(6, dtype=np.int16).reshape(3, 2), "none": np.zeros((0, 4), np.uint8)},
        {"label": np.array(["a", "b", "c"]), "split": np.array(["train", "test", "train"])},
        "made up",
        "A",
        hashes={"numbers/raw": sha256(b"012345")},
    )


def unavailable(cache: Path) -> Shard:
    raise FetchError("apt nothing: apt-get is not on this machine (Debian or Ubuntu only)")


def recipe(make=numbers, version: int = 1) -> dict:
    return {"tiny": {"numbers": Source(make, "counting", version)}}


@pytest.fixture(autouse=True)
def data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURFOLD_DATA", str(tmp_path / "data"))


def test_build_then_load_gives_the_same_arrays_mapped(tmp_path: Path) -> None:
    report = build("tiny", tmp_path / "out", lambda line: None, recipe(), {})
    assert report.shards == ["numbers"] and not report.missing and not report.mismatched
    shard = load(tmp_path / "out")["numbers"]
    assert isinstance(shard.arrays["values"], np.memmap)
    np.testing.assert_array_equal(shard.arrays["values"], [[0, 1], [2, 3], [4, 5]])
    assert shard.arrays["none"].shape == (0, 4)
    assert shard.rows(split="train").tolist() == [0, 2] and shard.rows(split="train", label="c").tolist() == [2]
    assert (shard.tier, shard.licence) == ("A", "made up")


def test_what_is_built_is_not_built_again_unless_its_version_grows(tmp_path: Path) -> None:
    calls = []

    def counted(cache: Path) -> Shard:
        calls.append(cache)
        return numbers(cache)

    for version in (1, 1, 2):
        build("tiny", tmp_path, lambda line: None, recipe(counted, version), {})
    assert len(calls) == 2


def test_missing_package_costs_its_shard_and_says_which_skill(tmp_path: Path) -> None:
    lines: list[str] = []
    both = {"tiny": {"gone": Source(unavailable, "flying"), "numbers": Source(numbers, "counting")}}
    report = build("tiny", tmp_path, lines.append, both, {})
    assert report.shards == ["numbers"] and "Debian" in report.missing["gone"]
    assert any("MISSING, so no flying" in line for line in lines)
    with pytest.raises(CorpusError, match="'gone' is not built"):
        load(tmp_path)["gone"]


def test_hash_mismatch_is_named(tmp_path: Path) -> None:
    lines: list[str] = []
    report = build("tiny", tmp_path, lines.append, recipe(), {"numbers/raw": sha256(b"other")})
    assert report.mismatched == ["numbers/raw"] and report.shards == ["numbers"]
    assert any("WARNING" in line and "numbers/raw" in line for line in lines)
    again = build("tiny", tmp_path, lines.append, recipe(), {"numbers/raw": sha256(b"other")})
    assert again.mismatched == ["numbers/raw"], "a shard built earlier must still be warned about"
    assert mismatches({"a": "1", "new": "2"}, {"a": "1"}) == []


def test_recorded_hashes_are_sha256_of_known_shards() -> None:
    table = json.loads(HASHES.read_text())
    assert table and all(len(digest) == 64 for digest in table.values())
    assert {item.split("/")[0] for item in table} == set(RECIPES["smoke"])


def test_interruption_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fails at each of the two renames: afterwards nothing loads, or the complete shard does."""
    real = __import__("os").replace
    for fail_at in (1, 2):
        calls = []

        def replace(source: Path, target: Path, fail_at: int = fail_at, calls: list = calls) -> None:
            calls.append(target)
            if len(calls) == fail_at:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr("fourfold.data.corpus.os.replace", replace)
        with pytest.raises(KeyboardInterrupt):
            write_shard(numbers(tmp_path), tmp_path)
        with pytest.raises(CorpusError, match="nothing is built"):
            load(tmp_path)
    monkeypatch.setattr("fourfold.data.corpus.os.replace", real)
    build("tiny", tmp_path, lambda line: None, recipe(), {})
    assert len(load(tmp_path)["numbers"]) == 3


def test_a_rewrite_that_is_interrupted_does_not_pass_for_the_old_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(numbers(tmp_path), tmp_path)

    def stop(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fourfold.data.corpus.write_atomically", stop)
    with pytest.raises(KeyboardInterrupt):
        write_shard(numbers(tmp_path), tmp_path)
    with pytest.raises(FileNotFoundError):
        read_shard(tmp_path, "numbers")


def test_unknown_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'none' is unknown; choose one of smoke"):
        build("none", tmp_path)


def fake_npm(package: str, download: Path, cache: Path) -> None:
    with tarfile.open(download / "p.tgz", "w:gz") as tar:
        entry = tarfile.TarInfo("package/hello.txt")
        entry.size = 2
        tar.addfile(entry, io.BytesIO(b"hi"))


def test_fetch_unpacks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_npm", fake_npm)
    folder = fetch("npm", "@some/thing@1.0.0", tmp_path)
    assert (folder / "package/hello.txt").read_text() == "hi" and find(folder, "hello.*").name == "hello.txt"
    monkeypatch.setattr(fetching, "_npm", None)  # a second fetch must not ask again
    assert fetch("npm", "@some/thing@1.0.0", tmp_path) == folder
    with pytest.raises(FetchError, match="holds no bye"):
        find(folder, "bye")


def test_two_that_fetch_at_once_get_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(package: str, download: Path, cache: Path) -> None:
        fake_npm(package, download, cache)
        monkeypatch.setattr(fetching, "_npm", fake_npm)
        fetch("npm", package, cache)

    monkeypatch.setattr(fetching, "_npm", overtaken)
    folder = fetch("npm", "thing", tmp_path)
    assert (folder / "package/hello.txt").read_text() == "hi"
    assert list((tmp_path / "npm").iterdir()) == [folder]


def test_failed_fetch_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(package: str, download: Path, cache: Path) -> None:
        (download / "p.tgz").write_bytes(b"not a tar file")

    monkeypatch.setattr(fetching, "_npm", broken)
    with pytest.raises(tarfile.TarError):
        fetch("npm", "thing", tmp_path)
    assert list((tmp_path / "npm").iterdir()) == []


def test_machine_without_apt_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError) as caught:
        fetch("apt", "wordnet-base", tmp_path)
    assert str(caught.value) == "apt wordnet-base: apt-get is not on this machine (Debian or Ubuntu only)"


def test_a_package_cannot_write_outside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evil(package: str, download: Path, cache: Path) -> None:
        with tarfile.open(download / "p.tgz", "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("../../../evil.txt"))

    monkeypatch.setattr(fetching, "_npm", evil)
    with pytest.raises(tarfile.FilterError):
        fetch("npm", "evil", tmp_path / "cache")
    assert not list(tmp_path.rglob("evil.txt"))


def test_split_rule() -> None:
    keys = [f"key{n}" for n in range(5000)]
    share = sum(map(is_test, keys)) / len(keys)
    assert 0.08 < share < 0.12
    # sha1("1f415") = 8b0b..., sha1("dog") = e49512...: the rule is first 8 hex digits mod 10
    assert is_test("dog") == (int("e49512524f47b4138d850c9d9d85972927281da0"[:8], 16) % 10 == 0)


def test_flatten_keeps_every_item_apart() -> None:
    flat, offsets = flatten([np.array([1, 2]), np.array([]), np.array([3])], np.int16)
    assert flat.tolist() == [1, 2, 3] and offsets.tolist() == [0, 2, 2, 3] and flat.dtype == np.int16


def test_idx() -> None:
    data = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, *range(6)])
    np.testing.assert_array_equal(read_idx(data), [[0, 1, 2], [3, 4, 5]])
    with pytest.raises(ValueError, match="idx"):
        read_idx(b"\0\0\x0d\x01" + bytes(8))


def test_cleaners() -> None:
    assert (
        clean_rst("Title\n=====\n\n.. index:: x\n\nSee :func:`~os.path` and ``code``.\n")
        == "Title\n\nSee os.path and code."
    )
    assert clean_html("<p>One <b>two</b></p><script>no()</script><p>three</p>") == "One two\nthree"
    assert shorten("a member (of some kind) of the family; more") == "a member of the family"
    assert shorten("massive carnivorous mammals with " + "long " * 20) == "massive carnivorous mammals"
    assert shorten("word " * 30) == ""


def test_emoji_names_are_distinct() -> None:
    names = [name for name, _ in emoji_names().values()]
    assert len(names) == len(set(names)) and len(names) == sum(len(listed.split(",")) for listed in EMOJI.values())
    assert max(len(name.split()) for name in names) <= 2


@pytest.mark.parametrize("source", (8000, 22050, 24000))
def test_resample_keeps_a_tone(source: int) -> None:
    wave = np.sin(2 * np.pi * 440 * np.arange(source // 2) / source).astype(np.float32)
    expected = np.sin(2 * np.pi * 440 * np.arange(RATE // 2) / RATE)
    np.testing.assert_allclose(resample(wave, source, RATE)[800:-800], expected[800:-800], atol=0.02)


def test_trim_takes_silence_off_both_ends() -> None:
    wave = np.concatenate([np.zeros(4000), 0.3 * np.ones(1600), np.zeros(8000)]).astype(np.float32)
    cut = trim(wave)
    assert cut.dtype == np.int16 and 1600 <= len(cut) <= 1600 + 2 * RATE // 50 and cut.max() == round(0.9 * 32767)
    assert len(trim(np.ones(50000, np.float32))) == 19200
    assert not trim(np.zeros(100, np.float32)).any()
