"""The recipe: a class that says what to train. Everything else is the launcher's."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import numpy as np
import torch
from torch import nn

from shardlaunch.errors import UserError
from shardlaunch.launcher.batch_defaults import collated, count_targets, has_column, model_outputs
from shardlaunch.launcher.hook_names import check_hook_names
from shardlaunch.launcher.launched import watch
from shardlaunch.launcher.optimization.optimizers import OptimizerOptions, build_optimizer, check_optimizer_options
from shardlaunch.launcher.optimization.schedules import ScheduleOptions, scheduled
from shardlaunch.launcher.options import Options, flag
from shardlaunch.launcher.tensor_data import TensorData


class Recipe:
    """Say what to train: model, data, loss, metrics. Derive from it, then end the file with `launch(YourRecipe)`.

    To be defined: `datasets`, `model`, `loss`. The other methods have defaults that suit supervised learning on batches
    with `inputs` and `labels`. Options: annotate `options` with a dataclass derived from `Options`.
    """

    options: Options
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named sets of option defaults, chosen by --preset."""
    best_metric: str = "loss"
    """The metric that says which checkpoint is best."""
    class_names: Sequence[str] = ()
    """Names of the classes by number, for tables such as the confusion matrix; `datasets` may set them."""
    layer_classes: ClassVar[tuple[str, ...]] = ()
    """Classes of the model's blocks, gathered one at a time under FSDP2. Hugging Face models declare theirs."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Watch that a recipe of the file that is run is launched."""
        super().__init_subclass__(**keywords)
        watch(cls)

    def __init__(self, options: Options) -> None:
        self.options = options

    def explicitly_set_flags(self, *names: str) -> list[str]:
        """Return those of some options, as on the command line, that were given there, or differ from the defaults.

        Defaults are the class's and the preset's.
        """
        preset = self.presets.get(self.options.preset, {})
        defaults = {f.name: (f.default, preset.get(f.name, f.default)) for f in fields(self.options)}
        explicitly_set = self.options.explicitly_set
        return [
            flag(name) for name in names if name in explicitly_set or getattr(self.options, name) not in defaults[name]
        ]

    def datasets(self) -> Mapping[str, Any]:
        """Return the map-style data sets `train` and, if there is one, `eval`.

        Called on rank 0 first, then on the others: what it caches on disk is made once. Called before `model`.
        """
        raise NotImplementedError

    def model(self) -> nn.Module:
        """Return the module, built from its configuration, with fresh weights. No pretrained weights here."""
        raise NotImplementedError

    def weights(self) -> Mapping[str, torch.Tensor]:
        """Return pretrained weights by parameter name; what is not among them starts fresh."""
        return {}

    def lengths(self, dataset: Any) -> np.ndarray | None:
        """Return one length a sample, to batch alike ones together: an integer array; None: all are alike."""
        if "length" in (getattr(dataset, "column_names", None) or ()):
            return np.asarray(dataset.with_format("numpy", columns=["length"])["length"][:])
        return None

    def classes_of(self, dataset: Any) -> np.ndarray | None:
        """Return one class a sample (int array), of which --folds gives each fold its share; None: there are none.

        By default the column `labels` or `label`, if it holds whole numbers or truth values.
        """
        has_tensors = isinstance(dataset, TensorData)
        names = dataset.columns if has_tensors else getattr(dataset, "column_names", None) or ()
        name = next((name for name in ("labels", "label") if name in names), None)
        if name is None:
            return None
        classes = np.asarray(dataset.columns[name] if has_tensors else dataset.with_format("numpy")[name][:])
        return classes if classes.ndim == 1 and classes.dtype.kind in "iub" else None

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        """Return a batch (tensors by name) of what the data set gave for some samples: a list, or a mapping of columns.

        `seeds` has one integer per sample for random preprocessing, and is None at evaluation. By default, rows that
        are (inputs, labels) give a batch with these two names, rows that are dictionaries one with theirs.
        """
        return samples if isinstance(samples, Mapping) else collated(samples)

    def num_targets(self, batch: Any) -> int:
        """Return how many targets the loss of this batch sums over.

        By default, whole-number labels of any shape count where they are not -100 (the `ignore_index` of torch's cross
        entropy), others one per row. Several numbers per row that are not whole are refused: they may be one target or
        several.
        """
        return count_targets(batch)

    def num_tokens(self, batch: Any) -> int:
        """Return how many tokens the batch holds, for the throughput shown; 0 where there are none."""
        return int(batch["attention_mask"].sum()) if has_column(batch, "attention_mask") else 0

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """Return the model's outputs. Call the model itself: parts of it may be slices until it is called.

        By default `model(batch["inputs"])`; where there are no `inputs`, the columns are passed by name, as to models
        of transformers, without `labels`, `label` and `length`.
        """
        return model_outputs(model, batch)

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """Return the SUM of the loss over the batch's targets: a scalar. The launcher divides by their number."""
        raise NotImplementedError

    def metrics(self) -> Mapping[str, Any]:
        """Return torchmetrics metrics by name; `update_metrics` feeds them."""
        return {}

    def update_metrics(self, metrics: Mapping[str, Any], outputs: Any, batch: Any) -> None:
        """Feed one evaluated batch to the metrics: by default outputs, or their `logits`, and labels."""
        for metric in metrics.values():
            metric.update(getattr(outputs, "logits", outputs), batch["labels"])

    def optimizer(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Return the optimizer over the named trainable parameters; its rates are the schedule's peak.

        By default the one that the options name.
        """
        return build_optimizer(parameters, self.options)

    def schedule(self, step: int, num_steps: int) -> float:
        """Return the factor on the learning rate of step `step` (from 0) out of `num_steps`; by default as optioned."""
        return scheduled(step, num_steps, self.options)

    def export(self, folder: Path, model: Any) -> None:
        """Write the files that make a checkpoint a model folder for other tools: configuration, tokenizer. Rank 0."""

    def usage(self, checkpoint: Path) -> str:
        """Return a shell line that shows how to use a checkpoint; empty: none."""
        return ""


def recipe_name(recipe_type: type[Recipe]) -> str:
    """Return the name of a recipe: its file's."""
    file = getattr(sys.modules[recipe_type.__module__], "__file__", None)
    return Path(file).stem if file else recipe_type.__name__


def options_type_of(recipe_type: type[Recipe]) -> type[Options]:
    """Return the class of a recipe's options: what its `options` is annotated with."""
    options_type: type[Options] = get_type_hints(recipe_type)["options"]
    return options_type


def check_in_effect(recipe: Recipe) -> None:
    """Raise UserError for options that the launcher's optimizer does not take, or that the recipe's own leaves idle.

    So too for methods that are named almost as hooks, which would be idle.

    What the recipe's options class declares itself is taken to be used by its own optimizer() or schedule().
    """
    check_hook_names(type(recipe), Recipe)
    if type(recipe).optimizer is Recipe.optimizer:
        check_optimizer_options(recipe.options)
    own = {name for cls in type(recipe.options).__mro__ if cls not in Options.__mro__ for name in vars(cls)}
    for method, owner in (("optimizer", OptimizerOptions), ("schedule", ScheduleOptions)):
        if getattr(type(recipe), method) is not getattr(Recipe, method):
            for f in fields(owner):
                if f.name != "lr" and f.name not in own and getattr(recipe.options, f.name) != f.default:
                    raise UserError(
                        f"{flag(f.name)}: this recipe has its own {method}(), which knows nothing of it; "
                        f"drop the option, or declare it in the recipe's options class and use it there"
                    )
