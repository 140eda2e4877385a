"""Freeze parameters by name, for the whole run or up to a step."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.option_fields import option


@dataclass(kw_only=True)
class FreezingOptions:
    """Options of frozen parameters."""

    freeze: tuple[str, ...] = ()
    """Parameters not to train, as name patterns such as 'features.*'. Frozen normalization layers also keep their
    running statistics."""
    unfreeze_at_step: int = option(0, minimum=0)
    """Train all parameters after this step; those of --freeze start with a new optimizer state (0: never)."""

    def __post_init__(self) -> None:
        if self.unfreeze_at_step and not self.freeze:
            raise UserError(
                f"--unfreeze-at-step {self.unfreeze_at_step}: has no effect without --freeze; set --freeze or remove it"
            )

    def is_frozen(self, name: str) -> bool:
        """Return whether a pattern of --freeze matches a parameter's name."""
        return any(fnmatchcase(name, pattern) for pattern in self.freeze)


def freeze(model: nn.Module, options: FreezingOptions, *, step: int) -> None:
    """Freeze what is frozen at `step`. Raises UserError for unused patterns and if nothing is left to train."""
    names = [name for name, _ in model.named_parameters()]
    unused = [pattern for pattern in options.freeze if not any(fnmatchcase(name, pattern) for name in names)]
    if unused:
        raise UserError(f"--freeze: no parameter matches {some(unused)}; available: {some(names)}")
    if not options.unfreeze_at_step or step < options.unfreeze_at_step:
        for name, parameter in model.named_parameters():
            if options.is_frozen(name):
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"--freeze {' '.join(options.freeze)}: no parameter is left to train")


def train_mode(model: nn.Module) -> None:
    """Set a model to training mode, except norms whose parameters are all frozen: they keep their statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
