"""Updates of a recipe's own step: their numbers beside those of plain PyTorch, and what is refused."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from shardlaunch import Options, Recipe, Step, TensorData, UserError, fit
from tests.recipes import final_tensors, losses, training_lines

LR = 0.1
FEW = {"tracker": "none", "max_steps": 2, "global_batch_size": 12, "micro_batch_size": 4, "lr": LR, "log_every": 1}
START: dict[str, torch.Tensor] = {}


class Two(nn.Module):
    """Two layers, each for an optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(inputs).tanh())
        return result


class TwoRecipe(Recipe):
    """All of the data in one global batch, in its own order."""

    options: Options
    num_rows: ClassVar[int] = 12

    def datasets(self) -> Mapping[str, Any]:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(self.num_rows, 3, generator=generator)
        return {"train": TensorData(inputs=inputs, labels=torch.arange(self.num_rows) % 2)}

    def model(self) -> nn.Module:
        model = Two()
        START.update({name: value.clone() for name, value in model.state_dict().items()})
        return model

    def loss(self, outputs: Any, batch: Any) -> Any:
        return F.cross_entropy(outputs, batch["labels"], reduction="sum")

    def optimizer(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> Any:
        parts: dict[str, list[nn.Parameter]] = {"first": [], "second": []}
        for name, parameter in parameters:
            parts[name.partition(".")[0]].append(parameter)
        return {name: torch.optim.SGD(part, lr=LR) for name, part in parts.items()}

    def step(self, step: Step) -> None:
        step.update(optimizer="second")
        step.update(self._squares, optimizer="first")

    def _squares(self, model: nn.Module, batch: Any) -> Any:
        return model(batch["inputs"]).square().sum()


def test_updates_alternate_as_in_a_plain_loop(tmp_path: Path) -> None:
    fit(TwoRecipe, output_dir=tmp_path, **FEW)
    model = Two()
    model.load_state_dict(START)
    data = TwoRecipe(Options()).datasets()["train"].columns
    for step in range(2):
        for part, loss_of in (
            (model.second, lambda: F.cross_entropy(model(data["inputs"]), data["labels"])),
            (model.first, lambda: model(data["inputs"]).square().sum() / 12),
        ):
            loss = loss_of()
            gradients = torch.autograd.grad(loss, list(part.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(part.parameters(), gradients, strict=True):
                    parameter -= LR * gradient
        assert losses(tmp_path)[step + 1] == pytest.approx(float(loss.detach()), rel=1e-6)
    saved = final_tensors(tmp_path)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(saved[name], parameter.detach(), rtol=1e-5, atol=1e-7)


class Rows(TwoRecipe):
    """Each row is compared with all others."""

    loss_couples_samples = True

    def optimizer(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> Any:
        return torch.optim.SGD([parameter for _, parameter in parameters], lr=LR)

    def step(self, step: Step) -> None:
        step.update(self._compare, embed=self._embed)

    def _embed(self, model: nn.Module, batch: Any) -> Any:
        return model(batch["inputs"]), batch["labels"]

    def _compare(self, rows: Any, all_rows: Any, first: int) -> Any:
        near = -torch.cdist(rows[0], all_rows[0])
        places = torch.arange(first, first + len(rows[0]))
        likely = near.masked_fill(places[:, None] == torch.arange(len(all_rows[0])), -1e9).log_softmax(1)
        return -(likely * (rows[1][:, None] == all_rows[1])).sum()


def test_rows_of_micro_batches_are_compared_as_those_of_one_batch(tmp_path: Path) -> None:
    fit(Rows, output_dir=tmp_path, **FEW)
    recipe, model = Rows(Options()), Two()
    model.load_state_dict(START)
    data = recipe.datasets()["train"].columns
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(2):
        rows = recipe._embed(model, data)
        loss = recipe._compare(rows, rows, 0) / 12
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert losses(tmp_path)[step + 1] == pytest.approx(float(loss.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(final_tensors(tmp_path)[name], parameter.detach(), rtol=1e-5, atol=1e-6)


class Several(TwoRecipe):
    """Two losses, of which one has few targets; evaluated too."""

    def datasets(self) -> Mapping[str, Any]:
        train = super().datasets()["train"]
        return {"train": train, "eval": train}

    def optimizer(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> Any:
        return torch.optim.SGD([parameter for _, parameter in parameters], lr=LR)

    def step(self, step: Step) -> None:
        Recipe.step(self, step)

    def num_targets(self, batch: Any) -> Any:
        return {"squares": len(batch["inputs"]), "positive": int((batch["inputs"][:, 0] > 0.3).sum())}

    def loss(self, outputs: Any, batch: Any) -> Any:
        return {"squares": outputs.square().sum(), "positive": 3 * outputs[batch["inputs"][:, 0] > 0.3].sum()}


def test_each_loss_has_its_own_number_of_targets(tmp_path: Path) -> None:
    result = fit(Several, output_dir=tmp_path, **FEW, eval_every=1)
    recipe, model = Several(Options()), Two()
    model.load_state_dict(START)
    data = recipe.datasets()["train"].columns
    counts, optimizer = recipe.num_targets(data), torch.optim.SGD(model.parameters(), lr=LR)
    assert 0 < counts["positive"] < 8
    found = []
    for _ in range(3):
        values = {name: each / counts[name] for name, each in recipe.loss(model(data["inputs"]), data).items()}
        found.append({name: float(value.detach()) for name, value in values.items()})
        optimizer.zero_grad()
        sum(values.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    line = next(line for line in training_lines(tmp_path) if line["step"] == 2 and "loss" in line)
    assert line["loss"] == pytest.approx(sum(found[1].values()), rel=1e-5)
    assert line["train/positive"] == pytest.approx(found[1]["positive"], rel=1e-5)
    assert result.evaluations[-1]["loss"] == pytest.approx(sum(found[2].values()), rel=1e-5)
    assert result.evaluations[-1]["squares"] == pytest.approx(found[2]["squares"], rel=1e-5)


class Diverging(TwoRecipe):
    """The loss of one optimizer is not finite in one step."""

    def loss(self, outputs: Any, batch: Any) -> Any:
        return super().loss(outputs, batch) / (self.moment.step != 1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_bad_update_is_left_out(tmp_path: Path) -> None:
    often = {**FEW, "max_steps": 3, "save_every": 1, "keep": 5}
    fit(Diverging, output_dir=tmp_path / "skip", on_nonfinite="skip", **often)
    before, after = (
        load_file(next((tmp_path / "skip" / "checkpoints" / f"step-0000000{step}").glob("model*.safetensors")))
        for step in (1, 2)
    )
    # The other update of the step is made.
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"first"}
    fit(Diverging, output_dir=tmp_path / "back", on_nonfinite="rollback", **often)
    assert set(losses(tmp_path / "back")) == {1, 3}


def _with(**methods: Callable[..., Any]) -> type[Recipe]:
    return type("Bad", (TwoRecipe,), methods)


def _stepping(loss: Callable[..., Any] | None, **arguments: Any) -> type[Recipe]:
    def step(self: Recipe, step: Step) -> None:
        step.update(loss, **{"optimizer": "first", **arguments})

    return _with(step=step)


def _missing(self: Any, parameters: Any) -> Any:
    return {"first": torch.optim.SGD([p for name, p in parameters if name.startswith("first")])}


def _sharing(self: Any, parameters: Any) -> Any:
    parameters = [parameter for _, parameter in parameters]
    return {"first": torch.optim.SGD(parameters), "second": torch.optim.Adam(parameters[-1:])}


def _calling_backward(model: nn.Module, batch: Any) -> Any:
    loss = model(batch["inputs"]).sum()
    loss.backward(retain_graph=True)
    return loss


def _of_used_graph(model: nn.Module, batch: Any) -> Any:
    loss = model(batch["inputs"]).square().sum()
    torch.autograd.grad(loss, list(model.parameters())[:1])
    return loss


def _drawing_anew() -> type[Recipe]:
    generator = torch.Generator().manual_seed(1)

    def embed(model: nn.Module, batch: Any) -> Any:
        return model(batch["inputs"]) * torch.rand(1, generator=generator)

    return _stepping(lambda rows, all_rows, first: (rows[0] @ all_rows[0].T).sum(), embed=embed)


def _teacher(teacher: Callable[[nn.Module], Any]) -> type[Recipe]:
    """Return a recipe that does something to its teacher in the loss."""

    class Taught(TwoRecipe):
        def references(self) -> Mapping[str, nn.Module]:
            return {"teacher": Two()}

        def _squares(self, model: nn.Module, batch: Any) -> Any:
            teacher(self.reference["teacher"])
            return super()._squares(model, batch)

    return Taught


def _add_to(teacher: nn.Module) -> None:
    with torch.no_grad():
        next(teacher.parameters()).add_(1)


BAD: dict[str, tuple[type[Recipe], str]] = {
    "an optimizer misses parameters": (_with(optimizer=_missing), "must include every trainable parameter"),
    "two optimizers share one": (_with(optimizer=_sharing), "gives second.bias to 'first' and 'second'"),
    "several without a step": (_with(step=Recipe.step), "it has no step()"),
    "optimizers that are none": (_with(optimizer=lambda self, p: {"first": 3}), "returned 'first': int"),
    "no optimizer": (_with(optimizer=lambda self, p: {}), "it returned none at all"),
    "another optimizer's name": (_stepping(None, optimizer="third"), "choose one of 'first', 'second'"),
    "no name": (_stepping(None, optimizer=""), "choose one of 'first', 'second'"),
    "independent of its part": (
        _stepping(lambda model, batch: model.second.bias.sum()),
        "does not depend on a trained parameter that the optimizer 'first' updates",
    ),
    "no update": (_with(step=lambda self, step: None), "makes no update"),
    "a step returns a loss": (
        _with(step=lambda self, step: [step.update(optimizer="first"), torch.ones(())][1]),
        "returns a Tensor, which nothing would use",
    ),
    "a loss in place of a function": (_stepping(torch.ones(())), "takes a function that returns the loss"),
    "a loss returns nothing": (_stepping(lambda model, batch: None), "must return a scalar tensor"),
    "a loss per row": (_stepping(lambda model, batch: model(batch["inputs"]).sum(1)), "it returned shape [4]"),
    "no losses": (_stepping(lambda model, batch: {}), "returned no losses"),
    "backward": (_stepping(_calling_backward), "not call backward()"),
    "a used graph": (_stepping(_of_used_graph), "has been done already"),
    "detached": (_stepping(lambda model, batch: model(batch["inputs"]).sum().detach()), "does not depend on a trained"),
    "no such count": (
        _with(num_targets=lambda self, batch: {"other": 1}, loss=lambda self, outputs, batch: {"mine": outputs.sum()}),
        "returns a loss 'mine', of which num_targets() returns no number",
    ),
    "one loss, several counts": (_with(num_targets=lambda self, batch: {"other": 1}), "must return sums by these"),
    "counts that come and go": (
        _with(num_targets=lambda self, batch: {"a": 1} if batch["inputs"][0, 0] > 0 else {"a": 1, "b": 1}),
        "must return the same names for each batch",
    ),
    "rows that are none": (_stepping(lambda *_: 0, embed=lambda model, batch: 3), "it returned int"),
    "rows of several numbers": (
        _stepping(lambda *_: 0, embed=lambda model, batch: (model(batch["inputs"]), batch["labels"][:1])),
        "it returned (shape [4, 2], shape [1])",
    ),
    "rows that are drawn anew": (_drawing_anew(), "returns other rows in its second pass"),
    "rows without a loss": (_stepping(None, embed=lambda model, batch: model(batch["inputs"])), "needs a function"),
    "a teacher in training mode": (_teacher(lambda it: it.train()), "is in training mode (all of it"),
    "a teacher with gradients": (_teacher(lambda it: it.requires_grad_()), "needs gradients (first.weight"),
    "a teacher that changes": (_teacher(_add_to), "has changed the reference model 'teacher': first.weight"),
    "a teacher that is none": (_with(references=lambda self: {"teacher": 3}), "it returned 'teacher': int"),
    "a teacher alone": (_with(references=lambda self: nn.Linear(1, 1)), "modules by name; it returned Linear"),
}


def test_whole_numbers_among_rows_may_be_large(tmp_path: Path) -> None:
    """Digests of texts, of which a sum overflows, come as they are."""
    seen: list[torch.Tensor] = []

    def embed(model: nn.Module, batch: Any) -> Any:
        return model(batch["inputs"]), batch["labels"] + 2**61

    def loss(rows: Any, all_rows: Any, first: int) -> torch.Tensor:
        seen.append(all_rows[1] - 2**61)
        return rows[0].square().sum()

    fit(_stepping(loss, embed=embed), output_dir=tmp_path, **FEW)
    assert seen[0].tolist().count(1) == 6
    assert {*seen[0].tolist()} == {0, 1}


@pytest.mark.parametrize("case", BAD)
def test_bad_steps_are_refused(case: str, tmp_path: Path) -> None:
    recipe_type, message = BAD[case]
    with pytest.raises(UserError) as raised:
        fit(recipe_type, output_dir=tmp_path, **FEW)
    assert message in str(raised.value), raised.value


def test_another_teacher_is_another_run(tmp_path: Path) -> None:
    kind = _teacher(lambda it: None)
    fit(kind, output_dir=tmp_path, **FEW, stop_at_step=1)
    kind.references = lambda self: {"teacher": nn.Linear(3, 2)}  # type: ignore[method-assign]
    with pytest.raises(UserError, match="digest of the reference model 'teacher'"):
        fit(kind, output_dir=tmp_path, **FEW)


def test_another_optimizer_is_no_resume(tmp_path: Path) -> None:
    one = _with(
        optimizer=lambda self, parameters: torch.optim.SGD([p for _, p in parameters], lr=LR),
        step=Recipe.step,
    )
    fit(one, output_dir=tmp_path, **FEW, stop_at_step=1)
    with pytest.raises(UserError, match="1 parameter groups, here are 2"):
        fit(_with(), output_dir=tmp_path, **FEW)
