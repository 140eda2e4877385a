"""The stacks of a run that hangs."""

import subprocess
import sys

import pytest

from shardlaunch.launcher.training.hang_report import DUMP_SIGNAL

# A thread reports as the watchdog does, then goes on: deep calls take and release the memory that holds its frames.
REPORTER = """
import os, threading, time
from shardlaunch.launcher.training.hang_report import Memory
from shardlaunch.progress import progress
memory = Memory(progress)
def deep(depth):
    return depth and deep(depth - 1)
def report():
    for _ in range(1000):
        os.ftruncate(memory.stacks, 0)
        memory.write_own_stacks()
        for _ in range(3):
            deep(700)
thread = threading.Thread(target=report)
thread.start()
while thread.is_alive():
    time.sleep(0.05)
print(open(f"/proc/self/fd/{memory.stacks}").read())
"""


@pytest.mark.skipif(DUMP_SIGNAL is None, reason="no files in memory on this system")
def test_a_process_that_writes_its_own_stacks_lives_on() -> None:
    ended = subprocess.run([sys.executable, "-c", REPORTER], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{ended.returncode}\n{ended.stderr}"
    assert " in report\n" in ended.stdout
