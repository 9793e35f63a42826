"""Says at the end of a run how close the models came."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parity.worst import SEEN, remember


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # one of several processes hands in what it saw
        session.config.workeroutput["worst"] = SEEN


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for what, value in getattr(node, "workeroutput", {}).get("worst", {}).items():
        remember(what, value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if SEEN:
        terminalreporter.section("greatest difference from the reference")
        for what, value in sorted(SEEN.items()):
            terminalreporter.write_line(f"{what}: {value:.1e}")
