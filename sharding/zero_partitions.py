"""Where ZeRO keeps a rank's shards of weights and optimizer state, as flat ranges of named tensors.

ZeRO concatenates the trainable parameters of a group and gives each rank one flat partition: stages 1 and 2 divide the
concatenation evenly, stage 3 divides each parameter. The optimizer sees partitions, not parameters. Only this module
reads DeepSpeed's internal layout.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shardlaunch.checkpoints.state import EMA, MODEL, ONLY, OPTIMIZER, Fragment, StateReader, TensorSpec, fill, whole
from shardlaunch.checkpoints.tensorfile import DTYPE_NAMES
from shardlaunch.errors import UserError
from shardlaunch.sharding.averages import Average
from shardlaunch.sharding.buffers import persistent_buffers
from shardlaunch.sharding.named_state import check_names

SCALAR_ENTRIES = ("step", "mu_product")  # state of torch's optimizers that is one number per parameter


@dataclass(frozen=True, kw_only=True)
class ParameterRange:
    """The elements [start, end) of a parameter that this rank holds, and their partition and offset in it."""

    partition: int
    offset: int
    start: int
    end: int

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """Return this range as a view of a flat tensor with the partition's layout."""
        return flat.detach()[self.offset : self.offset + self.end - self.start]


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return a parameter's full shape, even if it is partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class Partitions:
    """Read state from a rank's partitions by parameter name, and write it back. No collectives."""

    def __init__(
        self, model: nn.Module, zero: Any, optimizer: torch.optim.Optimizer, *, rank: int, is_offloaded: bool
    ) -> None:
        self._model = model
        self._zero = zero
        self._optimizer = optimizer
        self._rank = rank
        self.is_offloaded = is_offloaded
        self._is_model_sharded = hasattr(zero, "fp16_partitioned_groups_flat")  # stage 3
        self.masters: list[torch.Tensor] = (
            zero.fp32_partitioned_groups_flat if self._is_model_sharded else zero.single_partition_of_fp32_groups
        )
        self.ranges: dict[int, ParameterRange] = dict(
            self._stage_3_ranges() if self._is_model_sharded else self._stage_1_and_2_ranges()
        )
        self._alias_masters()

    def _alias_masters(self) -> None:
        """Make master weights share memory with the model's weights: DeepSpeed keeps both, even in fp32."""
        if self._is_model_sharded:
            weights: list[torch.Tensor] = self._zero.fp16_partitioned_groups_flat
        else:
            weights = [partitions[self._rank] for partitions in self._zero.parallel_partitioned_bit16_groups]
        for master, weight in zip(self.masters, weights, strict=True):
            if (master.device, master.dtype) == (weight.device, weight.dtype):
                master.data = weight.data
        self._zero._link_all_hp_params()  # DeepSpeed's own views of the masters

    def _stage_1_and_2_ranges(self) -> Iterator[tuple[int, ParameterRange]]:
        """Yield this rank's ranges in stages 1 and 2, with the parameter's id."""
        zero = self._zero
        groups = zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, zero.partition_size, strict=True)
        for index, (parameters, offsets, size) in enumerate(groups):
            begin = self._rank * size
            for parameter, offset in zip(parameters, offsets, strict=True):
                length = parameter.numel()
                start, end = (min(max(edge - offset, 0), length) for edge in (begin, begin + size))
                yield (
                    id(parameter),
                    ParameterRange(partition=index, offset=max(offset - begin, 0), start=start, end=end),
                )

    def _stage_3_ranges(self) -> Iterator[tuple[int, ParameterRange]]:
        """Yield this rank's ranges in stage 3, with the parameter's id."""
        for index, parameters in enumerate(self._zero.fp16_groups):
            offset = 0
            for parameter in parameters:
                start, end = self._shard_bounds(parameter)
                yield id(parameter), ParameterRange(partition=index, offset=offset, start=start, end=end)
                offset += parameter.ds_tensor.ds_numel

    def _shard_bounds(self, parameter: Any) -> tuple[int, int]:
        size = parameter.ds_tensor.ds_numel
        start = min(self._rank * size, parameter.ds_numel)
        return start, min(start + size, parameter.ds_numel)

    def gradients(self) -> list[torch.Tensor]:
        """Return the reduced gradients of this rank's partitions: each element once, zeros as padding."""
        if self.is_offloaded:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the copy to the host is asynchronous
            return [master.grad for master in self.masters if master.grad is not None]
        averaged = self._zero.averaged_gradients
        return [gradient for index in range(len(self.masters)) for gradient in averaged[index]]

    def begin_change(self) -> None:
        """Prepare for a change of the master weights outside of a step. All ranks."""
        if self._is_model_sharded:
            self._zero._partition_all_parameters()

    @torch.no_grad()
    def end_change(self) -> None:
        """Give the changed master weights to the model. All ranks."""
        if not self._is_model_sharded:
            self._zero.update_lp_params()
            return
        for master, weights in zip(self.masters, self._zero.fp16_partitioned_groups_flat, strict=True):
            weights.data.copy_(master.data)  # the same memory, where both are on one device
        self._gather_persistent()

    def _gather_persistent(self) -> None:
        if self._zero.persistent_parameters:  # small parameters stay gathered between steps
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def state(self, average: Average | None = None) -> Iterator[Fragment]:
        """Yield this rank's shards of all weights, persistent buffers, optimizer entries and averages.

        Each in the model's order.
        """
        parameters: list[tuple[str, Any]] = list(self._model.named_parameters())
        for name, parameter in parameters:
            held = self.ranges.get(id(parameter))
            if held is not None:
                yield _fragment(name, parameter, held, self.masters[held.partition])
            elif self._is_model_sharded:
                start, end = self._shard_bounds(parameter)
                frozen = ParameterRange(partition=-1, offset=0, start=start, end=end)
                yield _fragment(name, parameter, frozen, parameter.ds_tensor)
            else:
                yield whole(name, parameter)
        for name, buffer in persistent_buffers(self._model).items():
            yield whole(name, buffer)
        for name, parameter in parameters:
            held = self.ranges.get(id(parameter))
            if held is None:
                continue
            master = self.masters[held.partition]
            for entry, value in self._optimizer.state.get(master, {}).items():
                if value is None:
                    continue
                self._check_entry(entry, value, master)
                if entry in SCALAR_ENTRIES:
                    yield whole(name, value, section=OPTIMIZER, entry=entry)
                else:
                    yield _fragment(name, parameter, held, value, section=OPTIMIZER, entry=entry)
        if average is not None and average.num_updates:
            for name, parameter in parameters:
                if held := self.ranges.get(id(parameter)):
                    yield _fragment(name, parameter, held, average.values[str(held.partition)], section=EMA)
            for name, value in average.buffers.items():
                yield whole(name, value, section=EMA)

    def _check_entry(self, entry: str, value: Any, master: torch.Tensor) -> None:
        is_tensor = isinstance(value, torch.Tensor) and value.dtype in DTYPE_NAMES
        if not is_tensor or value.shape != (() if entry in SCALAR_ENTRIES else master.shape):
            found = list(value.shape) if is_tensor else type(value).__name__
            raise UserError(
                f"{type(self._optimizer).__name__} keeps {entry!r} as {found}, which ZeRO cannot shard (neither a "
                f"scalar nor of the weight's shape); use another optimizer, or --strategy ddp or fsdp2"
            )

    @torch.no_grad()
    def restore(self, reader: StateReader, average: Average | None = None) -> None:
        """Restore weights, buffers, optimizer entries and average from `reader`, each rank its own ranges.

        Raises UserError when names or shapes differ from the model's, or when scalar entries differ within a partition.
        """
        specs = list(reader.specs())
        weights = {spec.name: spec for spec in specs if spec.section == MODEL}
        parameters: dict[str, Any] = dict(self._model.named_parameters())
        buffers = persistent_buffers(self._model)
        shapes = {name: torch.empty(shape_of(parameter), device="meta") for name, parameter in parameters.items()}
        check_names(weights, shapes | buffers)
        if self._is_model_sharded:
            self._zero._partition_all_parameters()
        for name, parameter in parameters.items():
            if self._is_model_sharded:
                start, end = self._shard_bounds(parameter)
                shard: torch.Tensor = parameter.ds_tensor.detach()
                shard[end - start :] = 0  # padding
                shard[: end - start] = reader.read(weights[name], start, end)
            else:
                fill(reader, weights[name], 0, parameter)
        for name, buffer in buffers.items():
            fill(reader, weights[name], 0, buffer)
        self._zero.refresh_fp32_params()
        if self._is_model_sharded:
            self._gather_persistent()
        self._restore_optimizer([spec for spec in specs if spec.section == OPTIMIZER], parameters, reader)
        if average is None:
            return
        for name, spec in average.begin_restore(reader).items():
            if name in average.buffers:
                fill(reader, spec, 0, average.buffers[name])
            elif held := self.ranges.get(id(parameters.get(name))):
                fill(reader, spec, held.start, held.view(average.values[str(held.partition)]))

    def _restore_optimizer(self, specs: list[TensorSpec], parameters: dict[str, Any], reader: StateReader) -> None:
        entries: list[_Entries] = [_Entries() for _ in self.masters]
        for spec in specs:
            parameter = parameters.get(spec.name)
            if parameter is None or not parameter.requires_grad:
                raise UserError(
                    f"the checkpoint has {spec.entry} of {spec.name}, but this run does not train that parameter"
                )
            held = self.ranges[id(parameter)]
            if spec.entry in SCALAR_ENTRIES:
                entries[held.partition].add_scalar(spec, reader.read(spec, 0, 1).reshape(()))
            elif spec.shape == shape_of(parameter):
                flat = entries[held.partition].flat(spec, self.masters[held.partition])
                fill(reader, spec, held.start, held.view(flat))
            else:
                raise UserError(
                    f"the checkpoint's {spec.entry} of {spec.name} has shape {list(spec.shape)}, but ZeRO needs the "
                    f"weight's shape, {list(shape_of(parameter))}; use --strategy ddp or fsdp2"
                )
        if specs:
            names = {id(parameter): name for name, parameter in parameters.items()}
            for index, (master, found) in enumerate(zip(self.masters, entries, strict=True)):
                in_partition = [names[key] for key, held in self.ranges.items() if held.partition == index]
                self._optimizer.state[master] = found.checked(in_partition, self._scalar_device(index))

    def _scalar_device(self, index: int) -> torch.device | None:
        """Return the device of the optimizer's scalar entries; None: the CPU, the default of torch's optimizers."""
        group = self._optimizer.param_groups[
            self._zero.sub_group_to_group_id[index] if self._is_model_sharded else index
        ]
        return self.masters[index].device if group.get("fused") or group.get("capturable") else None


@dataclass
class _Entries:
    """The optimizer entries of one partition, as they are read."""

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def flat(self, spec: TensorSpec, master: torch.Tensor) -> torch.Tensor:
        self.names.setdefault(spec.entry, []).append(spec.name)
        if spec.entry not in self.values:
            self.values[spec.entry] = torch.zeros(master.shape, dtype=spec.dtype, device=master.device)
        return self.values[spec.entry]

    def add_scalar(self, spec: TensorSpec, scalar: torch.Tensor) -> None:
        known = self.values.setdefault(spec.entry, scalar)
        self.names.setdefault(spec.entry, []).append(spec.name)
        if not torch.equal(known, scalar):
            raise UserError(
                f"the checkpoint's {spec.entry!r} of {spec.name} is {scalar.item():g}, but {known.item():g} for "
                f"{self.names[spec.entry][0]}; ZeRO keeps one value per parameter group; use --strategy ddp or fsdp2"
            )

    def checked(self, names: list[str], device: torch.device | None) -> dict[str, torch.Tensor]:
        for entry, found in self.names.items():
            missing = [name for name in names if name not in set(found)]
            if missing:
                raise UserError(f"the checkpoint has {entry!r} of {found[0]} but not of {missing[0]}")
        return {entry: v.to(device) if entry in SCALAR_ENTRIES and device else v for entry, v in self.values.items()}


def _fragment(
    name: str,
    parameter: torch.Tensor,
    held: ParameterRange,
    flat: torch.Tensor,
    *,
    section: str = MODEL,
    entry: str = "",
) -> Fragment:
    spec = TensorSpec(name=name, section=section, entry=entry, shape=shape_of(parameter), dtype=flat.dtype)
    return Fragment(spec=spec, flat_start=held.start, flat_end=held.end, tensor=held.view(flat), replica=ONLY)
