"""A strategy of which checkpoints hold a part of the state only: what is trained, beside a base model that is not."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from shardlaunch.checkpoints.state import MODEL, ONLY, Fragment, Replica, StateReader, TensorSpec
from shardlaunch.sharding.buffers import persistent_buffers
from shardlaunch.sharding.strategy import Strategy


class PartlySaved(Strategy):
    """Another strategy, whose state is that of some tensors alone, under the names that checkpoints have for them."""

    def __init__(self, strategy: Strategy, saved_names: Mapping[str, str], base: StateReader) -> None:
        """`saved_names`: of the tensors that are saved, by the model's names. `base` has the values of all others."""
        self._strategy = strategy
        self._saved_names = saved_names
        self._base = base
        self.optimizer = strategy.optimizer
        self.replicas = strategy.replicas
        self.devices = strategy.devices
        self.average = strategy.average
        self.is_sharded = strategy.is_sharded  # type: ignore[misc]
        self.differentiates_twice = strategy.differentiates_twice  # type: ignore[misc]

    def describe(self) -> str:
        """Return the strategy's own details."""
        return self._strategy.describe()

    def updating(self, name: str) -> AbstractContextManager[None]:
        """Update what one optimizer does. All ranks."""
        return self._strategy.updating(name)

    def keeping_graph(self) -> AbstractContextManager[None]:
        """Let a backward pass be differentiated again."""
        return self._strategy.keeping_graph()

    def backward(self, loss: torch.Tensor, *, factor: float, last: bool) -> None:
        """Accumulate. All ranks."""
        self._strategy.backward(loss, factor=factor, last=last)

    def must_repeat(self) -> bool:
        """Ask the strategy. All ranks."""
        return self._strategy.must_repeat()

    @property
    def exact_exponents(self) -> dict[str, int]:
        """The units of exact sums by parameter."""
        return self._strategy.exact_exponents

    @exact_exponents.setter
    def exact_exponents(self, saved: dict[str, int]) -> None:
        self._strategy.exact_exponents = saved

    def finish_gradients(self, *, unscale: float, max_norm: float) -> float:
        """Sum, unscale and clip. All ranks."""
        return self._strategy.finish_gradients(unscale=unscale, max_norm=max_norm)

    def optimizer_step(self) -> None:
        """Apply the optimizer. All ranks."""
        self._strategy.optimizer_step()

    def discard(self) -> None:
        """Drop the gradients. All ranks."""
        self._strategy.discard()

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """Return what the optimizer changes."""
        return self._strategy.trained_tensors()

    def exchange_average(self) -> None:
        """Exchange weights and average. All ranks."""
        self._strategy.exchange_average()

    def state(self) -> Iterator[Fragment]:
        """Yield this rank's shards of what is saved, by its saved names. All ranks."""
        for fragment in self._strategy.state():
            if saved_name := self._saved_names.get(fragment.spec.name):
                yield replace(fragment, spec=replace(fragment.spec, name=saved_name))

    def restore(self, reader: StateReader) -> None:
        """Restore what is saved from `reader`, and the other weights from the base. All ranks."""
        self._strategy.restore(_Joined(reader, self._saved_names, self._base))


class _Joined:
    """A `StateReader` of all weights: what is saved, by the model's names, and the base's."""

    def __init__(self, saved: StateReader, saved_names: Mapping[str, str], base: StateReader) -> None:
        own_names = {saved_name: name for name, saved_name in saved_names.items()}
        self._sources: dict[TensorSpec, tuple[StateReader, TensorSpec]] = {}
        for spec in saved.specs():
            self._sources[replace(spec, name=own_names.get(spec.name, spec.name))] = (saved, spec)
        for spec in base.specs():
            if spec.name not in saved_names:
                self._sources[spec] = (base, spec)

    def specs(self) -> Iterable[TensorSpec]:
        return self._sources

    def read(self, spec: TensorSpec, flat_start: int, flat_end: int, replica: Replica = ONLY) -> torch.Tensor:
        source, its_spec = self._sources[spec]
        return source.read(its_spec, flat_start, flat_end, replica)


class HeldWeights:
    """A `StateReader` of the weights and persistent buffers that a model on this rank has as a whole."""

    def __init__(self, model: nn.Module) -> None:
        self._tensors = dict(model.named_parameters()) | persistent_buffers(model)

    def specs(self) -> Iterable[TensorSpec]:
        """Return every weight and persistent buffer."""
        return [
            TensorSpec(name=name, section=MODEL, shape=tuple(tensor.shape), dtype=tensor.dtype)
            for name, tensor in self._tensors.items()
        ]

    def read(self, spec: TensorSpec, flat_start: int, flat_end: int, replica: Replica = ONLY) -> torch.Tensor:
        """Return elements [flat_start, flat_end) on their device."""
        return self._tensors[spec.name].detach().reshape(-1)[flat_start:flat_end]
