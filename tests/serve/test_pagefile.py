"""Pages in a file: what is taken out of memory comes back as it was, and no more stays than was given."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import pytest
import torch

from fourfold import ops
from fourfold.model.cache import Cache, PagePool, SequenceState, layout
from fourfold.model.sequence import Document, pack
from fourfold.serve.engine import Engine
from fourfold.serve.memory import MemoryTooSmall, make_budget, size
from fourfold.serve.pagefile import PageFile, resident_bytes, spans
from fourfold.serve.request import RequestError
from tests.model import tiny
from tests.model.test_formats import SHAPES
from tests.serve.test_engine import answer, request, settle

# A page must be larger than the system's for eviction to mean anything: the latents are made wide.
WIDE = {"attention.kv_lora_rank": 300, "hidden_size": 32}
BLOCKS = SHAPES["two levels"] | WIDE


def pools(cfg, tmp_path, pages, page_size, memory, dtype):
    kept = layout(cfg, dtype=dtype)
    file = PageFile(tmp_path, kept, pages, page_size, memory)
    return PagePool(cfg, pages, page_size, dtype, backing=file), file


@torch.no_grad()
def decode(made, pool, documents, chunks):
    states, out = [SequenceState() for _ in documents], []
    for turn in range(max(map(len, chunks))):
        now = [i for i, c in enumerate(chunks) if turn < len(c)]
        pieces = [documents[i].slice(states[i].length, states[i].length + chunks[i][turn]) for i in now]
        packed = pack(pieces, starts=[states[i].length for i in now])
        out.append(made(packed, cache=Cache(pool, [states[i] for i in now])).logits)
    return out


@pytest.mark.parametrize("dtype", ops.ROW_FORMATS.values(), ids=str)
@pytest.mark.parametrize("shape", ["two levels", "dense", "gqa", "compressed"])
def test_eviction_changes_no_bit(shape, dtype, tmp_path):
    """Greedy tokens follow from logits, and these are the same to the last bit, with room for a page or two."""
    cfg = tiny.config(**SHAPES[shape] | (WIDE if shape in ("two levels", "dense") else {}))
    made, rng = tiny.model(cfg), random.Random(f"{shape} {dtype}")
    documents = [tiny.text(n, seed=n) for n in (70, 41, 9)]
    chunks = [tiny.random_chunks(len(d), rng) for d in documents]
    page_size = 2 * layout(cfg).multiple
    pages = sum(-(-len(d) // page_size) for d in documents)
    cost = max(resident_bytes(stop - start) for start, stop in spans(layout(cfg, dtype=dtype), page_size).values())
    pool, file = pools(cfg, tmp_path, pages, page_size, 3 * cost, dtype)
    file._all = 2**40  # such small pages would fit after all
    got = decode(made, pool, documents, chunks)
    wanted = decode(made, PagePool(cfg, pages, page_size, dtype), documents, chunks)
    assert file.evicted > 50
    for one, want in zip(got, wanted, strict=True):
        assert torch.equal(one, want)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="looked up as Linux tells it")


def mapped() -> int:
    """Bytes of files in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssFile", "RssShmem")))


@needs_proc
def test_no_more_stays_in_memory_than_was_given(tmp_path):
    cfg = tiny.config(**{"attention.kv_lora_rank": 1020, "num_hidden_layers": 2})
    kept, pages, memory = layout(cfg), 400, 2**24
    file = PageFile(tmp_path, kept, pages, 16, memory)
    pool = PagePool(cfg, pages, 16, backing=file)
    assert pool.data.nbytes > 3 * memory
    before, rng = mapped(), random.Random(0)
    wanted = torch.rand(2, pages)
    for layer in range(2):
        for page in range(pages):
            pool.use(f"layers.{layer}.kv", torch.tensor([page]))
            pool.view(f"layers.{layer}.kv")[page] = wanted[layer, page]
            assert file.resident <= memory
    assert mapped() - before <= memory + 2**20
    for _ in range(300):  # everything is there still, in whatever order it is wanted
        layer, some = rng.randrange(2), torch.tensor([rng.randrange(pages) for _ in range(9)])
        pool.use(f"layers.{layer}.kv", some)
        assert (pool.view(f"layers.{layer}.kv")[some] == wanted[layer, some][:, None, None]).all()
        assert file.resident <= memory and mapped() - before <= memory + 2**20


def test_the_least_recently_used_goes(tmp_path):
    cfg = tiny.config(**{"attention.kv_lora_rank": 1020, "num_hidden_layers": 1})
    cost = resident_bytes(16 * 1024 * 4)
    pool, file = pools(cfg, tmp_path, 8, 16, 4 * cost, torch.float32)
    for page in (0, 1, 2, 3, 0, 4):
        pool.use("layers.0.kv", torch.tensor([page]))
    assert file._used[0].nonzero()[0].tolist() == [0, 3, 4] and file.resident == 3 * cost  # an eighth more than must be
    pool.use_all([5])
    assert file._used[0].nonzero()[0].tolist() == [0, 3, 4, 5]
    pool.use("layers.0.kv", torch.arange(8))  # what one step needs is there, whatever was given
    assert file.resident == 8 * cost


@needs_proc
def test_the_file_has_no_name_and_goes(tmp_path):
    pool, file = pools(tiny.config(), tmp_path, 100, 16, 2**20, torch.float32)
    assert list(tmp_path.iterdir()) == []
    assert holds(tmp_path)
    del pool, file
    gc.collect()
    assert not holds(tmp_path)


def holds(folder):
    """Whether this process has a file of the folder open or mapped, with a name or without."""
    links = [os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()]
    return any(f"{folder}/" in held for held in [*links, Path("/proc/self/maps").read_text()])


def test_a_disk_without_room_is_told_at_once(tmp_path, model, tokenizer, monkeypatch):
    pages = 2**62 // 10**6
    with pytest.raises(OSError, match=f"no room for [0-9]+ bytes of pages.*{tmp_path.name}"):
        PageFile(tmp_path, layout(tiny.config()), pages, 16, 2**20)
    with pytest.raises(MemoryTooSmall, match="context_pages_size: is 1000 B; one page takes"):
        Engine(model, tokenizer, context_pages=tmp_path, context_pages_size=1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Engine(model, tokenizer, context_pages=tmp_path / "file")


def test_a_file_leaves_room_for_more_pages(model):
    def budget(memory, **options):
        return make_budget(model, memory=memory, page_size=64, pages=None, positions=32, sequences=8, **options)

    memory = 2 * 2**20
    inside, outside, wide = budget(memory), budget(memory, file=2**30), budget(None, file=2**30)
    assert inside.pages < outside.pages <= wide.pages == 4 * 512 // 64
    assert outside.total <= memory and outside.cache < outside.pages * outside.page
    assert budget(memory, file=10 * outside.page + 5).pages == 10
    with pytest.raises(MemoryTooSmall, match="are needed at least"):
        budget(2**18, file=2**30)


def test_the_engine_answers_the_same_and_refuses_with_the_numbers(model, tokenizer, tmp_path):
    prompts = [Document.text([20 + (n * k) % 230 for n in range(60)]) for k in (1, 7, 11)]
    with Engine(model, tokenizer, page_size=16, pages=40) as engine:
        wanted = [answer(engine, request(p, 12))[0] for p in prompts]
    with Engine(model, tokenizer, page_size=16, pages=40, context_pages=tmp_path) as engine:
        engine._file.memory, engine._file._all = 40_000, 2**40
        assert [answer(engine, request(p, 12))[0] for p in prompts] == wanted
        settle(engine)
        stats = engine.stats()
        assert stats["evicted_rows"] > 0 and stats["resident_bytes"] <= 40_000 + 5 * resident_bytes(16 * 24 * 4)
        needed, there = size(41 * engine.budget.page), size(40 * engine.budget.page)
        with pytest.raises(RequestError, match=f"prompt.*{needed} needed, {there} available|context holds"):
            engine.submit(request(Document.text([20] * 641), None))
