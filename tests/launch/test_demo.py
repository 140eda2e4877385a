"""The demo learns what the README says."""

from pathlib import Path

from transformers import AutoModelForSequenceClassification

from tests.launch.checks import last_evaluation
from tests.launch.command import BERT, SHARDLAUNCH, end_of, environment


def test_the_demo(hf_home: Path, tmp_path: Path) -> None:
    """What `make demo` runs, in fewer steps: films that the model has not seen, two ranks, the same command again."""
    options = ("--preset", "demo", "--max-steps", "160", "--output-dir", str(tmp_path))
    words = (*SHARDLAUNCH, "run", BERT, "--ranks", "2", "--", *options)
    ended = end_of(words, environment(hf_home), stuck_s=1200)
    assert ended.status == 0, ended.both
    assert ended.err == ""
    assert last_evaluation(tmp_path)["eval/accuracy"] >= 0.795
    newest = max((tmp_path / "checkpoints").iterdir())
    model = AutoModelForSequenceClassification.from_pretrained(newest)
    assert model.config.id2label == {0: "rotten", 1: "fresh"}
    again = end_of(words, environment(hf_home))
    assert again.status == 0, again.both
    assert "this run is complete" in again.out
