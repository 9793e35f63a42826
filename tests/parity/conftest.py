"""Says at the end of a run how close the models came."""

from __future__ import annotations

import pytest

from tests.parity import worst


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if worst.SEEN:
        terminalreporter.section("greatest difference from the reference")
        for what, value in sorted(worst.SEEN.items()):
            terminalreporter.write_line(f"{what}: {value:.1e}")
