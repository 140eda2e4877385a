"""Check on one micro-batch that the loss is a sum over targets, and that samples do not depend on each other."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from shardlaunch.errors import UserError
from shardlaunch.launcher.optimization.freezing import train_mode
from shardlaunch.launcher.recipe import Recipe, has_own_step
from shardlaunch.launcher.seeding import derive_seed, seed_model_stream, seeded
from shardlaunch.launcher.training.batches import Batches, MicroBatch, Slot
from shardlaunch.launcher.training.forward import forward
from shardlaunch.launcher.training.in_place import parameters_stay
from shardlaunch.sharding.precision import Precision

MOST_SAMPLES = 4  # each forward pass costs, where an evaluation generates texts
TOLERANCE = {"fp32": 2e-3}  # relative: kernels may round differently for other batch sizes
LOW_TOLERANCE = 3e-2
SAME = 1e-6  # relative: some kernels of GPUs round differently each time
MEAN_WITHIN = 0.03  # how near to 1/2 the ratio of a mean is
MOST_NOISE = 0.05  # of a loss that draws random numbers itself, for a mean to be told from a sum


def check_loss(
    recipe: Recipe,
    model: nn.Module,
    batches: Batches,
    *,
    precision: Precision,
    device: torch.device,
    warn: Callable[[str], None],
) -> None:
    """Raise UserError for a loss that is a mean, and warn of one that couples samples without saying so. All ranks.

    The first samples are evaluated, without dropout, once, and each twice in one micro-batch: a sum doubles, a mean
    does not. Then some of them with different others: sums are additive. All ranks evaluate the same samples. Changes
    neither the model, nor its buffers, nor the generators. An error of the recipe in evaluation mode ends the check.
    """
    if recipe.loss_couples_samples or has_own_step(type(recipe)):
        return
    samples = batches.plan.micro_batch(epoch=0, first=0)[:MOST_SAMPLES]
    load = lambda chosen: batches.load(Slot(step=0, epoch=0, micro_batch=0, weight=1, samples=chosen))  # noqa: E731
    half = samples[: max(1, len(samples) // 2)]
    with seeded(derive_seed(recipe.options.seed, "loss check")), evaluating(model):
        losses = _Losses(recipe, model, precision, device)
        tolerance = TOLERANCE.get(precision.name, LOW_TOLERANCE)
        try:
            once, twice = load(half), load(np.concatenate((half, half)))
            with parameters_stay(model):  # here, since what is changed in place may not change a second time
                base = losses.of(once)
            if not once.num_targets or not math.isfinite(base) or not base:
                return
            noise = abs(losses.of(once, seed=1) / base - 1)
            ratio = losses.of(twice) / max(1, twice.num_targets) / (base / once.num_targets)
            is_exact = noise <= SAME and _repeats(once, twice)
            if noise <= MOST_NOISE and abs(ratio - 0.5) <= MEAN_WITHIN:
                raise UserError(_mean_text(len(half), base, losses.of(twice), once.num_targets))
            couples = is_exact and abs(ratio - 1) > tolerance
            if is_exact and not couples and len(samples) > 2:
                couples = _is_not_additive(losses, load, samples, tolerance)
        except UserError:
            raise
        except Exception:  # training has its own messages, and need not be able to evaluate
            return
    if couples:
        warn(
            "the loss of a sample depends on the other samples of its micro-batch: results then depend on "
            "--micro-batch-size (though not on the ranks). If it is meant, as in contrastive losses, declare "
            "loss_couples_samples = True in the recipe"
        )


def _mean_text(num_samples: int, once: float, twice: float, num_targets: int) -> str:
    return (
        f"the recipe's loss() is a mean: it is {once:.4g} for {num_samples} sample{'s' * (num_samples > 1)} and "
        f"{twice:.4g} for the same twice. Return the sum over the targets (reduction='sum'), which is divided by their "
        f"number in the whole global batch (num_targets(): {num_targets} here); divided twice, loss and gradients are "
        f"too small. For a mean of the micro-batches' means, let num_targets() return 1"
    )


class _Losses:
    """The loss of micro-batches."""

    def __init__(self, recipe: Recipe, model: nn.Module, precision: Precision, device: torch.device) -> None:
        self._recipe = recipe
        self._model = model
        self._precision = precision
        self._device = device

    def of(self, micro_batch: MicroBatch, seed: int = 0) -> float:
        seed_model_stream(self._recipe.options.seed, -1 - seed, 0, self._device)
        recipe = copy(self._recipe)  # what the recipe notes about the batches it has seen, this one does not change
        return float(forward(recipe, self._model, micro_batch, self._precision, self._device).loss)


def _repeats(once: MicroBatch, twice: MicroBatch) -> bool:
    """Return whether one has the rows and targets of the other twice: collate() draws no numbers for a whole batch."""
    if twice.num_targets != 2 * once.num_targets:
        return False
    pairs = [
        (one, both)
        for one, both in zip(_tensors(once.inputs), _tensors(twice.inputs), strict=False)
        if one.ndim and both.ndim
    ]
    return bool(pairs) and all(torch.equal(both, torch.cat((one, one))) for one, both in pairs)


def _is_not_additive(
    losses: _Losses, load: Callable[[np.ndarray], MicroBatch], samples: np.ndarray, tolerance: float
) -> bool:
    """Return whether samples have another loss beside others, in micro-batches that are padded to the same shapes."""
    longest = _longest([load(samples[i : i + 1]) for i in range(len(samples))])
    others = [i for i in range(len(samples)) if i not in longest]
    if len(others) < 2:
        return False
    cut = (len(others) + 1) // 2
    chosen = (range(len(samples)), longest, longest + others[:cut], longest + others[cut:])
    loaded = [load(samples[sorted(positions)]) for positions in chosen]
    shapes = [[tuple(tensor.shape[1:]) for tensor in _tensors(micro_batch.inputs)] for micro_batch in loaded]
    if any(found != shapes[0] for found in shapes):
        return False
    everything, least, *both = (losses.of(micro_batch) for micro_batch in loaded)
    return abs(everything + least - sum(both)) > tolerance * max(abs(everything), abs(least))


def _longest(singles: list[MicroBatch]) -> list[int]:
    """Return positions of samples that, alone, reach the largest size of each dimension of each tensor."""
    sizes = [[size for tensor in _tensors(single.inputs) for size in tensor.shape] for single in singles]
    if any(len(found) != len(sizes[0]) for found in sizes):
        return list(range(len(singles)))
    return sorted({max(range(len(sizes)), key=lambda i: sizes[i][column]) for column in range(len(sizes[0]))})


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif hasattr(value, "values"):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluate without compiling, and leave the buffers as they are."""
    start = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if getattr(model, "_compiled_call_impl", None) is not None:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        try:
            yield
        finally:
            train_mode(model)
            for name, buffer in start.items():
                model.get_buffer(name).copy_(buffer)
