"""Optimizers by name, their options, and parameter groups with their own weight decay and learning rate."""

import importlib
import inspect
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.option_fields import flag, option

# Short names; any other class is given by its dotted path.
NAMES = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
# Optimizers whose fused implementation works on CPU, CUDA and the shards of FSDP2.
_FUSED = (torch.optim.Adam, torch.optim.AdamW)
L1 = "l1"


@dataclass(kw_only=True)
class OptimizerOptions:
    """Options of the optimizer that the launcher builds. None stands for the optimizer's own default."""

    lr: float = option(1e-3, above=0)
    """Peak learning rate."""
    optimizer: str = "adamw"
    """sgd, adam, adamw, rmsprop, adagrad, or a class by its dotted path, such as torch.optim.NAdam."""
    momentum: float | None = option(None, minimum=0)
    """Momentum (sgd, rmsprop)."""
    nesterov: bool = False
    """Nesterov momentum (sgd)."""
    betas: tuple[float, float] | None = option(None, minimum=0, maximum=1)
    """Decay rates of the running averages of gradients and of their squares (adam, adamw)."""
    eps: float | None = option(None, minimum=0)
    """Epsilon in the denominator, for numerical stability (adam, adamw, rmsprop, adagrad)."""
    weight_decay: float = option(0.0, minimum=0)
    """Weight decay of parameters with at least two dimensions; biases and normalization layers have none."""
    l1: float = option(0.0, minimum=0)
    """L1 penalty, applied as a proximal (soft-thresholding) step after each update."""
    decay_all: bool = False
    """Apply --weight-decay and --l1 to biases and normalization layers too."""
    optimizer_args: tuple[str, ...] = ()
    """Other arguments of the optimizer, each NAME=VALUE."""
    lr_factors: tuple[str, ...] = ()
    """Factors on the learning rate for some parameters, each PATTERN=FACTOR; the first matching pattern counts."""

    def __post_init__(self) -> None:
        if self.decay_all and not (self.weight_decay or self.l1):
            raise UserError("--decay-all: has no effect without --weight-decay or --l1; set one of them or remove it")


def check_optimizer_options(options: OptimizerOptions) -> None:
    """Raise UserError for an unknown optimizer, and for arguments and factors that are invalid or not supported."""
    _optimizer_args(options)
    _lr_factors(options)


OptionsT = TypeVar("OptionsT", bound=OptimizerOptions)
# Values that leave a setting at the optimizer's own default.
_UNSET: Mapping[str, Any] = {"momentum": None, "nesterov": False, "betas": None, "eps": None, "weight_decay": 0.0}


def for_its_optimizer(options: OptionsT, default: OptionsT, *, explicitly_set: Collection[str]) -> OptionsT:
    """Return the options without the recipe's `default` settings that a different optimizer does not support.

    `explicitly_set` are the options that the user set: those stay, so that they raise an error later.
    """
    if options.optimizer == default.optimizer:
        return options
    taken = inspect.signature(optimizer_type(options.optimizer)).parameters
    unused = {name for name in _UNSET if name not in taken and name not in explicitly_set}
    return replace(options, **{name: _UNSET[name] for name in unused})


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    options: OptimizerOptions,
) -> torch.optim.Optimizer:
    """Build the optimizer of the options for named parameters, grouped by learning rate and decay.

    Raises UserError for arguments that the optimizer does not accept.
    """
    kind = optimizer_type(options.optimizer)
    arguments: dict[str, Any] = _optimizer_args(options)
    if kind in _FUSED and not any(arguments.get(name) for name in ("foreach", "differentiable")):
        arguments.setdefault("fused", True)
    try:
        optimizer: torch.optim.Optimizer = kind(parameter_groups(parameters, options), lr=options.lr, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--optimizer {options.optimizer}: {error}") from error
    if options.l1:
        optimizer.register_step_post_hook(_shrink)
    return optimizer


def optimizer_type(name: str) -> Any:
    """Return the optimizer class for --optimizer. Raises UserError when it is unknown or not supported."""
    if name in NAMES:
        return NAMES[name]
    module, _, attribute = name.rpartition(".")
    known = f"choose one of {', '.join(NAMES)}, or a class by its dotted path, such as torch.optim.NAdam"
    if not module:
        raise UserError(f"--optimizer {name}: unknown; {known}")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"--optimizer {name}: {error}; {known}") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"--optimizer {name}: not a torch.optim.Optimizer class; {known}")
    if found is torch.optim.SparseAdam:
        raise UserError(f"--optimizer {name}: needs sparse gradients, which are not supported; use adam")
    return found


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    options: OptimizerOptions,
) -> list[dict[str, Any]]:
    """Group named parameters by learning rate and decay."""
    factors = _lr_factors(options)
    by_setting: dict[tuple[float, bool], list[nn.Parameter]] = {}
    has_decay = bool(options.weight_decay or options.l1)
    for name, parameter in parameters:
        pattern = _factor_of(name, factors)
        decays = has_decay and (options.decay_all or parameter.ndim > 1)
        factor = factors[pattern] if pattern else 1.0
        by_setting.setdefault((factor, decays), []).append(parameter)
    return [
        {
            "params": group,
            "lr": options.lr * factor,
            "weight_decay": options.weight_decay if decays else 0.0,
            **({L1: options.l1 if decays else 0.0} if options.l1 else {}),
        }
        for (factor, decays), group in by_setting.items()
    ]


def separate(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Move some parameters into their own groups, with the settings of their present groups.

    Used for parameters that start frozen: they have fewer updates than others, and ZeRO counts updates per group.
    """
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        halves = [[p for p in group["params"] if (id(p) in chosen) is is_chosen] for is_chosen in (False, True)]
        if all(halves):
            group["params"] = halves[0]
            optimizer.param_groups.append({**group, "params": halves[1]})


def check_lr_factors(names: Sequence[str], options: OptimizerOptions) -> None:
    """Raise UserError when a pattern of --lr-factors is not the first match of any trained parameter."""
    factors = _lr_factors(options)
    unused = [pattern for pattern in factors if not any(_factor_of(name, factors) == pattern for name in names)]
    if unused:
        raise UserError(
            f"--lr-factors: no trained parameter matches {some(unused)} and no earlier pattern; "
            f"available: {some(names)}"
        )


def _factor_of(name: str, patterns: Iterable[str]) -> str | None:
    """Return the first pattern that matches a parameter's name."""
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def decay_groups(parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters into those with weight decay (matrices) and those without (biases, norms: one dimension)."""
    tensors = [parameter for _, parameter in parameters]
    groups = [
        {"params": [p for p in tensors if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in tensors if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _optimizer_args(options: OptimizerOptions) -> dict[str, Any]:
    """Return the arguments for the optimizer's constructor. Raises UserError for unsupported ones."""
    given: dict[str, Any] = {
        "momentum": options.momentum,
        "nesterov": options.nesterov or None,
        "betas": options.betas,
        "eps": options.eps,
        "weight_decay": options.weight_decay or None,
    }
    arguments = {name: value for name, value in given.items() if value is not None}
    for text in options.optimizer_args:
        name, is_pair, value = text.partition("=")
        if not is_pair or name in ("params", "lr", *given):
            raise UserError(f"--optimizer-args {text}: must be NAME=VALUE, for an argument that has no option")
        arguments[name] = _value(value)
    taken = inspect.signature(optimizer_type(options.optimizer)).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken.values())
    for name in arguments:
        if name not in taken and not takes_any:
            asked = flag(name) if name in given else f"--optimizer-args {name}"
            names = ", ".join(name for name in taken if name != "params")
            raise UserError(f"{asked}: not supported by --optimizer {options.optimizer}; supported: {names}")
    arguments.pop("weight_decay", None)  # it is set per group
    return arguments


def _value(text: str) -> Any:
    """Parse a number, boolean, list or text as YAML 1.2 does. Raises UserError for what is none, and for NaN."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        value: Any = float(text) if not text.strip("+-").isdecimal() else int(text)
    except ValueError:
        try:
            value = YAML(typ="safe", pure=True).load(text)
        except (YAMLError, ValueError, RecursionError) as error:
            raise UserError(f"--optimizer-args {text}: not readable: {' '.join(str(error).split())}") from error
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"--optimizer-args {text}: must be a number")
    return value


def _lr_factors(options: OptimizerOptions) -> Mapping[str, float]:
    """Return the learning-rate factors by name pattern. Raises UserError for invalid ones."""
    factors: dict[str, float] = {}
    for text in options.lr_factors:
        pattern, _, value = text.rpartition("=")
        if pattern in factors:
            raise UserError(f"--lr-factors {text}: the pattern {pattern} already has a factor; remove one of the two")
        try:
            factors[pattern] = float(value)
        except ValueError:
            factors[pattern] = 0.0
        if not pattern or not 0 < factors[pattern] < math.inf:
            raise UserError(
                f"--lr-factors {text}: must be PATTERN=FACTOR with a factor above 0; to freeze parameters use --freeze"
            )
    return factors


@torch.no_grad()
def _shrink(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Apply the L1 penalty as a proximal step: soft thresholding by lr * l1 (ISTA: Daubechies et al. 2004).

    It is elementwise, and therefore the same for whole parameters and shards.
    """
    for group in optimizer.param_groups:
        threshold = group["lr"] * group[L1]
        if threshold:
            for parameter in group["params"]:
                parameter.copy_(parameter.sign() * (parameter.abs() - threshold).clamp(min=0))
