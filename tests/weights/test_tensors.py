"""Safetensors files as they come: what is whole is read bit by bit, what is broken is refused with all its faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fourfold.weights.tensors import DTYPES, CheckpointError, SafetensorsReader

INDEX = "model.safetensors.index.json"


def write_raw(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file of this header, whatever it says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def faults(path: Path) -> list[str]:
    with pytest.raises(CheckpointError) as caught:
        SafetensorsReader(path)
    return caught.value.faults


def sample(dtype: torch.dtype) -> Tensor:
    raw = torch.randint(0, 120, (3, 4 * dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return (raw % 2 if dtype is torch.bool else raw).view(dtype)


def test_every_type_is_read_as_it_is_stored(tmp_path):
    stored = {name: sample(dtype) for name, dtype in DTYPES.items()} | {
        "none": torch.empty(0, 3),
        "one": torch.ones(()),
    }
    save_file(stored, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        reader = SafetensorsReader(path)
        assert set(reader.names()) == stored.keys()
        for name, tensor in stored.items():
            got = reader.read(name)
            assert got.dtype is tensor.dtype and got.shape == tensor.shape == reader.shape(name)
            assert DTYPES[reader.dtype(name)] is tensor.dtype
            assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def test_released_pages_are_read_again(tmp_path):
    big = torch.randn(300, 100)
    save_file({"a": torch.ones(3), "big": big}, tmp_path / "model.safetensors")
    reader = SafetensorsReader(tmp_path)
    for _ in range(3):
        assert torch.equal(reader.read("big"), big)
        reader.release("big")
        reader.release("a")


def test_unaligned_tensors_are_read(tmp_path):
    data = b"\x01" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    header = {"b": entry("U8", [1], 0, 1), "f": entry("F32", [2], 1, 9)}
    reader = SafetensorsReader(write_raw(tmp_path / "x.safetensors", header, data))
    assert reader.read("f").tolist() == [1.5, -2.0]


# ---------------------------------------------------------------- broken files

GOOD = entry("F32", [2], 0, 8)
BROKEN = {
    "empty header": (b"", b"", "cannot be read"),
    "no json": (b"{oops", b"", "cannot be read"),
    "deep": (b"[" * 100_000, b"", "cannot be read"),
    "a list": ([1], b"", "the header is no table"),
    "a name twice": (b'{"a": 1, "a": 2}', b"", "a name appears twice"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "a: its entry"),
    "no table": ({"a": 7}, bytes(8), "a: its entry"),
    "unknown dtype": ({"a": GOOD | {"dtype": "F4"}}, bytes(8), "unknown dtype 'F4'"),
    "dtype no text": ({"a": GOOD | {"dtype": [1]}}, bytes(8), "a: its entry"),
    "negative": ({"a": GOOD | {"shape": [-2]}}, bytes(8), "whole numbers"),
    "not whole": ({"a": GOOD | {"shape": [2.0]}}, bytes(8), "whole numbers"),
    "truth": ({"a": GOOD | {"shape": [True, 2]}}, bytes(8), "whole numbers"),
    "huge": ({"a": GOOD | {"shape": [2**62, 2**62]}}, bytes(8), "bytes do not hold"),
    "too short": ({"a": GOOD | {"data_offsets": [0, 4]}}, bytes(8), "4 bytes do not hold F32"),
    "backwards": ({"a": GOOD | {"data_offsets": [8, 0]}}, bytes(8), "bytes do not hold"),
    "three offsets": ({"a": GOOD | {"data_offsets": [0, 4, 8]}}, bytes(8), "a: its entry"),
    "cut off": ({"a": GOOD}, bytes(5), "it is cut off at byte"),
    "a hole": ({"a": GOOD, "b": entry("U8", [1], 9, 10)}, bytes(10), "b starts at byte"),
    "overlap": ({"a": GOOD, "b": entry("U8", [4], 4, 8)}, bytes(8), "b starts at byte"),
    "more at the end": ({"a": GOOD}, bytes(11), "3 bytes after byte"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused(case, tmp_path):
    header, data, said = BROKEN[case]
    path = write_raw(tmp_path / "model.safetensors", header, data)
    assert any(said in fault for fault in faults(path)), faults(path)
    assert all("model.safetensors" in fault for fault in faults(path))


@pytest.mark.parametrize(
    "content", [b"", b"123", b"\xff" * 8, b"\x80\x04pickle" * 9], ids=["none", "3", "ff", "pickle"]
)
def test_a_file_of_something_else_is_refused(content, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert len(faults(tmp_path)) == 1


def test_every_tensor_behind_the_end_is_named(tmp_path):
    save_file({name: torch.ones(500) for name in "abcd"}, tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3000])
    assert [fault.split(";")[1].split()[0] for fault in faults(tmp_path)] == ["c", "d"]


def test_pickles_are_named_and_not_read(tmp_path):
    (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"x")
    (tmp_path / "consolidated.00.pth").write_bytes(b"x")
    (fault,) = faults(tmp_path)
    assert "pytorch_model-00001-of-00002.bin" in fault and "consolidated.00.pth" in fault and "never read" in fault


# ---------------------------------------------------------------- shards


def sharded(tmp_path: Path, **shards: dict[str, Tensor]) -> Path:
    index = {}
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        index |= dict.fromkeys(tensors, f"{name}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return tmp_path


def change_index(directory: Path, **change: str) -> Path:
    values = json.loads((directory / INDEX).read_text())
    values["weight_map"] |= change
    (directory / INDEX).write_text(json.dumps(values))
    return directory


def test_shards_are_one(tmp_path):
    reader = SafetensorsReader(sharded(tmp_path, x={"a": torch.ones(1)}, y={"b": torch.zeros(2)}))
    assert sorted(reader.names()) == ["a", "b"] and reader.read("b").shape == (2,)


def test_links_of_a_cache_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    directory = sharded(tmp_path / "snapshot", x={"a": torch.ones(1)})
    (directory / "x.safetensors").rename(tmp_path / "blobs" / "abc")
    (directory / "x.safetensors").symlink_to("../blobs/abc")
    assert SafetensorsReader(directory).read("a").item() == 1


@pytest.mark.parametrize("outside", ["../y.safetensors", "/y.safetensors", "deep/y.safetensors", "..", "", "a\\b"])
def test_an_index_names_files_of_its_directory_alone(outside, tmp_path):
    (tmp_path / "deep").mkdir()
    for place in (tmp_path, tmp_path / "deep"):
        save_file({"b": torch.ones(1)}, place / "y.safetensors")
    (tmp_path / "model").mkdir()
    directory = change_index(sharded(tmp_path / "model", x={"a": torch.ones(1)}), b=outside)
    assert [repr(outside) in fault and "not the name of a file" in fault for fault in faults(directory)] == [True]


def test_all_faults_of_the_shards_in_one_error(tmp_path):
    directory = sharded(tmp_path, x={"a": torch.ones(1)}, y={"a": torch.ones(1)}, z={"c": torch.ones(9)})
    change_index(directory, d="gone.safetensors", e="weights.bin", a="x.safetensors")
    change_index(directory, f="y.safetensors")
    path = directory / "z.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    found = "; ".join(faults(directory))
    for words in (
        "gone.safetensors is missing",
        "weights.bin",
        "a is in x.safetensors and in y.safetensors",
        "cut off",
    ):
        assert words in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"none": "x.safetensors"}, "none is not in x.safetensors"),
        ({"a": "y.safetensors"}, "a is in x.safetensors, not in y.safetensors"),
    ],
)
def test_the_index_and_its_files_agree(change, said, tmp_path):
    shards = sharded(tmp_path, x={"a": torch.ones(1), "c": torch.ones(1)}, y={"b": torch.ones(1)})
    directory = change_index(shards, **change)
    assert any(said in fault for fault in faults(directory))


def test_a_tensor_that_the_index_forgets_is_a_fault(tmp_path):
    directory = sharded(tmp_path, x={"a": torch.ones(1), "b": torch.ones(1)})
    values = json.loads((directory / INDEX).read_text())
    del values["weight_map"]["b"]
    (directory / INDEX).write_text(json.dumps(values))
    assert any("does not name b" in fault for fault in faults(directory))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 99999])
def test_a_broken_index_is_refused(text, tmp_path):
    sharded(tmp_path, x={"a": torch.ones(1)})
    (tmp_path / INDEX).write_text(text)
    assert any(INDEX in fault for fault in faults(tmp_path))
