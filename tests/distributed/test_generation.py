"""Generated texts in evaluation: the same on any number of ranks, even if each has only shards of the model."""

import shutil
from pathlib import Path

import pytest

from tests.distributed.ranks import run_on_ranks
from tests.recipes import FewSentences, run_well, training_lines

STEPS = 100
ARGV = [
    *("--preset", "demo", "--max-steps", str(STEPS), "--global-batch-size", "16", "--micro-batch-size", "4"),
    *("--width", "32", "--layers", "1", "--lr", "0.01", "--tracker", "none", "--eval-every", "1000"),
    *("--save-every", "0", "--threads-per-rank", "1", "--metrics", "bleu", "chrf", "rougeL"),
]


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that is one step, and its evaluation, before its end."""
    output_dir = tmp_path_factory.mktemp("run") / "stopped"
    run_on_ranks(1, run_well, FewSentences, [*ARGV, "--output-dir", str(output_dir), "--stop-at-step", str(STEPS - 1)])
    return output_dir


@pytest.fixture(scope="module")
def evaluation(stopped_run: Path) -> dict[str, float]:
    """Return the evaluation on one rank."""
    return _finished(stopped_run, 1, "single")


def _finished(stopped_run: Path, num_ranks: int, strategy: str) -> dict[str, float]:
    run_dir = shutil.copytree(stopped_run, stopped_run.parent / f"{strategy}-{num_ranks}")
    argv = [*ARGV, "--output-dir", str(run_dir), "--strategy", strategy]
    argv += ["--layer-classes", "MarianEncoderLayer", "MarianDecoderLayer"] if strategy == "fsdp2" else []
    run_on_ranks(num_ranks, run_well, FewSentences, argv)
    return training_lines(run_dir)[-1]


@pytest.mark.parametrize(("num_ranks", "strategy"), [(2, "ddp"), (3, "ddp"), (2, "fsdp2"), (2, "zero3")])
def test_ranks_write_the_same(num_ranks: int, strategy: str, stopped_run: Path, evaluation: dict[str, float]) -> None:
    """Texts end at different steps; a rank whose texts are done must continue until all are done."""
    found = _finished(stopped_run, num_ranks, strategy)
    for name in ("eval/bleu", "eval/chrf", "eval/rougeL"):
        assert found[name] == evaluation[name] > 1
    assert found["eval/loss"] == pytest.approx(evaluation["eval/loss"], abs=1e-5)
