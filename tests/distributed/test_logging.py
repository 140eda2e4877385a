"""Values that a recipe logs: the same on any ranks, to the bit with --exact, and after a resume."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shardlaunch import UserError, fit
from shardlaunch.launcher.logged import MOST_NAMES, collecting
from shardlaunch.launcher.reporting.tracking import read_metrics
from shardlaunch.launcher.training.log_sums import LogSums
from shardlaunch.sharding.world import World
from tests.distributed.ranks import run_on_ranks
from tests.recipes import LinearNet, NetOptions

OPTIONS: dict[str, Any] = {"max_steps": 4, "eval_every": 2, "threads_per_rank": 1, "tracker": "none", "lr": 0.05}


class Logging(LinearNet):
    """Logs in each micro-batch, in some, in few, and what is not finite."""

    def forward(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        outputs: torch.Tensor = super().forward(model, batch)
        self.log("confidence", outputs.softmax(-1).max(-1).values.sum(), len(outputs))
        return outputs

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        first = batch["labels"] == 0
        if first.sum() > 2:  # in some micro-batches only
            self.log("class/0", outputs[first].sum(), first.sum())
        if self.moment.step == 2 and not self.moment.is_evaluation and batch["inputs"][0, 0] > 0.9:
            self.log("rare", torch.tensor(math.nan), 1)
        for _ in range(2):
            self.log("tiny", outputs.detach().square().sum() * 1e-38, len(outputs))
        return super().loss(outputs, batch)

    def update_metrics(self, metrics: Any, outputs: Any, batch: Any) -> None:
        super().update_metrics(metrics, outputs, batch)
        self.log("margin", outputs.topk(2).values.diff().abs().sum(), len(outputs))


def _runs(folder: Path, jobs: dict[str, dict[str, Any]]) -> list[str]:
    """Run jobs one after the other, and return the warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for name, options in jobs.items():
            fit(Logging, output_dir=folder / name, **{**OPTIONS, **options})
    return [str(one.message) for one in found]


def _logged(folder: Path) -> list[dict[str, Any]]:
    lines = [
        {name: value for name, value in line.items() if name.startswith(("train/", "eval/")) or name == "step"}
        for line in read_metrics(folder)
    ]
    return [line for line in lines if len(line) > 1]


def test_logged_values_are_the_same_on_any_ranks_and_after_a_resume(tmp_path: Path) -> None:
    first = {"plain": {}, "exact": {"exact": True}, "resumed": {"stop_at_step": 1}}
    _runs(tmp_path / "1", first)
    _runs(tmp_path / "1", {"resumed": {}})
    said, _ = run_on_ranks(2, _runs, tmp_path / "2", {"exact": {"exact": True}, "fsdp2": {"strategy": "fsdp2"}})
    run_on_ranks(3, _runs, tmp_path / "3", {"plain": {}, "exact": {"exact": True}})
    assert len([text for text in said if "train/rare is nan at step 3" in text]) == 2, "once per run"
    expected = _logged(tmp_path / "1" / "plain")
    assert [sorted(line) for line in expected if line["step"] == 2] == [
        ["step", "train/class/0", "train/confidence", "train/tiny"],
        ["eval/accuracy", "eval/class/0", "eval/confidence", "eval/loss", "eval/margin", "eval/tiny", "step"],
    ]
    assert 1e-40 < expected[0]["train/tiny"] < 1e-34
    assert math.isnan(next(line for line in expected if line["step"] == 3)["train/rare"])
    assert repr(_logged(tmp_path / "1" / "resumed")) == repr(expected)
    for name in ("2/fsdp2", "3/plain"):
        for line, other in zip(expected, _logged(tmp_path / name), strict=True):
            assert other == pytest.approx(line, rel=1e-6, nan_ok=True), name
    exact = _logged(tmp_path / "1" / "exact")
    assert [line.keys() for line in exact] == [line.keys() for line in expected], "also in a step that is run again"
    for ranks in (2, 3):
        for line, other in zip(exact, _logged(tmp_path / str(ranks) / "exact"), strict=True):
            assert repr(other) == repr(line)


def test_sums_do_not_depend_on_their_order() -> None:
    values = [(math.ldexp(1 + place * 0.37 % 1, 29 * (place % 5) - 70), 3) for place in range(500)]

    def value(pairs: list[tuple[float, int]]) -> float:
        sums = LogSums(World())
        for total, count in pairs:
            sums.add({"x": [(total, float(count))]})
        return sums.of_one_rank()()["x"]

    tensors: list[Any] = [(torch.tensor(total, dtype=torch.float64), count) for total, count in values]  # as on a GPU
    assert value(tensors) == value(values) == value(values[::-1]) == math.fsum(total for total, _ in values) / 1500
    plain = sum(total for total, _ in values), sum(total for total, _ in values[::-1])
    assert plain[0] != plain[1], "the order matters to a plain sum"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("kl", torch.ones(3)), "takes a sum and the number"),
        (("kl", torch.ones(3), 3), r"the sum must be one real number, not a tensor of shape \[3\]"),
        (("kl", "high", 3), "must be one number, not 'high'"),
        (("kl", 1.0, -1), "the count must be a number from 0, not -1"),
        (("loss", 1.0, 1), "it is taken"),
        (("a\nb", 1.0, 1), "is no name for a value"),
        ((3, 1.0, 1), "is no name for a value"),
    ],
)
def test_what_cannot_be_logged(arguments: Any, text: str) -> None:
    recipe = LinearNet(NetOptions())
    with collecting(recipe), pytest.raises(UserError, match=text):
        recipe.log(*arguments)


def test_other_mistakes() -> None:
    recipe = LinearNet(NetOptions())
    with pytest.raises(UserError, match="can be called in forward"):
        recipe.log("kl", 1.0, 1)
    with collecting(recipe) as logged:
        for value in (np.ones((1, 1)), np.float32(1), torch.ones(1, requires_grad=True), True, 1):
            recipe.log("one", value, value)
        assert logged.pop("one") == [(1.0, 1.0)] * 5
        with pytest.raises(UserError, match="it does not take prog_bar"):
            recipe.log("kl", 1.0, 1, prog_bar=True)
        for name in range(MOST_NAMES):
            recipe.log(str(name), 1.0, 1)
        with pytest.raises(UserError, match="more than 1000 names"):
            recipe.log("one more", 1.0, 1)


class TwoOfAName(LinearNet):
    """Logs under the name of a metric."""

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        self.log("accuracy", 1.0, 1)
        return super().loss(outputs, batch)


def test_a_name_of_a_metric_is_refused_before_any_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"self\.log\('accuracy', ...\): is the name of a metric"):
        fit(TwoOfAName, output_dir=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists() or not read_metrics(tmp_path / "run")
