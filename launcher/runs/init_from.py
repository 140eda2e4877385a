"""`--init-from`: match stored weights with the model of a new run, by name and shape."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from shardlaunch.checkpoints.names import are_of_adapter
from shardlaunch.checkpoints.weight_files import WeightFiles, open_weights
from shardlaunch.errors import UserError, some
from shardlaunch.launcher.reporting.parameters import counts_by_part

# Prefixes that wrappers and other trainers add to tensor names.
_WRAPPERS = ("module.", "_orig_mod.", "model.")


@dataclass(frozen=True, kw_only=True)
class Match:
    """Tensors of a model that have stored values, and stored tensors that are unused."""

    stored_names: dict[str, str]
    """Stored name by the model's name; for tied tensors, each name that is stored."""
    other_shapes: dict[str, str]
    """Tensors of the model that are stored with another shape, with both shapes."""
    absent: list[str]
    unused: list[str]
    renaming: str = ""
    """How stored names differ from the model's (empty: they are the same)."""

    def rows(self) -> list[tuple[str, ...]]:
        """Return table rows: part of the model, numbers of loaded, differently shaped and absent tensors."""
        return counts_by_part((self.stored_names, self.other_shapes, self.absent))


@dataclass(kw_only=True)
class InitFrom:
    """Stored weights that a new run starts from, and their match with its model."""

    weights: WeightFiles
    match: Match | None = field(default=None)

    @classmethod
    def opened(cls, source: Path, *, warn: Callable[[str], None]) -> "InitFrom":
        """Open the weights of a run, a checkpoint or a file. Raises UserError if there are none."""
        try:
            weights = open_weights(source, warn=warn)
        except UserError as error:
            raise UserError(f"--init-from {error}") from error
        if are_of_adapter(weights.shapes):
            raise UserError(
                f"--init-from {source}: holds an adapter, without its base model; merge them (`shardlaunch ckpt export "
                f"{source} OUT --merge`), and give OUT"
            )
        return cls(weights=weights)

    def find(self, model: nn.Module) -> set[str]:
        """Match the weights with a model and return the names to load. Raises UserError if there are none."""
        self.match = match_weights(self.weights.shapes, model)
        targets = model.state_dict(keep_vars=True)
        if not self.match.stored_names:
            raise UserError(
                f"--init-from {self.weights.source}: no tensor matches the model by name and shape. Stored: "
                f"{some(self.weights.shapes)}. Model: {some(targets)}"
            )
        # A tied tensor has several names; loading it under one sets all.
        held = {id(targets[name]) for name in self.match.stored_names}
        return {name for name, tensor in targets.items() if id(tensor) in held}

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        """Copy the matched weights into the model. Call `find` first."""
        assert self.match is not None
        targets = model.state_dict(keep_vars=True)
        for name, stored in self.match.stored_names.items():
            targets[name].copy_(self.weights.read(stored))


def match_weights(shapes: Mapping[str, tuple[int, ...]], model: nn.Module) -> Match:
    """Match stored tensors with a model's by name and shape, with the renaming that matches most of them."""
    targets = model.state_dict(keep_vars=True)
    best: Match | None = None
    for renaming, rename in _renamings(model):
        match = _match(shapes, targets, renaming, rename)
        if best is None or len(match.stored_names) > len(best.stored_names):
            best = match
    assert best is not None
    return best


def _match(
    shapes: Mapping[str, tuple[int, ...]],
    targets: Mapping[str, torch.Tensor],
    renaming: str,
    rename: Callable[[str], str],
) -> Match:
    renamed = {rename(stored): stored for stored in shapes}
    fitting = {
        name: renamed[name] for name in targets if name in renamed and shapes[renamed[name]] == targets[name].shape
    }
    held = {id(targets[name]) for name in fitting}
    others = [name for name in targets if name not in fitting and id(targets[name]) not in held]
    return Match(
        stored_names=fitting,
        other_shapes={
            name: f"stored {list(shapes[renamed[name]])}, here {list(targets[name].shape)}"
            for name in others
            if name in renamed
        },
        absent=[name for name in others if name not in renamed],
        unused=[stored for name, stored in renamed.items() if name not in targets],
        renaming=renaming,
    )


def _renamings(model: nn.Module) -> Iterator[tuple[str, Callable[[str], str]]]:
    """Yield descriptions and functions that map stored names to the model's; first the unchanged names."""
    yield "", lambda name: name
    for wrapper in _WRAPPERS:
        yield f"without {wrapper!r}", lambda name, wrapper=wrapper: name.removeprefix(wrapper)  # type: ignore[misc]
    prefix = getattr(model, "base_model_prefix", "")
    if prefix:
        yield f"with {prefix + '.'!r} before them", lambda name: f"{prefix}.{name}"
        yield f"without {prefix + '.'!r}", lambda name: name.removeprefix(f"{prefix}.")
