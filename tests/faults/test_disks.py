"""A disk that fails, a kill and a power loss at any file-system call: the short form of three campaigns."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUCK_S = 300


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads a library as Linux does")
def test_faults_at_some_calls_of_a_resume_leave_it_as_it_would_be() -> None:
    words = [sys.executable, "-m", "tests.faults"]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=STUCK_S, cwd=ROOT)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    num_calls = [int(number) for number in re.findall(r"([\d,]+) calls", ended.stdout)]
    assert min(num_calls) > 100, "they were counted"
