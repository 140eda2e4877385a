"""What a run prints may have lost its reader."""

import os
import subprocess
import sys

import pytest

from shardlaunch.launcher.reporting.streams import LastingStream, survive_closed_output


def test_a_pipe_whose_reader_has_gone() -> None:
    reading, writing = os.pipe()
    with open(writing, "w", buffering=1) as plain:
        stream = LastingStream(plain)
        assert stream.write("read\n") == 5
        assert os.read(reading, 10) == b"read\n"
        os.close(reading)
        with pytest.raises(BrokenPipeError):
            plain.write("lost\n")
        assert stream.write("lost\n") == 5
        stream.flush()
        assert stream.fileno() == writing
        os.dup2(os.open(os.devnull, os.O_WRONLY), writing)  # for what is left in the buffer


def test_streams_are_wrapped_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", sys.__stdout__)
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw
    survive_closed_output()
    first = sys.stdout
    survive_closed_output()
    assert sys.stdout is first
    assert sys.stderr is None


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_no_file_gets_the_descriptor_of_a_closed_stream(closed: int) -> None:
    lines = [
        "import os, sys",
        "from shardlaunch.launcher.reporting.streams import survive_closed_output",
        "survive_closed_output()",
        "print('out'), print('err', file=sys.stderr), sys.stdout.flush()",
        "sys.exit(40 + open(os.devnull).fileno())",
    ]
    process = subprocess.Popen([sys.executable, "-c", "\n".join(lines)], preexec_fn=lambda: os.close(closed))
    assert process.wait() > 42
