"""The planner's arithmetic against numbers worked out by hand, and what must hold for any machine."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.config import PRESETS, ModelConfig
from fourfold.counts import cache_bytes_per_sequence, cache_bytes_per_token, weight_bytes
from fourfold.plan import parse_size, plan

GiB = 1024**3
V4 = ModelConfig.preset("v4")
NANO = ModelConfig.preset("nano")
DENSE = ModelConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=2, intermediate_size=128)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1024", 1024),
        ("24GiB", 24 * GiB),
        ("24gib", 24 * GiB),
        ("1.5 TB", 1_500_000_000_000),
        ("512MB", 512_000_000),
        ("3KiB", 3072),
        ("7B", 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "24 gigs", "1e9", "3..4GB", "nan"])
def test_what_is_no_size_is_said_to_be_none(text):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_a_dense_model_in_ram_is_bound_by_reading_it_once():
    found = plan(DENSE, ram=GiB, context=100, ram_bandwidth=1e9)
    embedding = 2 * 1000 * 64
    weights = sum(weight_bytes(DENSE).values()) - embedding + embedding / 1000
    read = weights + 100 * cache_bytes_per_token(DENSE)["total"]
    assert found.fits and found.limited_by == "ram"
    assert found.tokens_per_second == pytest.approx(1e9 / read)


def test_memories_work_at_once_so_the_slowest_decides():
    everything = sum(weight_bytes(DENSE).values())
    half = plan(DENSE, vram=everything // 2, ram=GiB, context=1, vram_bandwidth=1e12, ram_bandwidth=1e9)
    assert half.limited_by == "ram"
    in_ram = sum(part.read * part.placed.get("ram", 0) / part.size for part in half.parts)
    assert half.tokens_per_second == pytest.approx(1e9 / in_ram)


def test_what_is_read_most_lies_fastest():
    found = plan(V4, quant="int4", context=2**20, vram=80 * GiB, ram=512 * GiB, disk=2000 * 10**9)
    where = {part.name: set(part.placed) for part in found.parts}
    assert where["attention"] == where["shared_experts"] == where["cache_indexer"] == {"vram"}
    assert where["cache_attention"] == {"ram"}
    assert "disk" in where["engram_tables"]
    assert found.fits and found.cache_bytes_per_token == 70_272 + 4_096


def test_the_trillion_parameter_model_does_not_fit_a_laptop_and_says_by_how_much():
    found = plan(V4, quant="int4", ram=16 * GiB, disk=256 * 10**9)
    assert not found.fits and found.tokens_per_second is None and found.limited_by is None
    needed = sum(weight_bytes(V4, "int4").values()) + 4096 * cache_bytes_per_token(V4)["total"]
    assert found.missing == needed - 16 * GiB - 256 * 10**9


def test_the_cache_never_rests_on_disk():
    found = plan(NANO, disk=GiB, context=4096)
    assert found.missing == 4096 * cache_bytes_per_token(NANO)["total"]


def test_the_context_rests_on_disk_where_it_may():
    per_token = cache_bytes_per_token(V4)
    room = {"quant": "int4", "context": 2**20, "ram": 600 * GiB, "disk": 10**12}
    needed = sum(weight_bytes(V4, "int4").values()) + 2**20 * per_token["indexer"]
    inside, outside = plan(V4, **room | {"ram": needed}), plan(V4, **room | {"ram": needed}, context_pages=True)
    parts = {part.name: part for part in outside.parts}
    assert outside.fits and set(parts["cache_indexer"].placed) == {"ram"}
    assert sum(p.placed.get("disk", 0) for p in outside.parts) == 2**20 * per_token["attention"]
    assert all("disk" not in p.placed for p in inside.parts if p.name.startswith("cache"))
    nothing = plan(NANO, disk=GiB, context=4096, context_pages=True)
    assert nothing.missing == 4096 * cache_bytes_per_token(NANO)["indexer"]


@pytest.mark.parametrize("numbers", ["fp32", "fp8", "int8"])
def test_the_format_of_the_cache_is_what_is_kept_and_read(numbers):
    found = plan(V4, cache_format=numbers, context=2**20, vram=10**15)
    per_token, parts = cache_bytes_per_token(V4, numbers), {part.name: part for part in found.parts}
    assert found.cache_bytes_per_token == per_token["total"]
    assert parts["cache_attention"].size == 2**20 * per_token["attention"]
    assert parts["cache_indexer"].size == parts["cache_indexer"].read == 2**20 * per_token["indexer"]
    assert parts["cache_attention"].read == V4.indexer.topk * per_token["attention"]
    assert any(f"the cache is {numbers}" in said for said in found.assumptions)
    with pytest.raises(ValueError, match="cache_format: 'int2' is unknown"):
        plan(V4, cache_format="int2")


def test_a_compressing_model_keeps_entries_and_tails():
    cfg = ModelConfig.preset("v4-flash")
    found = plan(cfg, quant="int4", context=2**20, batch=3, vram=24 * GiB, ram=512 * GiB)
    parts = {part.name: part for part in found.parts}
    per_token = cache_bytes_per_token(cfg)
    assert parts["cache_attention"].size == 3 * 2**20 * per_token["attention"]
    assert parts["cache_indexer"].size == parts["cache_indexer"].read == 3 * 2**20 * per_token["indexer"]
    assert parts["cache_tails"].size == 3 * cache_bytes_per_sequence(cfg) == 3 * found.cache_bytes_per_sequence
    selected_and_all = 21 * 512 + 20 * (2**20 // 128)
    assert parts["cache_attention"].read == 3 * 2 * 512 * selected_and_all
    assert parts["cache_tails"].read == 3 * 4 * 43 * 128 * 512
    assert found.fits and set(parts["compressor"].placed) == {"vram"}


def test_what_drafts_is_kept_and_not_read():
    parts = {part.name: part for part in plan(ModelConfig.preset("v4.1-flash"), disk=10**13).parts}
    assert parts["drafter"].read == 0 < parts["drafter"].size
    assert parts["engram_tables"].read == pytest.approx(2 * 2 * 24 * 256)


@pytest.mark.parametrize("name", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_every_preset_can_be_planned(name):
    cfg = ModelConfig.preset(name)
    for context in (1, cfg.max_position_embeddings):
        found = plan(cfg, quant="int4", context=context, ram=2000 * GiB)
        assert found.fits and found.tokens_per_second > 0


def test_a_batch_shares_what_it_reads_of_the_experts():
    one, many = (plan(NANO, ram=GiB, context=64, batch=batch) for batch in (1, 1000))
    experts = {p.name: p for p in one.parts}["routed_experts"], {p.name: p for p in many.parts}["routed_experts"]
    assert experts[0].read == pytest.approx(experts[0].size * NANO.moe.num_experts_per_tok / NANO.moe.n_routed_experts)
    assert experts[0].read < experts[1].read <= experts[1].size
    assert many.tokens_per_second > one.tokens_per_second


def test_the_speed_bound_falls_with_context_when_attention_is_dense():
    dense = NANO.replace(**{"indexer.mode": "off"})
    speed = [plan(dense, ram=GiB, context=n).tokens_per_second for n in (1, 64, 4096)]
    assert speed[0] > speed[1] > speed[2]


def test_all_dtypes_are_listed_and_smaller_ones_are_smaller():
    weights = plan(V4).weights
    assert weights["bf16"] > weights["int8"] > weights["int4"] > 0.25 * weights["bf16"]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"quant": "int3"}, "quant"),
        ({"context": 0}, "context"),
        ({"context": 5000}, f"context: must be between 1 and {NANO.max_position_embeddings}"),
        ({"batch": 0}, "batch"),
        ({"ram": -1}, "ram"),
        ({"disk_bandwidth": 0.0}, "disk_bandwidth"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        plan(NANO, **arguments)


def test_the_plan_is_plain_data_and_names_what_it_leaves_out():
    data = json.loads(json.dumps(plan(NANO, ram=GiB).to_dict()))
    assert data["fits"] is True
    assert data["parts"][0]["placed"]
    assert len(data["assumptions"]) >= 4 and len(data["not_modelled"]) >= 5
    assert any("compute" in line for line in data["not_modelled"])


@settings(max_examples=50)
@given(
    st.integers(0, 40_000_000),
    st.integers(0, 40_000_000),
    st.integers(0, 40_000_000),
    st.sampled_from(("fp32", "bf16", "int8", "int4")),
    st.integers(1, 4096),
    st.integers(1, 64),
)
def test_no_byte_is_lost_or_placed_twice(vram, ram, disk, quant, context, batch):
    found = plan(NANO, quant=quant, vram=vram, ram=ram, disk=disk, context=context, batch=batch)
    needed = sum(weight_bytes(NANO, quant).values()) + context * batch * cache_bytes_per_token(NANO)["total"]
    placed = {m.name: sum(p.placed.get(m.name, 0) for p in found.parts) for m in found.memories}
    assert sum(p.size for p in found.parts) == needed
    assert sum(placed.values()) + found.missing == needed
    assert all(placed[m.name] <= m.capacity for m in found.memories)
    assert all(0 <= p.read <= p.size for p in found.parts)


def test_all_in_vram_is_faster_than_all_in_ram_by_the_ratio_of_bandwidths():
    slow = plan(NANO, ram=GiB, ram_bandwidth=50e9)
    fast = plan(NANO, vram=GiB, vram_bandwidth=1000e9)
    assert fast.tokens_per_second == pytest.approx(20 * slow.tokens_per_second)
