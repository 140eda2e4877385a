"""The recipe: a class that defines what to train."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, get_type_hints

import numpy as np
import torch
from torch import nn

from shardlaunch.errors import UserError
from shardlaunch.launcher.batch_defaults import collated, count_targets, has_column, model_outputs
from shardlaunch.launcher.callbacks import RunHooks
from shardlaunch.launcher.hook_names import check_hook_names
from shardlaunch.launcher.launched import mark_launched, watch
from shardlaunch.launcher.logged import Logs
from shardlaunch.launcher.optimization.lora import require_peft
from shardlaunch.launcher.optimization.optimizers import OptimizerOptions, build_optimizer, check_optimizer_options
from shardlaunch.launcher.optimization.schedules import ScheduleOptions, scheduled
from shardlaunch.launcher.options import Options, flag
from shardlaunch.launcher.order import Order
from shardlaunch.launcher.step import Loss, Step
from shardlaunch.launcher.tensor_data import TensorData


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where a run is, the same on any ranks and after a resume: `Recipe.moment` in collate, forward and loss."""

    step: int = 0
    """Steps done before this one; in an evaluation, steps done."""
    epoch: int = 0
    """Passes over the training data that are complete."""
    num_steps: int = 1
    """Steps of the whole run."""
    is_evaluation: bool = False

    @property
    def progress(self) -> float:
        """Return the part of the run that is done, from 0 to 1."""
        return min(1.0, self.step / self.num_steps)


class Recipe(Logs, RunHooks):
    """Base class of recipes, which define what to train: model, data, loss, metrics.

    A subclass must define `datasets`, `model` and `loss`; the other methods have defaults for supervised learning on
    batches with `inputs` and `labels`. For options of its own, it annotates `options` with a dataclass derived from
    `Options`. A recipe file ends with `launch(YourRecipe)`.
    """

    options: Options
    moment: Moment = Moment()
    """Where the run is, for weights of the loss that ramp up, temperatures and the like: a value derived from it is
    the same after a resume, one that the recipe counts itself is not. Set before each micro-batch."""
    reference: Mapping[str, nn.Module] = MappingProxyType({})
    """The models of `references`, once they are built."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named sets of option defaults, selected with --preset."""
    best_metric: str = "loss"
    """The metric that decides which checkpoint is best. Of a run with an average of its weights, that of the average,
    unless the name begins with `eval/`."""
    class_names: Sequence[str] = ()
    """Names of the classes by number, for tables such as the confusion matrix; `datasets` may set them."""
    loss_couples_samples: bool = False
    """Whether the loss of a sample is meant to depend on the others in its micro-batch, as contrastive losses do."""
    layer_classes: ClassVar[tuple[str, ...]] = ()
    """Classes of the model's blocks, gathered one at a time under FSDP2. Hugging Face models declare theirs."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Register the recipe, so that a recipe file that never launches it is reported."""
        super().__init_subclass__(**keywords)
        watch(cls)

    def __init__(self, options: Options) -> None:
        mark_launched(type(self))  # a script may use a recipe without a run of it
        self.options = options

    def explicitly_set_flags(self, *names: str) -> list[str]:
        """Return the flags of the named options that the user set, or that differ from class and preset defaults.

        The user sets options on the command line, in a YAML file or by keyword.
        """
        preset = self.presets.get(self.options.preset, {})
        defaults = {f.name: (f.default, preset.get(f.name, f.default)) for f in fields(self.options)}
        explicitly_set = self.options.explicitly_set
        return [
            flag(name) for name in names if name in explicitly_set or getattr(self.options, name) not in defaults[name]
        ]

    def datasets(self) -> Mapping[str, Any]:
        """Return the map-style data sets `train` and, optionally, `eval`; `train` may be an iterable.

        Called on rank 0 first and then on the others, which find what it cached on disk. Called before `model`.
        """
        raise NotImplementedError

    def model(self) -> nn.Module:
        """Return the module, built from its configuration and initialized. Pretrained weights belong in `weights`."""
        raise NotImplementedError

    def weights(self) -> Mapping[str, torch.Tensor]:
        """Return pretrained weights by parameter name; other parameters are newly initialized."""
        return {}

    def references(self) -> Mapping[str, nn.Module]:
        """Return models that are used and not trained, by name: teachers, reference models.

        Called before `model`. Each rank keeps them whole, as `self.reference[name]`, in evaluation mode and without
        gradients for their parameters. No checkpoint holds them; their digests are part of what the run is.
        """
        return {}

    def lengths(self, dataset: Any) -> np.ndarray | None:
        """Return one length per sample, to batch samples of similar length; None: no such batching.

        An array of numbers; of one that is mapped from a file (numpy.memmap), what is needed is read.
        """
        if "length" in (getattr(dataset, "column_names", None) or ()):
            return np.asarray(dataset.with_format("numpy", columns=["length"])["length"][:])
        return None

    def classes_of(self, dataset: Any) -> np.ndarray | None:
        """Return one class per sample (integer array), to stratify the folds of --folds; None: no classes.

        By default the column `labels` or `label`, if it holds integers or booleans.
        """
        classes = _column(dataset, "labels", "label")
        return classes if classes is not None and classes.ndim == 1 and classes.dtype.kind in "iub" else None

    def groups_of(self, dataset: Any) -> np.ndarray | None:
        """Return one group per sample (integer array), which --folds keeps in one fold; None: no groups.

        By default the column `group`, which `load_splits` makes of that of --group-column.
        """
        return _column(dataset, "group") if getattr(self.options, "group_column", "") else None

    def weights_of(self, dataset: Any) -> np.ndarray | None:
        """Return one weight per sample (from 0), for --order weighted; None: no weights.

        By default the column `weight`.
        """
        return _column(dataset, "weight")

    def order(self, dataset: Any) -> Order | None:
        """Return the order of the training samples, of `shardlaunch.orders` or your own; None: that of --order.

        Called with the training data, of a fold its part.
        """
        return None

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        """Return a batch (tensors by name) of some samples: a list of rows, or a mapping of columns.

        `seeds` has one integer per sample for random preprocessing, and is None in evaluation. By default, rows that
        are (inputs, labels) give a batch with these two names, and rows that are dictionaries a batch with their keys.
        """
        return samples if isinstance(samples, Mapping) else collated(samples)

    def num_targets(self, batch: Any) -> int | Mapping[str, int]:
        """Return the number of targets that the loss of this batch sums over; of several losses, numbers by name.

        By default, all integer labels that are not -100 (the `ignore_index` of torch's cross entropy); other labels
        count one per row. Raises UserError for several non-integer labels per row, which may be one target or several.
        """
        return count_targets(batch)

    def num_tokens(self, batch: Any) -> int:
        """Return the number of tokens in the batch, to show the throughput; 0: no tokens."""
        return int(batch["attention_mask"].sum()) if has_column(batch, "attention_mask") else 0

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Return the model's outputs. Call the model itself: its parameters may be sharded until it is called.

        By default `model(batch["inputs"])`; if there are no `inputs`, the columns are passed by name, as transformers'
        models expect, without `labels`, `label` and `length`.
        """
        return model_outputs(model, batch)

    def loss(self, outputs: Any, batch: Any) -> Loss:
        """Return the SUM of the loss over the batch's targets, a scalar. The launcher divides by the target count.

        Or several sums by name: each is divided by its own count if `num_targets` returns counts by name, and logged
        under its name; what is trained is their sum.
        """
        raise NotImplementedError

    def metrics(self) -> Mapping[str, Any]:
        """Return torchmetrics metrics by name; `update_metrics` updates them."""
        return {}

    def update_metrics(self, metrics: Mapping[str, Any], outputs: Any, batch: Any) -> None:
        """Update the metrics with an evaluated batch: by default with outputs, or their `logits`, and labels."""
        for metric in metrics.values():
            metric.update(getattr(outputs, "logits", outputs), batch["labels"])

    def step(self, step: Step) -> None:
        """Train on one global batch: update as often as wanted, by losses and optimizers of your own.

        By default one update by `forward` and `loss`.
        """
        step.update()

    def optimizer(
        self, parameters: Iterable[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer]:
        """Return the optimizer of the named trainable parameters; its learning rates are the peak of the schedule.

        Or several by name, each of other parameters, for a `step` that names them. By default the optimizer of
        --optimizer.
        """
        return build_optimizer(parameters, self.options)

    def schedule(self, step: int, num_steps: int) -> float:
        """Return the learning-rate factor of step `step` (from 0) of `num_steps`; by default that of --schedule."""
        return scheduled(step, num_steps, self.options)

    def export(self, folder: Path, model: Any) -> None:
        """Write files that let other tools load the checkpoint folder: configuration, tokenizer. Rank 0.

        They may lie in folders there, but not in folders of these.
        """

    def usage(self, checkpoint: Path) -> str:
        """Return an example shell command that uses a checkpoint; empty: none."""
        return ""


def _column(dataset: Any, *names: str) -> np.ndarray | None:
    """Return the first of some columns that a data set has, None if it has none."""
    has_tensors = isinstance(dataset, TensorData)
    known = dataset.columns if has_tensors else getattr(dataset, "column_names", None) or ()
    name = next((name for name in names if name in known), None)
    if name is None:
        return None
    return np.asarray(dataset.columns[name] if has_tensors else dataset.with_format("numpy")[name][:])


def recipe_name(recipe_type: type[Recipe]) -> str:
    """Return the name of a recipe: that of its file, without .py."""
    file = getattr(sys.modules[recipe_type.__module__], "__file__", None)
    return Path(file).stem if file else recipe_type.__name__


def options_type_of(recipe_type: type[Recipe]) -> type[Options]:
    """Return the class of a recipe's options: the annotation of `options`."""
    options_type: type[Options] = get_type_hints(recipe_type)["options"]
    return options_type


def has_own_step(recipe_type: type[Recipe]) -> bool:
    """Return whether a recipe decides itself which updates a step has."""
    return recipe_type.step is not Recipe.step


def check_in_effect(recipe: Recipe) -> None:
    """Raise UserError for options that have no effect in this recipe, and for misnamed hooks.

    Options have no effect if the optimizer does not support them, or if the recipe overrides optimizer() or schedule().
    Those that the recipe's options class declares itself count as used by its overrides.
    """
    check_hook_names(type(recipe), Recipe)
    require_peft(recipe.options)
    if type(recipe).optimizer is Recipe.optimizer:
        check_optimizer_options(recipe.options)
    own = {name for cls in type(recipe.options).__mro__ if cls not in Options.__mro__ for name in vars(cls)}
    for method, owner in (("optimizer", OptimizerOptions), ("schedule", ScheduleOptions)):
        if getattr(type(recipe), method) is not getattr(Recipe, method):
            for f in fields(owner):
                if f.name != "lr" and f.name not in own and getattr(recipe.options, f.name) != f.default:
                    raise UserError(
                        f"{flag(f.name)}: has no effect, because this recipe has its own {method}(); "
                        f"remove it, or declare it in the recipe's options class and use it in {method}()"
                    )
