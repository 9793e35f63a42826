"""What mHC costs in training: forward and backward of nano, 4096 positions, beside the plain residual.

Three arms, interleaved: mHC with the CPU twins, mHC with the plain reference, and the plain residual. Once without
Engram, and once as nano is, where Engram too has to write to every stream.
"""

from __future__ import annotations

import os

import torch
from _report import arguments, case, finish, interleaved, median

from fourfold.config import ModelConfig
from fourfold.model.sequence import Document, pack
from fourfold.model.transformer import Model

ROW, ROWS = 512, 8


def arm(kind: str, backend: str | None, **changes: object):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = Model(ModelConfig.preset("nano", **{"residual.kind": kind, "indexer.mode": "dense", **changes})).train()
    documents = [
        Document.text(torch.randint(16, model.cfg.vocab_size, (64,)).tolist()) for _ in range(ROW * ROWS // 64)
    ]
    packed = pack(documents, row=ROW)

    def step() -> None:
        os.environ.pop("FOURFOLD_BACKEND", None)
        if backend:
            os.environ["FOURFOLD_BACKEND"] = backend
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(packed, logits="target")
            loss = torch.nn.functional.cross_entropy(output.logits, packed.targets[packed.targets >= 0])
        loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def main() -> None:
    args = arguments(__doc__)
    cases = {}
    for note, changes in ((", no Engram", {"engram.layer_ids": []}), ("", {})):
        arms = {
            "mhc": arm("mhc", None, **changes),
            "mhc, reference": arm("mhc", "reference", **changes),
            "plain": arm("plain", None, **changes),
        }
        seconds = interleaved(arms, args.repeats)
        plain = median(seconds["plain"])
        for name in ("mhc", "mhc, reference"):
            cases[name + note] = case(
                median(seconds[name]), plain, plain, "s/step", seconds[name], peer_name="plain residual"
            )
    finish(cases, args.json)


if __name__ == "__main__":
    main()
