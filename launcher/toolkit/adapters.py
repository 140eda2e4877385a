"""A model's adapters of LoRA, off and on again."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Let a model compute as its base model would, without the adapters of peft in it. Whole trained layers stay."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers, "the model has no adapters"
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:  # enable_adapters() would also decide which parameters need gradients
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was
