"""Run real command lines in separate processes, as a user would."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
MNIST, BERT = str(RECIPES / "mnist_mlp.py"), str(RECIPES / "bert_imdb.py")
PYTHON = (sys.executable,)
SHARDLAUNCH = (str(Path(sys.executable).parent / "shardlaunch"),)
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
TRACEBACK = "Traceback (most recent call last)"
# What a launcher around the tests may have left in the environment, and what would change where data comes from.
_NOT_INHERITED = ("ACCELERATE_", "SHARDLAUNCH_", "HF_", "MASTER_", "TORCHELASTIC_", "FSDP_")
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
