"""What a run tells: one line of ``metrics.jsonl`` and one point of each TensorBoard curve per logged step."""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fourfold.config import ModelConfig
from fourfold.counts import training_flops
from fourfold.model.moe import Router
from fourfold.model.probe import Probe
from fourfold.model.sequence import IGNORE, MODALITIES, TEXT, Packed
from fourfold.model.transformer import Model

TIMED = ("seconds", "tokens_per_second", "mfu", "peak_flops", "peak_memory")  # differ between equal runs


class Metrics:
    """``metrics.jsonl`` and TensorBoard. What a killed run logged after its last checkpoint is forgotten."""

    def __init__(self, run: Path, step: int) -> None:
        self.run, self.step = run, step

    def __enter__(self) -> Metrics:
        path = self.run / "metrics.jsonl"
        kept = [line for line in path.read_text().splitlines() if _step(line) <= self.step] if path.is_file() else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(path)
        self.file = path.open("a")
        self.board = SummaryWriter(str(self.run / "tb"), purge_step=self.step + 1)
        return self

    def write(self, step: int, values: dict[str, float]) -> None:
        """A value that is not finite, as a skipped step may have, is null in the file."""
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **plain}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def __exit__(self, *_: Any) -> None:
        self.file.close()
        self.board.close()


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a run, a line that was cut short left out."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if _step(line) < math.inf]


def _step(line: str) -> float:
    """The step of a logged line; one that was cut short belongs to no step kept."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf


# ---------------------------------------------------------------- what the model did


def modality_sums(losses: Tensor, packed: Packed) -> Tensor:
    """float64 [2, modalities]: summed losses of the targets, and how many, by what their document holds.

    losses: [M], one a target. A document with positions of several media counts for each, one with none for text.
    """
    holds = torch.zeros(len(packed.cu_seqlens) - 1, len(MODALITIES), dtype=torch.bool, device=losses.device)
    holds[packed.sequence_ids, packed.modality] = True
    holds[:, TEXT] = ~holds[:, TEXT + 1 :].any(-1)
    of_target = holds[packed.sequence_ids[packed.targets != IGNORE]].double()
    return torch.stack([losses.double() @ of_target, of_target.sum(0)])


def modality_losses(sums: Tensor) -> dict[str, float]:
    """``loss_text`` and so on, of the modalities that occurred. sums: as ``modality_sums``."""
    pairs = zip(MODALITIES, *sums.tolist(), strict=True)
    return {f"loss_{name}": total / count for name, total, count in pairs if count}


def expert_balance(loads: dict[str, Tensor]) -> dict[str, float]:
    """``max_violation``: the most loaded expert's excess over the mean; ``dead_experts``: those below a tenth of it;
    both the mean of all layers. loads: int64 [modalities, E] by layer."""
    if not loads:
        return {}
    total = torch.stack([load.sum(0).float() for load in loads.values()])
    relative = total / total.mean(-1, keepdim=True)
    return {
        "max_violation": float(relative.amax(-1).mean() - 1),
        "dead_experts": float((relative < 0.1).sum(-1).float().mean()),
    }


def bias_range(model: Model) -> dict[str, float]:
    """``bias_range``: the widest spread of the selection biases of one layer and modality."""
    routers = [module for module in model.modules() if isinstance(module, Router) and not module.by_hash]
    spreads = [
        float((bias.amax(-1) - bias.amin(-1)).max())
        for router in routers
        for bias in (router._buffers.get("bias"), router._buffers.get("media_bias"))
        if bias is not None
    ]
    return {"bias_range": max(spreads)} if spreads else {}


def stream_gain(probe: Probe | None) -> dict[str, float]:
    """``gain_forward`` and ``gain_backward`` of the product of all stream maps."""
    if probe is None or not probe.stream_maps:
        return {}
    forward, backward = probe.composite_gain()
    return {"gain_forward": forward, "gain_backward": backward}


@contextmanager
def router_entropy(model: Model, into: dict[str, float]) -> Iterator[None]:
    """Over the passes inside: ``router_entropy``, that of a token's scores as a share of the largest possible (1: the
    router has no preference), the mean of tokens and layers."""
    seen: list[Tensor] = []

    def note(_: Any, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        scores = output[2].detach().float()
        share = scores / scores.sum(-1, keepdim=True)
        seen.append(torch.special.entr(share).sum(-1).mean() / math.log(max(2, share.shape[-1])))

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, Router)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if seen:
            into["router_entropy"] = float(torch.stack(seen).mean())


# ---------------------------------------------------------------- what it cost


class Throughput:
    """Seconds, tokens/s and MFU of the steps since the last logged one.

    MFU is ``fourfold.counts.training_flops`` of every position, fill included, over time and ``peak``.
    """

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self._reset()

    def _reset(self) -> None:
        self.steps, self.positions, self.squares, self.seconds = 0, 0, 0, 0.0

    def add(self, packed: Sequence[Packed], seconds: float) -> None:
        """A step over ``packed``."""
        lengths = torch.cat([part.cu_seqlens.diff() for part in packed])
        self.steps, self.seconds = self.steps + 1, self.seconds + seconds
        self.positions += int(lengths.sum())
        self.squares += int(lengths.square().sum())

    def read(self, cfg: ModelConfig | None, world: int = 1) -> dict[str, float]:
        """The values since the last call. cfg: as it was trained; None where the step was no usual one.

        world: processes, each taken to do as much; tokens/s are those of all.
        """
        rate = self.positions / self.seconds
        values = {"seconds": self.seconds / self.steps, "tokens_per_second": rate * world}
        values["peak_memory"] = peak_memory()
        if cfg is not None:
            context = round(self.squares / self.positions)  # of the sequence that the mean position lies in
            values |= {"mfu": training_flops(cfg, context) * rate / self.peak, "peak_flops": self.peak}
        self._reset()
        return values


def measured_peak(device: torch.device, bf16: bool) -> float:
    """FLOP/s of the best of some square matrix products: what this machine can do, near enough."""
    size = 4096 if device.type == "cuda" else 512
    best = math.inf
    for dtype in (torch.float32, torch.bfloat16)[: 1 + bf16]:
        matrix = torch.ones(size, size, dtype=dtype, device=device)
        for _ in range(4):
            began = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def peak_memory() -> float:
    """Bytes: of the accelerator where there is one, else resident ones of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated())
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
