"""Orders that recipes and options choose: the same losses on any ranks, exact after a resume, part of what a run is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import SequentialSampler, Subset, WeightedRandomSampler

from shardlaunch import TensorData, UserError, fit, orders
from shardlaunch.launcher.runs.choosing_order import chosen_order
from tests.distributed.ranks import run_on_ranks
from tests.recipes import LinearNet, NetOptions, NetRecipe, final_tensors, losses, run_quietly

OPTIONS: dict[str, Any] = {
    **{"max_steps": 6, "eval_every": 100, "threads_per_rank": 1, "tracker": "none", "lr": 0.05, "num_train": 90},
    **{"global_batch_size": 16, "micro_batch_size": 4},
}


class Weighted(NetRecipe):
    """Draws with replacement, with noise that each drawing has anew; an epoch has 40 samples."""

    def order(self, dataset: Any) -> orders.Order | None:
        return orders.weighted(np.arange(len(dataset)) % 4, num_samples=40)


class Chosen(LinearNet):
    """Has the order that a test sets."""

    chosen: Any = None

    def order(self, dataset: Any) -> Any:
        return self.chosen


def _runs(folder: Path, jobs: list[tuple[str, dict[str, Any]]]) -> None:
    for name, options in jobs:
        fit(Weighted if name.startswith("own") else LinearNet, output_dir=folder / name, **{**OPTIONS, **options})


def test_orders_are_the_same_on_any_ranks_and_after_a_resume(tmp_path: Path) -> None:
    pk = {"order": "per-class", "samples_per_class": 2}
    one: list[tuple[str, dict[str, Any]]] = [
        *(("own", {}), ("own-resumed", {"stop_at_step": 4}), ("own-resumed", {"num_workers": 1})),
        *(("balanced", {"order": "balanced", "samples_per_epoch": 50}), ("pk", pk), ("shuffled", {})),
    ]
    run_on_ranks(1, _runs, tmp_path, one)
    run_on_ranks(2, _runs, tmp_path, [("own-2", {}), ("own-fsdp2", {"strategy": "fsdp2"}), ("pk-2", pk)])
    run_on_ranks(3, _runs, tmp_path, [("own-3", {})])
    expected = losses(tmp_path / "own")
    assert losses(tmp_path / "own-resumed") == expected
    tensors = final_tensors(tmp_path / "own-resumed")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in final_tensors(tmp_path / "own").items())
    for name in ("own-2", "own-fsdp2", "own-3"):
        assert losses(tmp_path / name) == pytest.approx(expected, abs=1e-6), name
    assert losses(tmp_path / "pk-2") == pytest.approx(losses(tmp_path / "pk"), abs=1e-6)
    assert len({losses(tmp_path / name)[1] for name in ("balanced", "pk", "shuffled")}) == 3


def test_an_order_is_part_of_what_a_run_is(tmp_path: Path) -> None:
    words = ["--output-dir", str(tmp_path / "run"), "--num-train", "90", "--max-steps", "4", "--threads-per-rank", "1"]
    status, output = run_quietly(LinearNet, [*words, "--stop-at-step", "2", "--order", "balanced"])
    assert status == 0, output
    assert ["order", "balanced"] in [line.split() for line in output.splitlines()]
    for changed in ([], ["--order", "balanced", "--samples-per-epoch", "64"], ["--order", "sequential"]):
        status, output = run_quietly(LinearNet, [*words, *changed])
        assert status == 2
        assert "cannot resume" in output
        assert "order of the batches" in output
        assert "Traceback" not in output
    status, output = run_quietly(LinearNet, [*words, "--order", "balanced"])
    assert status == 0, output
    assert len(losses(tmp_path / "run")) == 4


def _order_of(chosen: Any, **options: Any) -> Any:
    recipe = Chosen(NetOptions(num_train=90, **options))
    recipe.chosen = chosen
    return chosen_order(recipe, recipe.datasets()["train"])


class Samples:
    num_samples = 0

    def samples(self, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        return positions


@pytest.mark.parametrize(
    ("chosen", "options", "text"),
    [
        (
            WeightedRandomSampler([1.0] * 90, 90),
            {},
            r"a WeightedRandomSampler, .* here orders.weighted\(weights",
        ),
        (SequentialSampler(range(90)), {}, "SequentialSampler, whose samples can only be taken in turn"),
        (torch.utils.data.DataLoader(range(9)), {}, "returned a BatchSampler, .* here orders.own"),
        ([3, 1, 2], {}, "returned a list, whose samples can only"),
        (lambda seed, epoch: [1], {}, r"returned a function. See orders.own\(function, num_samples"),
        (Samples(), {}, "num_samples must be a whole number from 1, not 0"),
        (orders.weighted(np.ones(80)), {}, "is for 80 samples, but the training data has 90"),
        (orders.sequential(90), {"order": "balanced"}, r"--order balanced: has no effect, because .* own order\(\)"),
        (orders.sequential(90), {"samples_per_epoch": 9}, "--samples-per-epoch: has no effect with this order"),
        (
            orders.per_class(np.arange(90) % 9, num_classes=2, samples_per_class=3),
            {},
            "groups of 6 samples, of which --micro-batch-size 4 is no multiple",
        ),
        (None, {"order": "weighted"}, "--order weighted: needs a column `weight`"),
        (None, {"order": "per-class", "samples_per_class": 3}, "a divisor of --micro-batch-size 4, not 3"),
        (None, {"order": "sequential", "samples_per_epoch": 3}, "--samples-per-epoch: has no effect with this order"),
        (None, {"samples_per_class": 3}, "--samples-per-class: has no effect with this order"),
    ],
)
def test_what_is_no_order(chosen: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        _order_of(chosen, **options)


class Sampled(LinearNet):
    def train_sampler(self) -> Any: ...


class OfAnotherMeaning(LinearNet):
    order = 3  # type: ignore[assignment]


class WithoutData(LinearNet):
    def order(self) -> Any: ...  # type: ignore[override]


@pytest.mark.parametrize("kind", [OfAnotherMeaning, WithoutData])
def test_an_order_that_cannot_be_called(kind: type[LinearNet]) -> None:
    recipe = kind(NetOptions(num_train=90))
    with pytest.raises(UserError, match="must be a method that takes the training data"):
        chosen_order(recipe, recipe.datasets()["train"])


class Loaders(LinearNet):
    def datasets(self) -> Any:
        return {"train": torch.utils.data.DataLoader(range(9))}  # type: ignore[arg-type]


def test_a_loader_is_answered(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train data is a DataLoader: return its data set .* or order\(\)"):
        fit(Loaders, output_dir=tmp_path / "run", **OPTIONS)
    with pytest.raises(UserError, match="sampler: did you mean --order"):
        fit(LinearNet, sampler="weighted", output_dir=tmp_path / "run", **OPTIONS)


def test_a_sampler_that_nothing_calls_and_folds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Sampled.train_sampler\(\) is never called; did you mean order\(\)\?"):
        fit(Sampled, output_dir=tmp_path / "run", **OPTIONS)
    recipe = LinearNet(NetOptions(num_train=90, order="balanced"))
    part = Subset(recipe.datasets()["train"], range(5, 45))
    order = chosen_order(recipe, part)
    assert order is not None
    classes = recipe.datasets()["train"].columns["labels"][torch.arange(5, 45)]
    counts = torch.bincount(classes[torch.from_numpy(order.samples(0, 0, np.arange(40)))], minlength=3)
    assert sorted(counts.tolist()) == [13, 13, 14]
    data = TensorData(inputs=torch.zeros(3, 12), labels=torch.arange(3), weight=torch.tensor([0.0, 1.0, 0.0]))
    order = chosen_order(LinearNet(NetOptions(order="weighted", samples_per_epoch=50)), data)
    assert order is not None
    assert set(order.samples(0, 0, np.arange(50)).tolist()) == {1}
    result = fit(Weighted, output_dir=tmp_path / "folds", folds=2, **{**OPTIONS, "max_steps": 2})
    assert [fold.step for fold in result.folds] == [2, 2]


def test_a_run_that_began_before_keeps_its_identity() -> None:
    from shardlaunch.launcher.options import Options, marks

    assert {marks(Options())[name] for name in ("order", "samples_per_class", "samples_per_epoch")} == {"free"}
