"""Parameters without values: what a constructor does to each is recorded, to be done later to one at a time.

A model of which only shards are kept need not stand in memory as a whole: its parameters are built on the meta device,
and the operations on each, with the state of the random generator before those that draw, are its program. The values
are those of the model built as usual, to the bit. What cannot be recorded is known by its reason (`Programs.problem`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from shardlaunch.launcher.runs.drawn_weights import value_digest
from shardlaunch.launcher.runs.program import Made, Program, Step, longer, mark_of, view_of

_UNSET = 0xA7
"""The first and last bytes of memory from torch.empty(), to see that nobody has set it unseen, as numpy can."""
_NUM_UNSET = 64
_EMPTY = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided"}
_OVERWRITING = {
    f"aten::{name}_"
    for name in ("zero", "fill", "copy", "normal", "uniform", "log_normal", "exponential", "random", "cauchy", "init")
}


class Programs:
    """The programs of the parameters of a model that is built within `recording`."""

    def __init__(self, *, draws: bool) -> None:
        self.draws = draws
        """Draw random values, of one parameter at a time, so that the generator moves as it does in a usual build."""
        self.problem = ""
        self._programs: dict[int, Program] = {}
        self._kept: dict[int, torch.Tensor] = {}  # so that no other memory gets the same key
        self._left: dict[int, tuple[StorageWeakRef, list[range]]] = {}
        """Memory of the tensors that parameters were registered with, which others may still refer to."""
        self._unset: dict[int, StorageWeakRef] = {}  # memory that has no values yet
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._counter = count()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what is done to parameters on the meta device, which look as if they were on the CPU."""
        with ExitStack() as stack:
            stack.enter_context(_atomic_draws(self))
            stack.enter_context(_Recording(self))
            stack.enter_context(_LooksUsual(self))
            yield
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def register(self, parameter: torch.Tensor, real: torch.Tensor) -> None:
        """Note that `parameter`, on the meta device, stands for `real`."""
        with torch._C.DisableTorchFunction():
            base = None if self._is_unset(real) else real.detach()
            self._add(parameter, Program(_num_bytes(parameter), base))
            _, ranges = self._left.setdefault(_key(real), (StorageWeakRef(real.untyped_storage()), []))
            ranges.append(_bytes_in_storage(real))

    def knows(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is a parameter, or made of one."""
        return tensor.is_meta and _key(tensor) in self._programs

    def of(self, parameter: torch.Tensor) -> Program:
        """Return the program of a parameter, at present."""
        return self._programs[_key(parameter)]

    def restore(self, parameter: torch.Tensor, program: Program) -> None:
        """Set a parameter's program back to an earlier one."""
        self._programs[_key(parameter)] = program

    def mark(self, tensor: torch.Tensor) -> Any:
        """Return what differs when a parameter has changed."""
        with torch._C.DisableTorchFunction():
            return self.made(tensor) if self.knows(tensor) else value_digest(tensor)

    def ancestors(self, parameter: torch.Tensor) -> frozenset[int]:
        """Return the memory that a parameter's value was taken from, and its own."""
        return self.of(parameter).ancestors | {_key(parameter)}

    def made(self, parameter: torch.Tensor) -> "Made":
        """Return what makes the value that a parameter has at present."""
        return Made(view_of(parameter, self.of(parameter)))

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do an operation that has parameters among its arguments, and note what it means for them."""
        schema = func._schema
        others = [arg for arg in tree_flatten((args, kwargs))[0] if isinstance(arg, torch.Tensor) and arg.is_meta]
        if not all(map(self.knows, others)):
            self.problem = self.problem or "the constructor mixes parameters with tensors on the meta device"
        named = [kwargs.get(spec.name) for spec in schema.arguments[len(args) :]]
        written = [
            arg
            for spec, arg in zip(schema.arguments, [*args, *named], strict=True)
            if spec.alias_info is not None and spec.alias_info.is_write and arg is not None
        ]
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        state = self._drawn(func, args, kwargs) if is_random else None
        returns = [spec.alias_info for spec in schema.returns]
        if not written and any(alias is not None for alias in returns):  # a view
            return func(*args, **kwargs)
        if len(written) == 1 and isinstance(written[0], torch.Tensor) and self.knows(written[0]):
            self._write(func, written[0], args, kwargs, state=state, is_random=is_random)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        if written:
            self.problem = self.problem or f"the constructor calls {schema.name.removeprefix('aten::')} on a parameter"
        else:
            self._make(func, result, args, kwargs, state=state, is_random=is_random)
        return result

    def record_draw(self, func: Callable[..., Any], tensor: torch.Tensor, args: tuple[Any, ...]) -> None:
        """Note that a function that draws in a way of its own sets a tensor."""
        with torch._C.DisableTorchFunction():
            state = self._drawn(func, (tensor, *args), {})
            self._write(func, tensor, (tensor, *args), {}, state=state, is_random=True, name="aten::init_")

    def note_empty(self, tensor: torch.Tensor) -> None:
        """Note that a tensor has no values yet."""
        self._unset[_key(tensor)] = StorageWeakRef(tensor.untyped_storage())
        for end in _ends_of(tensor):
            end.fill_(_UNSET)

    def note_set(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note that tensors have values from now on."""
        for tensor in tensors:
            self._unset.pop(_key(tensor), None)

    def _is_unset(self, tensor: torch.Tensor) -> bool:
        return _key(tensor) in self._unset and all(bool(end.eq(_UNSET).all()) for end in _ends_of(tensor))

    def refuse_aliases(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note a problem if a tensor shares the memory of what a parameter was registered with."""
        for tensor in tensors:
            _, ranges = self._left.get(_key(tensor), (None, []))
            mine = _bytes_in_storage(tensor) if ranges else range(0)
            if any(mine.start < other.stop and other.start < mine.stop for other in ranges):
                self.problem = self.problem or "the constructor uses a tensor after it has registered it as a parameter"

    def _drawn(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """Draw as the operation would, for the generator's sake, and return its state before; None without draws."""
        if not self.draws:
            return None
        state = torch.get_rng_state()
        real_args, real_kwargs = tree_map(
            lambda arg: self._stand_in(arg) if isinstance(arg, torch.Tensor) and self.knows(arg) else arg,
            (args, kwargs),
        )
        func(*real_args, **real_kwargs)
        return state

    def _stand_in(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of zeros in memory that is used again: new memory each time would be left in pieces."""
        num_bytes = _num_bytes(tensor)
        if len(self._scratch) < num_bytes:
            self._scratch = torch.empty(0, dtype=torch.uint8)
            self._scratch = torch.empty(num_bytes, dtype=torch.uint8)
        return view_of(tensor, None).on(self._scratch.untyped_storage()).zero_()

    def _write(
        self,
        func: Any,
        target: torch.Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        state: torch.Tensor | None,
        is_random: bool,
        name: str = "",
    ) -> None:
        old, key = self.of(target), _key(target)
        step, taken = self._step(func, key, args, kwargs, state=state, is_random=is_random, output=None)
        is_whole = target.numel() * target.dtype.itemsize == old.num_bytes
        if (name or func._schema.name) in _OVERWRITING and is_whole:
            old = Program(old.num_bytes)
        self._programs[key] = longer(old, step, taken)

    def _make(
        self, func: Any, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, state: Any, is_random: bool
    ) -> None:
        outputs = result if isinstance(result, tuple | list) else (result,)
        for number, output in enumerate(outputs):
            if isinstance(output, torch.Tensor) and output.is_meta:
                step, taken = self._step(func, 0, args, kwargs, state=state, is_random=is_random, output=number)
                self._add(output, longer(Program(_num_bytes(output)), step, taken))

    def _step(
        self,
        func: Any,
        own: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        state: torch.Tensor | None,
        is_random: bool,
        output: int | None,
    ) -> tuple[Step, list[tuple[int, Program]]]:
        """Return a step, and the memory and programs that it takes values from."""
        taken: list[tuple[int, Program]] = []

        def recorded(arg: Any) -> Any:
            if not isinstance(arg, torch.Tensor):
                return arg
            if not self.knows(arg):
                return arg.detach().clone()
            key = _key(arg)
            if key == own:
                return view_of(arg, None)
            taken.append((key, self.of(arg)))
            return view_of(arg, taken[-1][1])

        args, kwargs = tree_map(recorded, (args, kwargs))
        # What draws differs from all before it, unless the generator's state is the same.
        drawn = () if not is_random else (next(self._counter),) if state is None else (value_digest(state),)
        mark = (*mark_of(func, args, kwargs), output, *drawn)
        return Step(func, args, kwargs, is_random, state, output, mark), taken

    def _add(self, tensor: torch.Tensor, program: Program) -> None:
        self._programs[_key(tensor)] = program
        self._kept[_key(tensor)] = tensor


class _Recording(TorchDispatchMode):
    """Show the programs each operation on a parameter."""

    def __init__(self, programs: Programs) -> None:
        super().__init__()
        self._programs = programs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            tensors = [arg for arg in tree_flatten((args, kwargs))[0] if isinstance(arg, torch.Tensor)]
            real = [tensor for tensor in tensors if not tensor.is_meta]
            if real:
                self._programs.refuse_aliases(real)
            if any(map(self._programs.knows, tensors)):
                return self._programs.record(func, args, kwargs)
            result = func(*args, **kwargs)
            if func._schema.is_mutable:
                self._programs.note_set(real)
            if func._schema.name in _EMPTY and result.device.type == "cpu":
                self._programs.note_empty(result)
            return result


class _LooksUsual(TorchFunctionMode):
    """Let parameters on the meta device say that they are on the CPU, so that nobody treats them otherwise."""

    def __init__(self, programs: Programs) -> None:
        super().__init__()
        self._programs = programs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _LOOKS:
            with torch._C.DisableTorchFunction():
                if self._programs.knows(args[0]):
                    return _LOOKS[func]
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            with torch._C.DisableTorchFunction():
                if self._programs.knows(args[0]):
                    return _moved(func, args[0], args[1:], kwargs or {})
        if func is torch.Tensor.__setitem__ and isinstance(args[2], int | float) and _is_basic(args[1]):
            return args[0][args[1]].fill_(args[2])  # torch would make a meta tensor of the number
        return func(*args, **(kwargs or {}))


_LOOKS: dict[Any, Any] = {
    torch.Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    torch.Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
    torch.Tensor.device.__get__: torch.device("cpu"),
}


def _moved(func: Any, tensor: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """Return what a tensor's to() or cpu() returns for one that is on the CPU already."""
    is_copied = kwargs.pop("copy", False)
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs) if func is torch.Tensor.to else (None, None)
    if device is not None and device.type != "cpu":
        return tensor.to(device, dtype or tensor.dtype, copy=is_copied)
    return tensor.to(dtype or tensor.dtype, copy=is_copied)


def _is_basic(index: Any) -> bool:
    """Return whether an index makes a view."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or type(part) in (int, slice) for part in parts)


@contextmanager
def _atomic_draws(programs: Programs) -> Iterator[None]:
    """Record torch's truncated normal as one step: it draws until its values fit, and does nothing to meta tensors."""
    usual = nn.init._no_grad_trunc_normal_

    def draw(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch._C.DisableTorchFunction():
            is_known = programs.knows(tensor)
        if not is_known or kwargs.get("generator") is not None:
            return usual(tensor, *args, **kwargs)
        args = (*args, *(value for key, value in kwargs.items() if key != "generator"))
        programs.record_draw(usual, tensor, args)
        return tensor

    nn.init._no_grad_trunc_normal_ = draw
    try:
        yield
    finally:
        nn.init._no_grad_trunc_normal_ = usual


def _key(tensor: torch.Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _bytes_in_storage(tensor: torch.Tensor) -> range:
    """Return the part of its storage that a tensor spans."""
    if not tensor.numel():
        return range(0)
    last = sum((size - 1) * stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True))
    start, size = tensor.storage_offset(), tensor.dtype.itemsize
    return range(start * size, (start + last + 1) * size)


def _ends_of(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first and the last bytes of the storage of a tensor on the CPU."""
    data = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return data[:_NUM_UNSET], data[-_NUM_UNSET:]
