"""Activation recomputation: a block keeps only its input and runs again when its gradient is due."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fourfold.model.context import Context
from fourfold.model.probe import Probe
from fourfold.model.transformer import Model


def recompute_blocks(model: Model) -> None:
    """Makes every block of the trunk, and of multi-token prediction, recompute while it trains."""
    blocks = [*model.layers, *([model.mtp.block] if model.mtp is not None else [])]
    for block in blocks:
        block.forward = recomputed(block.forward)  # inside the module's hooks, and no name changes


def recomputed(forward: Callable[[Tensor, Context], Tensor]) -> Callable[[Tensor, Context], Tensor]:
    """``forward(streams, ctx)`` without its activations.

    A block also writes to the context: its losses and loads are added up there, its selection, entries and read
    weights go to the next block. Each run therefore gets a context of its own, as it was before the block, and only
    what the first run left there is passed on.
    """

    def run(streams: Tensor, ctx: Context) -> Tensor:
        before = dataclasses.replace(ctx)

        def block(x: Tensor) -> tuple[Tensor, Context]:
            own = dataclasses.replace(
                before,
                probe=None if before.probe is None else Probe(),
                shared=None if before.shared is None else dataclasses.replace(before.shared),
                index_losses=[],
                index_recalls=[],
                loads={},
                balance_losses=[],
            )
            return forward(x, own), own

        if not streams.requires_grad or ctx.cache is not None:
            return forward(streams, ctx)
        out, own = checkpoint(block, streams, use_reentrant=False)
        ctx.selection, ctx.shared, ctx.read_weights = own.selection, own.shared, own.read_weights
        ctx.index_losses += own.index_losses
        ctx.index_recalls += own.index_recalls
        ctx.balance_losses += own.balance_losses
        ctx.loads |= own.loads
        if ctx.probe is not None:
            for field in dataclasses.fields(Probe):
                getattr(ctx.probe, field.name).update(getattr(own.probe, field.name))
        return out

    return run
