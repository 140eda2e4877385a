"""Bad input: one clear message on stderr, a non-zero exit status, no traceback, and nothing is lost."""

import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import checkpoint_steps, open_checkpoint
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
)

STEPS = ("--max-steps", "3", "--save-every", "1", "--keep", "0", "--tracker", "none")
DEMO = ("--preset", "demo", *STEPS)
TEXTS = ("--model", "demo", "--max-steps", "1", "--tracker", "none")
WORKERS = 2
LOOK_EVERY_S = 0.1  # between two looks at a file that another process writes

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


@dataclass(frozen=True, kw_only=True)
class Case:
    """Say what is launched and what must be printed.

    Words may hold {inputs}: the folder of bad files; {out}: an output folder not yet there; {run}: a copy of a run with
    checkpoints of the steps 1 to 3. `says` are parts of the one message.
    """

    name: str
    words: tuple[str, ...]
    says: tuple[str, ...]
    never_says: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    damaged: tuple[int, ...] = ()  # steps of {run} with a flipped byte


def mnist(name: str, *words: str, says: tuple[str, ...], env: Mapping[str, str] | None = None) -> Case:
    """Return a case of the MNIST demo with some further words."""
    return Case(name=name, words=(*PYTHON, MNIST, *DEMO, "--output-dir", "{out}", *words), says=says, env=env or {})


def images(name: str, path: str, *says: str) -> Case:
    """Return a case of the MNIST recipe with some file of `inputs`."""
    data = ("--data", f"{{inputs}}/{path}")
    return Case(name=name, words=(*PYTHON, MNIST, *STEPS, *data, "--output-dir", "{out}"), says=says)


def texts(name: str, *words: str, says: tuple[str, ...]) -> Case:
    """Return a case of the BERT recipe."""
    return Case(name=name, words=(*PYTHON, BERT, *TEXTS, "--output-dir", "{out}", *words), says=says)


def resumed(name: str, *words: str, says: tuple[str, ...], damaged: tuple[int, ...] = ()) -> Case:
    """Return a case of the MNIST demo in the folder of a run with three checkpoints."""
    all_words = (*PYTHON, MNIST, *DEMO, "--output-dir", "{run}", *words)
    return Case(name=name, words=all_words, says=says, damaged=damaged)


HUB_CASES = (
    Case(
        name="hub data not reachable",
        words=(*PYTHON, MNIST, *STEPS, "--data", "ylecun/mnist", "--output-dir", "{out}"),
        says=("--data ylecun/mnist", "hub", "local path", "--preset demo"),
    ),
    texts(
        "hub model not reachable",
        *("--model", "google-bert/bert-base-uncased", "--data", "{inputs}/texts.csv"),
        says=("--model google-bert/bert-base-uncased", "hub", "local folder", "--preset demo"),
    ),
)

CASES = (
    # Options
    mnist("unknown option", "--learning-rate", "1", says=("--learning-rate", "did you mean --lr?")),
    mnist("wrong type", "--lr", "fast", says=("--lr fast", "must be a number")),
    mnist("unknown preset", "--preset", "big", says=("--preset big", "unknown", "demo")),
    mnist("no config file", "--config", "{inputs}/none.yaml", says=("--config {inputs}/none.yaml", "No such file")),
    mnist("config not YAML", "--config", "{inputs}/bad.yaml", says=("--config {inputs}/bad.yaml", "not valid YAML")),
    mnist(
        "unknown key in config",
        *("--config", "{inputs}/unknown.yaml"),
        says=("--config {inputs}/unknown.yaml: learning_rate: did you mean --lr?",),
    ),
    mnist("batches do not fit", "--global-batch-size", "60", says=("--global-batch-size 60", "--micro-batch-size 16")),
    mnist("unknown precision", "--precision", "fp9", says=("--precision fp9", "fp32, bf16, fp16, fp8")),
    mnist("fp8 without a GPU", "--precision", "fp8", says=("--precision fp8", "8.9", "Use bf16 or fp32")),
    mnist("unknown tracker", "--tracker", "paper", says=("--tracker paper", "unknown", "tensorboard")),
    # What was launched
    mnist("unknown strategy", "--strategy", "magic", says=("--strategy magic: must be one of", "single", "ddp")),
    mnist(
        "strategies contradict",
        *("--strategy", "single"),
        env={"SHARDLAUNCH_STRATEGY": "dp"},
        says=("--strategy single", "SHARDLAUNCH_STRATEGY=dp", "Remove one"),
    ),
    mnist("ranks not there", env={"SHARDLAUNCH_RANKS": "2"}, says=("SHARDLAUNCH_RANKS=2", "1")),
    mnist("ranks no number", env={"SHARDLAUNCH_RANKS": "two"}, says=("SHARDLAUNCH_RANKS='two'", "whole number")),
    # Data and model
    Case(
        name="no such data",
        words=(*PYTHON, MNIST, *STEPS, "--data", "{inputs}/none.csv", "--output-dir", "{out}"),
        says=("--data {inputs}/none.csv", "no such file"),
    ),
    images("no rows in CSV", "header.csv", "header.csv", "no rows"),
    images("no bytes in JSON lines", "zero.jsonl", "zero.jsonl"),
    images("no file in folder", "empty", "{inputs}/empty", "no .parquet, .csv, .json, .jsonl, .txt file"),
    images("no Parquet in Parquet file", "broken.parquet", "broken.parquet", "not readable"),
    images("no training data", "held_out_only", "{inputs}/held_out_only", "train"),
    images("Parquet without columns", "columns.parquet", "'image'", "'label'", "'pixels'", "'digit'"),
    images("JSON lines without column", "columns.jsonl", "no column 'label'", "'digit'"),
    texts(
        "CSV without column",
        *("--data", "{inputs}/columns.csv"),
        says=("no column 'text'", "it has 'review', 'label'"),
    ),
    images("negative label", "negative.csv", "labels out of range", "-1"),
    images("label missing", "missing.jsonl", "without a 'label'"),
    texts(
        "label of eval unknown to train",
        *("--data", "{inputs}/unknown_label"),
        says=("labels out of range", "'angry'", "eval data", "those of the training data are 'happy', 'sad'"),
    ),
    texts("text missing", "--data", "{inputs}/no_text.csv", says=("'text'",)),
    texts(
        "no model folder",
        *("--model", "{inputs}/empty", "--data", "{inputs}/texts.csv"),
        says=("--model {inputs}/empty", "not a model folder"),
    ),
    # Output
    mnist(
        "output below a file",
        *("--output-dir", "{inputs}/texts.csv/run"),
        says=("--output-dir {inputs}/texts.csv/run", "Not a directory"),
    ),
    mnist("output not writable", "--output-dir", "/proc/run", says=("--output-dir /proc/run", "cannot be created")),
    # Resume
    resumed("resume never", "--resume", "never", says=("--resume never", "{run}", "another --output-dir")),
    mnist("no such resume", "--resume", "{inputs}/none", says=("--resume {inputs}/none", "no such folder")),
    mnist("resume without checkpoint", "--resume", "{inputs}/empty", says=("--resume {inputs}/empty", "manifest.json")),
    resumed(
        "resume from damaged",
        *("--resume", "{run}/checkpoints/step-00000003"),
        says=("--resume {run}/checkpoints/step-00000003", "model-00001-of-00001.safetensors", "damaged"),
        damaged=(3,),
    ),
    resumed(
        "all damaged",
        says=("{run}/checkpoints", "step-00000003/model-00001-of-00001.safetensors", "another --output-dir"),
        damaged=(1, 2, 3),
    ),
    resumed(
        "resume of another run",
        *("--lr", "0.2", "--seed", "5"),
        says=("{run}", "--lr was 0.1 and is 0.2", "--seed was 0 and is 5", "another --output-dir"),
    ),
    # The console command
    Case(
        name="predict without checkpoint",
        words=(*SHARDLAUNCH, "predict", "{inputs}/none", "--text", "good"),
        says=("{inputs}/none", "no such folder"),
        never_says=("--resume",),
    ),
    Case(
        name="predict with digits",
        words=(*SHARDLAUNCH, "predict", "{run}", "--text", "good"),
        says=("{run}", "mnist_mlp.MnistMlp", "not a text classifier"),
    ),
    Case(
        name="no recipe", words=(*SHARDLAUNCH, "run", "{inputs}/none.py"), says=("{inputs}/none.py", "no such recipe")
    ),
)


@pytest.fixture(scope="session")
def hf_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an empty cache for this session."""
    return tmp_path_factory.mktemp("hf")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, hf_home: Path) -> Path:
    """Return the folder of a run of the MNIST demo with checkpoints of the steps 1 to 3. To be copied, not used."""
    output_dir = tmp_path_factory.mktemp("finished")
    ended = end_of([*PYTHON, MNIST, *DEMO, "--output-dir", str(output_dir)], environment(hf_home))
    assert ended.status == 0, ended.both
    return output_dir


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of files that are no good, each in its own way."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in ("empty", "held_out_only", "unknown_label"):
        (folder / name).mkdir()
    (folder / "bad.yaml").write_text("lr: [1\nb: {")
    (folder / "unknown.yaml").write_text("learning_rate: 0.1\n")
    lines = [f"line {number}" for number in range(20)]
    classes = [number % 2 for number in range(20)]
    tables = {
        "texts.csv": {"text": lines, "label": classes},
        "header.csv": {"image": [], "label": []},
        "held_out_only/test.csv": {"image": lines, "label": classes},
        "columns.csv": {"review": lines, "label": classes},
        "columns.parquet": {"pixels": lines, "digit": classes},
        "columns.jsonl": {"image": lines, "digit": classes},
        "negative.csv": {"image": lines, "label": [-1, *classes[1:]]},
        "unknown_label/train.csv": {"text": lines, "label": ["happy", "sad"] * 10},
        "unknown_label/test.csv": {"text": lines, "label": ["happy", "angry"] * 10},
        "missing.jsonl": {"image": lines, "label": [*classes[1:], None]},
        "no_text.csv": {"text": [*lines[1:], None], "label": classes},
    }
    for name, columns in tables.items():
        write_table(folder / name, columns)
    (folder / "zero.jsonl").write_text("")
    (folder / "broken.parquet").write_text("no Parquet" * 10)
    return folder


def write_table(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    """Write columns as CSV, Parquet or JSON lines."""
    if path.suffix == ".csv":
        pd.DataFrame(columns).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(columns).to_parquet(path)
    else:
        rows = zip(*columns.values(), strict=True)
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))


@dataclass(frozen=True, kw_only=True)
class Told:
    """Hold how a case ended and what it must have said, with its folders."""

    ended: Ended
    says: tuple[str, ...]
    output_dir: Path
    run_dir: Path
    files_before: Mapping[str, bytes]


@pytest.fixture(scope="session")
def told(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, hf_home: Path, inputs: Path
) -> Iterator[Callable[[Case], Told]]:
    """Return how a case ended. All that are selected are launched at once, some at a time: most of it is importing."""
    cases = [item.callspec.params["case"] for item in request.session.items if "case" in params_of(item)]
    is_copied = any("{run}" in word for case in cases for word in case.words)
    run_dir = request.getfixturevalue("finished") if is_copied else None
    futures: dict[str, Future[Told]] = {}
    with ThreadPoolExecutor(WORKERS) as pool, ThreadPoolExecutor(len(HUB_CASES)) as waiting_for_hub:
        for case in cases:
            folder = tmp_path_factory.mktemp("case")
            executor = waiting_for_hub if case in HUB_CASES else pool
            futures[case.name] = executor.submit(play, case, folder, finished=run_dir, inputs=inputs, hf_home=hf_home)
        yield lambda case: futures[case.name].result()
        for future in futures.values():
            future.cancel()


def params_of(item: pytest.Item) -> Mapping[str, object]:
    """Return the parameters of a test."""
    return item.callspec.params if hasattr(item, "callspec") else {}


def play(case: Case, folder: Path, *, finished: Path | None, inputs: Path, hf_home: Path) -> Told:
    """Launch a case and wait for its end."""
    places = {"inputs": str(inputs), "out": str(folder / "out"), "run": str(folder / "run")}
    if finished is not None and any("{run}" in word for word in case.words):
        shutil.copytree(finished, folder / "run")
        for step in case.damaged:
            flip_byte(folder / "run", step)
    files_before = content_of(folder / "run")
    ended = end_of([word.format(**places) for word in case.words], environment(hf_home, case.env))
    return Told(
        ended=ended,
        says=tuple(text.format(**places) for text in case.says),
        output_dir=folder / "out",
        run_dir=folder / "run",
        files_before=files_before,
    )


def flip_byte(run_dir: Path, step: int) -> None:
    """Damage the weights of a checkpoint, in the middle of a tensor."""
    path = run_dir / "checkpoints" / f"step-{step:08}" / "model-00001-of-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def content_of(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_one_message(ended: Ended, says: Sequence[str]) -> None:
    """Check that a command was refused with just one message, which says what it should."""
    assert ended.status > 0, ended.both
    assert TRACEBACK not in ended.err, ended.both
    lines = ended.err.strip().splitlines()
    assert lines, f"no message\n{ended.both}"
    is_line = len(lines) == 1 and lines[0].startswith("error: ")
    is_frame = lines[0].startswith("╭") and lines[-1].startswith("╰") and ended.err.count("╭") == 1
    assert is_line or is_frame, f"more than one message\n{ended.both}"
    for text in says:
        assert text in ended.message, f"not said: {text}\n{ended.both}"


def assert_valid(run_dir: Path, steps: Sequence[int]) -> None:
    """Check that a run has just these checkpoints and that they are valid."""
    checkpoints_dir = run_dir / "checkpoints"
    assert checkpoint_steps(checkpoints_dir) == list(steps)
    for step in steps:
        assert open_checkpoint(checkpoints_dir / f"step-{step:08}", peers=Peers()).step == step
    assert not list(checkpoints_dir.glob(".*")), "left behind"


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_one_message(case: Case, told: Callable[[Case], Told]) -> None:
    """One message that says what, where and what to do, before any step, and no file of an earlier run is touched."""
    outcome = told(case)
    assert_one_message(outcome.ended, outcome.says)
    for text in case.never_says:
        assert text not in outcome.ended.err, outcome.ended.both
    assert "step 1/" not in outcome.ended.out, outcome.ended.both
    assert not list(outcome.output_dir.rglob("step-*"))
    assert content_of(outcome.run_dir) == outcome.files_before


@pytest.mark.parametrize("case", HUB_CASES, ids=[case.name for case in HUB_CASES])
def test_hub_not_reachable(case: Case, told: Callable[[Case], Told]) -> None:
    """The last word is one message; the hub's client says before it how often it tries."""
    outcome = told(case)
    if outcome.ended.status == 0:
        pytest.skip("the hub is within reach here")
    ours = [line for line in outcome.ended.err.splitlines() if "Retry" not in line and "thrown while" not in line]
    assert_one_message(Ended(status=outcome.ended.status, out="", err="\n".join(ours)), outcome.says)


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
    """Also when the rank that speaks comes late: the launcher ends it soon after another rank has failed."""
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
    ended = end_of(
        [*SHARDLAUNCH, "run", recipe, "--ranks", "2", "--", *words, "--output-dir", str(run_dir)], environment(hf_home)
    )
    assert_one_message(ended, ["loss nan", "before the update", "--lr"])
    step = int(ended.message.split("step ")[1].split(":")[0])
    assert step > 1, "the case needs a checkpoint before the bad step"
    assert_valid(run_dir, range(1, step))


def test_fp16_on_cpu(tmp_path: Path, hf_home: Path) -> None:
    """It works: products and their gradients are computed in fp16, with a loss scale."""
    words = [*PYTHON, MNIST, *DEMO, "--precision", "fp16", "--output-dir", str(tmp_path)]
    ended = end_of(words, environment(hf_home))
    assert ended.status == 0, ended.both
    assert any(line.split() == ["precision", "fp16"] for line in ended.out.splitlines()), ended.both
    assert_valid(tmp_path, [1, 2, 3])
    state = json.loads((tmp_path / "checkpoints" / "step-00000003" / "trainer_state.json").read_text())
    assert state["loss_scale"]["value"] > 0


# Resume


def test_damaged_newest_is_skipped(tmp_path: Path, hf_home: Path, finished: Path) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run")
    flip_byte(run_dir, 3)
    ended = end_of([*PYTHON, MNIST, *DEMO, "--output-dir", str(run_dir)], environment(hf_home))
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
    first = end_of(words, environment(hf_home))
    assert first.status == 0, first.both
    before = content_of(run_dir)
    pixels[7, 3, 3] ^= 1
    write_digits(data, pixels)
    ended = end_of(words, environment(hf_home))
    assert_one_message(ended, [str(run_dir), "fingerprint of the ", "data was", "another --output-dir"])
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
    ended = end_of([*PYTHON, MNIST, *DEMO, "--output-dir", str(run_dir)], environment(hf_home))
    assert_one_message(ended, [f"--output-dir {run_dir}", "free", "one checkpoint takes at least"])
    assert_valid(run_dir, [])


@pytest.mark.parametrize(("size", "good_steps"), [("440k", []), ("1000k", [1, 2])])
def test_disk_full_at_a_save(
    small_disk: Callable[[str], Path], hf_home: Path, size: str, good_steps: list[int]
) -> None:
    """A save that finds no room is dropped on both ranks, the run goes on, and its end says what is missing."""
    run_dir = small_disk(size) / "run"
    words = ["--ranks", "2", "--", *DEMO, "--max-steps", "4", "--output-dir", str(run_dir)]
    ended = end_of([*SHARDLAUNCH, "run", MNIST, *words], environment(hf_home))
    assert_one_message(ended, ["step 4", "last checkpoint could not be saved"])
    warnings = [line for line in ended.out.splitlines() if line.startswith("warning:")]
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
    words = [*SHARDLAUNCH, "run", MNIST, "--ranks", "2", "--", *DEMO, "--max-steps", "600", "--save-every", "100"]
    with started([*words, "--output-dir", str(run_dir)], tmp_path, hf_home) as process:
        wait_for(lambda: checkpoint_steps(run_dir / "checkpoints"), process)
        fill(disk)
        status = process.wait(timeout=STUCK_S)
    ended = Ended(status=status, out=(tmp_path / "out").read_text(), err=(tmp_path / "err").read_text())
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


def wait_for(happened: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    """Wait until something has happened, while a process runs."""
    while not happened():
        assert process.poll() is None, "it ended before"
        time.sleep(LOOK_EVERY_S)


def test_two_runs_in_one_folder(tmp_path: Path, hf_home: Path) -> None:
    """The second is refused; the first does not notice."""
    run_dir = tmp_path / "run"
    words = [*PYTHON, MNIST, *DEMO, "--output-dir", str(run_dir), "--save-every", "0"]
    with started([*words, "--max-steps", "1000000"], tmp_path, hf_home) as process:
        wait_for((run_dir / "metrics.jsonl").exists, process)
        ended = end_of(words, environment(hf_home))
        assert process.poll() is None
    assert_one_message(ended, [f"--output-dir {run_dir}", "another run is using it", "choose another folder"])
