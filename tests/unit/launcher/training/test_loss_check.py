"""The check of the loss on one micro-batch: means and couplings are found, sums of all kinds are not taken for them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Options, Recipe, TensorData, UserError
from shardlaunch.launcher.training.batch_plan import BatchPlan
from shardlaunch.launcher.training.batches import Batches
from shardlaunch.launcher.training.loss_check import check_loss
from shardlaunch.sharding.precision import apply_precision

CPU = torch.device("cpu")
VOCABULARY = 11


class _Sum(Recipe):
    """A sum over rows, of a net with dropout, batch norm and a counter."""

    def datasets(self) -> Mapping[str, Any]:
        inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
        return {"train": TensorData(inputs=inputs, labels=(inputs[:, 0] > 0).long())}

    def model(self) -> nn.Module:
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        net.register_forward_hook(lambda module, *_: bool(module.seen.add_(1)) and None)
        net.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        return net

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs, batch["labels"], reduction="sum")


class _Mean(_Sum):
    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs, batch["labels"])


class _MeanOfMeans(_Mean):
    """A mean that says so: one target per micro-batch."""

    def num_targets(self, batch: Any) -> int:
        return 1


class _Weighted(_Sum):
    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        weight = torch.tensor([0.2, 5.0, 1.0])
        return F.cross_entropy(outputs, batch["labels"], weight, reduction="sum", label_smoothing=0.1)


class _WeightedMean(_Sum):
    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs, batch["labels"], torch.tensor([0.2, 5.0, 1.0]))


class _Squares(_Sum):
    """A mean over the features of a row, summed over rows."""

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.mse_loss(outputs, batch["inputs"][:, :3], reduction="none").mean(1).sum()


class _Noisy(_Sum):
    """A model that draws in evaluation too, as a variational autoencoder does."""

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        outputs: torch.Tensor = model(batch["inputs"])
        return outputs + 0.05 * torch.randn_like(outputs)


class _HardlyNoisy(_Sum):
    """Random numbers change the loss by less than a neighbour may."""

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return super().loss(outputs, batch) + 1e-2 * torch.randn(len(outputs)).sum()


class _NoisyMean(_Noisy):
    loss = _Mean.loss


class _VeryNoisy(_Sum):
    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return super().loss(outputs, batch) * torch.rand(())


class _Contrastive(_Sum):
    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        normal = F.normalize(outputs)
        return F.cross_entropy(normal @ normal.T / 0.1, torch.arange(len(normal)), reduction="sum")


class _Declared(_Contrastive):
    loss_couples_samples = True


class _Hardest(_Sum):
    """The hardest other sample of the batch: the same when each sample is there twice."""

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        distances = torch.cdist(outputs, outputs)
        return distances.max(1).values.sum()


class _Balanced(_Sum):
    """A small penalty on what the batch does on average, as in mixtures of experts."""

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return super().loss(outputs, batch) + outputs.softmax(1).mean(0).square().sum()


class _Tokens(_Sum):
    """Sequences of several lengths, padded, with a loss over tokens; the model looks at neighbouring positions."""

    lengths_of = (3, 9, 5, 7, 2, 8, 4, 6)

    def datasets(self) -> Mapping[str, Any]:
        generator = torch.Generator().manual_seed(0)
        return {"train": [torch.randint(VOCABULARY, (self.lengths_of[i % 8],), generator=generator) for i in range(40)]}

    def model(self) -> nn.Module:
        return nn.ModuleDict({"table": nn.Embedding(VOCABULARY, 8), "head": nn.Linear(8, VOCABULARY)})

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        labels = nn.utils.rnn.pad_sequence(samples, batch_first=True, padding_value=-100)
        return {"ids": labels.clamp(min=0), "labels": labels}

    def forward(self, model: Any, batch: Any) -> torch.Tensor:
        hidden = model["table"](batch["ids"])
        logits: torch.Tensor = model["head"](hidden + hidden.mean(1, keepdim=True))  # the padding counts
        return logits

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten(), reduction="sum")


class _TokenMean(_Tokens):
    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())


class _RandomMasks(_Tokens):
    """Tokens are masked by numbers from the global generator, as transformers' collator does."""

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        batch = super().collate(samples, seeds)
        is_masked = (torch.rand(batch["labels"].shape) < 0.5) & (batch["labels"] >= 0)
        return {"ids": batch["ids"].masked_fill(is_masked, 0), "labels": batch["labels"].where(is_masked, -100)}


class _Triple(_Tokens):
    """A mean over the batch of sums over tokens."""

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return super().loss(outputs, batch) / len(outputs)


class _Raising(_Sum):
    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if not model.training:
            raise KeyError("only for training")
        outputs: torch.Tensor = model(batch["inputs"])
        return outputs


class _Zero(_Sum):
    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        return (outputs * 0).sum()


def _warnings(recipe_type: type[Recipe], micro_batch_size: int) -> list[str]:
    """Check a recipe's loss, and that this has changed nothing."""
    recipe = recipe_type(Options())
    dataset = recipe.datasets()["train"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = recipe.model()
    plan = BatchPlan(
        num_samples=len(dataset), global_batch_size=micro_batch_size, micro_batch_size=micro_batch_size, seed=1
    )
    counts = {"num_targets": recipe.num_targets, "num_tokens": recipe.num_tokens}
    batches = Batches(dataset, plan, collate=recipe.collate, **counts, rank=0, num_ranks=1, training=True)  # type: ignore[arg-type]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    said: list[str] = []
    check_loss(recipe, model, batches, precision=apply_precision("fp32", CPU), device=CPU, warn=said.append)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    return said


@pytest.mark.parametrize("micro_batch_size", [1, 2, 8])
@pytest.mark.parametrize(
    "recipe_type",
    [
        _Sum,
        _Weighted,
        _Squares,
        _Noisy,
        _HardlyNoisy,
        _VeryNoisy,
        _MeanOfMeans,
        _Declared,
        _Tokens,
        _RandomMasks,
        _Raising,
        _Zero,
    ],
)
def test_sums_are_not_taken_for_anything_else(recipe_type: type[Recipe], micro_batch_size: int) -> None:
    assert _warnings(recipe_type, micro_batch_size) == []


@pytest.mark.parametrize(
    ("recipe_type", "micro_batch_size"),
    [(kind, size) for kind in (_Mean, _WeightedMean, _TokenMean, _Triple) for size in (1, 2, 8)]
    + [(_NoisyMean, 8)],  # the noise of fewer samples hides it
)
def test_means_are_refused(recipe_type: type[Recipe], micro_batch_size: int) -> None:
    with pytest.raises(UserError, match=r"loss\(\) is a mean: it is .* the same twice\. Return the sum"):
        _warnings(recipe_type, micro_batch_size)


@pytest.mark.parametrize("recipe_type", [_Contrastive, _Hardest, _Balanced])
def test_losses_that_couple_samples_are_told_of(recipe_type: type[Recipe]) -> None:
    (said,) = _warnings(recipe_type, 8)
    assert "depends on the other samples" in said
    assert "loss_couples_samples = True" in said
