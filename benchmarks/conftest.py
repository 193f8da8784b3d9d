"""`pytest benchmarks`: the kernels' figures in GB/s and GFLOP/s behind pytest-benchmark's own table."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # its modules import each other by their names, as scripts do

from report import kernel_table

rows: list[dict[str, Any]] = []


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Keep what a benchmark has found."""
    fixture = getattr(item, "funcargs", {}).get("benchmark")
    if fixture is not None and fixture.extra_info:
        rows.append({"name": fixture.name.removeprefix("test_"), **fixture.extra_info})


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table."""
    if rows:
        terminalreporter.section("kernels, of the best round")
        terminalreporter.write(kernel_table(rows))
