"""The same training on one process or many: ``python -m tests.distributed.runs FOLDER PROCESSES:CASE,CASE ...`` writes
what rank 0 saw of each case."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from fourfold.model.sequence import IGNORE, Packed, pack
from fourfold.model.transformer import Model, mtp_targets
from fourfold.train.optim import answer_weights, build_optimizers
from fourfold.train.parallel import Parallel, gather_state, parallelize, setup
from fourfold.train.recipe import Optimizer
from fourfold.train.tables import RowAdam, row_leaf, sparse_tables
from tests.model import tiny

FULL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "attention.q_lora_rank": 10,
    "indexer.mode": "sparse",
    "indexer.n_heads": 2,
    "indexer.head_dim": 8,
    "indexer.topk": 6,
    "moe.n_routed_experts": 4,
    "moe.num_experts_per_tok": 2,
    "moe.moe_intermediate_size": 8,
    "moe.n_shared_experts": 1,
    "moe.first_k_dense_replace": 0,
    "residual.kind": "mhc",
    "residual.hc_mult": 2,
    "engram.layer_ids": [1],
    "engram.vocab_size": 101,
    "engram.head_dim": 4,
    "engram.short_conv": True,
    "mtp.num_layers": 1,
    "media": tiny.MEDIA,
}
ROW, ROWS = 24, 4


@dataclass(frozen=True)
class Case:
    """``steps`` with ``optimizer`` (sgd, adamw, muon), clipped to ``clip``; the rest is that of ``[parallel]``."""

    name: str
    dp_replicate: int = 1
    dp_shard: int = 1
    ep: int = 1
    optimizer: str = "adamw"
    steps: int = 20
    clip: float = 1.0
    bf16: bool = False
    recompute: bool = False
    residual: str = "mhc"


@dataclass(frozen=True)
class Seen:
    """Of each step the loss, the gradient's norm and the experts' loads; of the first the gradients; the last state."""

    losses: list[float]
    norms: list[float]
    loads: list[Tensor]
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


CASES = {
    case.name: case
    for case in (
        Case("fsdp", dp_shard=2),
        Case("fsdp-sgd", dp_shard=2, optimizer="sgd", steps=8),
        Case("ep", dp_shard=2, ep=2),
        Case("ep-sgd", dp_shard=2, ep=2, optimizer="sgd", steps=8),
        Case("ep-muon", dp_shard=2, ep=2, optimizer="muon", steps=2),
        Case("replicate", dp_replicate=2, ep=2, steps=4),
        Case("recompute", dp_shard=2, ep=2, recompute=True, steps=2),
        Case("recompute-bf16", dp_shard=2, recompute=True, bf16=True, steps=2),
        Case("bf16", dp_shard=2, bf16=True, steps=2),
        Case("hsdp", dp_replicate=2, dp_shard=2),
        Case("hsdp-ep", dp_replicate=2, dp_shard=2, ep=2, steps=4),
        Case("hsdp-sgd", dp_replicate=2, dp_shard=2, ep=2, optimizer="sgd"),
        Case("ep4", dp_shard=4, ep=4, steps=2),
    )
}


def batch(cfg: Any, step: int, rank: int, world: int) -> Packed:
    """This rank's rows of a step. Only the first holds media, and the number of targets differs from row to row."""
    documents = []
    for row in range(rank * ROWS // world, (rank + 1) * ROWS // world):
        seed = 100 * step + 10 * row
        first = tiny.document(cfg, ROW // 2, seed) if row == 0 else tiny.text(ROW // 2, seed)
        second = tiny.text(ROW // 2, seed + 1)
        second.targets[: 2 * row] = IGNORE
        documents += [first, second]
    return pack(documents, row=ROW)


def train(case: Case) -> Seen:
    """Runs a case on as many processes as there are."""
    parallel = setup(case)
    cfg = tiny.config(**FULL | {"residual.kind": case.residual})
    model = parallelize(tiny.model(cfg).train(), parallel, bf16=case.bf16, recompute=case.recompute)
    optimizers = make_optimizers(model, case.optimizer)
    losses, norms, loads, gradients = [], [], [], {}
    for step in range(case.steps):
        packed = batch(cfg, step, parallel.rank, parallel.world)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.bf16):
            output = model(packed, logits="target", mtp=True, balance=True)
            loss = objective(output, packed, parallel)
        loss.backward()
        norms.append(float(parallel.clip(model.parameters(), case.clip)))
        if step == 0:
            gradients = gather_gradients(model)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(parallel.all_reduce_sum(loss)))
        loads.append(torch.stack(list(parallel.reduce_loads(output.loads).values())))
    return Seen(losses, norms, loads, gradients, gather_state(model))


def objective(output: Any, packed: Packed, parallel: Parallel) -> Tensor:
    """This process's share of the loss of all."""

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        weights = answer_weights(packed, targets)
        losses = F.cross_entropy(logits, targets[targets != IGNORE], reduction="none")
        return parallel.share((losses * weights).sum(), weights.sum())

    means = output.index_loss + 0.1 * output.balance_loss  # of as many positions on every process
    return (
        cross_entropy(output.logits, packed.targets)
        + 0.3 * cross_entropy(output.mtp_logits, mtp_targets(packed))
        + means / parallel.world
    )


def make_optimizers(model: Model, kind: str) -> list[torch.optim.Optimizer]:
    if kind == "sgd":
        return [torch.optim.SGD(model.parameters(), lr=0.1)]
    if kind == "muon":
        return build_optimizers(model, Optimizer(kind="muon", lr=1e-3))
    tables = sparse_tables(model)
    rest = [p for p in model.parameters() if all(p is not table for table in tables)]
    return [torch.optim.AdamW(rest, lr=3e-4, betas=(0.9, 0.95), eps=1e-6, fused=True), RowAdam(tables, lr=1.5e-3)]


def gather_gradients(model: Model) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = row_leaf(parameter).grad
        if grad is None:
            continue
        if grad.is_sparse:
            grad = grad.to_dense()
            if isinstance(parameter, DTensor):
                grad = DTensor.from_local(
                    grad, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
                )
        found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return found


def launch(jobs: dict[int, list[str]], folder: Path) -> dict[str, Seen]:
    """Runs cases on as many processes as each list's key says, and returns what rank 0 saw of each."""
    spoken = [f"{world}:{','.join(names)}" for world, names in jobs.items()]
    command = [sys.executable, "-m", "tests.distributed.runs", str(folder), *spoken]
    subprocess.run(
        command, cwd=Path(__file__).parents[2], env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=150, check=True
    )
    return {
        name: seen for world in jobs for name, seen in torch.load(folder / f"{world}.pt", weights_only=False).items()
    }


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def join(rank: int, world: int, port: int) -> None:
    """Gives this process the environment that torchrun would give it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}


def work(rank: int, world: int, port: int, names: list[str], out: Path) -> None:
    """One process of a job."""
    join(rank, world, port)
    seen = {name: train(CASES[name]) for name in names}
    parallel = setup(CASES[names[0]])
    if parallel.is_main:
        torch.save(seen, out)
    parallel.barrier()
    parallel.destroy()


def main() -> None:
    """Forks once all is imported: that costs more than the runs."""
    folder, *jobs = sys.argv[1:]
    torch.set_num_threads(1)
    for job in jobs:
        world, names = job.split(":")
        arguments = (int(world), free_port(), names.split(","), Path(folder) / f"{world}.pt")
        torch.multiprocessing.start_processes(work, arguments, nprocs=int(world), start_method="fork")


if __name__ == "__main__":
    from tests.distributed import runs  # so that what is saved has an importable name

    runs.main()
