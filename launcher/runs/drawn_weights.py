"""Which parameters a Hugging Face model drew at random in its constructor, and how they are drawn by (seed, name)."""

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import nn

from shardlaunch.launcher.seeding import derive_seed

_MODELING = "transformers.modeling_utils"
_LOADED = "_is_hf_initialized"  # transformers sets it on each parameter that from_pretrained() has loaded


@dataclass(kw_only=True)
class Drawn:
    """Parameters as Hugging Face models left them when they drew their weights."""

    mark: Callable[[torch.Tensor], Any] = field(default_factory=lambda: value_digest)
    """What differs when a parameter has changed."""
    values: dict[int, tuple[nn.Parameter, Any]] = field(default_factory=dict)
    """By id: the parameter, which keeps the id taken, and its mark."""
    calls: list[dict[str, nn.Parameter]] = field(default_factory=list)
    """Parameters of each model that has drawn its weights, in this order, by their names in that model."""

    def record(self, model: nn.Module) -> None:
        """Record the parameters of a Hugging Face model that has just drawn its weights."""
        self.calls.append(dict(model.named_parameters()))
        for parameter in model.parameters():
            if not parameter.is_meta and not getattr(parameter, _LOADED, False):
                self.values[id(parameter)] = (parameter, self.mark(parameter))

    def untouched(self, model: nn.Module) -> set[str]:
        """Return the names of parameters whose values are still those that a Hugging Face model drew."""
        return {
            name
            for name, parameter in model.named_parameters()
            if id(parameter) in self.values and self.values[id(parameter)][1] == self.mark(parameter)
        }

    def replaced(self, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> list[dict[str, str]]:
        """Return which of `weights` replace what each model in `calls` has drawn: their names by its own names."""
        tensors = model.state_dict(keep_vars=True)
        by_id = {id(tensors[name]): name for name in weights if name in tensors}
        return [
            {name: by_id[id(parameter)] for name, parameter in call.items() if id(parameter) in by_id}
            for call in self.calls
        ]


def value_digest(tensor: torch.Tensor) -> int:
    """Return a digest of a tensor's bytes."""
    flat = tensor.detach().contiguous().reshape(-1)
    return xxhash.xxh3_64_intdigest(flat.view(torch.uint8).numpy().data)


def is_loaded(parameter: nn.Parameter) -> bool:
    """Return whether transformers' from_pretrained() has loaded the parameter."""
    return bool(getattr(parameter, _LOADED, False))


@contextmanager
def recorded_draws(
    *,
    mark: Callable[[torch.Tensor], Any] | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    replaced: Sequence[Mapping[str, str]] = (),
) -> Iterator[Drawn]:
    """Record what Hugging Face models draw meanwhile, in their constructors and in from_pretrained().

    `replaced` (see `Drawn.replaced`) are those of `weights` to set as soon as their parameters are drawn.
    """
    drawn = Drawn(mark=mark or value_digest)

    def recording(cls: type) -> AbstractContextManager[None]:
        return _recording(cls, drawn, weights or {}, replaced)

    with ExitStack() as stack:
        if _MODELING in sys.modules:
            stack.enter_context(recording(sys.modules[_MODELING].PreTrainedModel))
        else:  # importing it takes a second, which other models need not wait for
            stack.enter_context(_at_declaration("PreTrainedModel", lambda cls: stack.enter_context(recording(cls))))
        yield drawn


@contextmanager
def _recording(
    model_class: Any, drawn: Drawn, weights: Mapping[str, torch.Tensor], replaced: Sequence[Mapping[str, str]]
) -> Iterator[None]:
    initialize = model_class.initialize_weights

    def initialize_and_record(model: Any) -> None:
        initialize(model)
        drawn.record(model)
        if replaced:
            with torch.no_grad():
                for name, source in replaced[len(drawn.calls) - 1].items():
                    drawn.calls[-1][name].copy_(weights[source])

    model_class.initialize_weights = initialize_and_record
    try:
        yield
    finally:
        model_class.initialize_weights = initialize


@contextmanager
def _at_declaration(name: str, call: Callable[[type], object]) -> Iterator[None]:
    """Call a function with the module class of transformers of this name, as soon as it is declared."""

    def declared(cls: type, **keywords: Any) -> None:
        super(nn.Module, cls).__init_subclass__(**keywords)  # type: ignore[misc]
        if (cls.__module__, cls.__name__) == (_MODELING, name):
            call(cls)

    nn.Module.__init_subclass__ = classmethod(declared)  # type: ignore[assignment]
    try:
        yield
    finally:
        del nn.Module.__init_subclass__


@torch.no_grad()
def draw(
    model: nn.Module,
    names: Collection[str],
    seed: int,
    *,
    keep: Callable[[torch.Tensor], Any] = torch.Tensor.clone,
    restore: Callable[[torch.Tensor, Any], object] = torch.Tensor.copy_,
) -> None:
    """Draw the named parameters as their Hugging Face models do, seeded by (seed, module name).

    Children come first. All other parameters keep their values, although a module draws all of its own at once:
    `keep` returns what `restore` sets them back to.
    """
    from transformers import PreTrainedModel
    from transformers.initialization import guard_torch_init_functions

    modules = dict(model.named_modules())
    owners = {name: owner for name in modules if (owner := _owner(modules, name, PreTrainedModel)) is not None}
    # Loaded parameters are many, but flagged, and transformers' initializers skip those; others do not.
    beside = {name.rpartition(".")[0] for name in names}
    kept = {
        name: keep(parameter)
        for name, parameter in model.named_parameters()
        if name not in names and (not is_loaded(parameter) or name.rpartition(".")[0] in beside)
    }
    with guard_torch_init_functions():
        for name in sorted(owners, key=lambda name: (-name.count(".") if name else 1, name)):
            prefix = f"{name}." if name else ""
            if any(parameter.startswith(prefix) for parameter in names):
                torch.default_generator.manual_seed(derive_seed(seed, name))
                owners[name]._init_weights(modules[name])
    for name, value in kept.items():
        restore(model.get_parameter(name), value)


def _owner(modules: Mapping[str, nn.Module], name: str, kind: type) -> Any:
    """Return the innermost module of a kind that is, or is around, the one of this name; None: there is none."""
    while not isinstance(modules[name], kind):
        if not name:
            return None
        name = name.rpartition(".")[0]
    return modules[name]
