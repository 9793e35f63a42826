"""Whole runs in turn: ``python -m tests.distributed.worlds '[[PROCESSES, RECIPE, [OVERRIDE, ...]], ...]'``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from fourfold.train.loop import train
from tests.distributed.runs import free_port, join

Run = tuple[int, str, list[str]]


def launch(runs: list[Run]) -> None:
    """Raises RuntimeError with what the processes said if one of them failed."""
    command = [sys.executable, "-m", "tests.distributed.worlds", json.dumps(runs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, timeout=170)
    if done.returncode:
        raise RuntimeError(done.stderr.decode()[-6000:])


def work(rank: int, world: int, port: int, recipe: str, overrides: list[str]) -> None:
    join(rank, world, port)
    train(Path(recipe), overrides)


def main() -> None:
    """Forks once all is imported: that costs more than the runs."""
    torch.set_num_threads(1)
    for world, recipe, overrides in json.loads(sys.argv[1]):
        arguments = (world, free_port(), recipe, overrides)
        torch.multiprocessing.start_processes(work, arguments, nprocs=world, start_method="fork")


if __name__ == "__main__":
    main()
