"""Which parameters a run trains: what is frozen by name, from the start or up to a step, and what a person is shown."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from shardlaunch.errors import UserError, some


@dataclass(kw_only=True)
class FreezingOptions:
    """Options that say what is trained when."""

    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, by patterns of names such as 'features.*'. Norms among them stand still."""
    unfreeze_at_step: int = 0
    """Train all parameters after this step, those of --freeze with a fresh optimizer state; 0: never."""

    def __post_init__(self) -> None:
        if self.unfreeze_at_step < 0 or (self.unfreeze_at_step and not self.freeze):
            raise UserError(f"--unfreeze-at-step {self.unfreeze_at_step}: must be at least 0, and goes with --freeze")

    def is_frozen(self, name: str) -> bool:
        """Return whether --freeze names a parameter."""
        return any(fnmatchcase(name, pattern) for pattern in self.freeze)


def freeze(model: nn.Module, options: FreezingOptions, *, step: int) -> None:
    """Freeze what the options say is frozen at `step`. Raises UserError for idle patterns and when nothing is left."""
    names = [name for name, _ in model.named_parameters()]
    idle = [pattern for pattern in options.freeze if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        raise UserError(f"--freeze: no parameter's name matches {some(idle)}; there are {some(names)}")
    if not options.unfreeze_at_step or step < options.unfreeze_at_step:
        for name, parameter in model.named_parameters():
            if options.is_frozen(name):
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze {' '.join(options.freeze)}: no parameter is left to train")


def train_mode(model: nn.Module) -> None:
    """Put a model into training mode, but for norms whose parameters are all frozen: their statistics stand still."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()


@dataclass(frozen=True, kw_only=True)
class ParameterRow:
    """Hold one line of the table of parameters: those of one part of the model that are treated alike."""

    names: str
    num_tensors: int
    num_elements: int
    lr: float | None
    """None: frozen."""
    weight_decay: float


def parameter_rows(
    numels: Mapping[str, int], trained: Iterable[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> list[ParameterRow]:
    """Return how a model's parameters (elements by name) are trained, a row for those of one part that are alike."""
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    treated = {name: groups[id(parameter)] for name, parameter in trained}
    rows: dict[tuple[str, float | None, float], list[str]] = {}
    for name in numels:
        group = treated.get(name, {})
        key = (_part(name), group.get("lr"), group.get("weight_decay", 0.0))
        rows.setdefault(key, []).append(name)
    return [
        ParameterRow(
            names=names[0] if len(names) == 1 else f"{part}.*",
            num_tensors=len(names),
            num_elements=sum(numels[name] for name in names),
            lr=lr,
            weight_decay=weight_decay,
        )
        for (part, lr, weight_decay), names in rows.items()
    ]


def _part(name: str) -> str:
    """Return the part of a model that a parameter is in: a module or a module's module, a list of them as one."""
    modules = name.split(".")[:-1][:2]
    return ".".join(module for number, module in enumerate(modules) if not (number and module.isdecimal()))
