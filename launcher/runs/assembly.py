"""A run's model, its strategy, and its initial weights. Built again when parameters are unfrozen."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import nn

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.optimization.freezing import freeze
from shardlaunch.launcher.optimization.optimizers import check_lr_factors, separate
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.recipe import Recipe, has_own_step
from shardlaunch.launcher.reporting.parameters import ParameterRow, parameter_rows
from shardlaunch.launcher.reporting.phases import phase
from shardlaunch.launcher.runs.init_from import InitFrom
from shardlaunch.launcher.runs.lora import Adapters, add_adapters
from shardlaunch.launcher.runs.model import (
    Origins,
    build_empty_model,
    build_model,
    non_persistent_buffers_digest,
)
from shardlaunch.launcher.runs.references import check_references
from shardlaunch.launcher.runs.start_values import RecordedModel, record_model, start_values
from shardlaunch.sharding.initial_weights import InitialWeights
from shardlaunch.sharding.optimizers import Optimizers, optimizers_by_name
from shardlaunch.sharding.partly_saved import HeldWeights, PartlySaved
from shardlaunch.sharding.precision import convert_model
from shardlaunch.sharding.resolve import STRATEGIES
from shardlaunch.sharding.strategy import Settings, Strategy
from shardlaunch.sharding.world import World, connecting


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """A model, the strategy that distributes it, and facts about it."""

    model: nn.Module
    model_class: str
    """Name of the class that the recipe built; FSDP2 gives the model another."""
    strategy: Strategy
    origins: Origins
    """Where the initial values of the parameters come from."""
    whole_model_because: str
    """Why one rank of each machine built the whole model for ranks that keep shards, or each did; empty: none did."""
    whole_model_on: str
    """Which processes did."""
    aliases: dict[str, str]
    """Other names of tied parameters, each with the name that it is saved under."""
    non_persistent_buffers: str
    """Digest of the non-persistent buffers."""
    rows: list[ParameterRow]
    """Learning rate and weight decay of the parameters, by part of the model."""
    num_tensors: int
    num_elements: int
    num_saved: int
    """Elements of the weights that a checkpoint holds."""
    adapters: Adapters | None
    """Those of --lora-rank."""
    trained: frozenset[str]
    """Names of the parameters that require gradients, which the strategy and the optimizer were made for."""

    def bytes_to_save(self, options: Options) -> int:
        """Return about how many bytes a checkpoint will have: weights, two values of the optimizer, their average."""
        return (12 + 4 * options.keeps_average) * self.num_saved

    def check_trained(self) -> None:
        """Raise UserError if other parameters require gradients now: they would be trained in part, or not at all."""
        if changed := trained_names(self.model) ^ self.trained:
            raise UserError(
                f"requires_grad of {some(sorted(changed))} was changed during training, which the optimizer, the other "
                f"strategies and a resume do not follow. Use --freeze and --unfreeze-at-step, or leave the parameters "
                f"out of the loss (detach())"
            )


def assemble(
    recipe: Recipe,
    *,
    world: World,
    strategy_name: str,
    settings: Settings,
    precision_name: str,
    run_digest: int,
    step: int,
    is_resumed: bool,
    init: InitFrom | None = None,
) -> Assembly:
    """Build the recipe's model, freeze what is frozen at `step`, and spread it, without a checkpoint's values yet.

    All ranks. `run_digest` says which run a rank has before it. Raises UserError when ranks differ, and when the model
    cannot be built or spread.
    """
    options = recipe.options
    with phase("building the model"):
        model, origins, initial, reason, built_on, adapters = _build(
            recipe, world, strategy_name, run_digest, is_resumed=is_resumed, init=init
        )
    if adapters is not None and precision_name == "fp8":
        raise UserError("--precision fp8: not with --lora-rank; use bf16, or remove one of the two")
    buffers_digest = non_persistent_buffers_digest(model)
    convert_model(model, precision_name)
    if options.gradient_checkpointing:
        enable_gradient_checkpointing(model, every=options.gradient_checkpointing_every)
    numels = {name: parameter.numel() for name, parameter in model.named_parameters()}
    freeze(model, options, step=step)
    is_frozen = options.is_frozen if not options.unfreeze_at_step else lambda name: False
    trainable = trained_names(model) if adapters is not None else {name for name in numels if not is_frozen(name)}
    check_lr_factors([name for name in numels if name in trainable], options)
    rows: list[ParameterRow] = []

    def build_optimizer(parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        trained = list(parameters)
        optimizer = recipe_optimizer(recipe, trained)
        if isinstance(optimizer, Optimizers) and not STRATEGIES[strategy_name].takes_several_optimizers:
            raise UserError(
                f"the recipe's optimizer() returns several optimizers, of which {strategy_name} takes one; use "
                f"--strategy ddp or fsdp2"
            )
        rows.extend(parameter_rows(numels, trained, optimizer))
        return optimizer

    model_class = type(model).__name__
    aliases = _aliases(model)
    with phase("placing the model"):
        with connecting():
            strategy = STRATEGIES[strategy_name](model, build_optimizer, world=world, settings=settings)
        if options.keeps_average:
            strategy.keep_average(is_exact=options.exact)
        if initial is not None and not (adapters is not None and is_resumed):
            strategy.restore(initial)
    check_references(recipe, model, len(strategy.replicas))
    if options.compile:
        for replica in strategy.replicas:
            replica.compile()
    if adapters is not None:
        strategy = PartlySaved(strategy, adapters.saved_names, base=initial or HeldWeights(model))
    return Assembly(
        model=model,
        model_class=model_class,
        strategy=strategy,
        origins=origins,
        whole_model_because=reason,
        whole_model_on=built_on,
        aliases=adapters.saved_aliases(aliases) if adapters else aliases,
        non_persistent_buffers=buffers_digest,
        rows=rows,
        num_tensors=len(numels),
        num_elements=sum(numels.values()),
        num_saved=sum(n for name, n in numels.items() if adapters is None or name in adapters.saved_names),
        adapters=adapters,
        trained=trained_names(model),
    )


def trained_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters that require gradients."""
    return frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def recipe_optimizer(recipe: Recipe, trained: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Return the recipe's optimizer of some parameters. Raises UserError if it returns something else."""
    optimizer = recipe.optimizer(trained)
    if isinstance(optimizer, Mapping):
        _check_several(recipe, optimizer)
        optimizer = Optimizers(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        several = isinstance(optimizer, list | tuple) and f"a {type(optimizer).__name__} of {len(optimizer)}"
        raise UserError(
            f"the recipe's optimizer() must return one torch.optim.Optimizer, or a dictionary of several for a step() "
            f"that names them; it returned {several or type(optimizer).__name__}. For other settings of some "
            f"parameters give one optimizer groups: AdamW([{{'params': some, 'lr': 1e-4}}, {{'params': others}}]); a "
            f"learning-rate schedule is schedule()"
        )
    for one in optimizers_by_name(optimizer).values():
        separate(one, (parameter for name, parameter in trained if recipe.options.is_frozen(name)))
    return optimizer


def _check_several(recipe: Recipe, optimizers: Mapping[Any, Any]) -> None:
    """Raise UserError for several optimizers that are none, or that nothing tells apart."""
    wrong = [
        f"{name!r}: {type(one).__name__}"
        for name, one in optimizers.items()
        if not (isinstance(one, torch.optim.Optimizer) and isinstance(name, str) and name)
    ]
    if wrong or not optimizers:
        raise UserError(
            f"the recipe's optimizer() must return optimizers by name; it returned {some(wrong) or 'none at all'}"
        )
    if not has_own_step(type(recipe)):
        raise UserError(
            f"the recipe's optimizer() returns several optimizers ({some(map(str, optimizers))}), but it has no step() "
            f"that says when each updates: def step(self, step): step.update(self.its_loss, optimizer=...)"
        )
    if recipe.options.on_spike != "off":
        raise UserError("--on-spike: not with several optimizers, whose losses are not one sequence; remove it")


def _build(
    recipe: Recipe, world: World, strategy_name: str, run_digest: int, *, is_resumed: bool, init: InitFrom | None
) -> tuple[nn.Module, Origins, InitialWeights | None, str, str, Adapters | None]:
    """Build the model, whole or (if the strategy requires it) empty; return it, its weights' origins, and its weights.

    All ranks. The weights are those to restore: none if the model has them. Then follow why a whole model was built
    besides an empty one, on which processes, and the model's adapters, which have no base model in a checkpoint to be
    resumed from.
    """
    options, seed = recipe.options, recipe.options.seed
    is_resumed = is_resumed and not options.lora_rank
    adapters: Adapters | None = None
    if not STRATEGIES[strategy_name].starts_empty:
        model, origins = build_model(recipe, seed, is_resumed=is_resumed, init=init)
        _check_ranks_agree(world, run_digest, _weights_digest(model))
        if options.lora_rank:
            adapters, _ = world.peers.together(lambda: add_adapters(model, options, new=origins.new, init=init))
        return model, origins, None, "", "", adapters
    if is_resumed:
        whole: list[str] = []
        empty = world.peers.together(lambda: build_empty_model(recipe, seed, on_whole=whole.append))
        _check_ranks_agree(world, run_digest, -1)
        return empty, Origins(), None, "".join(whole), "each process", None

    def built() -> tuple[nn.Module, RecordedModel | None]:
        recorded = record_model(recipe, seed) if world.is_local_main else None
        return (recorded.model if recorded else build_empty_model(recipe, seed)), recorded

    empty, recorded = world.peers.together(built)
    values = world.peers.together(lambda: start_values(recipe, seed, recorded, init=init) if recorded else None)
    is_one_machine = world.local_size == world.size
    weights_digest = world.peers.together(lambda: -1 if values is None or is_one_machine else values.digest())
    _check_ranks_agree(world, run_digest, weights_digest)
    origins, reason = (values.origins, values.whole_model_because) if values is not None else (Origins(), "")
    if options.lora_rank:
        names = [name for name, _ in empty.named_parameters()]
        is_new = world.peers.of_first([name in set(origins.new) for name in names])
        new = [name for name, flag in zip(names, is_new, strict=True) if flag]
        adapters, values = world.peers.together(
            lambda: add_adapters(empty, options, new=new, values=values, is_empty=True, init=init)
        )
    built_on = "each process" if recorded and recorded.was_whole else "one process of each machine"
    return empty, origins, InitialWeights(empty, values, world=world), reason, built_on, adapters


def _check_ranks_agree(world: World, run_digest: int, weights_here: int) -> None:
    """Check that all ranks have the same run, and the same digest of the weights, unless it is -1. All ranks."""
    run, weights = world.peers.of_first([run_digest, weights_here])

    def check() -> None:
        if run_digest != run or weights_here not in (-1, weights):
            what = "other weights" if run_digest == run else "other options or data"
            raise UserError(
                f"rank {world.rank} has {what} than rank 0: what datasets(), model() and weights() of the recipe "
                f"return must not depend on the rank, nor on randomness without a seed"
            )

    world.peers.together(check)


def _weights_digest(model: nn.Module) -> int:
    digest = xxhash.xxh3_64()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.intdigest() >> 1


def _aliases(model: nn.Module) -> dict[str, str]:
    names: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names.setdefault(id(parameter), name) != name:
            aliases[name] = names[id(parameter)]
    return aliases


def enable_gradient_checkpointing(model: nn.Module, *, every: int = 1) -> None:
    """Let one of `every` layers of a model recompute its activations. Raises UserError if the model cannot."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        raise UserError(f"--gradient-checkpointing: not supported by {type(model).__name__}; remove it")
    try:
        enable(activation_checkpointing_kwargs={"use_reentrant": False}, every_n_layers=every)
    except ValueError as error:
        raise UserError(f"--gradient-checkpointing: {error}") from error
    if every > 1 and all(module.gradient_checkpointing for module in model.modules() if _is_recomputed(module)):
        raise UserError(
            f"--gradient-checkpointing-every {every}: {type(model).__name__} has no layers to choose from or just one. "
            "Remove it."
        )


def _is_recomputed(module: nn.Module) -> bool:
    return hasattr(module, "gradient_checkpointing")
