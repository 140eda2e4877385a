"""A run that was trained before: its checkpoint, the recipe and options that made it, its data and its model."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from msgspec import UnsetType
from torch import nn

from shardlaunch.checkpoints.exporting import Weight, weights_of
from shardlaunch.checkpoints.files import error_text
from shardlaunch.checkpoints.finding import checkpoint_at
from shardlaunch.checkpoints.layout import CHECKPOINTS
from shardlaunch.checkpoints.peers import Peers
from shardlaunch.checkpoints.reader import Checkpoint, open_checkpoint
from shardlaunch.checkpoints.records import RecipeFile, RunRecord, as_meant, read_record
from shardlaunch.errors import UserError, some
from shardlaunch.launcher.commands.doctor.recipe import load_recipe
from shardlaunch.launcher.commands.installed import find_recipe
from shardlaunch.launcher.option_fields import option_types
from shardlaunch.launcher.options import Options, flag
from shardlaunch.launcher.recipe import Recipe, options_type_of, recipe_name
from shardlaunch.launcher.runs.data import RunData, load_data
from shardlaunch.launcher.runs.folder import RUN
from shardlaunch.launcher.runs.identity import data_fingerprint, reference_key
from shardlaunch.launcher.runs.init_from import InitFrom
from shardlaunch.launcher.runs.lora import add_adapters
from shardlaunch.launcher.runs.model import build_model
from shardlaunch.launcher.runs.references import place_references
from shardlaunch.sharding.buffers import persistent_buffers
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.world import World


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A checkpoint and what made it."""

    run_dir: Path | None
    """Output folder, None of a checkpoint that stands alone."""
    checkpoint: Checkpoint
    recipe: Recipe
    fold: int | None
    warn: Callable[[str], None]
    on_cpu: bool = False

    @property
    def where(self) -> Path:
        return self.checkpoint.step_dir

    @property
    def precision_name(self) -> str:
        """Return the precision that the run computes in."""
        return str(self.checkpoint.recipe.run.warn.get("--precision", "fp32"))

    @cached_property
    def world(self) -> World:
        """Return this process alone, on a GPU where there is one."""
        has_gpu = not self.on_cpu and torch.cuda.is_available() and not read_environment().use_cpu
        return World(device=torch.device("cuda", 0)) if has_gpu else World()

    def load_data(self, *, own: Collection[str] = ("train", "eval")) -> RunData:
        """Return the run's data, and warn where those that are its `own` are no longer what it was trained on."""
        with reading_data():
            data = load_data(self.recipe, self.world, self.fold)
        for name, split in data.splits.items():
            if name in own and (changed := self.changed_fingerprint(name, split)):
                self.warn(f"the {name} data are not those of the run any more ({changed}); its log is of others")
        return data

    def changed_fingerprint(self, name: str, split: Any) -> str:
        """Return both fingerprints of a split that differs from the run's, else an empty text."""
        saved = self.checkpoint.recipe.run.identity.get(f"fingerprint of the {name} data")
        here = data_fingerprint(split, seed=self.recipe.options.seed)
        return f"fingerprint {saved} -> {here}" if saved not in (None, here) else ""

    def model(self, *, ema: bool = False) -> nn.Module:
        """Return the model with the checkpoint's weights, or the average of them, for evaluation. Load the data before.

        Raises UserError where the recipe builds another model than the checkpoint's.
        """
        recipe, options = self.recipe, self.recipe.options
        self._place_references()
        weights = {weight.name: weight for weight in weights_of(self.checkpoint, is_average=ema)}
        saved_names: Mapping[str, str] = {}
        if options.lora_rank:
            init = InitFrom.opened(Path(options.init_from), warn=self.warn) if options.init_from else None
            model, origins = build_model(recipe, options.seed, is_resumed=False, init=init)
            adapters, _ = add_adapters(model, options, new=origins.new, init=init)
            adapters.check_base(self.checkpoint)
            saved_names = adapters.saved_names
        else:
            model, _ = build_model(recipe, options.seed, is_resumed=True)
        held = dict(model.named_parameters()) | persistent_buffers(model)
        if options.lora_rank:
            held = {name: tensor for name, tensor in held.items() if name in saved_names}
        self._fill({saved_names.get(name, name): tensor for name, tensor in held.items()}, weights)
        return model.eval().to(self.world.device)

    def _place_references(self) -> None:
        """Build the recipe's reference models, and warn of one that is not that of the run."""
        identity = self.checkpoint.recipe.run.identity
        for name, digest in place_references(self.recipe, self.world).items():
            saved = identity.get(reference_key(name))
            if saved not in (None, digest):
                self.warn(
                    f"the reference model {name!r} is not that of the run any more (digest {saved} -> {digest}); its "
                    f"log is with another"
                )

    @torch.no_grad()
    def _fill(self, held: Mapping[str, torch.Tensor], weights: Mapping[str, Weight]) -> None:
        """Copy weights into tensors of the same names. Raises UserError where they differ in names or shapes."""
        changed = [f"{name} is missing there" for name in held if name not in weights]
        changed += [f"{name} is not in the recipe's model" for name in weights if name not in held]
        changed += [
            f"{name} is {list(weight.shape)} there, {list(held[name].shape)} here"
            for name, weight in weights.items()
            if name in held and weight.shape != tuple(held[name].shape)
        ]
        if changed:
            raise UserError(
                f"{self.where}: the recipe builds another model than that of the checkpoint: {some(changed, 3)}; bring "
                f"back the recipe and the data of the run"
            )
        for name, weight in weights.items():
            held[name].copy_(weight.read(0, weight.num_elements).view(weight.shape))


@contextmanager
def reading_data() -> Iterator[None]:
    """Raise UserError where data cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"the data cannot be read: {error_text(error)}") from error


def open_run(
    path: Path, *, step: int | None, recipe_path: str, warn: Callable[[str], None], on_cpu: bool = False
) -> TrainedRun:
    """Return the run at a path, at its newest valid checkpoint, or at one that is named, with its recipe and options.

    The path is an output folder or a checkpoint, `recipe_path` a recipe file or name in place of the run's. Raises
    UserError where there is no valid checkpoint, and where the recipe cannot be found or has other options.
    """
    step_dir = checkpoint_at(path, step=step, warn=warn)
    checkpoint = open_checkpoint(step_dir, peers=Peers())
    run_dir = step_dir.absolute().parent.parent if step_dir.absolute().parent.name == CHECKPOINTS else None
    name, _, class_name = checkpoint.recipe.recipe.partition(".")
    recipe_type = _recipe_type(name, class_name, _recorded_file(run_dir), recipe_path, warn=warn)
    if recipe_name(recipe_type) != name:
        warn(f"{step_dir} is of the recipe {name}, and this one is {recipe_name(recipe_type)}")
    options = options_of(recipe_type, checkpoint.recipe.options, where=str(step_dir))
    fold = checkpoint.recipe.run.identity.get("fold")
    return TrainedRun(
        run_dir=run_dir,
        checkpoint=checkpoint,
        recipe=recipe_type(options),
        fold=fold - 1 if isinstance(fold, int) else None,
        warn=warn,
        on_cpu=on_cpu,
    )


def _recorded_file(run_dir: Path | None) -> RecipeFile | None:
    """Return where a run says that its recipe is, None if it does not say."""
    if run_dir is None or not (run_dir / RUN).exists():
        return None
    file = read_record(run_dir / RUN, RunRecord).recipe_file
    return None if isinstance(file, UnsetType) else file


def _recipe_type(
    name: str, class_name: str, recorded: RecipeFile | None, given: str, *, warn: Callable[[str], None]
) -> type[Recipe]:
    """Return the class of a recipe: of the file that is given, else of the run's, else the installed one of the name.

    Raises UserError where there is none, or the file fails.
    """
    if given:
        path = find_recipe(given)
    elif recorded is not None and Path(recorded.path).is_file():
        path = Path(recorded.path)
    else:
        gone = f", whose file {recorded.path} is gone" if recorded is not None else ""
        try:
            path = find_recipe(name)
        except UserError:
            named = f"{name}{gone}"
            raise UserError(f"the run is one of the recipe {named}; say where it is with --recipe FILE") from None
        if gone:
            warn(f"{recorded.path if recorded else ''} is gone; using the installed recipe {name}")
    if recorded is not None and xxhash.xxh3_128_hexdigest(path.read_bytes()) != recorded.xxh3_128:
        warn(f"{path} is not as it was when the run began or was last resumed: figures may differ from those it logged")
    recipe_type, findings = load_recipe(path, class_name)
    if recipe_type is None:
        raise UserError("; ".join(f"{finding.text}; {finding.advice}" for finding in findings))
    if class_name and recipe_type.__name__ != class_name:
        raise UserError(f"{path}: has no class {class_name}, which is the run's recipe; bring it back")
    return recipe_type


def options_of(recipe_type: type[Recipe], values: Mapping[str, Any], *, where: str) -> Options:
    """Return a recipe's options with the values of a record. Raises UserError for options that the recipe has not."""
    options_type = options_type_of(recipe_type)
    hints = option_types(options_type)
    unknown = [flag(name) for name in values if name not in hints]
    if unknown:
        raise UserError(
            f"{where}: was trained with {some(unknown)}, which the recipe does not have; it has changed since"
        )
    known = {f.name for f in fields(options_type) if f.init}
    meant = {name: value if hints[name] is str else as_meant(value) for name, value in values.items() if name in known}
    return options_type(**meant)
