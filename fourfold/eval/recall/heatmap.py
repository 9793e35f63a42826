"""The depth x length map of a recall suite as an SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure


def draw(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """One map a task, accuracy from 0 to 1. cells: of a report, each with task, length, depth and accuracy."""
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells}, key=lambda depth: -1 if depth is None else depth)
    figure = Figure(figsize=(1.5 + 0.8 * len(lengths), 0.8 + len(tasks) * (0.9 + 0.35 * len(depths))))
    FigureCanvasSVG(figure)
    for axes, task in zip(figure.subplots(len(tasks), squeeze=False)[:, 0], tasks, strict=True):
        grid = np.full((len(depths), len(lengths)), np.nan)
        for cell in cells:
            if cell["task"] == task:
                row, column = depths.index(cell["depth"]), lengths.index(cell["length"])
                grid[row, column] = cell["accuracy"]
                axes.text(column, row, f"{100 * cell['accuracy']:.0f}", ha="center", va="center", fontsize=8)
        axes.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_title(task, fontsize=9)
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
        axes.set_yticks(range(len(depths)), ["any" if d is None else f"{d:.0%}" for d in depths], fontsize=8)
    figure.tight_layout()
    figure.savefig(path, format="svg", metadata={"Date": None})
