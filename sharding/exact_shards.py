"""Exact sums of gradients that FSDP2 shards: reduced here, as integers, in place of FSDP2's own reduction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from shardlaunch.sharding import direct
from shardlaunch.sharding.direct import OwnMemory
from shardlaunch.sharding.exact import ExactGradients, Units, norm_of, sums_of_squares
from shardlaunch.sharding.shards import local_shard
from shardlaunch.sharding.world import World

_SENT, _RECEIVED = "sent", "received"


@dataclass(frozen=True, kw_only=True)
class _Shard:
    """A parameter of a block."""

    number: int
    """Among all."""
    parameter: nn.Parameter
    begin: int
    end: int
    """The place of its shard, with padding, in the sums of the block."""


class ExactShards:
    """Shards of gradients with sums that have the same bits on any ranks (see `exact`).

    FSDP2 gives each block its reduction: what it would sum over the ranks is added here to integers that wait for all
    micro-batches, and FSDP2 gets zeros.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[FSDPModule], scalars: Mapping[str, nn.Parameter], *, world: World
    ) -> None:
        """`scalars` are trained parameters without dimensions, which each rank has whole."""
        self._world = world
        self._scalars = ExactGradients(scalars, world=world)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._shards: list[_Shard] = []
        self._views: list[torch.Tensor] = []  # of the sums, without padding
        self._sums: list[torch.Tensor] = []
        self._replicas: list[dist.ProcessGroup | None] = []
        self._kept: dict[str, torch.Tensor] = {}
        found: list[str] = []
        for block in blocks:
            group: Any = block._get_fsdp_state()._fsdp_param_group
            if group is None:
                continue
            size = group.mesh_info.shard_mesh_size
            shards: list[_Shard] = []
            end = 0
            for fsdp_parameter in group.fsdp_params:
                parameter = fsdp_parameter.sharded_param
                if parameter.requires_grad:
                    rows, *row = fsdp_parameter._orig_size
                    begin, end = end, end + -(-rows // size) * prod(row)
                    shards.append(_Shard(number=len(found), parameter=parameter, begin=begin, end=end))
                    found.append(names[id(parameter)])
            sums = torch.zeros(end, dtype=torch.int64, device=world.device)
            if size > 1:
                block.set_custom_reduce_scatter(_Reduction(partial(self._reduce, shards, sums)))
            else:  # then FSDP2 does not reduce
                block.set_all_reduce_hook(partial(self._add, shards, sums, is_first=False))
            for shard in shards:
                self._views.append(sums[shard.begin : shard.begin + local_shard(shard.parameter).numel()])
            self._shards += shards
            self._sums.append(sums)
            self._replicas.append(group._all_reduce_process_group if group._is_hsdp else None)
        self._units = Units(found, world.device)

    @property
    def exponents(self) -> dict[str, int]:
        """The exponent of each parameter's unit, which a resume needs."""
        return self._units.exponents | self._scalars.units.exponents

    @exponents.setter
    def exponents(self, saved: Mapping[str, int]) -> None:
        self._units.exponents = self._scalars.units.exponents = saved

    def zero(self) -> None:
        """Drop all sums."""
        self._units.forget()
        self._scalars.zero()
        for sums in self._sums:
            sums.zero_()

    def arm(self) -> None:
        """Prepare for the backward pass of the step's last micro-batch. All ranks."""
        self._scalars.arm()

    def must_repeat(self) -> bool:
        """Return whether the step must be run again, with other units. All ranks."""
        must_repeat = any([self._units.must_change(self._world), self._scalars.must_repeat()])
        if must_repeat:
            self.zero()
        return must_repeat

    def finish(self) -> None:
        """Turn the sums into the gradients of the shards and of the scalars. All ranks."""
        self._scalars.finish()
        for sums, replicas in zip(self._sums, self._replicas, strict=True):
            if replicas is not None:
                dist.all_reduce(sums, group=replicas)
        for shard, view in zip(self._shards, self._views, strict=True):
            if shard.parameter.grad is None:  # in a block that no rank has run
                shard.parameter.grad = torch.zeros_like(shard.parameter)
            self._units.gradient(shard.number, view, local_shard(shard.parameter.grad).view(-1))

    def norm(self, *, num_replicas: int) -> float:
        """Return the 2-norm of all gradients. All ranks."""
        squares = sums_of_squares(self._gradients(), self._world, num_replicas=num_replicas)
        return norm_of([*squares, *self._scalars.squares()])

    def scale(self, factor: float) -> None:
        """Multiply all gradients by `factor`, and choose the units of the next step."""
        if factor != 1.0:
            for gradient in self._gradients():
                gradient.mul_(factor)
        self._units.begin_next()
        self._scalars.scale(factor)

    def _gradients(self) -> list[torch.Tensor]:
        return [local_shard(s.parameter.grad).view(-1) for s in self._shards if s.parameter.grad is not None]

    def _reduce(
        self,
        shards: Sequence[_Shard],
        sums: torch.Tensor,
        output: torch.Tensor,
        gradients: torch.Tensor,
        group: dist.ProcessGroup,
    ) -> None:
        """Sum a micro-batch's gradients of a block over the ranks, and add this rank's shards to the sums."""
        multiples = self._memory(_SENT, len(gradients))
        for its_gradients, its_multiples in zip(
            gradients.view(-1, len(sums)), multiples.view(-1, len(sums)), strict=True
        ):
            self._add(shards, its_multiples, its_gradients, is_first=True)
        if direct.fits(group):
            for part in direct.parts_of_all(multiples, group, self._memory(_RECEIVED, len(multiples))):
                sums.add_(part)
        else:
            own = self._memory(_RECEIVED, len(sums))
            dist.reduce_scatter_single(own, multiples, group=group)
            sums.add_(own)
        output.zero_()

    def _memory(self, purpose: str, size: int) -> torch.Tensor:
        """Return integers for the time of a reduction, in memory that all blocks share."""
        kept = self._kept.get(purpose)
        if kept is None or len(kept) < size:
            kept = self._kept[purpose] = torch.empty(size, dtype=torch.int64, device=self._world.device)
        return kept[:size]

    def _add(self, shards: Sequence[_Shard], sums: torch.Tensor, gradients: torch.Tensor, *, is_first: bool) -> None:
        for shard in shards:
            place = slice(shard.begin, shard.end)
            self._units.add_multiples(shard.number, gradients[place], sums[place], is_first=is_first)


class _Reduction(OwnMemory, ReduceScatter):
    """A block's reduction by a function of output, input and group."""

    def __init__(self, reduce: Any) -> None:
        self._reduce_by = reduce

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Reduce at once."""
        self._reduce_by(output_tensor, input_tensor, group)
