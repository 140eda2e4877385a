"""Find methods that are misnamed hooks: nothing would call them, and the default hook would run instead."""

import sys
from collections.abc import Iterator
from difflib import get_close_matches
from types import CodeType, FunctionType
from typing import Any

from shardlaunch.errors import UserError

RENAMED = {"update": "update_metrics", "given": "explicitly_set_flags"}
"""Hooks of release 0.1 and their present names."""
KNOWN_ELSEWHERE = {
    "train_dataset": "datasets",
    "train_data": "datasets",
    "train_dataloader": "datasets",
    "get_datasets": "datasets",
    "load_data": "datasets",
    "get_model": "model",
    "build_model": "model",
    "configure_model": "model",
    "pretrained_weights": "weights",
    "data_collator": "collate",
    "criterion": "loss",
    "loss_function": "loss",
    "compute_loss": "loss",
    "training_step": "loss",
    "compute_metrics": "metrics",
    "configure_optimizers": "optimizer",
    "create_optimizer": "optimizer",
    "lr_lambda": "schedule",
    "sampler": "order",
    "train_sampler": "order",
    "get_sampler": "order",
    "get_train_sampler": "order",
    "batch_sampler": "order",
    "on_fit_start": "on_start",
    "on_train_start": "on_start",
    "on_train_begin": "on_start",
    "on_train_batch_end": "after_update",
    "on_step_end": "after_update",
    "optimizer_step": "after_update",
    "on_evaluate": "on_evaluation",
    "on_validation_end": "on_evaluation",
    "on_validation_epoch_end": "on_evaluation",
    "on_save_checkpoint": "on_save",
    "on_fit_end": "on_end",
    "on_train_end": "on_end",
}
"""Names in other trainers, and the hook that does the same here."""
NEAR = 0.8  # difflib ratio: 0.8 for `lossfn` and `loss`, more for `collate_fn` and `collate`


def check_hook_names(owner_type: type, base: type) -> None:
    """Raise UserError for an unused public method whose name is close to that of a hook of `base`.

    Checks the methods of the classes between `owner_type` and `base`. A method is accepted if its class also defines
    the hook, or if any function in their modules refers to the method's name.
    """
    classes = [cls for cls in owner_type.__mro__ if issubclass(cls, base) and cls is not base]
    owners = [cls for cls in base.__mro__ if cls is not object]
    hooks = [
        name
        for owner in owners
        for name, value in vars(owner).items()
        if isinstance(value, FunctionType) and name[0] != "_"
    ]
    used: set[str] | None = None
    for cls in classes:
        for name, function in _public_methods(cls):
            hook = RENAMED.get(name) or _nearest(name, hooks)
            if hook not in hooks or hook in vars(cls) or hasattr(base, name):
                continue
            if used is None:
                used = set(_names_used(classes))
            if name not in used or (name == "update" and _takes_a_batch(function)):
                why = f"is now {hook}()." if name in RENAMED else f"is never called; did you mean {hook}()?"
                raise UserError(
                    f"{cls.__name__}.{name}() {why} Rename it; a helper method may have any name that begins with `_`."
                )


def _nearest(name: str, hooks: list[str]) -> str | None:
    return KNOWN_ELSEWHERE.get(name) or next(iter(get_close_matches(name, hooks, n=1, cutoff=NEAR)), None)


def _takes_a_batch(function: FunctionType) -> bool:
    """Return whether it takes (self, metrics, outputs, batch): calls like `metric.update(...)` do not use it then."""
    return function.__code__.co_argcount == 4


def _public_methods(cls: type) -> Iterator[tuple[str, FunctionType]]:
    for name, value in vars(cls).items():
        function = getattr(value, "__func__", value)  # static and class methods
        if isinstance(function, FunctionType) and name[0] != "_" and function.__name__ == name:
            yield name, function


def _names_used(classes: list[type]) -> Iterator[str]:
    """Yield the attribute names, global names and strings in the functions of the classes and their modules."""
    for cls in classes:
        module = sys.modules.get(cls.__module__)
        for value in [*vars(cls).values(), *(vars(module).values() if module else ())]:
            for function in _functions(value, cls.__module__):
                yield from _names_in(function.__code__)


def _functions(value: Any, module: str) -> Iterator[FunctionType]:
    if isinstance(value, type) and value.__module__ == module:
        for member in vars(value).values():
            if not isinstance(member, type):
                yield from _functions(member, module)
    elif isinstance(value, property):
        yield from (f for f in (value.fget, value.fset) if isinstance(f, FunctionType))
    else:
        function = getattr(value, "__wrapped__", getattr(value, "__func__", value))
        if isinstance(function, FunctionType) and function.__module__ == module:
            yield function


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
        else:
            texts = constant if isinstance(constant, tuple) else (constant,)
            yield from (text for text in texts if isinstance(text, str))
