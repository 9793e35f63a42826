"""Speed of a training step beside transformers: the same configuration, weights and batches, interleaved.

A step is forward, cross-entropy, backward, clipping and AdamW. The peer runs by whichever of its experts
implementations is fastest here. Ours also teaches the indexer of V4, which the peer leaves untrained.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
from _peers import SIZES, ours, peer
from _report import case, finish, interleaved, median, parser
from torch import Tensor, nn
from transformers.utils import logging

from fourfold.model.sequence import Document, Packed, pack

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
Batch = tuple[Tensor, Packed]
Losses = tuple[Tensor, Tensor | float]  # cross-entropy, and what is learnt beside it
Step = Callable[[], float]


def stepper(model: nn.Module, loss_of: Callable[[Batch], Losses], size: dict[str, int], bf16: bool) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)

    def step() -> float:
        ids = torch.randint(size["vocabulary"], (size["rows"], size["row"]), generator=generator)
        packed = pack([Document.text(row) for row in ids.tolist()], row=size["row"])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss, beside = loss_of((ids, packed))
        (loss + beside).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def peer_loss(model: Callable[..., Any]) -> Callable[[Batch], Losses]:
    return lambda batch: (model(input_ids=batch[0], labels=batch[0], use_cache=False).loss, 0.0)


def our_loss(model: Callable[..., Any]) -> Callable[[Batch], Losses]:
    def loss_of(batch: Batch) -> Losses:
        packed = batch[1]
        output = model(packed, logits="target")
        loss = F.cross_entropy(output.logits, packed.targets[packed.targets >= 0])
        return loss, 0.0 if output.index_loss is None else output.index_loss

    return loss_of


def gathered_bytes(size: dict[str, int]) -> int:
    """What batched_mm copies of the experts' weights and keeps for the backward pass, float32."""
    return size["rows"] * size["row"] * 4 * 3 * size["expert"] * size["width"] * 4 * size["layers"]


def free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def best_implementation(kind: str, size: dict[str, int], bf16: bool) -> tuple[str, dict[str, str]]:
    """The fastest experts implementation of the peer, eager, and the seconds of each or why there are none."""
    seconds, said = {}, {}
    for name in IMPLEMENTATIONS:
        if name == "batched_mm" and gathered_bytes(size) > free_bytes() // 2:
            said[name] = f"not run: would hold {gathered_bytes(size) / 2**30:.0f} GiB of gathered weights"
            continue
        model = peer(kind, size).train()
        model.set_experts_implementation(name)
        step = stepper(model, peer_loss(model), size, bf16)
        try:
            step()
            seconds[name] = median(interleaved({name: step}, repeats=3, warmup=0)[name])
            said[name] = f"{seconds[name]:.3f} s/step"
        except RuntimeError as error:  # or that it is not implemented
            said[name] = f"does not run: {str(error).splitlines()[0]}"
    return min(seconds, key=seconds.__getitem__), said


def compiled(step: Callable[[Callable[..., Any]], Step], model: nn.Module) -> tuple[Step | None, str]:
    """A step through torch.compile after its first two, which compile; or why there is none."""
    began = time.perf_counter()
    try:
        made = step(torch.compile(model))
        made()
        made()
    except Exception as error:  # a compiler fails in any way it likes; the eager figures are not lost for it
        return None, f"not available: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    return made, f"{time.perf_counter() - began:.0f} s to compile"


def measure(kind: str, size: dict[str, int], bf16: bool, repeats: int, compile_too: bool) -> dict[str, dict[str, Any]]:
    print(f"{kind}, {'bf16 autocast' if bf16 else 'float32'}: the peer's experts ...", file=sys.stderr)
    name, said = best_implementation(kind, size, bf16)
    numbers = "bf16 autocast" if bf16 else "float32"
    tokens = size["rows"] * size["row"]

    def arm(family: str) -> tuple[nn.Module, Callable[[Callable[..., Any]], Step]]:
        made = peer(kind, size).train()
        if family == "ours":
            made = ours(made)
        else:
            made.set_experts_implementation(name)
        loss_of = our_loss if family == "ours" else peer_loss
        return made, lambda call: stepper(made, loss_of(call), size, bf16)

    def report(steps: dict[str, Step], **extra: Any) -> dict[str, Any]:
        seconds = interleaved(steps, repeats)
        mine, theirs = ([tokens / s for s in seconds[family]] for family in ("ours", "peer"))
        return case(
            median(mine),
            median(theirs),
            None,
            "tokens/s",
            mine,
            peer_name=f"transformers {transformers.__version__}, experts {name}",
            peer_min=min(theirs),
            peer_max=max(theirs),
            experts=said,
            size=size,
            **extra,
        )

    cases = {}
    pairs = {family: arm(family) for family in ("ours", "peer")}
    steps = {family: step(model) for family, (model, step) in pairs.items()}
    first = {family: step() for family, step in steps.items()}
    if abs(first["ours"] - first["peer"]) > (1e-2 if bf16 else 1e-4):
        raise SystemExit(f"{kind}, {numbers}: the two do not do the same, first losses {first}")
    cases[f"{kind}, {numbers}, eager"] = report(steps, first_loss=first)
    if compile_too:
        print(f"{kind}, {numbers}: compiling ...", file=sys.stderr)
        done = {family: compiled(step, model) for family, (model, step) in pairs.items()}
        notes = {family: note for family, (_, note) in done.items()}
        steps = {family: step for family, (step, _) in done.items() if step is not None}
        if len(steps) == 2:
            cases[f"{kind}, {numbers}, compiled"] = report(steps, compile=notes)
        else:
            print(f"{kind}, {numbers}, compiled: {notes}")
            cases[f"{kind}, {numbers}, eager"]["compile"] = notes
        torch._dynamo.reset()
    return cases


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--tiny", action="store_true", help="only see that it runs")
    flags.add_argument("--only", choices=("V3", "V4"), help="one of the two")
    flags.add_argument("--no-compile", action="store_true", help="eager alone")
    args = flags.parse_args()
    logging.set_verbosity_error()
    torch._logging.set_logs(dynamo=40)  # logging.ERROR: no line for each graph break
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
    if not compiler:
        print("compiled: not available, there is no C++ compiler")
    cases = {}
    for kind in ("V3", "V4") if args.only is None else (args.only,):
        for bf16 in (False, True):
            size = SIZES["tiny" if args.tiny else "usual"]
            cases |= measure(kind, size, bf16, args.repeats, compiler and not args.no_compile)
    finish(cases, args.json)


if __name__ == "__main__":
    main()
