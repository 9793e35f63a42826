"""What every benchmark shares: interleaved timing, the machine, and the JSON it writes."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def arguments(description: str) -> argparse.Namespace:
    return parser(description).parse_args()


def parser(description: str) -> argparse.ArgumentParser:
    """The flags of every benchmark, to which one may add its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each arm (default: 7)")
    return parser


def interleaved(arms: dict[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each arm, A B A B ..., so that a drifting machine drifts for all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for run in range(warmup + repeats):
        for name, arm in arms.items():
            began = time.perf_counter()
            arm()
            if run >= warmup:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def case(
    ours: float, peer: float | None, limit: float | None, unit: str, spread: list[float], **extra: Any
) -> dict[str, Any]:
    """One line of the report; ratio is ours / peer. ``spread``: smallest and largest of ours."""
    return {
        "ours": ours,
        "peer": peer,
        "ratio": None if peer is None else ours / peer,
        "limit": limit,
        "fraction_of_limit": None if limit is None else limit / ours,
        "unit": unit,
        "min": min(spread),
        "max": max(spread),
        "machine": machine(),
        "commit": commit(),
        **extra,
    }


def machine() -> str:
    return f"{processor()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    run = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def finish(cases: dict[str, dict[str, Any]], out: Path | None) -> None:
    for name, values in cases.items():
        ratio = "" if values["ratio"] is None else f", {values['ratio']:.2f} x {values.get('peer_name', 'the peer')}"
        print(f"{name}: {values['ours']:.4g} {values['unit']} [{values['min']:.4g} .. {values['max']:.4g}]{ratio}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(cases, indent=1) + "\n")


def median(values: list[float]) -> float:
    return statistics.median(values)
