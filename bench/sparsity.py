"""What sparse attention costs in bits per byte of held-out prose: the same weights with attention to everything, to
what the indexers choose, and to what indexers choose that never learnt (their weights drawn anew, ``--repeats`` times).
"""

from __future__ import annotations

import sys

import torch
from _report import case, finish, median, parser

import fourfold
from fourfold.data import corpus
from fourfold.data.suites import TEXTS, texts
from fourfold.eval import Subject
from fourfold.eval.bpb import bits_per_byte
from fourfold.model.indexer import Indexer
from fourfold.model.transformer import Model


def forget(model: Model, seed: int) -> None:
    """Draws the weights of all indexers anew."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Indexer):
            for part in module.children():
                if isinstance(part, torch.nn.Linear):
                    torch.nn.init.normal_(part.weight, std=model.cfg.initializer_range)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--model", default="nano")
    flags.add_argument("--samples", type=int, default=100, help="texts of each source (default: 100)")
    args = flags.parse_args()
    found = [text for source in TEXTS for text in texts(source, corpus.load(None), args.samples)]

    def bits(subject: Subject, mode: str) -> float:
        subject.model.set_indexer_mode(mode)
        return bits_per_byte(subject, found)

    model = fourfold.load(args.model)
    dense = bits(model, "dense")
    arms = {"sparse": [bits(model, "sparse")], "sparse, indexers drawn anew": []}
    for seed in range(args.repeats):
        forget(model.model, seed)
        arms["sparse, indexers drawn anew"].append(bits(model, "sparse"))
    cases = {"dense": case(dense, None, None, "bits per byte", [dense])}
    for name, all_ in arms.items():
        cases[name] = case(median(all_), dense, None, "bits per byte", all_, peer_name="dense")
        print(f"{name}: {median(all_):.4f}, dense {dense:.4f}, {median(all_) / dense - 1:+.2%}", file=sys.stderr)
    finish(cases, args.json)


if __name__ == "__main__":
    main()
