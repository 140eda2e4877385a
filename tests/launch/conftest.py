"""Fixtures of the tests that run command lines."""

from pathlib import Path

import pytest

from tests.launch.checks import DEMO
from tests.launch.command import MNIST, PYTHON, environment, forked_end_of


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, hf_home: Path) -> Path:
    """Return the folder of a run of the MNIST demo with checkpoints of the steps 1 to 3. To be copied, not used."""
    output_dir = tmp_path_factory.mktemp("finished")
    ended = forked_end_of([*PYTHON, MNIST, *DEMO, "--output-dir", str(output_dir)], environment(hf_home))
    assert ended.status == 0, ended.both
    return output_dir
