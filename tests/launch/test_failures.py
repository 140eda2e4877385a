"""What goes wrong on several ranks, in training, at a resume, on the disk: one message, and no checkpoint is lost."""

import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shardlaunch.checkpoints.reader import checkpoint_steps
from tests.launch.checks import DEMO, STEPS, assert_one_message, assert_valid, content_of, flip_byte, write_table
from tests.launch.command import (
    ACCELERATE,
    BERT,
    MNIST,
    PYTHON,
    SHARDLAUNCH,
    STUCK_S,
    TORCHRUN,
    TRACEBACK,
    Ended,
    end_of,
    environment,
    forked,
    forked_end_of,
)

POLL_INTERVAL_S = 0.1  # for a file that another process writes

# A user's own recipe, with what the tests need to go wrong in the place of #HERE.
OWN_RECIPE = """
import os, time
import torch
from shardlaunch import Options, Recipe, TensorData, launch

#HERE

class Own(Recipe):
    options: Options

    def datasets(self):
        inputs = torch.ones(32, 4)
        inputs[BAD_ROWS] = float("nan")
        return {"train": TensorData(inputs=inputs, labels=torch.zeros(32, dtype=torch.int64))}

    def model(self):
        return torch.nn.Linear(4, 2)

    def loss(self, outputs, batch):
        return torch.nn.functional.cross_entropy(outputs, batch["labels"], reduction="sum")

launch(Own)
"""


# Several ranks


def write_recipe(folder: Path, *, here: str) -> str:
    """Write a user's own recipe, with some lines before its class, and return its path."""
    path = folder / "own.py"
    path.write_text(OWN_RECIPE.replace("#HERE", here))
    return str(path)


def assert_said_once(ended: Ended, *says: str) -> None:
    """Check that two ranks ended with one message; torchrun's and accelerate's own words do not count."""
    assert ended.status > 0, ended.both
    assert ended.err.count("error: ") == 1, ended.both
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    for text in says:
        assert text in line, f"not said: {text}\n{ended.both}"


def test_single_with_two_ranks(tmp_path: Path, hf_home: Path) -> None:
    words = [*TORCHRUN, "--nproc-per-node", "2", MNIST, *DEMO, "--strategy", "single", "--output-dir", str(tmp_path)]
    assert_said_once(end_of(words, environment(hf_home)), "--strategy single", "2 ranks were started", "Use ddp")


def test_two_ranks_of_accelerate_that_are_one(tmp_path: Path, hf_home: Path) -> None:
    words = [*ACCELERATE, "--cpu", "--num_processes", "2", MNIST, *DEMO, "--output-dir", str(tmp_path)]
    assert_said_once(end_of(words, environment(hf_home)), "accelerate launch", "started one", "shardlaunch run")


@pytest.mark.parametrize("slow", ["nobody", "0"])
def test_two_ranks_say_it_once(tmp_path: Path, hf_home: Path, slow: str) -> None:
    """Also if the rank that prints is late: the launcher ends it soon after another rank has failed."""
    late = f'BAD_ROWS = []\nif os.environ["RANK"] == "{slow}":\n    time.sleep(3)'
    recipe = write_recipe(tmp_path, here=late)
    words = [*SHARDLAUNCH, "run", recipe, "--ranks", "2", "--", "--preset", "big", "--output-dir", str(tmp_path / "o")]
    ended = end_of(words, environment(hf_home))
    assert_one_message(ended, ["--preset big"])


def test_debug_shows_traceback(tmp_path: Path, hf_home: Path) -> None:
    words = [*PYTHON, MNIST, *DEMO, "--output-dir", str(tmp_path), "--strategy", "magic", "--debug"]
    ended = end_of(words, environment(hf_home))
    assert TRACEBACK in ended.err, ended.both
    assert_said_once(ended, "--strategy magic: must be one of")


# Training that goes wrong


@pytest.mark.parametrize("cause", ["learning rate", "data"])
def test_loss_not_finite(tmp_path: Path, hf_home: Path, cause: str) -> None:
    """Both ranks stop, the message names the step, and the checkpoint before it stays. One rank has the bad row."""
    if cause == "data":
        recipe, words = write_recipe(tmp_path, here="BAD_ROWS = [9]"), ["--global-batch-size", "8", *STEPS]
        words += ["--micro-batch-size", "4", "--max-steps", "8", "--seed", "1"]
    else:
        recipe, words = MNIST, [*DEMO, "--lr", "1e30"]
    run_dir = tmp_path / "run"
    words += ["--output-dir", str(run_dir)]
    if cause == "data":
        ended = end_of([*SHARDLAUNCH, "run", recipe, "--ranks", "2", "--", *words], environment(hf_home))
    else:
        ended = forked_end_of([*PYTHON, recipe, *words], environment(hf_home), num_ranks=2)
    assert_one_message(ended, ["loss nan", "before the update", "--lr"])
    step = int(ended.message.split("step ")[1].split(":")[0])
    assert step > 1, "the case needs a checkpoint before the bad step"
    assert_valid(run_dir, range(1, step))


def test_fp16_on_cpu(tmp_path: Path, hf_home: Path) -> None:
    """It works: products and their gradients are computed in fp16, with a loss scale."""
    words = [*PYTHON, MNIST, *DEMO, "--precision", "fp16", "--output-dir", str(tmp_path)]
    ended = forked_end_of(words, environment(hf_home))
    assert ended.status == 0, ended.both
    assert any(line.split() == ["precision", "fp16"] for line in ended.out.splitlines()), ended.both
    assert_valid(tmp_path, [1, 2, 3])
    state = json.loads((tmp_path / "checkpoints" / "step-00000003" / "trainer_state.json").read_text())
    assert state["loss_scale"]["value"] > 0


# Resume


def test_damaged_newest_is_skipped(tmp_path: Path, hf_home: Path, finished: Path) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run")
    flip_byte(run_dir, 3)
    ended = forked_end_of([*PYTHON, MNIST, *DEMO, "--output-dir", str(run_dir)], environment(hf_home))
    assert ended.status == 0, ended.both
    warnings = [line for line in ended.out.splitlines() + ended.err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1, ended.both
    assert "step-00000003/model-00001-of-00001.safetensors" in warnings[0]
    assert "step 2 (" in ended.out, ended.both
    assert_valid(run_dir, [1, 2, 3])
    assert weights_of(run_dir, 3) == weights_of(finished, 3)


def weights_of(run_dir: Path, step: int) -> bytes:
    """Return the weights file of a checkpoint."""
    return (run_dir / "checkpoints" / f"step-{step:08}" / "model-00001-of-00001.safetensors").read_bytes()


def test_resume_with_changed_data(tmp_path: Path, hf_home: Path) -> None:
    """One row that was edited is enough."""
    pixels = np.random.default_rng(0).integers(0, 256, size=(20, 28, 28), dtype=np.uint8)
    run_dir, data = tmp_path / "run", tmp_path / "digits.parquet"
    words = [*PYTHON, MNIST, "--data", str(data), *STEPS, "--global-batch-size", "16", "--output-dir", str(run_dir)]
    write_digits(data, pixels)
    first = forked_end_of(words, environment(hf_home))
    assert first.status == 0, first.both
    before = content_of(run_dir)
    pixels[7, 3, 3] ^= 1
    write_digits(data, pixels)
    ended = forked_end_of(words, environment(hf_home))
    assert_one_message(
        ended, [str(run_dir), "fingerprint of the train data: ", "To start a new run", f"--output-dir {run_dir}-2"]
    )
    assert content_of(run_dir) == before


def write_digits(path: Path, pixels: np.ndarray) -> None:
    """Write images as a Parquet file of PNGs with labels."""
    rows = []
    for image in pixels:
        png = io.BytesIO()
        Image.fromarray(image).save(png, format="PNG")
        rows.append({"bytes": png.getvalue(), "path": None})
    write_table(path, {"image": rows, "label": [number % 10 for number in range(len(rows))]})


# Output folders


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Return a function that mounts an empty file system of a size and returns its folder; skip where denied."""
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        folder = tmp_path / "disk"
        folder.mkdir()
        if os.geteuid() != 0 or shutil.which("mount") is None:
            pytest.skip("only root can mount a small file system")
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode != 0:
            pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_disk_full_at_start(small_disk: Callable[[str], Path], hf_home: Path) -> None:
    run_dir = small_disk("256k") / "run"
    ended = forked_end_of([*PYTHON, MNIST, *DEMO, "--output-dir", str(run_dir)], environment(hf_home))
    assert_one_message(ended, [f"--output-dir {run_dir}", "free", "one checkpoint takes at least"])
    assert_valid(run_dir, [])


@pytest.mark.parametrize(("size", "good_steps"), [("440k", []), ("1000k", [1, 2])])
def test_disk_full_at_a_save(
    small_disk: Callable[[str], Path], hf_home: Path, size: str, good_steps: list[int]
) -> None:
    """A save without room is dropped on both ranks; the run continues and reports the missing checkpoint at its end."""
    run_dir = small_disk(size) / "run"
    words = [*PYTHON, MNIST, *DEMO, "--max-steps", "4", "--output-dir", str(run_dir)]
    ended = forked_end_of(words, environment(hf_home), num_ranks=2)
    assert_one_message(ended, ["step 4", "last checkpoint could not be saved"])
    room, *warnings = [line for line in ended.out.splitlines() if line.startswith("warning:")]
    assert "are free, but 4 more checkpoints of" in room
    dropped = [step for step in (1, 2, 3, 4) if step not in good_steps]
    assert len(warnings) == len(dropped), ended.both
    for step, warning in zip(dropped, warnings, strict=True):
        assert f"step {step} was not saved" in warning
        assert "No space left" in warning
    assert "step 4/4" in ended.out, ended.both
    assert_valid(run_dir, good_steps)


def test_disk_filled_by_others(small_disk: Callable[[str], Path], tmp_path: Path, hf_home: Path) -> None:
    """Not even the metrics find room: both ranks end with a message, the checkpoint stays."""
    disk = small_disk("2m")
    run_dir = disk / "run"
    words = [*PYTHON, MNIST, *DEMO, "--max-steps", "600", "--save-every", "100", "--output-dir", str(run_dir)]
    with forked(words, environment(hf_home), num_ranks=2) as run:
        wait_for(lambda: checkpoint_steps(run_dir / "checkpoints"), run.ranks[0].is_alive)
        fill(disk)
        ended = run.end()
    assert_one_message(ended, ["run"])
    assert "No space left" in ended.out + ended.err, ended.both
    steps = checkpoint_steps(run_dir / "checkpoints")
    assert steps
    assert_valid(run_dir, steps)


def fill(disk: Path) -> None:
    """Write into a file until there is no room."""
    with open(disk / "other", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


@contextmanager
def started(words: Sequence[str], folder: Path, hf_home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command line whose output goes to the files out and err of a folder; end it if it still runs."""
    with open(folder / "out", "wb") as out, open(folder / "err", "wb") as err:
        process = subprocess.Popen(words, env=environment(hf_home), stdout=out, stderr=err, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=STUCK_S)


def wait_for(happened: Callable[[], object], is_running: Callable[[], bool]) -> None:
    """Wait until something has happened, while a run goes on."""
    while not happened():
        assert is_running(), "it ended before"
        time.sleep(POLL_INTERVAL_S)


def test_two_runs_in_one_folder(tmp_path: Path, hf_home: Path) -> None:
    """The second is refused; the first does not notice."""
    run_dir = tmp_path / "run"
    words = [*PYTHON, MNIST, *DEMO, "--output-dir", str(run_dir), "--save-every", "0"]
    with started([*words, "--max-steps", "1000000"], tmp_path, hf_home) as process:
        wait_for((run_dir / "metrics.jsonl").exists, lambda: process.poll() is None)
        ended = forked_end_of(words, environment(hf_home))
        assert process.poll() is None
    assert_one_message(ended, [f"--output-dir {run_dir}", "another run is using it", "choose another folder"])


# The hub

HUB_CASES = (
    ((*PYTHON, MNIST, "--data", "ylecun/mnist"), ("--data ylecun/mnist", "hub", "local path", "--preset demo")),
    (
        (*PYTHON, BERT, "--model", "google-bert/bert-base-uncased", "--data", "{folder}/texts.csv"),
        ("--model google-bert/bert-base-uncased", "hub", "local folder", "--preset demo"),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A command that asks the hub, what it must say, and the files of its output."""

    process: subprocess.Popen[bytes]
    says: tuple[str, ...]
    folder: Path

    def end(self) -> Ended:
        """Wait until it has ended."""
        status = self.process.wait(STUCK_S)
        return Ended(status=status, out=(self.folder / "stdout").read_text(), err=(self.folder / "stderr").read_text())


@pytest.fixture(scope="module", autouse=True)
def unreachable_hub(hf_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sequence[Asked]]:
    """Start what asks the hub before the first test of this file: the client waits between its retries."""
    asked = []
    for words, says in HUB_CASES:
        folder = tmp_path_factory.mktemp("hub")
        write_table(folder / "texts.csv", {"text": ["good", "bad"] * 9, "label": [1, 0] * 9})
        words = [*words, *STEPS, "--output-dir", str(folder / "run")]
        with open(folder / "stdout", "wb") as out, open(folder / "stderr", "wb") as err:
            process = subprocess.Popen(
                [word.format(folder=folder) for word in words],
                env=environment(hf_home),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        asked.append(Asked(process=process, says=says, folder=folder))
    yield asked
    for one in asked:
        one.process.kill()
        one.process.wait()


def test_hub_not_reachable(unreachable_hub: Sequence[Asked]) -> None:
    """The output ends with one message; the Hub's client prints its retries, between which it waits, before it."""
    all_ended = [asked.end() for asked in unreachable_hub]
    if not any(ended.status for ended in all_ended):
        pytest.skip("the hub is within reach here")
    for asked, ended in zip(unreachable_hub, all_ended, strict=True):
        ours = [line for line in ended.err.splitlines() if "Retry" not in line and "thrown while" not in line]
        assert_one_message(Ended(status=ended.status, out="", err="\n".join(ours)), asked.says)
