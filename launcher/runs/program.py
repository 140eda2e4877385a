"""The program of one parameter: the operations that give it its value, to be done when the value is needed."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

from shardlaunch.launcher.runs.drawn_weights import value_digest

MOST_STEPS = 1000
"""Of one program, with all that it takes values from."""


@dataclass(frozen=True)
class View:
    """A tensor argument: a view of the program's own memory, or of another's (a snapshot of that program)."""

    of: "Program | None"
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def on(self, storage: torch.UntypedStorage | None = None) -> torch.Tensor:
        own = storage if self.of is None else self.of.run()
        assert own is not None
        return torch.empty(0, dtype=self.dtype).set_(own, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class Step:
    """An operation: in place, or one whose output number `output` is the program's memory from then on."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_random: bool
    state: torch.Tensor | None
    """Of the random generator; None: of no interest, or not known because nothing was drawn meanwhile."""
    output: int | None
    mark: tuple[Any, ...]
    """Equal for steps that do the same."""


@dataclass(frozen=True)
class Program:
    """How a parameter gets its value."""

    num_bytes: int
    base: torch.Tensor | None = None
    """The value that it was registered with; None: it had none."""
    steps: tuple[Step, ...] = ()
    ancestors: frozenset[int] = frozenset()
    """Memory that values were taken from."""
    num_steps: int = 0
    """With those of all programs that it takes values from."""
    problem: str = ""

    @property
    def needs_draws(self) -> bool:
        """Return whether it draws with a generator whose state is not known."""
        others = (arg.of for step in self.steps for arg in views_of(step.args, step.kwargs) if arg.of is not None)
        return any(step.is_random and step.state is None for step in self.steps) or any(p.needs_draws for p in others)

    @property
    def mark(self) -> tuple[Any, ...]:
        """Return what is equal for programs that do the same."""
        return (None if self.base is None else id(self.base), *(step.mark for step in self.steps))

    @torch.no_grad()
    def run(self) -> torch.UntypedStorage:
        """Do all steps and return the memory with the value. Moves the random generator."""
        if self.base is not None:
            laid_out = torch.empty_like(self.base)  # as the meta tensor is
            storage = laid_out.copy_(self.base).untyped_storage()
        else:
            storage = torch.empty(self.num_bytes, dtype=torch.uint8).untyped_storage()
        for step in self.steps:
            args, kwargs = tree_map(
                lambda arg: arg.on(storage) if isinstance(arg, View) else arg,  # noqa: B023 - called at once
                (step.args, step.kwargs),
            )
            if step.state is not None:
                torch.set_rng_state(step.state)
            result = step.func(*args, **kwargs)
            if step.output is not None:
                storage = (result[step.output] if isinstance(result, tuple | list) else result).untyped_storage()
        return storage


@dataclass(frozen=True, eq=False)
class Made:
    """What makes the value of one parameter. Equal if the values are known to be."""

    _view: View

    def __eq__(self, other: object) -> bool:
        mine, its = self._view.of, other._view.of if isinstance(other, Made) else None
        assert mine is not None
        if its is None or mine.mark == its.mark:
            return its is not None
        is_known = not any(program.needs_draws or program.problem for program in (mine, its))
        return is_known and value_digest(self.value()) == value_digest(other.value())  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]

    def value(self) -> torch.Tensor:
        """Make the value."""
        state = torch.get_rng_state()
        try:
            return self._view.on()
        finally:
            torch.set_rng_state(state)


def longer(program: Program, step: Step, taken: Sequence[tuple[int, Program]]) -> Program:
    ancestors = program.ancestors.union(*(other.ancestors | {key} for key, other in taken))
    num_steps = program.num_steps + 1 + sum(other.num_steps for _, other in taken)
    problem = program.problem or next((other.problem for _, other in taken if other.problem), "")
    if num_steps > MOST_STEPS:
        problem = problem or f"a parameter takes more than {MOST_STEPS} operations"
    return replace(program, steps=(*program.steps, step), ancestors=ancestors, num_steps=num_steps, problem=problem)


def views_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[View]:
    for arg in tree_flatten((args, kwargs))[0]:
        if isinstance(arg, View):
            yield arg


def view_of(tensor: torch.Tensor, of: Program | None) -> View:
    with torch._C.DisableTorchFunction():
        return View(of, tensor.dtype, tuple(tensor.size()), tuple(tensor.stride()), int(tensor.storage_offset()))


def mark_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return what is equal for operations that do the same."""

    def mark(arg: Any) -> Any:
        if isinstance(arg, View):
            return (None if arg.of is None else arg.of.mark, arg.dtype, arg.size, arg.stride, arg.offset)
        return (
            value_digest(arg) if isinstance(arg, torch.Tensor) else arg if isinstance(arg, int | float) else repr(arg)
        )

    if func is torch.ops.aten.zero_.default:
        func, args = torch.ops.aten.fill_.Scalar, (*args, 0)
    return (repr(func), *map(mark, tree_flatten((args, kwargs))[0]))
