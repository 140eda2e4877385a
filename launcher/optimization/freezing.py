"""Which parameters a run trains: what is frozen by name, from the start or up to a step, and what a person is shown."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.option_fields import option


@dataclass(kw_only=True)
class FreezingOptions:
    """Options of which parameters are trained."""

    freeze: tuple[str, ...] = ()
    """Parameters not to train, as name patterns such as 'features.*'. Frozen normalization layers also keep their
    running statistics."""
    unfreeze_at_step: int = option(0, minimum=0)
    """Train all parameters after this step; those of --freeze start with a new optimizer state (0: never)."""

    def __post_init__(self) -> None:
        if self.unfreeze_at_step and not self.freeze:
            raise UserError(f"--unfreeze-at-step {self.unfreeze_at_step}: goes with --freeze; give both or neither")

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
