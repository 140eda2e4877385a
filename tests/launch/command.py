"""Run command lines: in processes of their own, as a person would, or forked, where most of it would be importing."""

import contextlib
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.distributed.ranks import FORKING, free_port, rank_environment, start_workers_as_usual

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
MNIST, BERT = str(RECIPES / "mnist_mlp.py"), str(RECIPES / "bert_imdb.py")
PLAIN = str(Path(__file__).with_name("plain_recipe.py"))
PYTHON = (sys.executable,)
SHARDLAUNCH = (str(Path(sys.executable).parent / "shardlaunch"),)
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
TRACEBACK = "Traceback (most recent call last)"
# What a launcher around the tests may have left in the environment, and what would change where data comes from.
_NOT_INHERITED = ("ACCELERATE_", "SHARDLAUNCH_", "HF_", "MASTER_", "TORCHELASTIC_", "FSDP_", "SLURM_", "OMPI_", "PMI_")
_NAMES_NOT_INHERITED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "OMP_NUM_THREADS",
    "TRANSFORMERS_OFFLINE",
)
STUCK_S = 300  # no short run takes so long; one that does would hang for ever


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Result of a command line."""

    status: int
    out: str
    err: str

    @property
    def both(self) -> str:
        """Return stdout and stderr, for test messages."""
        return f"exit status {self.status}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"

    @property
    def message(self) -> str:
        """Return stderr as one line, without the frame that tyro draws."""
        return " ".join("".join(" " if letter in "│╭╮╰╯─" else letter for letter in self.err).split())


@dataclass(frozen=True, kw_only=True)
class Forked:
    """Ranks of a command line in forked processes, and the files of their output."""

    ranks: list[BaseProcess]
    out: Path
    err: Path

    def end(self) -> Ended:
        """Wait until all ranks have ended; the status is the one that is farthest from 0."""
        for rank in self.ranks:
            rank.join(STUCK_S)
        statuses = [rank.exitcode for rank in self.ranks]
        assert None not in statuses, "a rank did not end"
        status = max(filter(None, statuses), key=abs, default=0)
        return Ended(status=status, out=self.out.read_text(), err=self.err.read_text())


def environment(hf_home: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a command: this one's, without launch settings, on CPU, with caches in `hf_home`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_NOT_INHERITED) and name not in _NAMES_NOT_INHERITED
    }
    return {**kept, "HF_HOME": str(hf_home), "ACCELERATE_USE_CPU": "true", **(extra or {})}


def end_of(words: Sequence[str], env: Mapping[str, str], *, stuck_s: float = STUCK_S) -> Ended:
    """Run a command line until it ends."""
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=stuck_s, stdin=subprocess.DEVNULL)
    return Ended(status=done.returncode, out=done.stdout, err=done.stderr)


@contextlib.contextmanager
def forked(words: Sequence[str], env: Mapping[str, str], *, num_ranks: int = 1) -> Iterator[Forked]:
    """Start the command line of a Python script, in processes forked from one that has loaded the libraries.

    All is as in `end_of` but for the start of the interpreter, the imports, and what libraries read as they are
    imported: of the environment, where the session's caches are. Several ranks are what a launcher starts, without a
    launcher. They are killed at the end.
    """
    script = list(words[1:] if words[0] == sys.executable else words)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        out.touch(), err.touch()
        processes = []
        for rank in range(num_ranks):
            its_env = {**env, **(rank_environment(rank, num_ranks, port) if num_ranks > 1 else {})}
            processes.append(FORKING.Process(target=run_script, args=(script, its_env, out, err)))
            processes[-1].start()
        try:
            yield Forked(ranks=processes, out=out, err=err)
        finally:
            for process in processes:
                process.kill()  # does nothing to one that has ended
                process.join()


def forked_end_of(words: Sequence[str], env: Mapping[str, str], *, num_ranks: int = 1) -> Ended:
    """Run the command line of a Python script until it ends, as `forked` starts it."""
    with forked(words, env, num_ranks=num_ranks) as run:
        return run.end()


def run_script(script: list[str], env: Mapping[str, str], out: Path, err: Path) -> None:
    """Run a script as `python script` would."""
    for path, descriptor in ((out, 1), (err, 2)):
        with open(path, "ab") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(env)
    if "SLURM_STEP_ID" in env:
        os.setsid()  # as srun does: tasks have no terminal
    start_workers_as_usual()
    sys.argv = script
    sys.path.insert(0, str(Path(script[0]).parent))
    runpy.run_path(script[0], run_name="__main__")
