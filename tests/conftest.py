"""What holds for the tests of every level."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

# How fast examples are made says how busy the machine is, and nothing about what is tested.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is long comes first: nobody should wait for it alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture
def show(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Takes a figure that was measured into the summary at the end, whether the test passes or not."""
    return lambda figure: request.node.user_properties.append(("measured", figure))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With several processes too: what a test has recorded comes with its report."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    figures = [str(value) for report in reports for name, value in report.user_properties if name == "measured"]
    if figures:
        terminalreporter.section("measured")
        for line in figures:
            terminalreporter.write_line(line)
