"""Models that a recipe uses and does not train stay as they are: no checkpoint holds them."""

from torch import nn

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.training.in_place import sum_of_bits


def _sums(model: nn.Module) -> dict[str, int]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: int(sum_of_bits(tensor)) for name, tensor in tensors if tensor.is_floating_point()}


class ReferencesStay:
    """Compares the reference models after the first step with those before."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._sums = {name: _sums(model) for name, model in recipe.reference.items()}

    def check(self) -> None:
        """Raise UserError if one trains, or has other values."""
        for name, model in self._recipe.reference.items():
            training = [part or "all of it" for part, module in model.named_modules() if module.training]
            trained = [part for part, parameter in model.named_parameters() if parameter.requires_grad]
            if training or trained:
                what = f"is in training mode ({some(training)})" if training else f"needs gradients ({some(trained)})"
                raise UserError(
                    f"the reference model {name!r} {what} after the first step. What is trained belongs in model(): "
                    f"remove the call of train() or requires_grad_()"
                )
            sums = _sums(model)
            if changed := [part for part in sums if sums[part] != self._sums[name].get(part)]:
                raise UserError(
                    f"the first step has changed the reference model {name!r}: {some(changed)}. No checkpoint holds "
                    f"it, so that a resume would go on without the change. For an average of the weights use --ema, or "
                    f"keep the model in model()"
                )
