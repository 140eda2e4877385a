"""The task that all tools train: a small perceptron on points made from a seed. Imports nothing but torch.

It writes into SURVIVAL_DIR what a start did: its processes, the ids of the samples of each step that it began, and a
line for each update of the weights, per rank. There the campaign also makes it wait in a phase (SURVIVAL_PHASE), until
it has sent its signal; the steps after that take a quarter of a second each, so that a signal finds a run that is not
over.
"""

import ctypes
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

NUM_TRAIN, NUM_EVAL, NUM_FEATURES = 256, 64, 16
GLOBAL_BATCH_SIZE = 16
NUM_EPOCHS = 3
NUM_STEPS = NUM_EPOCHS * NUM_TRAIN // GLOBAL_BATCH_SIZE
SAVE_EVERY, EVAL_EVERY = 10, 8
FAULT_STEP, EVALUATED_STEP, SAVED_STEP = 25, 24, 20  # of a fault: the first two are in the second epoch
LEARNING_RATE = 0.01
SEED = 0
SLOW_STEP_S = 0.25
LONGEST_WAIT_S = 40.0

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))
_KILL = 3  # of shim.c


class Task:
    """One start of a run, on one rank."""

    def __init__(self) -> None:
        self.folder = Path(os.environ["SURVIVAL_DIR"])
        self.run_dir = self.folder / "run"
        self.batch_size = GLOBAL_BATCH_SIZE // WORLD_SIZE
        self._start = os.environ["SURVIVAL_START"]
        self._phase = os.environ.get("SURVIVAL_PHASE", "")
        self._call = os.environ.get("SURVIVAL_CALL", "")
        self._step = 0
        self._is_slow = False
        self._write(f"pid-{self._start}-{RANK}", str(os.getpid()))
        register_optimizer_step_post_hook(lambda *_: self._updated())

    def points(self, split: str) -> dict[str, torch.Tensor]:
        """Return inputs, labels and ids of the samples of `train` or `eval`."""
        is_train = split == "train"
        num_samples = NUM_TRAIN if is_train else NUM_EVAL
        inputs = torch.randn(num_samples, NUM_FEATURES, generator=torch.Generator().manual_seed(int(is_train)))
        return {"inputs": inputs, "labels": (inputs.sum(1) > 0).long(), "ids": torch.arange(num_samples)}

    def model(self) -> "Net":
        """Return a new model, the same on all ranks."""
        self.wait("start-up")
        torch.manual_seed(SEED)
        return Net(self)

    def wait(self, phase: str) -> None:
        """Wait here for the fault, if it is to come in this phase."""
        if phase != self._phase:
            return
        self._phase = ""
        self._write(f"mark-{RANK}", phase)
        end = time.monotonic() + LONGEST_WAIT_S
        while not (self.folder / "go").exists() and time.monotonic() < end:
            time.sleep(0.02)
        self._is_slow = True

    def train_on(self, ids: torch.Tensor) -> None:
        """Note the samples of a step, which begins."""
        self._note_calls()
        self._write(f"ids-{self._start}-{RANK}", json.dumps(ids.tolist()) + "\n")
        if self._step == FAULT_STEP:
            self.wait("step")
        elif self._is_slow:
            time.sleep(SLOW_STEP_S)
        self._step += 1

    def evaluate(self) -> None:
        """Note that a batch is evaluated."""
        if self._step == EVALUATED_STEP:
            self.wait("evaluation")

    def save(self) -> None:
        """Note that a checkpoint is being written."""
        if self._step == SAVED_STEP:
            self.wait("saving")

    def finish(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Note the weights of a run that is done."""
        if RANK == 0:
            digest = hashlib.sha256()
            for tensor in _in_order(tensors):
                digest.update(tensor.detach().contiguous().numpy().tobytes())
            self._write("final", digest.hexdigest())

    def _updated(self) -> None:
        """Note an update. From that before a save, let the shim count the changes of files, and kill at one of them."""
        self._write(f"updates-{self._start}-{RANK}", "\n")
        if self._call and self._step == SAVED_STEP:
            call = ctypes.c_long(int(self._call))
            log = self.folder.with_suffix(".calls")
            # tests/faults/shim.c
            ctypes.CDLL(None).shim_arm(str(self.folder).encode(), str(log).encode(), call, call, _KILL, 0, 0, 1)

    def _note_calls(self) -> None:
        """Note how many changes of files a save is, once the next step begins."""
        if self._call and self._step == SAVED_STEP:
            calls = self.folder.with_suffix(".calls").read_bytes().splitlines()
            self._write("num-calls", str(len(calls)))

    def _write(self, name: str, text: str) -> None:
        descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, text.encode())
        os.close(descriptor)


def _in_order(tensors: Mapping[str, torch.Tensor]) -> Iterable[torch.Tensor]:
    return (tensors[name] for name in sorted(tensors))


class Net(nn.Module):
    """A perceptron with dropout, so that the state of the generators counts."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self._task = task
        dropout = nn.Dropout(float(os.environ.get("SURVIVAL_DROPOUT", "0.1")))
        self.layers = nn.Sequential(
            nn.Linear(NUM_FEATURES, 64), nn.ReLU(), dropout, nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
        )

    def forward(self, inputs: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits of a batch."""
        if self.training:
            self._task.train_on(ids)
        else:
            self._task.evaluate()
        logits: torch.Tensor = self.layers(inputs)
        return logits
