"""The average of the weights in one process: its values, its evaluation, what a checkpoint has of it, bad input."""

import json
import math
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from shardlaunch import Options, UserError, fit
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import Checkpoint, open_checkpoint
from shardlaunch.checkpoints.state import EMA, MODEL
from shardlaunch.launcher.optimization.averaging import AveragingOptions
from shardlaunch.launcher.training.averaging import Averaging, best_metric_in
from shardlaunch.launcher.training.stopping import BrokenOff
from shardlaunch.sharding.averages import Average
from shardlaunch.sharding.replicated import Single
from shardlaunch.sharding.world import World
from tests.recipes import LinearNet, Net, NetOptions, NetRecipe, final_tensors, training_lines
from tests.unit.checkpoints.saved import sign

STEPS, DECAY = 8, 0.6
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "eval_every": 4,
    "save_every": 1,
    "keep": 0,
    "threads_per_rank": 1,
    "async_save": "off",
    "lr": 0.05,
}


class Smooth(Net):
    """The net of other tests, but each sample has its output, whatever else is in its batch."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = nn.functional.dropout(self.norm(self.first(inputs)).relu(), 0.2, self.training) * self.rare
        result: torch.Tensor = self.last(self.tied(self.middle(hidden).relu()))
        return result


class SmoothRecipe(NetRecipe):
    """The recipe of this net."""

    def model(self) -> nn.Module:
        return Smooth()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(SmoothRecipe, output_dir=tmp_path_factory.mktemp("plain"), **OPTIONS).run_dir


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged")
    return fit(SmoothRecipe, output_dir=folder, ema=DECAY, digest_every=4, **OPTIONS).run_dir


def _checkpoint(run_dir: Path, step: int) -> Checkpoint:
    return open_checkpoint(run_dir / "checkpoints" / f"step-{step:08d}", peers=Peers())


def _section(run_dir: Path, step: int, section: str) -> dict[str, torch.Tensor]:
    checkpoint = _checkpoint(run_dir, step)
    specs = [spec for spec in checkpoint.specs() if spec.section == section]
    return {spec.name: checkpoint.read(spec, 0, spec.num_elements).view(spec.shape) for spec in specs}


def _net_of(run_dir: Path, step: int, *, is_average: bool = False) -> nn.Module:
    """Return the net of a checkpoint, with the averages where it has some."""
    net = Smooth()
    tensors = _section(run_dir, step, MODEL)
    tensors |= _section(run_dir, step, EMA) if is_average else {}
    net.load_state_dict({**tensors, "tied.weight": tensors["middle.weight"]})
    return net.eval()


def _expected(run_dir: Path, steps: Sequence[int], average: Any) -> dict[str, torch.Tensor]:
    """Return what torch makes of the weights of some steps."""
    model: AveragedModel | None = None
    for step in steps:
        net = _net_of(run_dir, step)
        net.norm.num_batches_tracked = torch.tensor(0.0)  # of integers torch's average fails
        model = model or AveragedModel(net, multi_avg_fn=average, use_buffers=True)
        model.update_parameters(net)
    assert model is not None
    state = dict(model.module.named_parameters()) | dict(model.module.named_buffers())
    return {name: tensor.detach() for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def _eval_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in training_lines(run_dir) if any(name.startswith("eval") for name in line)]


def test_it_is_what_torch_computes_and_changes_nothing_else(averaged: Path, plain: Path) -> None:
    for step in (1, 2, STEPS):
        steps = range(1, step + 1)
        _assert_same(_section(averaged, step, EMA), _expected(averaged, steps, get_ema_multi_avg_fn(DECAY)))
    assert "tied.weight" not in _section(averaged, STEPS, EMA)
    without = [
        {name: value for name, value in line.items() if not name.startswith(("eval_ema/", "ema_", "weights_", "optim"))}
        for line in training_lines(averaged)
    ]
    assert without == training_lines(plain)  # evaluations of the average leave weights and buffers as they were
    weights = {name: tensor for name, tensor in final_tensors(averaged).items() if not name.startswith("ema/")}
    _assert_same(weights, final_tensors(plain))
    assert all("ema_digest" in line for line in training_lines(averaged) if "weights_digest" in line)


def test_it_is_evaluated_and_decides_what_is_best(averaged: Path, plain: Path) -> None:
    lines = _eval_lines(averaged)
    assert [line["step"] for line in lines] == [4, STEPS]
    data = SmoothRecipe(NetOptions()).datasets()["eval"]
    for line in lines:
        for is_average, prefix in ((True, "eval_ema/"), (False, "eval/")):
            with torch.no_grad():
                outputs = _net_of(averaged, line["step"], is_average=is_average)(data.columns["inputs"])
            labels = data.columns["labels"]
            assert line[f"{prefix}loss"] == pytest.approx(nn.functional.cross_entropy(outputs, labels).item(), abs=1e-6)
            assert line[f"{prefix}accuracy"] == pytest.approx((outputs.argmax(1) == labels).float().mean().item())
    position = _checkpoint(averaged, STEPS).position
    assert position.best_metric == "eval_ema/accuracy"
    assert position.best_value == max(line["eval_ema/accuracy"] for line in lines)
    assert position.num_averaged == STEPS
    assert _checkpoint(plain, STEPS).position.best_metric == "accuracy"


def test_a_resume_is_exact_and_keeps_the_average(averaged: Path, plain: Path, tmp_path: Path) -> None:
    for stop, strategy in ((3, "single"), (4, "dp"), (0, "single")):
        fit(
            SmoothRecipe,
            output_dir=tmp_path,
            ema=DECAY,
            digest_every=4,
            stop_at_step=stop,
            strategy=strategy,
            **OPTIONS,
        )
    assert training_lines(tmp_path) == training_lines(averaged)
    _assert_same(final_tensors(tmp_path), final_tensors(averaged))
    with pytest.raises(UserError, match=r"--ema: 0\.6 -> 0\.0"):
        fit(SmoothRecipe, output_dir=tmp_path, **OPTIONS)
    with pytest.raises(UserError, match=r"--ema: 0\.0 -> 0\.6"):
        fit(SmoothRecipe, output_dir=plain, ema=DECAY, **OPTIONS)
    assert not {"--ema", "--swa-from"} & json.loads((plain / "run.json").read_text())["identity"].keys()  # as before


def test_a_position_of_another_average_is_damage(averaged: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(averaged, tmp_path / "run")
    state = folder / "checkpoints" / f"step-{STEPS:08d}" / "trainer_state.json"
    state.write_text(state.read_text().replace(f'"num_averaged": {STEPS}', '"num_averaged": 0'))
    sign(state.parent, state.name)
    with pytest.raises(UserError, match="average of the weights is not that of 0 updates"):
        fit(SmoothRecipe, output_dir=folder, ema=DECAY, digest_every=4, **OPTIONS)


def test_an_evaluation_that_is_broken_off_leaves_the_weights() -> None:
    model = nn.Linear(1, 1, bias=False)
    strategy, calls = Single(model, lambda named: torch.optim.SGD([p for _, p in named]), world=World()), []
    strategy.keep_average()
    averaging = Averaging(Options(ema=0.5), strategy, num_steps=2)

    class Evaluating:
        def evaluate(self, model: nn.Module, on_progress: object, poll: object) -> dict[str, float]:
            calls.append(model.weight.item())
            if len(calls) == 4:
                raise BrokenOff
            return {"loss": calls[-1]}

    def evaluate() -> dict[str, float]:
        return averaging.evaluate(Evaluating(), lambda done, of: None, lambda: None)  # type: ignore[arg-type]

    for step, value in ((1, 2.0), (2, 4.0)):
        model.weight.data.fill_(value)
        averaging.update(step, num_samples=1)
    assert evaluate() == {"eval/loss": 4.0, "eval_ema/loss": 3.0}
    with pytest.raises(BrokenOff):
        evaluate()
    assert (calls, model.weight.item()) == ([4.0, 3.0, 4.0, 3.0], 4.0)


def test_the_room_for_an_average_that_is_to_come_is_known() -> None:
    model = Smooth()
    model.first.requires_grad_(False)
    strategy = Single(model, lambda named: torch.optim.SGD([p for _, p in named], lr=0.1), world=World())
    specs = [fragment.spec for fragment in strategy.state()]
    assert Averaging(Options(), strategy, num_steps=8).bytes_to_come(specs) == 0
    strategy.keep_average()
    averaging = Averaging(Options(swa_from=0.5), strategy, num_steps=8)
    to_come = averaging.bytes_to_come(specs)
    for step in range(1, 6):  # it begins with the fifth
        assert averaging.num_averaged == 0
        averaging.update(step, num_samples=1)
    average = [fragment.spec.num_bytes for fragment in strategy.state() if fragment.spec.section == EMA]
    assert sum(average) == to_come > 0
    assert averaging.bytes_to_come(specs) == 0


def test_equal_averages_begin_at_a_step(tmp_path: Path) -> None:
    class Named(SmoothRecipe):
        best_metric = "eval/accuracy"

    fit(Named, output_dir=tmp_path, swa_from=0.5, **{**OPTIONS, "eval_every": 3})
    assert not _section(tmp_path, 4, EMA)
    _assert_same(_section(tmp_path, 8, EMA), _expected(tmp_path, range(5, 9), get_swa_multi_avg_fn()))
    middle = torch.stack([_section(tmp_path, step, MODEL)["middle.weight"] for step in range(5, 9)]).mean(0)
    torch.testing.assert_close(_section(tmp_path, 8, EMA)["middle.weight"], middle)
    assert [("eval/loss" in line, "eval_ema/loss" in line) for line in _eval_lines(tmp_path)] == [
        (True, False),
        (True, True),
        (True, True),
    ]
    assert _checkpoint(tmp_path, 8).position.best_metric == "accuracy"


def test_half_lives_are_of_samples() -> None:
    of = AveragingOptions(ema_half_life=64).weight_of_update
    assert of(1, 64) == pytest.approx(0.5)
    assert (1 - of(1, 32)) ** 2 == pytest.approx(1 - of(1, 64))
    assert of(1, 1) == pytest.approx(1 - 0.5 ** (1 / 64))
    assert AveragingOptions(ema_half_life=640).part_of_first(101, 64) == pytest.approx(2**-10)


def test_a_batch_that_is_not_full_counts_for_its_samples(tmp_path: Path) -> None:
    options = {**OPTIONS, "max_steps": 3, "num_train": 44, "global_batch_size": 32}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the first weights still count
        fit(LinearNet, output_dir=tmp_path, ema_half_life=16, eval_ema="only", **options)
    weights = [_section(tmp_path, step, MODEL)["weight"] for step in (1, 2, 3)]
    average = weights[0] + (1 - 0.5 ** (12 / 16)) * (weights[1] - weights[0])  # 44 samples: 32 and 12
    average += (1 - 0.5 ** (32 / 16)) * (weights[2] - average)
    torch.testing.assert_close(_section(tmp_path, 3, EMA)["weight"], average)
    (line,) = _eval_lines(tmp_path)[-1:]
    assert {name.partition("/")[0] for name in line} == {"step", "epoch", "eval_ema"}


class Bad(SmoothRecipe):
    """A net with a bad loss at the third step."""

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return super().loss(outputs, batch) * (math.nan if self.moment.step == 2 else 1)


@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_only_updates_that_were_done_count(action: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it goes back
        fit(Bad, output_dir=tmp_path, ema=DECAY, on_nonfinite=action, **{**OPTIONS, "max_steps": 7})
    assert _checkpoint(tmp_path, 7).position.num_averaged == 6
    _assert_same(_section(tmp_path, 7, EMA), _expected(tmp_path, (1, 2, 4, 5, 6, 7), get_ema_multi_avg_fn(DECAY)))


class Large(SmoothRecipe):
    """A net whose first gradients are too large for fp16 times the loss scale."""

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return super().loss(outputs, batch) * 30


def test_updates_with_too_large_a_loss_scale_do_not_count(tmp_path: Path) -> None:
    fit(Large, output_dir=tmp_path, ema=DECAY, precision="fp16", **OPTIONS)
    done = [line["step"] for line in training_lines(tmp_path) if "loss" in line and not line.get("skipped")]
    assert 1 < len(done) < STEPS
    assert _checkpoint(tmp_path, STEPS).position.num_averaged == len(done)
    _assert_same(_section(tmp_path, STEPS, EMA), _expected(tmp_path, done, get_ema_multi_avg_fn(DECAY)))


def test_what_is_frozen_has_no_average_until_it_is_trained(tmp_path: Path) -> None:
    fit(
        SmoothRecipe,
        output_dir=tmp_path,
        ema=DECAY,
        freeze=("first.*", "norm.*"),
        unfreeze_at_step=3,
        **{**OPTIONS, "max_steps": 7},
    )
    before, after = (_section(tmp_path, step, EMA) for step in (3, 7))
    assert after.keys() - before.keys() == {"first.weight", "norm.weight", "norm.bias"}
    _assert_same(after, _expected(tmp_path, range(1, 8), get_ema_multi_avg_fn(DECAY)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema": 1.0}, "--ema 1.0: must be at least 0 and below 1"),
        ({"ema": -0.1}, "--ema -0.1: must be at least 0"),
        ({"ema": math.nan}, "--ema nan"),
        ({"ema_half_life": -5.0}, "--ema-half-life -5.0: must be at least 0"),
        ({"ema": 0.9, "ema_half_life": 64.0}, "--ema and --ema-half-life: a run keeps one average"),
        ({"ema": 0.9, "swa_from": 0.5}, "--ema and --swa-from: a run keeps one average"),
        ({"swa_from": 2.5}, "--swa-from 2.5: must be a whole number"),
        ({"swa_from": 9.0}, "--swa-from 9: the run has 8 steps"),
        ({"eval_ema": "only"}, "--eval-ema only: has no effect without an average"),
    ],
)
def test_bad_input_is_one_message(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        fit(LinearNet, output_dir=tmp_path, **{**OPTIONS, **options})
    assert message in str(caught.value)
    assert not (tmp_path / "run.json").exists()  # nothing has begun


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eval_ema/accuracy", {}, "this run keeps no average"),
        ("eval/accuracy", {"ema": 0.5, "eval_ema": "only"}, "--eval-ema only leaves the weights out"),
        ("eval_ema/nothing", {"ema": 0.5}, "unknown best_metric 'nothing'"),
    ],
)
def test_a_best_metric_that_is_not_evaluated(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    class Named(LinearNet):
        best_metric = name

    with pytest.raises(UserError, match=message):
        fit(Named, output_dir=tmp_path, **{**OPTIONS, **options})


def test_the_best_metric_by_its_name() -> None:
    both = {"eval/loss": 1.0, "eval_ema/loss": 2.0}
    assert best_metric_in(both, "loss") == "eval_ema/loss"
    assert best_metric_in(both, "eval/loss") == "eval/loss"
    assert best_metric_in({"eval/loss": 1.0}, "loss") == "eval/loss"
    assert best_metric_in({"eval/loss": 1.0}, "eval_ema/loss") == ""


class Odd(nn.Module):
    """A module with buffers that have no usual average."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("bound", torch.tensor(math.inf))
        self.register_buffer("low", torch.ones(2, dtype=torch.bfloat16))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)


@pytest.mark.parametrize("is_exact", [False, True])
def test_odd_buffers_and_an_exchange_that_is_undone(is_exact: bool) -> None:
    model = Odd()
    average = Average(model, {"weight": model.weight}, is_exact=is_exact)
    for step in range(3):
        model.weight.data.fill_(step)
        model.low.fill_(1 + step / 64)  # a change by a quarter of it would be lost in bf16
        model.count.add_(1)
        if step:
            model.bound.fill_(4)
        average.update(0.25)
    assert average.values["weight"].tolist() == [0.6875] * 3
    assert {name: value.tolist() for name, value in average.buffers.items()} == {
        "mask": [0.0, -math.inf],
        "bound": 4.0,
        "low": [1 + 0.6875 / 64] * 2,
    }
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average.exchange()
    assert model.weight.tolist() == [0.6875] * 3
    assert (model.count.item(), model.low[0].item()) == (3, torch.tensor(1 + 0.6875 / 64).bfloat16().item())
    average.exchange()
    _assert_same(dict(model.state_dict()), before)
    assert average.values["weight"].tolist() == [0.6875] * 3


def test_a_rule_that_forgets_too_slowly_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"at the end of 2 steps, 90% of the average will still be"):
        fit(LinearNet, output_dir=tmp_path, ema=0.9, **{**OPTIONS, "max_steps": 2})
    assert json.loads((tmp_path / "run.json").read_text())["identity"]["--ema"] == 0.9
