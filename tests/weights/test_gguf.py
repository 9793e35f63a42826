"""GGUF files: what is read is what the file says, and a file that is not whole or not sane is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind

from fourfold.weights.gguf import GgufFile
from fourfold.weights.tensors import CheckpointError
from tests.weights import gguf_files

ALL_KINDS = (*gguf_files.WRITABLE, *gguf_files.READABLE, Kind.MXFP4, Kind.TQ1_0, Kind.TQ2_0)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Kind]] | None = None, **fields: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        writer.add_key_value(name, value, kind_of(value))
    for name, (values, kind) in (tensors or {}).items():
        writer.add_tensor(name, values, raw_dtype=kind)
    gguf_files.finish(writer)
    return path


def kind_of(value: Any) -> gguf.GGUFValueType:
    return gguf.GGUFValueType.get_type(value)


def small(path: Path) -> Path:
    first, second = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones(40, dtype=np.float32)
    return write(path, {"first": (first, Kind.F32), "second": (second, Kind.F32)}, number=3, text="a", flag=True)


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def tensor(name: str = "t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(body: bytes = b"", tensors: int = 0, fields: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, fields) + body


def field(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def refused(path: Path, raw: bytes, *words: str) -> None:
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as caught:
        GgufFile(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind.name)
def test_values_of_every_type_are_those_of_the_library(tmp_path: Path, kind: Kind) -> None:
    values = torch.randn(5, 2 * max(256, GGML_QUANT_SIZES[kind][0]), generator=torch.Generator().manual_seed(0))
    raw, held = gguf_files.quantized(values, kind, np.random.default_rng(0))
    file = GgufFile(write(tmp_path / "a.gguf", {"filler": (np.ones(3, np.float32), Kind.F32), "t": (raw, kind)}))
    assert (file.names(), file.shape("t"), file.dtype("t")) == (["filler", "t"], tuple(values.shape), kind.name)
    got = file.read("t")
    assert got.dtype == torch.float32 and got.isfinite().all()
    torch.testing.assert_close(got, held, rtol=0, atol=0)
    torch.testing.assert_close(file.read_rows("t", 1, 4), held[1:4], rtol=0, atol=0)
    assert file.read_rows("t", 2, 2).shape == (0, values.shape[1])
    file.release("t")
    torch.testing.assert_close(file.read("t"), held, rtol=0, atol=0)
    if kind in gguf_files.WRITABLE:
        assert (held - values).abs().max() < 0.4


def test_stacks_are_read_by_rows_of_all_matrices(tmp_path: Path) -> None:
    values = torch.randn(3, 4, 32)
    raw, held = gguf_files.quantized(values, Kind.Q8_0, np.random.default_rng(0))
    file = GgufFile(write(tmp_path / "a.gguf", {"t": (raw, Kind.Q8_0)}))
    torch.testing.assert_close(file.read("t"), held, rtol=0, atol=0)
    torch.testing.assert_close(file.read_rows("t", 3, 9), held.flatten(0, 1)[3:9], rtol=0, atol=0)
    with pytest.raises(IndexError, match="rows 3..13 of 12"):
        file.read_rows("t", 3, 13)


def test_large_tensors_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(7, 32)
    raw, held = gguf_files.quantized(values, Kind.Q4_0, np.random.default_rng(0))
    file = GgufFile(write(tmp_path / "a.gguf", {"t": (raw, Kind.Q4_0)}))
    monkeypatch.setattr("fourfold.weights.gguf.CHUNK", 70)
    torch.testing.assert_close(file.read("t"), held, rtol=0, atol=0)


def test_metadata_of_every_type(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    V = gguf.GGUFValueType
    values = {
        V.UINT8: 255, V.INT8: -5, V.UINT16: 65535, V.INT16: -300, V.UINT32: 1 << 31, V.INT32: -(1 << 30),
        V.UINT64: 1 << 60, V.INT64: -(1 << 60), V.FLOAT64: 0.1, V.BOOL: True, V.STRING: "ä\n",
    }  # fmt: skip
    for kind, value in values.items():
        writer.add_key_value(kind.name, value, kind)
    writer.add_float32("FLOAT32", 1e-6)
    writer.add_array("strings", ["a", "", "ü"])
    writer.add_array("numbers", [1, -2])
    writer.add_array("floats", [0.1, 2.0])
    writer.add_array("flags", [True, False])
    gguf_files.finish(writer)
    found = GgufFile(path).metadata
    assert all(found[kind.name] == value and type(found[kind.name]) is type(value) for kind, value in values.items())
    assert found["FLOAT32"] == 1e-6  # not 9.999999974752427e-07
    assert (found["strings"], found["numbers"], found["floats"]) == (["a", "", "ü"], [1, -2], [0.1, 2.0])
    assert found["flags"] == [True, False] and found["general.architecture"] == "llama"


def test_what_is_read_agrees_with_the_reader_of_the_library(tmp_path: Path) -> None:
    path = small(tmp_path / "a.gguf")
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    assert {f.name: f.contents() for f in theirs.fields.values() if not f.name.startswith("GGUF.")} == ours.metadata
    assert sorted(ours.names()) == sorted(t.name for t in theirs.tensors)
    for found in theirs.tensors:
        assert ours.tensors[found.name].offset == found.data_offset and ours.tensors[found.name].size == found.n_bytes
        np.testing.assert_array_equal(ours.read(found.name).numpy(), found.data)


def test_another_alignment(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(256)
    for number in range(3):
        writer.add_tensor(f"t{number}", np.full(5, number, np.float32))
    gguf_files.finish(writer)
    file = GgufFile(tmp_path / "a.gguf")
    assert [int(file.read(f"t{number}")[4]) for number in range(3)] == [0, 1, 2]
    assert all(info.offset % 256 == 0 for info in file.tensors.values())


# ---------------------------------------------------------------- files that are not whole


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = small(tmp_path / "whole.gguf").read_bytes()
    info = GgufFile(tmp_path / "whole.gguf").tensors["second"]
    end = info.offset + info.size
    assert end <= len(whole)
    for length in range(1, end):
        refused(tmp_path / "cut.gguf", whole[:length], *(["truncated", f"offset {length}"] if length >= 8 else []))
    (tmp_path / "cut.gguf").write_bytes(whole[:end])  # padding after the last tensor may be missing
    assert GgufFile(tmp_path / "cut.gguf").read("second").sum() == 40


def test_the_error_names_the_tensor_and_the_offsets(tmp_path: Path) -> None:
    whole = small(tmp_path / "whole.gguf").read_bytes()
    info = GgufFile(tmp_path / "whole.gguf").tensors["second"]
    cut = info.offset + 10
    refused(
        tmp_path / "cut.gguf",
        whole[:cut],
        f"the file ends at offset {cut}, second wants offsets {info.offset} to {info.offset + info.size}; "
        f"the whole file has {info.offset + info.size} bytes",
    )


def test_no_file_an_empty_file_and_another_file(tmp_path: Path) -> None:
    refused(tmp_path / "a.gguf", b"", "cannot be read")
    refused(tmp_path / "a.gguf", b"PK\x03\x04 a zip archive, say", "does not begin with those letters")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GgufFile(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GgufFile(tmp_path)


# ---------------------------------------------------------------- headers that are not sane

HUGE = (1 << 64) - 1
HOSTILE = {
    "version 1": (header(version=1), ["version 1", "2 and 3"]),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), ["big-endian"]),
    "tensors without end": (header(tensors=HUGE), ["the number of tensors", str(HUGE)]),
    "fields without end": (header(fields=HUGE), ["the number of metadata fields", str(HUGE)]),
    "a million tensors": (header(bytes(4096), tensors=1_000_000), ["number of tensors", "1000000"]),
    "a name longer than the file": (header(struct.pack("<Q", HUGE) + bytes(64), fields=1), ["metadata field 0"]),
    "a text longer than the file": (header(field("k", 8, struct.pack("<Q", 1 << 40)), fields=1), ["k at offset"]),
    "a list longer than the file": (
        header(field("k", 9, struct.pack("<IQ", 4, 1 << 62)), fields=1),
        ["the length of k", str(1 << 62)],
    ),
    "a list of texts longer than the file": (
        header(field("k", 9, struct.pack("<IQ", 8, 1 << 50)), fields=1),
        ["the length of k"],
    ),
    "lists of lists": (
        header(field("k", 9, struct.pack("<IQ", 9, 1) * 1000), fields=1),
        ["array of the unsupported type 9"],
    ),
    "an unknown type": (header(field("k", 77, bytes(8)), fields=1), ["k at offset", "unknown type 77"]),
    "an unknown type of list": (header(field("k", 9, struct.pack("<IQ", 78, 1)), fields=1), ["unsupported type 78"]),
    "a field twice": (header(field("k", 0, b"1") * 2, fields=2), ["'k' twice"]),
    "a name that is no text": (header(field(b"\xff\xfe", 0, b"1"), fields=1), ["not UTF-8"]),
    "a text that is no text": (header(field("k", 8, string(b"\xc3")), fields=1), ["k at offset", "not UTF-8"]),
    "one part of many": (header(field("split.count", 2, struct.pack("<H", 3)), fields=1), ["one of 3 parts"]),
    "alignment 0": (
        header(field("general.alignment", 4, struct.pack("<I", 0)), fields=1),
        ["general.alignment is 0"],
    ),
    "alignment 3": (header(field("general.alignment", 4, struct.pack("<I", 3)), fields=1), ["power of two"]),
    "alignment as a text": (header(field("general.alignment", 8, string("32")), fields=1), ["power of two"]),
    "a tensor twice": (header(tensor() * 2 + bytes(64), tensors=2), ["'t' twice"]),
    "no dimensions": (header(tensor(shape=()) + bytes(64), tensors=1), ["t has 0 dimensions"]),
    "many dimensions": (header(tensor(shape=(1,) * 9) + bytes(64), tensors=1), ["t has 9 dimensions"]),
    "dimensions without end": (
        header(string("t") + struct.pack("<I", 0xFFFFFFFF) + bytes(64), tensors=1),
        ["t has 4294967295 dimensions"],
    ),
    "an empty tensor": (header(tensor(shape=(0,)) + bytes(64), tensors=1), ["t has shape [0]"]),
    "an unknown number format": (header(tensor(kind=200) + bytes(64), tensors=1), ["t is of the unknown type 200"]),
    "a format no longer in use": (header(tensor(kind=4) + bytes(64), tensors=1), ["t is of the unknown type 4"]),
    "a format that is never stored": (
        header(tensor(shape=(256,), kind=15) + bytes(512), tensors=1),
        ["t is of type Q8_K", "cannot be dequantised"],
    ),
    "whole numbers": (header(tensor(kind=26) + bytes(64), tensors=1), ["t is of type I32", "cannot be dequantised"]),
    "half a block": (header(tensor(shape=(33,), kind=8) + bytes(64), tensors=1), ["[33]", "multiple of 32"]),
    "a tensor larger than any file": (
        header(tensor(shape=(1 << 63, 1 << 63, 1 << 63, 1 << 63)) + bytes(64), tensors=1),
        ["truncated", "t wants offsets"],
    ),
    "a tensor far away": (header(tensor(offset=HUGE - 31) + bytes(64), tensors=1), ["truncated", "t wants offsets"]),
    "a tensor between": (header(tensor(offset=7) + bytes(128), tensors=1), ["no multiple of 32"]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers(tmp_path: Path, name: str) -> None:
    raw, words = HOSTILE[name]
    refused(tmp_path / "a.gguf", raw, *words)


def test_any_byte_changed_is_read_or_refused(tmp_path: Path) -> None:
    whole = bytearray(small(tmp_path / "whole.gguf").read_bytes())
    end = GgufFile(tmp_path / "whole.gguf").tensors["first"].offset
    path, refusals = tmp_path / "a.gguf", 0
    for at in range(end):
        for value in (0, 0x7F, 0xFF):
            raw = bytearray(whole)
            raw[at] = value
            path.write_bytes(raw)
            try:
                file = GgufFile(path)
                [file.read(name) for name in file.names()]
            except CheckpointError:
                refusals += 1
    assert refusals > end
