"""Do hyper-connections stay stable, by depth and learning rate? plain, hc and mhc, three seeds each.

The composite gain is how much the product of all residual maps can amplify (forward: activations, backward: gradients),
the largest of those looked at every ``--every`` steps. Expected: below 3 for mhc everywhere, above 100 for hc where the
model is deep and the rate high.
"""

from __future__ import annotations

from pathlib import Path

import torch
from _study import Cell, Language, chosen, grid, groups, parser, run, shown, threads, train

from fourfold.config import ModelConfig
from fourfold.model.probe import Probe
from fourfold.model.transformer import Model, Output

DEPTHS, FACTORS, KINDS = (8, 16, 32), (1, 3, 10), ("plain", "hc", "mhc")
LR = 1e-3  # times a factor


def config(depth: int, kind: str) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "vocab_size": 64,
            "hidden_size": 48,
            "num_hidden_layers": depth,
            "intermediate_size": 128,
            "max_position_embeddings": 64,
            "attention": {"kind": "gqa", "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 12},
            "residual": {"kind": kind},
        }
    )


def work(cell: Cell, every: int) -> Cell:
    held_out = Language().batch(torch.Generator().manual_seed(9_999))
    gains: list[tuple[float, float]] = []

    def watch(step: int, model: Model, output: Output) -> None:
        if cell["kind"] != "plain" and ((step + 1) % every == 0 or step + 1 == cell["steps"]):
            probe = Probe()
            with torch.no_grad():
                model(held_out, probe=probe, logits="last")
            gains.append(probe.composite_gain())

    result = train(config(cell["depth"], cell["kind"]), LR * cell["factor"], cell["steps"], cell["seed"], watch=watch)
    forward, backward = zip(*gains or [(1.0, 1.0)], strict=True)
    return result | {
        "gain_forward": max(forward),
        "gain_backward": max(backward),
        "gain_forward_end": forward[-1],
        "gain_backward_end": backward[-1],
    }


def gain(cell: Cell) -> float:
    return max(cell["gain_forward"], cell["gain_backward"])


def table(cells: list[Cell]) -> None:
    print(
        "\n| depth | lr | residual | seeds | loss | gain forward | backward | grad norm | skipped | stopped | s/step |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (depth, factor, kind), same in groups(cells, "depth", "factor", "kind"):
        finite = [c["loss"] for c in same if c["loss"] is not None]
        lost = f" ({len(same) - len(finite)} not finite)" if len(finite) < len(same) else ""
        greatest = [max(c[key] for c in same) for key in ("gain_forward", "gain_backward", "max_grad_norm")]
        print(
            f"| {depth} | {LR * factor:g} | {kind} | {len(same)} | {shown(finite)}{lost} | "
            + " | ".join(f"{value:.3g}" for value in greatest)
            + f" | {sum(c['skipped'] for c in same)} | {sum(c['stopped_at'] is not None for c in same)}"
            + f" | {min(c['seconds_per_step'] for c in same):.3f} |"
        )
    mhc = [gain(c) for c in cells if c["kind"] == "mhc"]
    corner = [gain(c) for c in cells if (c["kind"], c["depth"], c["factor"]) == ("hc", DEPTHS[-1], FACTORS[-1])]
    if mhc:
        print(f"\nmhc: greatest gain {max(mhc):.3g}; wanted below 3 everywhere")
    if corner:
        print(f"hc, depth {DEPTHS[-1]}, {FACTORS[-1]} x: smallest gain {min(corner):.3g}; expected above 100")


def draw(cells: list[Cell], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # the same figure has the same bytes
    from matplotlib import pyplot

    depths = sorted({c["depth"] for c in cells})
    figure, axes = pyplot.subplots(2, len(depths), figsize=(3.4 * len(depths), 6), sharey="row", squeeze=False)
    for column, depth in enumerate(depths):
        for kind, colour, aside in zip(KINDS, ("0.5", "tab:red", "tab:blue"), (0.9, 1.0, 1.1), strict=True):
            mine = [c for c in cells if (c["depth"], c["kind"]) == (depth, kind)]
            x = [LR * c["factor"] * aside for c in mine]
            axes[0, column].plot(x, [gain(c) for c in mine], "o", color=colour, label=kind, alpha=0.7)
            axes[1, column].plot(x, [c["loss"] for c in mine], "o", color=colour, alpha=0.7)
        axes[0, column].set(title=f"depth {depth}", xscale="log", yscale="log")
        axes[0, column].axhline(3, color="0.8", linestyle="--", zorder=0)
        axes[1, column].set(xlabel="learning rate", xscale="log")
    axes[0, 0].set_ylabel("greatest composite gain")
    axes[1, 0].set_ylabel("held-out loss, nats")
    axes[0, 0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(f"figure: {path}")


def main() -> None:
    flags = parser(__doc__, "study_mhc", steps=300, plot="docs/study_mhc.svg")
    flags.add_argument("--every", type=int, default=20, help="steps between two looks at the gain (default: 20)")
    args = flags.parse_args()
    threads(args.threads)
    cells = grid(
        steps=[args.steps], depth=[*DEPTHS], factor=[*FACTORS], seed=[*range(args.seeds)], kind=[*KINDS]
    )  # the kinds side by side, so that a drifting machine drifts for all alike
    done = run(chosen(cells, args.cells), args.out, args.limit, lambda cell: work(cell, args.every))
    if done:
        table(done)
        draw(done, args.plot)


if __name__ == "__main__":
    main()
