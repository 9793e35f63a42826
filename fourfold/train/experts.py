"""Expert parallelism: each process holds some experts of every layer, and tokens travel to the experts they chose.

One all-to-all takes each (token, expert) pair to where the expert lives, a second brings the result back; both carry
gradients the other way. An expert sees what the whole group sent it, so its gradient is already that of the group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from fourfold import ops
from fourfold.fields import ConfigError
from fourfold.model.moe import MoE


def spread_experts(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Keeps of each stack of experts this process's share and routes the tokens. Returns the new parameters.

    mesh: (replicas of a share, ep). Raises ConfigError if ``ep`` does not divide the experts.
    """
    new = set()
    for module in model.modules():
        if not isinstance(module, MoE):
            continue
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(module, name)
            if len(stack) % mesh.size(1):
                raise ConfigError(f"parallel.ep: {mesh.size(1)} does not divide moe.n_routed_experts ({len(stack)})")
            share = stack.detach().chunk(mesh.size(1))[mesh.get_local_rank(1)].clone()
            spread = nn.Parameter(DTensor.from_local(share, mesh, [Replicate(), Shard(0)], run_check=False))
            setattr(module, name, spread)
            new.add(spread)
        module.dispatch = dispatch_to(mesh.get_group(1))
    return new


def dispatch_to(group: dist.ProcessGroup) -> Callable[..., Tensor]:
    """:func:`fourfold.ops.experts` for stacks that are spread over ``group``."""

    def run(x: Tensor, indices: Tensor, weights: Tensor, gate_up: DTensor, down: DTensor, limit: float) -> Tensor:
        """x: [T, d]; indices: int64 [T, K], of all experts; weights: [T, K]. Returns [T, d]."""
        w1, w2 = gate_up.to_local(), down.to_local()
        processes, held, per_token = group.size(), len(w1), indices.shape[1]
        order = indices.flatten().argsort(stable=True)  # by expert, hence by process
        leaving = torch.bincount(indices.flatten(), minlength=processes * held)
        arriving = torch.empty_like(leaving)
        dist.all_to_all_single(arriving, leaving, group=group)
        sent, received = (n.view(processes, held).sum(1).tolist() for n in (leaving, arriving))
        rows = all_to_all_single_autograd(x[order // per_token], received, sent, group)
        chosen = torch.arange(held, device=x.device).repeat(processes).repeat_interleave(arriving)[:, None]
        y = ops.experts(rows, chosen, torch.ones_like(chosen, dtype=x.dtype), w1, w2, limit)
        y = all_to_all_single_autograd(y.contiguous(), sent, received, group)
        y = y * weights.flatten()[order, None].to(y.dtype)
        return torch.empty_like(y).index_copy(0, order, y).unflatten(0, (-1, per_token)).sum(1)

    return run
