"""The weights at the start of a run whose ranks keep shards: read or made one at a time, never the whole model.

Pretrained ones stay in their files, of which each rank reads its ranges; all else is made on one rank of each machine
by the parameter's program (see `Programs`). The values are those of `build_model`, to the bit; where that cannot be
had without the whole model, it is built, and said.
"""

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from torch import nn

from shardlaunch.checkpoints.stored import Place, StoredTensors
from shardlaunch.launcher.recipe import Recipe
from shardlaunch.launcher.runs.drawn_weights import draw, recorded_draws, value_digest
from shardlaunch.launcher.runs.init_from import InitFrom
from shardlaunch.launcher.runs.model import (
    Origins,
    build_empty_model,
    build_model,
    check_non_persistent_buffers,
    check_weights,
    origins_of,
)
from shardlaunch.launcher.runs.program import Made, Program
from shardlaunch.launcher.runs.programs import Programs
from shardlaunch.launcher.seeding import derive_seed, seeded
from shardlaunch.sharding.buffers import non_persistent_buffers, persistent_buffers

T = TypeVar("T")


class _NeedsWholeModel(Exception):
    """A value that cannot be made without the whole model, with the reason."""


@dataclass(frozen=True, kw_only=True)
class RecordedModel:
    """A model without values of its parameters, and how they get them."""

    model: nn.Module
    programs: Programs
    untouched: set[str]
    """Parameters that a Hugging Face model drew, and nobody has changed since."""
    has_drawn: bool
    """Whether the constructor has drawn values of something else."""
    was_whole: bool = False
    """Whether the model had to be built as a whole first."""


@dataclass(kw_only=True)
class StartValues:
    """The values of a model's parameters and persistent buffers at the start of a run, by name."""

    origins: Origins
    places: dict[str, Place] = field(default_factory=dict)
    """Values in files, of any dtype: of the others `value` has them."""
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    made: dict[str, Made] = field(default_factory=dict)
    whole_model_because: str = ""
    """Why the whole model was built; empty: it was not."""

    def value(self, name: str) -> torch.Tensor:
        """Return a value that is not in a file, on the CPU; a given one in its own dtype."""
        return self.made[name].value() if name in self.made else self.tensors[name].detach().cpu()

    def read(self, name: str) -> torch.Tensor:
        """Return a value, wherever it is, on the CPU, in its own dtype."""
        place = self.places.get(name)
        return self.value(name) if place is None else StoredTensors(places={name: place})[name]

    def digest(self) -> int:
        """Return a digest of all values, made or read one at a time."""
        digest = xxhash.xxh3_64()
        for name in sorted({*self.places, *self.tensors, *self.made}):
            digest.update(f"{name} {value_digest(self.read(name))}".encode())
        return digest.intdigest() >> 1

    def with_adapters(self, new_names: Mapping[str, str], adapters: Mapping[str, torch.Tensor]) -> "StartValues":
        """Return the values of the same model with adapters, where some tensors have other names."""

        def renamed(values: Mapping[str, T]) -> dict[str, T]:
            return {new_names.get(name, name): value for name, value in values.items()}

        tensors = renamed(self.tensors) | dict(adapters)
        return replace(self, places=renamed(self.places), tensors=tensors, made=renamed(self.made))


def start_values(recipe: Recipe, seed: int, recorded: RecordedModel, *, init: InitFrom | None) -> StartValues:
    """Return the values at the start of a new run, for a model that `record_model` built without draws.

    Raises UserError if weights do not fit the model, or non-persistent buffers are drawn at random.
    """
    try:
        return _one_at_a_time(recipe, seed, recorded, init)
    except _NeedsWholeModel as error:
        reason = str(error)  # without its frames, which hold the weights
    whole, origins = build_model(recipe, seed, is_resumed=False, init=init)
    check_non_persistent_buffers(non_persistent_buffers(whole), non_persistent_buffers(recorded.model))
    tensors = dict(whole.named_parameters()) | persistent_buffers(whole)
    return StartValues(origins=origins, tensors=tensors, whole_model_because=reason)


def record_model(recipe: Recipe, seed: int, *, draws: bool = False) -> RecordedModel:
    """Return the recipe's model as `build_empty_model` does, with what is done to each parameter.

    Without `draws`, programs that draw are not complete: nothing is drawn meanwhile, which takes less time.
    """
    programs = Programs(draws=draws)
    untouched: set[str] = set()
    states: list[torch.Tensor] = []
    whole: list[str] = []

    def on_built(model: nn.Module) -> None:
        untouched.update(drawn.untouched(model))
        states.append(torch.get_rng_state())

    with seeded(derive_seed(seed, "model")):
        states.append(torch.get_rng_state())
    try:
        with recorded_draws(mark=programs.mark) as drawn:
            model = build_empty_model(recipe, seed, programs=programs, on_built=on_built)
    except Exception as error:  # of the recipe's own, which comes again; or of what the recording does not know
        model = build_empty_model(recipe, seed, on_whole=whole.append)
        reason = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
        cannot = f"what the constructor does cannot be recorded ({reason})"
        programs.problem = programs.problem or next(iter(whole), cannot)
    has_drawn = not torch.equal(states[0], states[-1])
    return RecordedModel(
        model=model, programs=programs, untouched=untouched, has_drawn=has_drawn, was_whole=bool(whole)
    )


def _one_at_a_time(recipe: Recipe, seed: int, recorded: RecordedModel, init: InitFrom | None) -> StartValues:
    """Return the values without the whole model. Raises _NeedsWholeModel where that cannot be had."""
    if recorded.programs.problem:
        raise _NeedsWholeModel(recorded.programs.problem)
    from_init = init.find(recorded.model) if init is not None else set()
    weights: Mapping[str, torch.Tensor] = {}
    if not from_init >= recorded.model.state_dict().keys():
        with seeded(derive_seed(seed, "model")):
            before = _generators()
            weights = recipe.weights()
            check_weights(recorded.model, weights)
            if weights and not isinstance(weights, StoredTensors) and _generators() != before:
                raise _NeedsWholeModel("weights() draws random numbers")
    supplied = {*weights, *from_init}
    for draws in (False, True):
        if draws:
            recorded, empty = record_model(recipe, seed, draws=True), recorded.model
            check_non_persistent_buffers(non_persistent_buffers(recorded.model), non_persistent_buffers(empty))
        origins = origins_of(recorded.model, supplied, recorded.untouched)
        needed = _needed(recorded, supplied, drawn=origins.drawn)
        if not draws and (recorded.has_drawn or any(program.needs_draws for program in needed.values())):
            continue
        _refuse_copies(recorded, needed, weights)
        _draw(recorded, origins, seed)
        needed |= _needed(recorded, supplied, only=origins.drawn)
        problem = next((program.problem for program in needed.values() if program.problem), "")
        if recorded.programs.problem or problem:
            raise _NeedsWholeModel(recorded.programs.problem or problem)
        if not any(program.needs_draws for program in needed.values()):
            break
    else:
        raise _NeedsWholeModel("a parameter is drawn when the random generator's state is not known")
    return _collected(recorded, origins, needed, weights, init)


def _generators() -> tuple[bytes, int, int]:
    """Return the state of the global generators, to compare."""
    numpy_state: Any = np.random.get_state()
    drawn = xxhash.xxh3_64_intdigest(numpy_state[1].tobytes() + repr(numpy_state[2:]).encode())
    return torch.get_rng_state().numpy().tobytes(), drawn, hash(random.getstate())


def _needed(
    recorded: RecordedModel, supplied: Collection[str], *, drawn: Collection[str] = (), only: Collection[str] = ()
) -> dict[str, Program]:
    """Return the programs of parameters that are not `supplied` with values, without those to be `drawn` later."""
    tensors = recorded.model.state_dict(keep_vars=True)
    held = {id(tensors[name]) for name in supplied}
    found = {}
    for name, parameter in recorded.model.named_parameters():
        if id(parameter) in held or name in drawn or (only and name not in only):
            continue
        if not recorded.programs.knows(parameter):
            raise _NeedsWholeModel(f"the constructor makes {name} in an unknown way")
        found[name] = recorded.programs.of(parameter)
    return found


def _refuse_copies(recorded: RecordedModel, needed: Mapping[str, Program], weights: Mapping[str, torch.Tensor]) -> None:
    """Raise _NeedsWholeModel for values that the constructor takes from parameters that `weights` replace."""
    model, programs = recorded.model, recorded.programs
    tensors = model.state_dict(keep_vars=True)
    replaced = [tensors[name] for name in weights if programs.knows(tensors[name])]
    memory = frozenset().union(*map(programs.ancestors, replaced))
    bases = {value_digest(base) for tensor in replaced if (base := programs.of(tensor).base) is not None}
    for name, program in needed.items():
        is_same = program.base is not None and bool(bases) and value_digest(program.base) in bases
        if programs.ancestors(model.get_parameter(name)) & memory or is_same:
            raise _NeedsWholeModel(f"the constructor takes {name} from a parameter that weights() replaces")


def _draw(recorded: RecordedModel, origins: Origins, seed: int) -> None:
    """Draw, on record, what the Hugging Face model draws by (seed, name). Raises _NeedsWholeModel if that fails."""
    if not origins.drawn:
        return
    model, programs = recorded.model, recorded.programs
    before = {name: buffer.clone() for name, buffer in non_persistent_buffers(model).items()}
    were_drawing, programs.draws = programs.draws, True
    try:
        with seeded(derive_seed(seed, "model")), programs.recording():
            draw(model, set(origins.drawn), seed, keep=programs.of, restore=programs.restore)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise _NeedsWholeModel(f"what _init_weights does cannot be recorded ({reason})") from error
    finally:
        programs.draws = were_drawing
    check_non_persistent_buffers(before, non_persistent_buffers(model))


def _collected(
    recorded: RecordedModel,
    origins: Origins,
    needed: Mapping[str, Program],
    weights: Mapping[str, torch.Tensor],
    init: InitFrom | None,
) -> StartValues:
    """Return all values by the names that the model's state has them under; what is set last stays."""
    model = recorded.model
    targets = model.state_dict(keep_vars=True)
    named: dict[str, torch.Tensor] = dict(model.named_parameters()) | persistent_buffers(model)
    names = {id(tensor): name for name, tensor in named.items()}
    tensors: dict[str, torch.Tensor] = dict(persistent_buffers(model))
    places: dict[str, Place] = {}

    def supply(name: str, place: Place | None, source: Mapping[str, torch.Tensor], key: str) -> None:
        own = names[id(targets[name])]
        if place is not None:
            tensors.pop(own, None)
            places[own] = place
        else:
            places.pop(own, None)
            tensors[own] = source[key]

    for name in weights:
        supply(name, weights.places.get(name) if isinstance(weights, StoredTensors) else None, weights, name)
    if init is not None and init.match is not None:
        stored = StoredTensors(places=init.weights.places)
        for name, key in init.match.stored_names.items():
            supply(name, stored.places.get(key), {key: init.weights.read(key)} if key not in stored else {}, key)
    made = {name: recorded.programs.made(model.get_parameter(name)) for name in needed}
    return StartValues(origins=origins, places=places, tensors=tensors, made=made)
