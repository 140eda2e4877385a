"""What each module of a model takes and gives, forward and backward, as digests in the order of time.

Of two runs whose records differ, the first difference is that of the code that behaves differently: a module whose
output differs though its input, and all that the modules in it gave, agree; or what lies between two modules.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from shardlaunch.launcher.training.value_digests import digest_of, leaves_of
from shardlaunch.sharding.gradient_leaves import class_name

THE_MODEL = "the model"
CALLER = "forward() of the recipe"
_Add = Callable[[str, str, int], None]


class ModuleRecord:
    """Hooks on all modules, which call `add` with what a value is, the code that made it, and its digest."""

    def __init__(self, models: Sequence[nn.Module], add: _Add) -> None:
        self._add = add
        self._running: list[str] = []  # modules, the outermost first
        for model in models:
            for name, module in model.named_modules():
                called, made_by = name or THE_MODEL, place_of(name, module)
                module.register_forward_pre_hook(partial(self._before, called, made_by), with_kwargs=True)
                after = partial(self._after, called, made_by)
                module.register_forward_hook(after, with_kwargs=True, always_call=True)

    def begin(self) -> None:
        """Begin a micro-batch."""
        self._running.clear()

    def _before(
        self, name: str, made_by: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Record the inputs. Each is replaced by a view of itself, whose gradient is this module's part alone."""
        enclosing = self._running[-1] if self._running else CALLER
        for path, leaf in leaves_of({**dict(enumerate(args)), **kwargs}):
            self._add(f"the input {path} of {name}", enclosing, digest_of(leaf))
        self._running.append(made_by)
        views: dict[int, torch.Tensor] = {}  # what is one object to a module stays one

        def with_views(value: Any) -> Any:
            if type(value) in (list, tuple):
                return type(value)(map(with_views, value))
            if type(value) is dict:
                return {key: with_views(item) for key, item in value.items()}
            if not (isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled()):
                return value
            if id(value) not in views:
                views[id(value)] = value.view_as(value)
                hook = partial(self._record_gradient, f"the gradient of an input of {name}", made_by)
                views[id(value)].register_hook(hook)
            return views[id(value)]

        return with_views(args), with_views(kwargs)

    def _after(
        self,
        name: str,
        made_by: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        if made_by in self._running:  # with what an error in it has left
            del self._running[len(self._running) - 1 - self._running[::-1].index(made_by) :]
        enclosing = self._running[-1] if self._running else CALLER
        for path, leaf in leaves_of(output):
            what = f"the output {path} of {name}" if path else f"the output of {name}"
            self._add(what, made_by, digest_of(leaf))
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                leaf.register_hook(partial(self._record_gradient, f"the gradient of {what}", enclosing))

    def _record_gradient(self, what: str, where: str, gradient: torch.Tensor) -> None:
        self._add(what, where, digest_of(gradient))


def place_of(name: str, module: nn.Module) -> str:
    """Return a module's name in its model, and its class."""
    return f"{name or THE_MODEL} ({class_name(module)})"
