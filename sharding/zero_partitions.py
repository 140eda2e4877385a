"""Where ZeRO keeps a rank's share of weights and optimizer state, as flat ranges of named tensors.

ZeRO lays the trainable parameters of a group end to end and gives each rank one flat partition: stages 1 and 2 cut the
whole line into equal parts, stage 3 cuts each parameter. The optimizer sees partitions, not parameters. What is read of
DeepSpeed's own layout is read here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shardlaunch.checkpoints.state import MODEL, OPTIMIZER, Fragment, StateReader, TensorSpec, whole
from shardlaunch.checkpoints.tensorfile import DTYPE_NAMES
from shardlaunch.errors import UserError
from shardlaunch.sharding.buffers import persistent_buffers
from shardlaunch.sharding.named_state import check_names

NUMBERS = ("step", "mu_product")  # entries of torch's optimizers that are one number, not one a weight


@dataclass(frozen=True, kw_only=True)
class ParameterRange:
    """Hold which elements [start, end) of a parameter this rank has, in which partition, from which offset."""

    partition: int
    offset: int
    start: int
    end: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the piece's view of a flat tensor that is laid out as its partition is."""
        return flat.detach()[self.offset : self.offset + self.end - self.start]


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return a parameter's true shape, also when it is partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


class Partitions:
    """Name what is in a rank's partitions: state out of them, and back into them. No collectives."""

    def __init__(
        self, model: nn.Module, zero: Any, optimizer: torch.optim.Optimizer, *, rank: int, is_offloaded: bool
    ) -> None:
        self._model = model
        self._zero = zero
        self._optimizer = optimizer
        self._rank = rank
        self.is_offloaded = is_offloaded
        self._is_sliced = hasattr(zero, "fp16_partitioned_groups_flat")  # stage 3: the model itself is sliced
        self.masters: list[torch.Tensor] = (
            zero.fp32_partitioned_groups_flat if self._is_sliced else zero.single_partition_of_fp32_groups
        )
        self.pieces: dict[int, ParameterRange] = dict(self._slices() if self._is_sliced else self._cuts())
        self._share_masters()

    def _share_masters(self) -> None:
        """Let the weights that are updated be those that are computed with: DeepSpeed holds both, in fp32 too."""
        if self._is_sliced:
            weights: list[torch.Tensor] = self._zero.fp16_partitioned_groups_flat
        else:
            weights = [partitions[self._rank] for partitions in self._zero.parallel_partitioned_bit16_groups]
        for master, weight in zip(self.masters, weights, strict=True):
            if (master.device, master.dtype) == (weight.device, weight.dtype):
                master.data = weight.data
        self._zero._link_all_hp_params()  # DeepSpeed's own views of the masters

    def _cuts(self) -> Iterator[tuple[int, ParameterRange]]:
        """Yield the pieces of stages 1 and 2, by id of the parameter."""
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

    def _slices(self) -> Iterator[tuple[int, ParameterRange]]:
        """Yield the pieces of stage 3, by id of the parameter."""
        for index, parameters in enumerate(self._zero.fp16_groups):
            offset = 0
            for parameter in parameters:
                start, end = self._slice(parameter)
                yield id(parameter), ParameterRange(partition=index, offset=offset, start=start, end=end)
                offset += parameter.ds_tensor.ds_numel

    def _slice(self, parameter: Any) -> tuple[int, int]:
        size = parameter.ds_tensor.ds_numel
        start = min(self._rank * size, parameter.ds_numel)
        return start, min(start + size, parameter.ds_numel)

    def gradients(self) -> list[torch.Tensor]:
        """Return the reduced gradients of this rank's partitions; each element once, padding is zero."""
        if self.is_offloaded:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # they are copied to the host while the device goes on
            return [master.grad for master in self.masters if master.grad is not None]
        averaged = self._zero.averaged_gradients
        return [gradient for index in range(len(self.masters)) for gradient in averaged[index]]

    def state(self) -> Iterator[Fragment]:
        """Yield this rank's piece of all weights, persistent buffers and optimizer entries, in the model's order."""
        parameters: list[tuple[str, Any]] = list(self._model.named_parameters())
        for name, parameter in parameters:
            piece = self.pieces.get(id(parameter))
            if piece is not None:
                yield _fragment(name, parameter, piece, self.masters[piece.partition])
            elif self._is_sliced:
                start, end = self._slice(parameter)
                frozen = ParameterRange(partition=-1, offset=0, start=start, end=end)
                yield _fragment(name, parameter, frozen, parameter.ds_tensor)
            else:
                yield whole(name, parameter)
        for name, buffer in persistent_buffers(self._model).items():
            yield whole(name, buffer)
        for name, parameter in parameters:
            piece = self.pieces.get(id(parameter))
            if piece is None:
                continue
            master = self.masters[piece.partition]
            for entry, value in self._optimizer.state.get(master, {}).items():
                if value is None:
                    continue
                self._check_entry(entry, value, master)
                if entry in NUMBERS:
                    yield whole(name, value, section=OPTIMIZER, entry=entry)
                else:
                    yield _fragment(name, parameter, piece, value, section=OPTIMIZER, entry=entry)

    def _check_entry(self, entry: str, value: Any, master: torch.Tensor) -> None:
        is_tensor = isinstance(value, torch.Tensor) and value.dtype in DTYPE_NAMES
        if not is_tensor or value.shape != (() if entry in NUMBERS else master.shape):
            found = list(value.shape) if is_tensor else type(value).__name__
            raise UserError(
                f"{type(self._optimizer).__name__} keeps {entry!r} as {found}, neither one number nor one a weight, so "
                f"that ZeRO cannot divide it among ranks; use another optimizer, or --strategy ddp or fsdp2"
            )

    @torch.no_grad()
    def restore(self, reader: StateReader) -> None:
        """Fill weights, buffers and optimizer entries from `reader`, each rank its own ranges.

        Raises UserError when names or shapes differ from the model's, or a partition's numbers among themselves.
        """
        specs = list(reader.specs())
        weights = {spec.name: spec for spec in specs if spec.section == MODEL}
        parameters: dict[str, Any] = dict(self._model.named_parameters())
        buffers = persistent_buffers(self._model)
        shapes = {name: torch.empty(shape_of(parameter), device="meta") for name, parameter in parameters.items()}
        check_names(weights, shapes | buffers)
        if self._is_sliced:
            self._zero._partition_all_parameters()
        for name, parameter in parameters.items():
            if self._is_sliced:
                start, end = self._slice(parameter)
                held: torch.Tensor = parameter.ds_tensor.detach()
                held[end - start :] = 0  # padding
                held[: end - start] = reader.read(weights[name], start, end)
            else:
                parameter.copy_(reader.read(weights[name], 0, parameter.numel()).view_as(parameter))
        for name, buffer in buffers.items():
            buffer.copy_(reader.read(weights[name], 0, buffer.numel()).view_as(buffer))
        self._zero.refresh_fp32_params()
        if self._is_sliced and self._zero.persistent_parameters:  # small ones stay gathered between steps
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
        self._restore_optimizer([spec for spec in specs if spec.section == OPTIMIZER], parameters, reader)

    def _restore_optimizer(self, specs: list[TensorSpec], parameters: dict[str, Any], reader: StateReader) -> None:
        entries: list[_Entries] = [_Entries() for _ in self.masters]
        for spec in specs:
            parameter = parameters.get(spec.name)
            if parameter is None or not parameter.requires_grad:
                raise UserError(f"the checkpoint has {spec.entry} of {spec.name}, which this run does not train")
            piece = self.pieces[id(parameter)]
            if spec.entry in NUMBERS:
                entries[piece.partition].add_number(spec, reader.read(spec, 0, 1).reshape(()))
            elif spec.shape == shape_of(parameter):
                part = reader.read(spec, piece.start, piece.end)
                piece.of(entries[piece.partition].flat(spec, self.masters[piece.partition])).copy_(part)
            else:
                raise UserError(
                    f"the checkpoint's {spec.entry} of {spec.name} has the shape {list(spec.shape)}: ZeRO takes "
                    f"entries of the weight's shape, {list(shape_of(parameter))}; use --strategy ddp or fsdp2"
                )
        if specs:
            names = {id(parameter): name for name, parameter in parameters.items()}
            for index, (master, found) in enumerate(zip(self.masters, entries, strict=True)):
                held = [names[key] for key, piece in self.pieces.items() if piece.partition == index]
                self._optimizer.state[master] = found.checked(held, self._on_device(index))

    def _on_device(self, index: int) -> torch.device | None:
        """Return where the optimizer wants its numbers: torch's optimizers keep them on the host unless told."""
        group = self._optimizer.param_groups[self._zero.sub_group_to_group_id[index] if self._is_sliced else index]
        return self.masters[index].device if group.get("fused") or group.get("capturable") else None


@dataclass
class _Entries:
    """Collect the optimizer entries of one partition."""

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def flat(self, spec: TensorSpec, master: torch.Tensor) -> torch.Tensor:
        self.names.setdefault(spec.entry, []).append(spec.name)
        if spec.entry not in self.values:
            self.values[spec.entry] = torch.zeros(master.shape, dtype=spec.dtype, device=master.device)
        return self.values[spec.entry]

    def add_number(self, spec: TensorSpec, number: torch.Tensor) -> None:
        known = self.values.setdefault(spec.entry, number)
        self.names.setdefault(spec.entry, []).append(spec.name)
        if not torch.equal(known, number):
            raise UserError(
                f"the checkpoint's {spec.entry!r} of {spec.name} is {number.item():g}, of {self.names[spec.entry][0]} "
                f"{known.item():g}: ZeRO keeps one for all parameters of a group; use --strategy ddp or fsdp2"
            )

    def checked(self, names: list[str], device: torch.device | None) -> dict[str, torch.Tensor]:
        for entry, found in self.names.items():
            missing = [name for name in names if name not in set(found)]
            if missing:
                raise UserError(f"the checkpoint has {entry!r} of {found[0]} but not of {missing[0]}")
        return {entry: v.to(device) if entry in NUMBERS and device else v for entry, v in self.values.items()}


def _fragment(
    name: str,
    parameter: torch.Tensor,
    piece: ParameterRange,
    flat: torch.Tensor,
    *,
    section: str = MODEL,
    entry: str = "",
) -> Fragment:
    spec = TensorSpec(name=name, section=section, entry=entry, shape=shape_of(parameter), dtype=flat.dtype)
    return Fragment(spec=spec, flat_start=piece.start, flat_end=piece.end, tensor=piece.of(flat))
