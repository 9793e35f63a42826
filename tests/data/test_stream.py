"""The stream over files: ordered by the seed, resumed exactly, dealt out to ranks, held to its weights, never stopped
by a bad sample."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fourfold.config_media import MediaConfig
from fourfold.data.corpus import Corpus
from fourfold.data.pack import Lanes, merge
from fourfold.data.records import Reader, Record
from fourfold.data.stream import SourceSpec, Stream, StreamError, open_batches, open_stream, take_bad
from fourfold.model.sequence import Document, Packed
from fourfold.text.tokenizer import Tokenizer

PLAIN = MediaConfig()
WORDS = "rain falls on the old stone bridge while a quick brown fox jumps".split()


def sentence(source: str, shard: int, n: int) -> str:
    rng = np.random.default_rng([len(source), shard, n])
    return f"{source}.{shard}.{n} " + " ".join(rng.choice(WORDS, rng.integers(1, 12)))


def write_jsonl(path: Path, texts: Sequence[str], bad: dict[int, bytes] | None = None) -> None:
    lines = [json.dumps({"text": text}).encode() for text in texts]
    for index, line in (bad or {}).items():
        lines[index] = line
    data = b"\n".join(lines) + b"\n"
    if path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write(data)
        return
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5 shards of JSON lines (plain, gzip, zstd), 3 of Parquet with small row groups, 20 samples each."""
    root = tmp_path_factory.mktemp("data")
    (root / "lines" / "deep").mkdir(parents=True)
    (root / "table").mkdir()
    for shard, name in enumerate(("0.jsonl", "1.jsonl.gz", "2.jsonl.zst", "deep/3.jsonl", "4.jsonl")):
        write_jsonl(root / "lines" / name, [sentence("lines", shard, n) for n in range(20)])
    for shard in range(3):
        table = pa.table({"body": [sentence("table", shard, n) for n in range(20)]})
        pq.write_table(table, root / "table" / f"{shard}.parquet", row_group_size=7)
    return root


def specs(folder: Path, lines: float = 1.0, table: float = 1.0) -> list[SourceSpec]:
    return [
        SourceSpec("jsonl", str(folder / "lines"), lines, name="lines"),
        SourceSpec("parquet", str(folder / "table"), table, name="table", text="body"),
    ]


def names(documents: Sequence[Document], tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(d.tokens.tolist()).split(" ")[0] for d in documents]


def take(stream: Stream, n: int, tokenizer: Tokenizer) -> list[str]:
    return names([next(stream) for _ in range(n)], tokenizer)


def everything(source: str, shards: int) -> Counter[str]:
    return Counter(f"{source}.{shard}.{n}" for shard in range(shards) for n in range(20))


def test_the_order_is_a_function_of_the_seed(folder: Path, tokenizer: Tokenizer) -> None:
    first, again, other = (
        take(open_stream(specs(folder), tokenizer, PLAIN, seed), 300, tokenizer) for seed in (3, 3, 4)
    )
    assert first == again != other
    orders = {tuple(take(open_stream(specs(folder)[:1], tokenizer, PLAIN, seed), 100, tokenizer)) for seed in range(5)}
    assert len(orders) > 1, "not only which source comes next, but which shard"
    lines = [name for name in first if name.startswith("lines")]
    assert Counter(lines[:100]) == everything("lines", 5), "each sample once in an epoch"
    assert lines[:20] != lines[100:120] or lines[20:40] != lines[120:140], "shards are shuffled anew"


@pytest.mark.parametrize("world", (1, 2, 3, 4, 8))
def test_all_ranks_together_read_every_sample_once_an_epoch(folder: Path, tokenizer: Tokenizer, world: int) -> None:
    for source, shards in (("lines", 5), ("table", 3)):
        spec = next(s for s in specs(folder) if s.name == source)
        read: Counter[str] = Counter()
        for rank in range(world):
            stream = open_stream([spec], tokenizer, PLAIN, 1, rank, world)
            one, own = stream.sources[source], Counter()
            while True:
                document = next(stream)
                if one.state()["epoch"] > 0:
                    break
                own.update(names([document], tokenizer))
            assert own and not own & read
            read += own
        assert read == everything(source, shards)


def test_a_stream_goes_on_from_any_point(folder: Path, tokenizer: Tokenizer, corpus: Corpus) -> None:
    mixed = [
        *(replace(spec, long="split") for spec in specs(folder)),
        SourceSpec("skills", str(corpus.root), 0.5, skills={"greeting": 1.0, "arithmetic": 1.0}),
    ]

    def fresh() -> Stream:
        return open_stream(mixed, tokenizer, PLAIN, 7, 1, 2, max_tokens=24)

    stream = fresh()
    states, documents, tickets = [], [], []
    for _ in range(400):
        states.append(json.dumps(stream.state()))
        ticket, document = stream.draw()
        tickets.append(ticket)
        documents.append(document.tokens.tolist())
    assert max(map(len, documents)) <= 24 and any(ticket[-1] for ticket in tickets if len(ticket) > 2), "some are split"
    for point in np.random.default_rng(0).integers(0, 380, 40):
        resumed = fresh()
        resumed.restore(json.loads(states[point]))
        assert [next(resumed).tokens.tolist() for _ in range(15)] == documents[point : point + 15]
    some = np.random.default_rng(1).integers(0, 400, 60)
    again = fresh().again([json.loads(json.dumps(tickets[n])) for n in some])
    assert [d.tokens.tolist() for d in again] == [documents[n] for n in some]


def test_shares_follow_the_weights(folder: Path, tokenizer: Tokenizer) -> None:
    n = 2000
    for rank in range(2):
        stream = open_stream(specs(folder, 3.0, 1.0), tokenizer, PLAIN, 0, rank, 2)
        drawn = Counter(stream.draw()[0][0] for _ in range(n))
        assert abs(drawn["lines"] / n - 0.75) < 4 * np.sqrt(0.75 * 0.25 / n)


def test_a_source_of_no_weight_is_not_looked_at(folder: Path, tokenizer: Tokenizer) -> None:
    absent = SourceSpec("tar", "nowhere", 0.0)
    assert len(take(open_stream([*specs(folder), absent], tokenizer, PLAIN), 5, tokenizer)) == 5


def rows_of(batches: Sequence[Packed], row: int) -> list[list[int]]:
    return [part.tolist() for packed in batches for part in packed.tokens.split(row)]


def test_batches_are_the_same_on_any_number_of_ranks(folder: Path, tokenizer: Tokenizer) -> None:
    def lanes(rank: int = 0, world: int = 1, parts: int = 1) -> Lanes:
        return open_batches(specs(folder), tokenizer, PLAIN, 160, 4, 5, rank, world, parts, waiting=8)

    def run(ranks: list[Lanes], steps: int, parts: int = 1) -> list[list[int]]:
        made = []
        for _ in range(steps):
            for batches in ranks:
                made += rows_of([next(batches) for _ in range(parts)], 160)
        return made

    def carry(ranks: list[Lanes]) -> dict[str, Any]:
        return json.loads(json.dumps(merge(batches.state() for batches in ranks)))

    whole = lanes()
    expected = run([whole], 18)
    two, four = [lanes(rank, 2) for rank in range(2)], [lanes(rank, 4) for rank in range(4)]
    assert run(two, 6) == expected[:24]
    for batches in four:
        batches.restore(carry(two))
    assert run(four, 5) == expected[24:44]
    half = lanes(parts=2)
    half.restore(carry(four))
    assert run([half], 7, 2) == expected[44:72]
    assert merge([half.state()]) == whole.state() and 0.9 < whole.efficiency <= 1
    next(half)
    with pytest.raises(ValueError, match="1 of 2 parts of a batch are out"):
        half.state()
    with pytest.raises(ValueError, match="rows: 4 cannot be divided among 3 ranks"):
        lanes(0, 3)
    with pytest.raises(ValueError, match="lane 0 is not in the state; merge"):
        lanes().restore(two[1].state())


def test_a_change_of_weights_keeps_the_places(folder: Path, tokenizer: Tokenizer) -> None:
    before = open_batches(specs(folder, 1, 0), tokenizer, PLAIN, 160, 2, waiting=4)
    next(before)
    after = open_batches(specs(folder, 1, 1), tokenizer, PLAIN, 160, 2, waiting=4)
    after.restore(before.state(held=False))
    source = after.lanes[0].feed.sources["lines"]  # type: ignore[attr-defined]
    assert source.state() == before.lanes[0].feed.sources["lines"].state()  # type: ignore[attr-defined]
    assert not after.lanes[0].held and len(next(after)) == 320


# ---------------------------------------------------------------- what may be wrong


BAD_LINES = {
    1: (b'{"text": "cut', "is not JSON"),
    2: (b'{"text": ""}', "empty: text is blank"),
    3: (b'{"other": "x"}', "empty: has neither 'text' nor 'messages'"),
    4: (b'["a", "list"]', "is a list, not an object"),
    5: (b"\xff\xfe\x00", "is not JSON|UnicodeDecodeError"),
    6: (json.dumps({"text": "rain " * 300}).encode(), "too long: .* positions, at most 200"),
    7: (b'{"text": "\\ud800"}', "lone surrogates"),
    8: (b'{"text": 7}', "text: is a int, not text"),
    9: (b'{"messages": "hi"}', "messages: must be a list"),
    10: (b'{"messages": [{"role": "king", "content": "hi"}]}', "role: is 'king'"),
    11: (b'{"messages": [{"role": "user", "content": "hi"}]}', "empty: nothing in it is learnt"),
    12: (b"[" * 100_000, "is JSON of too many levels|is not JSON"),
    13: (b'{"text": "x", "images": ["http://a.example/x.png"]}', "model takes only text"),
    14: (b'{"messages": [{"role": "user", "content": [{"type": "cake"}]}]}', "type: is 'cake'"),
    15: (b'{"messages": [null]}', r"messages\[0\]: must be an object"),
    16: (b"NaN", "not an object"),
}


def test_each_bad_line_is_skipped_counted_and_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    texts = [sentence("a", 0, n) for n in range(20)]
    write_jsonl(tmp_path / "a.jsonl", texts, {n: line for n, (line, _) in BAD_LINES.items()})
    stream = open_stream([SourceSpec("jsonl", str(tmp_path), name="a")], tokenizer, PLAIN, max_tokens=200)
    assert take(stream, 4, tokenizer) == ["a.0.0", "a.0.17", "a.0.18", "a.0.19"]
    named = stream.take_bad()
    assert [bad.index for bad in named] == list(BAD_LINES) and stream.bad == {"a": len(BAD_LINES)}
    assert not stream.take_bad()
    for bad in named:
        assert (bad.source, bad.shard) == ("a", "a.jsonl")
        assert re.search(BAD_LINES[bad.index][1], bad.reason), bad
    resumed = open_stream([SourceSpec("jsonl", str(tmp_path), name="a")], tokenizer, PLAIN, max_tokens=200)
    resumed.restore(stream.state())
    assert resumed.bad == stream.bad


def test_all_lanes_name_what_they_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "", "three", "four"])
    batches = open_batches([SourceSpec("jsonl", str(tmp_path))], tokenizer, PLAIN, 32, 2, waiting=2)
    for _ in range(4):
        next(batches)
    named = take_bad(batches)
    assert named and {(bad.shard, bad.index) for bad in named} == {("a.jsonl", 1)} and not take_bad(batches)


def test_a_line_without_end_costs_no_memory(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: Any) -> None:
    monkeypatch.setattr("fourfold.data.sharded.MAX_LINE", 1000)
    monkeypatch.setattr("fourfold.data.sharded.CHUNK", 64)
    write_jsonl(tmp_path / "a.jsonl", ["one", "x" * 5000, "three"])
    stream = open_stream([SourceSpec("jsonl", str(tmp_path))], tokenizer, PLAIN)
    assert take(stream, 2, tokenizer) == ["one", "three"]
    assert "a line of more than 1000 bytes" in stream.take_bad()[0].reason


@pytest.mark.parametrize("name", ("b.jsonl.gz", "b.jsonl.zst", "b.parquet"))
def test_a_broken_shard_is_named_and_the_others_go_on(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    kind = "parquet" if name.endswith("parquet") else "jsonl"
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["whole"]}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"text": ["x" * 9999]}), tmp_path / name)
    else:
        write_jsonl(tmp_path / "a.jsonl", ["whole"])
        write_jsonl(tmp_path / name, [str(np.random.default_rng(n).random(99)) for n in range(99)])
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    stream = open_stream([SourceSpec(kind, str(tmp_path), name="s")], tokenizer, PLAIN, max_tokens=30)
    assert take(stream, 5, tokenizer) == ["whole"] * 5
    errors = [bad for bad in stream.take_bad() if bad.reason.startswith("the rest of the shard")]
    assert errors and {bad.shard for bad in errors} == {name}


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "a.parquet"
    texts = [sentence("a", 0, n) for n in range(30)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle - 20 : middle + 20] = bytes(40)
    path.write_bytes(data)
    stream = open_stream([SourceSpec("parquet", str(path))], tokenizer, PLAIN)
    assert take(stream, 20, tokenizer) == [f"a.0.{n}" for n in (*range(10), *range(20, 30))]
    assert [bad.index for bad in stream.take_bad()] == list(range(10, 20))


def test_a_bomb_is_not_unpacked(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: Any) -> None:
    monkeypatch.setattr("fourfold.data.sharded.EXPANSION_SLACK", 1 << 16)
    write_jsonl(tmp_path / "a.jsonl", ["whole"])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n" * (4 << 20)))
    stream = open_stream([SourceSpec("jsonl", str(tmp_path))], tokenizer, PLAIN)
    assert take(stream, 3, tokenizer) == ["whole"] * 3
    assert any("a bomb" in bad.reason for bad in stream.take_bad())


def test_one_good_sample_is_found_by_every_rank(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", [""] * 9 + ["good"])
    for rank in range(4):
        stream = open_stream([SourceSpec("jsonl", str(tmp_path))], tokenizer, PLAIN, 0, rank, 4)
        assert take(stream, 2, tokenizer) == ["good"] * 2


def test_only_if_all_is_bad_a_run_ends(tmp_path: Path, folder: Path, tokenizer: Tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["", " "])
    bad = SourceSpec("jsonl", str(tmp_path), name="bad")
    stream = open_stream([bad, *specs(folder)], tokenizer, PLAIN)
    assert all(name.startswith(("lines", "table")) for name in take(stream, 50, tokenizer))
    assert stream.state()["dead"] == ["bad"] and stream.bad == {"bad": 2}
    with pytest.raises(StreamError, match=r"not one good sample in any \(2 bad; the last: bad, a.jsonl, 0: .* blank"):
        next(open_stream([bad], tokenizer, PLAIN))


def test_changed_data_is_noticed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    spec = SourceSpec("jsonl", str(tmp_path), name="s")
    stream = open_stream([spec], tokenizer, PLAIN)
    ticket, _ = stream.draw()
    state = stream.state()
    write_jsonl(tmp_path / "a.jsonl", ["", "two"])
    with pytest.raises(StreamError, match=r"s: a.jsonl has changed \(empty"):
        open_stream([spec], tokenizer, PLAIN).again([ticket])
    with pytest.raises(StreamError, match="s: its shards are not those of the state"):
        open_stream([spec], tokenizer, PLAIN).restore(state)


@pytest.mark.parametrize(
    ("fields", "message"),
    (
        ({"kind": "csv", "path": "x"}, "sources.kind: is 'csv'"),
        ({"kind": "jsonl", "path": "x", "weight": -1.0}, "sources.weight: must be >= 0"),
        ({"kind": "jsonl", "path": "x", "weight": float("nan")}, "sources.weight"),
        ({"kind": "jsonl", "path": "x", "long": "cut"}, "sources.long: is 'cut'"),
        ({"kind": "jsonl"}, "sources.path: must be given"),
        ({"kind": "skills"}, "sources.skills"),
        ({"kind": "jsonl", "path": "/nowhere"}, "source jsonl:/nowhere: path: no .jsonl"),
        ({"kind": "jsonl", "path": "x", "weight": 0.0}, "at least one positive weight"),
    ),
)
def test_bad_specs_are_named(fields: dict, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(StreamError, match=message):
        open_stream([SourceSpec(**fields)], tokenizer, PLAIN)


def test_two_sources_need_two_names(folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(StreamError, match="'jsonl:.*' is there twice"):
        open_stream([SourceSpec("jsonl", str(folder))] * 2, tokenizer, PLAIN)


# ---------------------------------------------------------------- records


def test_long_text_is_split_and_every_token_learnt_once(tokenizer: Tokenizer) -> None:
    text = sentence("long", 0, 0) * 20
    whole = Reader(tokenizer, PLAIN, 10**6).documents(Record({"text": text}))[0]
    assert whole.tokens[0] == tokenizer.special("<|bos|>") and whole.tokens[-1] == tokenizer.special("<|eos|>")
    for most in (2, 7, len(whole) - 1, len(whole)):
        pieces = Reader(tokenizer, PLAIN, most, split=True).documents(Record({"text": text}))
        learnt = torch.cat([piece.targets[piece.targets >= 0] for piece in pieces])
        assert max(map(len, pieces)) <= most and torch.equal(learnt, whole.tokens[1:])


def test_conversations_teach_what_the_assistant_says(tokenizer: Tokenizer) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "sum", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "how much"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "two", "tool_call_id": "c"},
        {"role": "assistant", "content": "it is two", "reasoning_content": "I asked"},
    ]
    tools = [{"type": "function", "function": {"name": "sum", "parameters": {}}}]
    (document,) = Reader(tokenizer, PLAIN, 999).documents(Record({"messages": messages, "tools": tools}))
    learnt = tokenizer.decode(document.targets[document.targets >= 0].tolist(), skip_special=False)
    assert learnt == '<tool_call>{"name":"sum","arguments":{"a":1}}</tool_call><|eos|>I asked</think>it is two<|eos|>'
