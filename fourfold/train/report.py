"""The report of a run: one HTML file with its curves, drawn from ``metrics.jsonl``."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fourfold.train.metrics import read_metrics

# Title and the metrics in one plot; a plot without any of its metrics is left out.
PLOTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Loss (nats per target)", ("loss", "loss_text", "loss_image", "loss_video", "loss_audio", "mtp_loss")),
    ("Learning rate", ("lr",)),
    ("Gradient norm, before clipping", ("grad_norm",)),
    ("MaxVio: load of the fullest expert over the mean, minus 1", ("max_violation",)),
    ("Composite gain of the stream mixing", ("gain_forward", "gain_backward")),
    ("Indexer: KL to the attention", ("index_kl",)),
    ("Tokens per second", ("tokens_per_second",)),
)
LOGARITHMIC = ("lr", "grad_norm", "gain_forward", "gain_backward", "index_kl")

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }}
img {{ width: 100%; max-width: 31rem }} td, th {{ padding: 0 1rem 0 0; text-align: left }}
</style>
<h1>{title}</h1>
<table>{rows}</table>
{images}
<details><summary>Recipe</summary><pre>{recipe}</pre></details>
</html>
"""


def write_report(run: Path) -> Path:
    """Writes ``report.html`` of a run directory, whole or not at all. Returns its path.

    Raises ValueError if the run has logged nothing.
    """
    run = Path(run)
    lines = read_metrics(run)
    if not lines:
        raise ValueError(f"report: {run} has no metrics.jsonl with a logged step")
    recipe = json.loads((run / "recipe.json").read_text()) if (run / "recipe.json").is_file() else {}
    images = [image(title, drawn) for title, names in PLOTS if (drawn := curves(lines, names))]
    cells = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in summary(lines, recipe))
    page = PAGE.format(
        title=html.escape(f"Training run {run.resolve().name}"),
        rows=cells,
        images="\n".join(images),
        recipe=html.escape(json.dumps(recipe, indent=1)),
    )
    path, partial = run / "report.html", run / ".report.html.partial"
    partial.write_text(page)
    os.replace(partial, path)
    return path


def summary(lines: list[dict[str, Any]], recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """What the last line says, in words and numbers; the mean speed of all."""
    last = lines[-1]
    rates = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second")]
    shares = [line["mfu"] for line in lines if line.get("mfu")]
    rows = [("steps", str(last["step"])), ("skipped steps", f"{last.get('skipped') or 0:.0f}")]
    rows += [(name, f"{last[name]:.4f}") for name in PLOTS[0][1] if last.get(name) is not None]
    if rates:
        rows.append(("tokens/s, mean", f"{sum(rates) / len(rates):,.0f}"))
    if shares and last.get("peak_flops"):
        how = "assumed in the recipe" if recipe.get("peak_flops") else "measured by a matrix product"
        rows.append(("MFU, mean", f"{sum(shares) / len(shares):.2%} of {last['peak_flops']:.3g} FLOP/s ({how})"))
    if last.get("peak_memory"):
        rows.append(("peak memory", f"{last['peak_memory'] / 2**30:.2f} GiB"))
    return rows


def curves(lines: list[dict[str, Any]], names: tuple[str, ...]) -> dict[str, tuple[list[float], list[float]]]:
    """Steps and values of each metric that was ever logged; a value that was not finite is a gap."""
    found = {}
    for name in names:
        points = [(line["step"], line[name]) for line in lines if name in line]
        if any(value is not None for _, value in points):
            found[name] = ([step for step, _ in points], [math.nan if value is None else value for _, value in points])
    return found


def image(title: str, drawn: dict[str, tuple[list[float], list[float]]]) -> str:
    """An ``<img>`` that carries its PNG."""
    figure = Figure(figsize=(6.2, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title=title, xlabel="step")
    for name, (steps, values) in drawn.items():
        axes.plot(steps, values, label=name, linewidth=1.2, marker="." if len(steps) < 20 else "")
    if set(drawn) <= set(LOGARITHMIC) and all(not v <= 0 for _, values in drawn.values() for v in values):
        axes.set_yscale("log")
    if len(drawn) > 1:
        axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
