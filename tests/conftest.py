"""Settings and fixtures for all tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

DATA_VARIABLE = "SHARDLAUNCH_DATA"
TABLE = "resumes"


@pytest.fixture(autouse=True)
def _restored_environment() -> Iterator[None]:
    """Restore the environment and the number of threads after each test."""
    environment = dict(os.environ)
    threads = torch.get_num_threads()
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the folder of full data sets, or skip."""
    if not os.environ.get(DATA_VARIABLE):
        pytest.skip(f"{DATA_VARIABLE} does not name a folder with the data sets (see CONTRIBUTING.md)")
    return Path(os.environ[DATA_VARIABLE])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of resumes; each test adds a row."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [entry for report in reports for entry in getattr(report, "user_properties", ())]
    rows = dict(value for name, value in properties if name == TABLE)
    if rows:
        terminalreporter.section("max loss difference: saved under (column), resumed under (row)")
        columns = list(next(iter(rows.values())))
        terminalreporter.line(" " * 10 + "".join(f"{column:>10}" for column in columns))
        for target, row in rows.items():
            terminalreporter.line(f"{target:<10}" + "".join(f"{row[column]:>10}" for column in columns))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU if there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
