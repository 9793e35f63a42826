"""Will it fit, and how fast can it be at best: a model against a machine's memories, before anything is downloaded.

Only arithmetic on :mod:`fourfold.counts`: nothing is loaded and nothing is measured.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from fourfold import counts
from fourfold.config import ModelConfig

UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgtp", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}

NOT_MODELLED = (
    "time to compute (the FLOPs are given, no FLOP/s assumed), kernel launches, sampling and tokenizing",
    "activations, the allocator's waste, the page tables of the cache and the runtime itself",
    "reading the prompt, and the media embedders that it may need",
    "speculative decoding with the MTP block or the drafter",
    "the shorter way of csa2 through a prompt, whose later layers need but the entries and a last window",
    "transfers between memories: each byte is priced at the bandwidth of the memory it rests in",
    "routing that is not uniform: real experts are not equally popular",
    "the engine of this release keeps a whole model in one memory; a split describes the hardware, not the engine",
)


@dataclass(frozen=True)
class Memory:
    """One level of the machine. capacity: bytes; bandwidth: bytes per second."""

    name: str
    capacity: int
    bandwidth: float


@dataclass(frozen=True)
class Part:
    """size: bytes; read: bytes read by one decoding step of the whole batch; placed: memory name -> bytes."""

    name: str
    size: int
    read: float
    placed: dict[str, int]

    @property
    def missing(self) -> int:
        """Bytes for which no memory is left."""
        return self.size - sum(self.placed.values())


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found.

    weights: bytes of all weights by dtype; missing: bytes that found no place; tokens_per_second: the upper bound of
    the whole batch's decoding speed, None if the model does not fit; flops: per token, at the context.
    """

    parameters: int
    active: int
    quant: str
    context: int
    batch: int
    weights: dict[str, int]
    cache_bytes_per_token: int
    cache_bytes_per_sequence: int
    memories: tuple[Memory, ...]
    parts: tuple[Part, ...]
    missing: int
    tokens_per_second: float | None
    limited_by: str | None
    decode_flops: dict[str, float]
    prefill_flops: dict[str, float]
    assumptions: tuple[str, ...]
    not_modelled: tuple[str, ...] = NOT_MODELLED

    @property
    def fits(self) -> bool:
        return self.missing == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"fits": self.fits, **dataclasses.asdict(self)}


def parse_size(text: str) -> int:
    """Bytes of ``"24GiB"``, ``"1.5 TB"``, ``"512MiB"`` or a bare number. Raises ValueError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].lower() not in UNITS:
        raise ValueError(f"{text!r} is not a size; write for example 24GiB or 500GB")
    return int(float(match[1]) * UNITS[match[2].lower()])


def plan(
    cfg: ModelConfig,
    *,
    quant: str = "bf16",
    cache_format: str = "bf16",
    context: int = 4096,
    batch: int = 1,
    vram: int = 0,
    ram: int = 0,
    disk: int = 0,
    vram_bandwidth: float = 1000e9,
    ram_bandwidth: float = 50e9,
    disk_bandwidth: float = 2e9,
    context_pages: bool = False,
) -> Plan:
    """Places weights and cache of ``batch`` sequences of ``context`` tokens into VRAM, RAM and disk (bytes).

    What a step reads most of, per byte kept, goes to the fastest memory that has room; a part may be split. Weights
    may rest anywhere, the cache in VRAM or RAM; with ``context_pages`` rows of attention also on disk. Bandwidths are
    bytes per second. Raises ValueError naming the argument.
    """
    if quant not in counts.WEIGHT_BYTES:
        raise ValueError(f"quant: {quant!r} is unknown; choose one of {', '.join(counts.WEIGHT_BYTES)}")
    if cache_format not in counts.CACHE_BYTES:
        raise ValueError(f"cache_format: {cache_format!r} is unknown; choose one of {', '.join(counts.CACHE_BYTES)}")
    if not 1 <= context <= cfg.max_position_embeddings:
        limit = cfg.max_position_embeddings
        raise ValueError(f"context: must be between 1 and {limit}, the model's limit; is {context}")
    if batch < 1:
        raise ValueError(f"batch: must be at least 1; is {batch}")
    memories = (
        Memory("vram", vram, vram_bandwidth),
        Memory("ram", ram, ram_bandwidth),
        Memory("disk", disk, disk_bandwidth),
    )
    for memory in memories:
        if memory.capacity < 0:
            raise ValueError(f"{memory.name}: must be at least 0 bytes; is {memory.capacity}")
        if memory.bandwidth <= 0:
            raise ValueError(f"{memory.name}_bandwidth: must be > 0; is {memory.bandwidth}")

    demands = _weights_demand(cfg, quant, batch) | _cache_demand(cfg, cache_format, context, batch)
    off_disk = [n for n in demands if n.startswith("cache") and not (context_pages and n == "cache_attention")]
    parts = _place(demands, memories, off_disk)
    missing = sum(part.missing for part in parts)
    seconds = _step_seconds(parts, memories)
    slowest = max(seconds, key=seconds.__getitem__)
    totals = counts.count_parameters(cfg)
    return Plan(
        parameters=totals["total"],
        active=totals["active"],
        quant=quant,
        context=context,
        batch=batch,
        weights={dtype: sum(counts.weight_bytes(cfg, dtype).values()) for dtype in ("bf16", "int8", "int4")},
        cache_bytes_per_token=counts.cache_bytes_per_token(cfg, cache_format)["total"],
        cache_bytes_per_sequence=counts.cache_bytes_per_sequence(cfg),
        memories=memories,
        parts=parts,
        missing=missing,
        tokens_per_second=None if missing else batch / seconds[slowest],
        limited_by=None if missing else slowest,
        decode_flops=counts.decode_flops(cfg, context),
        prefill_flops=counts.prefill_flops(cfg, context),
        assumptions=_assumptions(memories, quant, cache_format),
    )


def _weights_demand(cfg: ModelConfig, quant: str, batch: int) -> dict[str, tuple[int, float]]:
    """Part -> (bytes, bytes that one step reads)."""
    sizes = counts.weight_bytes(cfg, quant)
    moe, engram = cfg.moe, cfg.engram
    untouched = (1 - moe.num_experts_per_tok / moe.n_routed_experts) ** batch if moe.n_routed_experts else 0.0
    rows = len(engram.layer_ids) * (engram.max_ngram - 1) * engram.n_heads
    share = {
        "embedding": min(batch / cfg.vocab_size, 1.0),
        "routed_experts": 1.0 - untouched,
        "engram_tables": min(batch * rows / max(counts.engram_rows(cfg), 1), 1.0),
        "mtp": 0.0,
        "drafter": 0.0,
        "media": 0.0,
    }
    return {name: (size, size * share.get(name, 1.0)) for name, size in sizes.items() if size}


def _cache_demand(cfg: ModelConfig, dtype: str, context: int, batch: int) -> dict[str, tuple[int, float]]:
    """As ``_weights_demand``. Layers that share entries read them once each."""
    per_token, item = counts.cache_bytes_per_token(cfg, dtype), counts.CACHE_BYTES[dtype]
    row = {"attention": counts.kv_parts(cfg), "indexer": (cfg.indexer.head_dim,)}
    sizes = {
        "cache_attention": per_token["attention"] * context,
        "cache_indexer": per_token["indexer"] * context,
        "cache_tails": counts.cache_bytes_per_sequence(cfg),
    }
    read = dict.fromkeys(sizes, 0)
    for r in counts.reads(cfg):
        name = "cache_tails" if r.tail else f"cache_{r.part}"
        each = counts.TAIL_BYTES * r.width if r.tail else counts.row_bytes(row[r.part], item)
        read[name] += r.rows(context) * each
    read["cache_tails"] = min(read["cache_tails"], sizes["cache_tails"])  # the newest position is not in it yet
    return {name: (size * batch, float(read[name] * batch)) for name, size in sizes.items() if size}


def _place(
    demands: dict[str, tuple[int, float]], memories: tuple[Memory, ...], off_disk: list[str]
) -> tuple[Part, ...]:
    left = {memory.name: memory.capacity for memory in memories}
    parts = []
    for name, (size, read) in sorted(demands.items(), key=lambda item: -item[1][1] / item[1][0]):
        placed, remaining = {}, size
        for memory in memories:
            taken = min(remaining, left[memory.name])
            if taken and not (name in off_disk and memory.name == "disk"):
                placed[memory.name] = taken
                left[memory.name] -= taken
                remaining -= taken
        parts.append(Part(name, size, read, placed))
    return tuple(parts)


def _step_seconds(parts: tuple[Part, ...], memories: tuple[Memory, ...]) -> dict[str, float]:
    return {m.name: sum(p.read * p.placed.get(m.name, 0) / p.size for p in parts) / m.bandwidth for m in memories}


def _assumptions(memories: tuple[Memory, ...], quant: str, cache_format: str) -> tuple[str, ...]:
    speeds = ", ".join(f"{m.name} {m.bandwidth / 1e9:g} GB/s" for m in memories)
    kept = "embedding, head, router, indexer, compressor, norms and mixing stay bf16"
    scales = {
        "int8": f"int8 has a 32-bit scale per row, taken as one per 256 weights; {kept}",
        "int4": f"int4 has a 16-bit scale per 32 weights; {kept}",
    }
    return (
        "tokens/s <= batch / max over memories of (bytes one step reads there / bandwidth): all memories work at once",
        f"bandwidths: {speeds} (arguments, not measured)",
        "a step reads each active weight once for the whole batch, and each sequence's attended cache once",
        "routed experts: uniform and independent choices, so a batch B touches 1 - (1 - k/E)^B of them",
        f"the cache is {cache_format} (tails fp32), all sequences of the whole context; the indexer reads all its keys",
        *([scales[quant]] if quant in scales else []),
    )
