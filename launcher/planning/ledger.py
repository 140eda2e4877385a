"""A ledger of what tensors without values would take: each allocation and release, operations, collectives.

Floating-point tensors are fake (shapes and dtypes, no memory). Integers and booleans, which models branch on and index
with, are computed for real.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import finalize

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from shardlaunch.launcher.planning.gpu_kernels import workspace_bytes

MOST_REAL_ELEMENTS = 1 << 28
_aten = torch.ops.aten
_COLLECTIVES = {
    torch.ops.c10d._allgather_base_.default: "all-gather",
    torch.ops.c10d._reduce_scatter_base_.default: "reduce-scatter",
    torch.ops.c10d.allreduce_.default: "all-reduce",
}


class Collective(NamedTuple):
    """A kind of collective in one group of ranks, and how many bytes each call moves: those of the whole tensor."""

    kind: str
    ranks: tuple[int, ...] | range
    num_bytes: int


class CannotPlan(Exception):
    """What a model does with values that the plan does not have."""


class Ledger(TorchDispatchMode):
    """Note the memory of every tensor from its first use to its end, while it is entered (inside a fake mode)."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        """The number of a storage, and the bytes that it grows by."""
        self.streams: dict[int, int] = {}
        """The stream that a storage is allocated in, of those that are not in the default one."""
        self.flops = 0
        self.collectives: Counter[Collective] = Counter()
        self._numbers: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._count = 0
        self._stream = 0

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note what happens within."""
        resize = torch.UntypedStorage.resize_

        def noted_resize(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            number = self._numbers.get(storage._cdata)
            if number is not None:
                self.events.append((number, size - self._sizes[number]))
                self._sizes[number] = size

        @contextmanager
        def noted_stream(stream: Any) -> Iterator[None]:
            before, self._stream = self._stream, 0 if stream is default else id(stream)
            try:
                yield
            finally:
                self._stream = before

        on_stream, default = torch.cpu.stream, torch.cpu.current_stream()
        look = ShardingPropagator._propagate_tensor_meta_non_cached

        def unnoted_look(*args: Any) -> Any:
            with _disable_current_modes():
                return look(*args)

        torch.cpu.stream = noted_stream  # FSDP2 calls the one of its device
        torch.UntypedStorage.resize_ = noted_resize  # type: ignore[assignment,method-assign]
        # DTensor looks at the shapes of whole tensors, which no rank has.
        ShardingPropagator._propagate_tensor_meta_non_cached = unnoted_look  # type: ignore[assignment,method-assign]
        try:
            with FakeTensorMode(allow_non_fake_inputs=True) as self.fake_mode, self:
                yield
        finally:
            torch.cpu.stream = on_stream
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
            ShardingPropagator._propagate_tensor_meta_non_cached = look  # type: ignore[method-assign]

    def number_of(self, tensor: torch.Tensor) -> int:
        """Return the number of a tensor's storage, which is noted from now on."""
        storage = _local(tensor).untyped_storage()
        key = storage._cdata
        if key not in self._numbers:
            self._count += 1
            number = self._numbers[key] = self._count
            self._sizes[number] = storage.nbytes()
            self.events.append((number, self._sizes[number]))
            if self._stream:
                self.streams[number] = self._stream
            finalize(storage, self._released, key, number)
        return self._numbers[key]

    def _released(self, key: int, number: int) -> None:
        self.events.append((number, -self._sizes.pop(number)))
        del self._numbers[key]

    def fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor without values that is like a real one, or on the meta device."""
        with unset_fake_temporarily():
            empty = torch.empty_like(tensor, device="meta")
        made: torch.Tensor = self.fake_mode.fake_tensor_converter.from_meta_and_device(
            self.fake_mode, empty, torch.device("cpu")
        )
        self.number_of(made)
        return made

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        flat = tree_flatten((args, kwargs))[0]
        tensors = [arg for arg in flat if isinstance(arg, torch.Tensor)]
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if tensors and all(map(_is_on_meta, tensors)) and kwargs.get("device") in (None, torch.device("meta")):
            with unset_fake_temporarily():  # parameters before they have a place, which are cut for each rank
                return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default and fakes:
            return self._value(args[0])
        if func in _COLLECTIVES:
            self._note_collective(func, args)
        is_exact = not fakes and all(map(_is_exact, tensors))
        if is_exact and tensors and max(tensor.numel() for tensor in tensors) <= MOST_REAL_ELEMENTS:
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        else:
            if func is _aten.index.Tensor:
                args = (args[0], _as_numbers(args[1]))
            result = func(*args, **kwargs)
            is_made_of_nothing = not tensors and isinstance(result, FakeTensor) and _is_exact(result)
            if is_made_of_nothing and result.numel() <= MOST_REAL_ELEMENTS:
                with unset_fake_temporarily():
                    result = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        if workspace := workspace_bytes(func, args):
            self._count += 1
            self.events += [(self._count, workspace), (self._count, -workspace)]
        for output in tree_flatten(result)[0]:
            if isinstance(output, torch.Tensor) and output.device.type != "meta":
                self.number_of(output)
        return result

    def _value(self, tensor: torch.Tensor) -> float | bool:
        """Return a number in place of one that is not known: 1, or for DeepSpeed's checks that nothing is wrong."""
        if tensor.dtype.is_floating_point:
            return 1.0
        caller = next((name for name in _callers() if not name.startswith("torch.")), "")
        if tensor.dtype == torch.bool and caller.startswith("deepspeed."):
            return False
        raise CannotPlan(f"it decides by a value ({str(tensor.dtype).removeprefix('torch.')}) that it computes")

    def _note_collective(self, func: Any, args: tuple[Any, ...]) -> None:
        kind = _COLLECTIVES[func]
        whole = args[1] if kind == "reduce-scatter" else args[0][0] if kind == "all-reduce" else args[0]
        group = next(arg for arg in args[1:] if isinstance(arg, torch.ScriptObject))
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(group))
        num_bytes = whole.numel() * whole.element_size()
        self.collectives[Collective(kind, _as_range(ranks), num_bytes)] += 1


def _callers() -> Iterator[str]:
    """Yield the modules of the functions that are running, innermost first, from the ledger's caller on."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__:
            yield name
        frame = frame.f_back  # type: ignore[assignment]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_exact(tensor: torch.Tensor) -> bool:
    return not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)


def _is_on_meta(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, FakeTensor) and tensor.is_meta


def _as_numbers(indices: Any) -> Any:
    """Return indices with real masks as positions: how many there are decides the shape."""
    found: list[Any] = []
    for index in indices:
        if isinstance(index, torch.Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool:
            with unset_fake_temporarily():
                found.extend(index.nonzero(as_tuple=True))
        else:
            found.append(index)
    return found


def _as_range(ranks: list[int]) -> tuple[int, ...] | range:
    """Return ranks with equal distances as a range."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    even = range(ranks[0], ranks[-1] + 1, step) if step > 0 else range(0)
    return even if list(even) == ranks else tuple(ranks)
