"""Settings and fixtures for all tests."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

DATA_VARIABLE = "SHARDLAUNCH_DATA"
TABLE = "resumes"
END_WITHIN_S = 10


def pytest_configure(config: pytest.Config) -> None:
    """Give the tests, and the processes that they start, a cache of data sets for this session, and no hub."""
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist share the cache
        os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="shardlaunch-tests-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True))
    _handle_signals()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "passive"  # several tests share the cores: a thread that waits must not spin


@pytest.fixture(autouse=True)
def _as_found() -> Iterator[None]:
    """Give each test what the one before found, and fail one that leaves a process group or a process."""
    _handle_signals()
    environment = dict(os.environ)
    threads = torch.get_num_threads()
    folder = os.getcwd()
    path = sys.path[:]  # to which the folder of a recipe is added
    before = set(psutil.Process().children(recursive=True))  # that a module's fixture has started
    yield
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    os.chdir(folder)
    sys.path[:] = path
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        pytest.fail("left a process group")
    left = _processes_left(before)
    for process in left:
        process.kill()
    if left:
        pytest.fail(f"left processes: {left}")


def _handle_signals() -> None:
    """Handle signals as usual: nohup ignores SIGHUP, and a run that has ended in this process ignores all of them.

    What is ignored, processes that are started would ignore too.
    """
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _processes_left(before: set[psutil.Process]) -> list[psutil.Process]:
    """Return what still runs of this process's further descendants, some time after it was to end."""
    me = psutil.Process()
    servers = {child.pid for child in me.children() if _is_server(child)}
    left = [process for process in set(me.children(recursive=True)) - before if process.pid not in servers]
    return psutil.wait_procs(left, timeout=END_WITHIN_S)[1] if left else []


def _is_server(process: psutil.Process) -> bool:
    """Say whether a child serves the whole session: it forks the tests' processes, or keeps track of semaphores."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return any("from multiprocessing." in word for word in process.cmdline())
    return False


@pytest.fixture(scope="session")
def hf_home() -> Path:
    """Return the cache of this session, for commands whose environment is not this one."""
    return Path(os.environ["HF_HOME"])


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
        terminalreporter.line("=: restored and saved again bit for bit; it did not train on")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a GPU if there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
