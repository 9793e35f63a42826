"""One program on one process or many: who holds which part of the model, and how their numbers come together.

All processes are data-parallel: each runs the whole model on documents of its own. ``dp_replicate`` groups of
``dp_shard`` processes each hold one copy of the parameters in shards (FSDP2); in a second view of the same processes,
the experts of each layer are spread over groups of ``ep`` (fourfold.train.experts), and in a third the rows of the
Engram tables over all of them (fourfold.train.tables).

The loss is a mean over all processes, so each divides by the weight of all (:meth:`Parallel.share`), and gradients
are summed and nowhere averaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate

from fourfold.fields import ConfigError
from fourfold.model.context import Context
from fourfold.model.embedders import MediaEmbedder
from fourfold.model.indexer import Indexer
from fourfold.model.moe import Router
from fourfold.model.residual import HyperConnection
from fourfold.model.transformer import Model
from fourfold.train.experts import spread_experts
from fourfold.train.recipe import Parallel as Sizes
from fourfold.train.recompute import recompute_blocks
from fourfold.train.tables import local, row_leaf, spread_tables

FLOAT32_ISLANDS = (Router, HyperConnection, Indexer)  # compute in float32; their weights must not be rounded either


@dataclass(frozen=True)
class Parallel:
    """This process among ``world``; the meshes are None where it is alone.

    data: (dp_replicate, dp_shard); experts: (replicas of a share, ep); rows: all processes.
    """

    rank: int
    world: int
    device: torch.device
    data: DeviceMesh | None = None
    experts: DeviceMesh | None = None
    rows: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """The sum over all processes of a tensor of equal shape; no gradient passes."""
        x = x.detach().clone()
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def sum(self, *numbers: float) -> list[float]:
        """Each number, summed over all processes."""
        return self.all_reduce_sum(torch.tensor(numbers, dtype=torch.float64, device=self.device)).tolist()

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, in their order."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def share(self, total: Tensor, weight: Tensor) -> Tensor:
        """This process's part of the mean over all: ``total``, a weighted sum here, over the sum of all weights.

        The parts add up to the mean (:meth:`all_reduce_sum`), and so do their gradients. With gradient accumulation
        ``weight`` is that of all micro-batches.
        """
        return total / self.all_reduce_sum(weight).clamp_min(1e-9)

    def reduce_loads(self, loads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Expert choices by layer (``Output.loads``), summed over all processes."""
        if not loads:
            return {}
        return dict(zip(loads, self.all_reduce_sum(torch.stack(list(loads.values()))), strict=True))

    @torch.no_grad()
    def clip(self, parameters: Iterable[Tensor], max_norm: float) -> Tensor:
        """Completes the gradients, scales them to ``max_norm`` at most, and returns their norm over all processes.

        Call it once between the last backward and the step of the optimizer, also where nothing is to be clipped
        (``max_norm`` infinity): the gradients of experts that several groups hold are summed here.
        """
        grads = []
        for parameter in parameters:
            holder = row_leaf(parameter)
            if holder.grad is None:
                continue
            if holder.grad.is_sparse:
                holder.grad = holder.grad.coalesce()
            grad = local(holder.grad)
            grads.append((grad.values() if grad.is_sparse else grad, parameter))
        squares = torch.zeros((), device=self.device)
        for grad, parameter in grads:
            if isinstance(parameter, DTensor) and self.experts is not None and parameter.device_mesh == self.experts:
                dist.all_reduce(grad, group=self.experts.get_group(0))
            squares += grad.float().square().sum() / copies(parameter)
        norm = self.all_reduce_sum(squares).sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp_max(1.0)
        for grad, _ in grads:
            grad.mul_(scale.to(grad.dtype))
        return norm

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def destroy(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


ALONE = Parallel(rank=0, world=1, device=torch.device("cpu"))


def setup(sizes: Sizes) -> Parallel:
    """Joins the processes that torchrun has started; alone, there is nothing to join.

    Raises ConfigError, which names the field, if the sizes do not fit the number of processes.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check(sizes, world)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world == 1:
        return Parallel(rank, world, device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
        return init_device_mesh(device.type, shape, mesh_dim_names=names)

    return Parallel(
        rank,
        world,
        device,
        data=mesh((sizes.dp_replicate, sizes.dp_shard), ("dp_replicate", "dp_shard")),
        experts=mesh((world // sizes.ep, sizes.ep), ("ep_replicate", "ep")),
        rows=mesh((world,), ("rows",)),
    )


def check(sizes: Sizes, world: int) -> None:
    """Raises ConfigError if ``sizes`` is not a way to arrange ``world`` processes."""
    for name in ("dp_replicate", "dp_shard", "ep"):
        if getattr(sizes, name) < 1:
            raise ConfigError(f"parallel.{name}: is {getattr(sizes, name)}; must be at least 1")
    if sizes.dp_replicate * sizes.dp_shard != world:
        raise ConfigError(
            f"parallel.dp_shard: dp_replicate ({sizes.dp_replicate}) x dp_shard ({sizes.dp_shard}) must be the number "
            f"of processes, which is {world} (torchrun --nproc-per-node)"
        )
    if world % sizes.ep:
        raise ConfigError(f"parallel.ep: is {sizes.ep}; must divide the number of processes ({world})")


def parallelize(model: Model, parallel: Parallel, *, bf16: bool = False, recompute: bool = False) -> Model:
    """Spreads a model, the same on every process, over all of them, in place. Comes before the optimizers are built.

    bf16: blocks and Engram projections travel and multiply in bfloat16 (for use under autocast), their gradients are
    summed in float32. The float32 islands are sharded on their own and not cast, nor is anything outside the blocks
    (embeddings, collapse, last norm, head). recompute: blocks keep no activations.
    Raises ConfigError if ``ep`` does not divide the experts.
    """
    for module in model.modules():
        if isinstance(module, MediaEmbedder):
            module.register_forward_hook(reach_all)
    if recompute:
        recompute_blocks(model)
    if parallel.data is None or parallel.experts is None or parallel.rows is None:
        return model
    spread = spread_tables(model, parallel.rows)
    if parallel.experts.size(1) > 1:
        spread |= spread_experts(model, parallel.experts)
    mesh = parallel.data if parallel.data.size(0) > 1 else parallel.data["dp_shard"]
    plain = MixedPrecisionPolicy()
    cast = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if bf16 else plain
    if bf16:
        for module in list(model.modules()):
            if isinstance(module, FLOAT32_ISLANDS):
                fully_shard(module, mesh=mesh, mp_policy=plain)
    blocks = [*model.layers, *model.engrams.values(), *([model.mtp.block] if model.mtp is not None else [])]
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=cast, ignored_params=spread)
    fully_shard(model, mesh=mesh, mp_policy=plain, ignored_params=spread)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # a sum of gradients, on every backend
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if module is not model:
                pass_as_is(module)
    return model


def pass_as_is(module: nn.Module) -> None:
    """Hands dataclasses through FSDP's hooks untouched: they put copies in their place, and blocks write to theirs.

    FSDP gathers a block's weights again when a gradient arrives at what the block returned. The losses of its indexer
    leave it by way of the context, so they are returned as well, as far as the hooks can see.
    """
    forward = module.forward

    def hide(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_Opaque(x) if is_dataclass(x) else x for x in inputs)

    def reveal(*inputs: Any) -> Any:
        revealed = [x.value if isinstance(x, _Opaque) else x for x in inputs]
        before = [len(x.index_losses) if isinstance(x, Context) else 0 for x in revealed]
        out = forward(*revealed)
        return out, [x.index_losses[n:] for x, n in zip(revealed, before, strict=True) if isinstance(x, Context)]

    def take_losses(_: nn.Module, inputs: tuple[Any, ...], returned: tuple[Any, list[list[Tensor]]]) -> Any:
        out, losses = returned
        contexts = [x.value for x in inputs if isinstance(x, _Opaque) and isinstance(x.value, Context)]
        for ctx, own in zip(contexts, losses, strict=True):
            ctx.index_losses[len(ctx.index_losses) - len(own) :] = own
        return out

    module.register_forward_pre_hook(hide, prepend=True)
    module.register_forward_hook(take_losses)
    module.forward = reveal


class _Opaque:
    def __init__(self, value: Any) -> None:
        self.value = value


def reach_all(module: nn.Module, _: Any, out: Tensor) -> Tensor:
    """A forward hook: every parameter gets a gradient, zero where the input did not need it.

    Processes whose batches differ in modalities must still agree on which gradients there are to sum.
    """
    return _Reach.apply(out, *module.parameters())


class _Reach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *reached: Tensor) -> Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in reached]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def copies(parameter: Tensor) -> int:
    """How many processes hold each number of a parameter, as far as its own mesh says."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh, placements = parameter.device_mesh, parameter.placements
    replicas = 1
    for size, placement in zip(mesh.shape, placements, strict=True):
        replicas *= size if isinstance(placement, Replicate) else 1
    return replicas


def gather_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict on every process, on the CPU. All processes must call it together."""
    with torch.no_grad():
        return {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
            for name, value in model.state_dict().items()
        }
