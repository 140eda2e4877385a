"""The table of families at the end of `make test-families`."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how each family compares with transformers; each test adds a row."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [entry for report in reports for entry in getattr(report, "user_properties", ())]
    rows = sorted({value for name, value in properties if name == "family"})
    if len(rows) > 20:
        terminalreporter.section("families, compared with plain transformers")
        for kind, family, result in rows:
            terminalreporter.line(f"{kind:<30}{family:<24}{result}")
