"""Engram tables: rows spread over all processes, and an Adam that touches only the rows a step has read.

Each process holds one run of rows. A lookup sends the distinct rows it wants to where they are and gets their numbers
back; the gradients take the same way home, so nothing of a table's size ever travels or is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fourfold.model.transformer import Model


def spread_tables(model: Model, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Keeps of each Engram table this process's rows. Returns the new parameters; mesh: all processes in one row."""
    for engram in model.engrams.values():
        engram.embed = SpreadTable(engram.embed.weight.detach(), mesh)
    return {engram.embed.weight for engram in model.engrams.values()}


class SpreadTable(nn.Module):
    """An embedding whose rows are spread over the processes in equal runs, the last ones shorter."""

    def __init__(self, table: Tensor, mesh: DeviceMesh) -> None:
        """table: [R, dim], the same everywhere."""
        super().__init__()
        self.group, self.run = mesh.get_group(), -(-len(table) // mesh.size())
        self.first, self.sparse = self.run * mesh.get_local_rank(), False
        rows = table[self.first : self.first + self.run].clone()
        spread = DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=table.shape, stride=table.stride())
        self.weight = nn.Parameter(spread)

    def forward(self, rows: Tensor) -> Tensor:
        """rows: int64 [...]. Returns [..., dim]."""
        wanted, where = rows.unique(return_inverse=True)  # in order, hence by process
        asking = torch.bincount(wanted // self.run, minlength=self.group.size())
        asked = torch.empty_like(asking)
        dist.all_to_all_single(asked, asking, group=self.group)
        sent, received = asking.tolist(), asked.tolist()
        requests = wanted.new_empty(sum(received))
        dist.all_to_all_single(requests, wanted, received, sent, group=self.group)
        held = row_leaf(self.weight) if self.sparse else self.weight.to_local()
        found = F.embedding(requests - self.first, held, sparse=self.sparse)
        return all_to_all_single_autograd(found, sent, received, self.group)[where]


def sparse_tables(model: Model) -> list[nn.Parameter]:
    """Makes the Engram tables give gradients of the rows that were read alone. Returns them, for :class:`RowAdam`.

    Comes after the model was spread over processes. The gradient of a spread table lies in ``row_leaf(table).grad``.
    """
    tables = []
    for engram in model.engrams.values():
        engram.embed.sparse = True
        weight = engram.embed.weight
        if isinstance(weight, DTensor):  # whose own gradient could not be sparse
            weight.row_leaf = weight.detach().to_local().requires_grad_()
        tables.append(weight)
    return tables


def row_leaf(table: Tensor) -> Tensor:
    """This process's rows of a table; they share its memory and receive the row-sparse gradient."""
    return getattr(table, "row_leaf", table)


class RowAdam(torch.optim.Optimizer):
    """Adam without decay for tables with row-sparse gradients.

    It is dense Adam, except that a step moves only the rows with a gradient: their moments are those of dense Adam,
    fading in the steps between as well, but dense Adam would have let the old momentum move the row meanwhile.
    The state of a row is touched only when the row is.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-10
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Raises ValueError for a gradient that is not sparse (see :func:`sparse_tables`)."""
        if closure is not None:
            raise ValueError("RowAdam.step: closures are not supported")
        for group in self.param_groups:
            for table in group["params"]:
                grad = row_leaf(table).grad
                if grad is None:
                    continue
                if not grad.is_sparse:
                    raise ValueError("RowAdam: the gradient of a table is not sparse")
                self._update(table, grad.coalesce(), group)

    def _update(self, table: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[table]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(table), torch.zeros_like(table)
            state["last"] = torch.zeros_like(table[:, 0])  # the step that saw the row last
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        rows, values = grad.indices()[0], grad.values()
        first, second, last = (local(state[name]) for name in ("exp_avg", "exp_avg_sq", "last"))
        passed = (step - last[rows])[:, None]
        m = first[rows] * beta1**passed + (1 - beta1) * values
        v = second[rows] * beta2**passed + (1 - beta2) * values.square()
        first[rows], second[rows], last[rows] = m, v, torch.full_like(last[rows], step)
        change = m / ((v / (1 - beta2**step)).sqrt() + group["eps"])
        row_leaf(table).index_add_(0, rows, change, alpha=-group["lr"] / (1 - beta1**step))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for table in group["params"]:
                table.grad = row_leaf(table).grad = None


def local(x: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x
