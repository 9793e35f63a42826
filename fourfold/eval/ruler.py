"""The eleven generated tasks of RULER (arXiv 2404.06654)."""

from __future__ import annotations

from typing import Any

from fourfold.data.recall import RULER
from fourfold.eval import Subject
from fourfold.eval.recall import run_suite


def run(model: Subject, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings and errors as :func:`fourfold.eval.recall.run_suite`."""
    return run_suite("ruler", RULER, model, settings)
