"""Multi-query associative recall of token pairs (arXiv 2312.04927)."""

from __future__ import annotations

from typing import Any

from fourfold.eval import Subject
from fourfold.eval.recall import run_suite


def run(model: Subject, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings and errors as :func:`fourfold.eval.recall.run_suite`."""
    return run_suite("mqar", ("mqar",), model, settings)
