"""Bad input: one clear message on stderr, a non-zero exit status, no traceback, and nothing is lost."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.launch.checks import DEMO, STEPS, assert_one_message, content_of, flip_byte, write_table
from tests.launch.command import BERT, MNIST, PYTHON, SHARDLAUNCH, end_of, environment, forked_end_of

TEXTS = ("--model", "demo", "--max-steps", "1", "--tracker", "none")
# One of each way out, as processes of their own: tyro's message, a recipe's before and after its data, the console
# command's; and a message that a library adds unless it is told not to as it is imported.
AS_PROCESSES = {
    "unknown option",
    "ddp with one process",
    "resume from damaged",
    "predict with digits",
    "no Parquet in Parquet file",
}


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
    images("no file in folder", "empty", "{inputs}/empty", "no .csv, .tsv, .tab, .json, .jsonl"),
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
        says=("{run}", "--lr: 0.1 -> 0.2", "--seed: 0 -> 5", "--output-dir {run}-2"),
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


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_one_message(case: Case, inputs: Path, finished: Path, hf_home: Path, tmp_path: Path) -> None:
    """One message that says what, where and what to do, before any step, and no file of an earlier run is touched."""
    run_dir, output_dir = tmp_path / "run", tmp_path / "out"
    if any("{run}" in word for word in case.words):
        shutil.copytree(finished, run_dir)
        for step in case.damaged:
            flip_byte(run_dir, step)
    files_before = content_of(run_dir)
    places = {"inputs": str(inputs), "out": str(output_dir), "run": str(run_dir)}
    run = end_of if case.name in AS_PROCESSES else forked_end_of
    ended = run([word.format(**places) for word in case.words], environment(hf_home, case.env))
    assert_one_message(ended, [text.format(**places) for text in case.says])
    for text in case.never_says:
        assert text not in ended.err, ended.both
    assert "step 1/" not in ended.out, ended.both
    assert not output_dir.exists()
    assert content_of(run_dir) == files_before
