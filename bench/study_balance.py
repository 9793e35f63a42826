"""What keeps experts evenly used: the selection bias, an auxiliary loss, or nothing. Three seeds each.

MaxVio is how far the busiest expert is above the mean load, 0 when even; an expert is dead in a step where it gets
under a tenth of the mean load. Both are means over layers and over the last fifth of the steps; the figure shows them
over all of training. Expected: nothing is worst.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from _study import Cell, chosen, grid, groups, interval, parser, run, shown, threads, train

from fourfold.config import ModelConfig
from fourfold.model.transformer import Model, Output

# arm: speed of the bias, weight of the balance loss
ARMS = {
    "off": (0.0, 0.0),
    "bias 0.001": (1e-3, 0.0),
    "bias 0.01": (1e-2, 0.0),
    "aux 0.001": (0.0, 1e-3),
    "aux 0.01": (0.0, 1e-2),
}
EXPERTS = (16, 64)
LR, BIN = 3e-3, 10


def config(experts: int, speed: float) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "vocab_size": 64,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "intermediate_size": 128,
            "max_position_embeddings": 64,
            "attention": {"kind": "gqa", "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16},
            "moe": {
                "n_routed_experts": experts,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 32,
                "n_shared_experts": 0,
                "first_k_dense_replace": 0,
                "bias_update_speed": speed,
            },
        }
    )


def work(cell: Cell) -> Cell:
    violation: list[float] = []
    dead: list[float] = []

    def watch(step: int, model: Model, output: Output) -> None:
        assert output.loads is not None
        loads = torch.stack([load.sum(0).float() for load in output.loads.values()])
        relative = loads / loads.mean(-1, keepdim=True)
        violation.append(float(relative.amax(-1).mean() - 1))
        dead.append(float((relative < 0.1).sum(-1).float().mean()))

    speed, weight = ARMS[cell["arm"]]
    result = train(config(cell["experts"], speed), LR, cell["steps"], cell["seed"], weight, watch)
    last = max(1, cell["steps"] // 5)
    return result | {
        "max_violation": statistics.fmean(violation[-last:]),
        "dead_experts": statistics.fmean(dead[-last:]),
        "violation_curve": binned(violation),
        "dead_curve": binned(dead),
    }


def binned(values: list[float]) -> list[float]:
    """Means of ``BIN`` steps each."""
    return [round(statistics.fmean(values[at : at + BIN]), 4) for at in range(0, len(values), BIN)]


def table(cells: list[Cell]) -> None:
    print("\n| experts | balance | seeds | MaxVio | dead experts | loss | skipped | s/step |")
    print("|---|---|---|---|---|---|---|---|")
    for (experts, arm), same in groups(cells, "experts", "arm"):
        columns = [[c[key] for c in same if c[key] is not None] for key in ("max_violation", "dead_experts", "loss")]
        print(
            f"| {experts} | {arm} | {len(same)} | "
            + " | ".join(shown(values) for values in columns)
            + f" | {sum(c['skipped'] for c in same)} | {min(c['seconds_per_step'] for c in same):.3f} |"
        )


def draw(cells: list[Cell], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # the same figure has the same bytes
    from matplotlib import pyplot

    counts = sorted({c["experts"] for c in cells})
    figure, axes = pyplot.subplots(2, len(counts), figsize=(4.5 * len(counts), 6), sharex=True, squeeze=False)
    for column, experts in enumerate(counts):
        for row, key in enumerate(("violation_curve", "dead_curve")):
            axis = axes[row, column]
            for number, arm in enumerate(ARMS):
                curves = [c[key] for c in cells if (c["experts"], c["arm"]) == (experts, arm)]
                if not curves:
                    continue
                shortest = min(map(len, curves))  # one that stopped is shorter
                steps = [BIN * (at + 0.5) for at in range(shortest)]
                points = [interval([curve[at] for curve in curves]) for at in range(shortest)]
                axis.plot(steps, [mean for mean, _ in points], color=f"C{number}", label=arm)
                low, high = ([mean + sign * half for mean, half in points] for sign in (-1, 1))
                axis.fill_between(steps, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
            axis.set_ylim(bottom=0)
        axes[0, column].set_title(f"{experts} experts")
        axes[1, column].set_xlabel("step")
    axes[0, 0].set_ylabel("MaxVio, mean ± 95 %")
    axes[1, 0].set_ylabel("dead experts, mean ± 95 %")
    axes[1, 0].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    print(f"figure: {path}")


def main() -> None:
    args = parser(__doc__, "study_balance", steps=300, plot="docs/study_balance.svg").parse_args()
    threads(args.threads)
    cells = grid(steps=[args.steps], experts=[*EXPERTS], seed=[*range(args.seeds)], arm=[*ARMS])
    done = run(chosen(cells, args.cells), args.out, args.limit, work)
    if done:
        table(done)
        draw(done, args.plot)


if __name__ == "__main__":
    main()
