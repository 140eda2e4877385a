"""FSDP2: parameters, gradients and optimizer state in slices, one a rank; a block is whole while it works.

The same code drives gloo on CPU and NCCL on GPUs. HSDP keeps several such copies of the model, one a group of ranks.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from shardlaunch.checkpoints.state import Fragment, StateReader
from shardlaunch.errors import UserError, some
from shardlaunch.sharding.gradients import clip_factor
from shardlaunch.sharding.layers import exact_modules, layers_to_wrap
from shardlaunch.sharding.lockstep import Lockstep
from shardlaunch.sharding.named_state import check_optimizer, named_state, restore_named_state
from shardlaunch.sharding.slices import local_part
from shardlaunch.sharding.strategy import DEFAULT_SETTINGS, ONE_RANK, BuildOptimizer, Settings, Strategy
from shardlaunch.sharding.world import World

# Optimizers of torch that work with norms or products of whole matrices.
WHOLE_MATRICES = ("Adafactor", "Muon")


class Fsdp2(Strategy):
    """Give each rank a slice of every parameter (see `Strategy`).

    Each micro-batch's gradients are summed over the ranks at once, into slices: whole gradients of all blocks would
    take as much memory as the model.
    """

    starts_empty = True

    def __init__(
        self, model: nn.Module, build_optimizer: BuildOptimizer, *, world: World, settings: Settings = DEFAULT_SETTINGS
    ) -> None:
        _check_shapes(model)
        for parameter in model.parameters():
            if not parameter.is_contiguous():  # slices follow each other in memory
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        self._world = world
        self._offload = settings.cpu_offload
        mesh = self._mesh(world, settings)
        self._copies = mesh.size() // mesh.size(mesh.ndim - 1)
        self._wrap(model, mesh, settings)
        _materialise(model, world.device, offload=settings.cpu_offload)
        self.model = model
        self.replicas = [model]
        self.devices = [world.device]
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._trainable = list(trainable.values())
        self.optimizer = build_optimizer(trainable.items())
        check_optimizer(model, self.optimizer)
        if type(self.optimizer).__name__ in WHOLE_MATRICES:
            raise UserError(
                f"{type(self.optimizer).__name__} needs matrices as wholes, of which each rank has a slice here; use "
                f"an optimizer that works element by element, such as AdamW, or --strategy ddp"
            )
        self._lockstep = Lockstep(model, world=world)
        for number, block in enumerate(self._blocks):
            block.register_forward_pre_hook(partial(self._run_together, number), prepend=True)

    def _mesh(self, world: World, settings: Settings) -> DeviceMesh:
        return init_device_mesh(world.device.type, (world.size,))

    def _wrap(self, model: nn.Module, mesh: DeviceMesh, settings: Settings) -> None:
        offload = (
            CPUOffloadPolicy(pin_memory=self._world.device.type == "cuda") if settings.cpu_offload else OffloadPolicy()
        )
        fp32 = MixedPrecisionPolicy()
        policy = fp32
        exact: list[nn.Module] = []
        layers = layers_to_wrap(model, settings.layer_classes)
        if settings.compute_dtype != torch.float32:
            # Autocast decides what is computed in which dtype, as under every strategy. Weights that it casts at each
            # use are gathered in that dtype, at half the traffic; others as they are.
            policy = MixedPrecisionPolicy(
                param_dtype=settings.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            exact = [module for layer in layers for module in exact_modules(layer)]
        low = [layer for layer in layers if layer not in exact]
        policies = dict.fromkeys(exact, fp32) | dict.fromkeys(low, policy) | {model: fp32}
        for module, its_policy in policies.items():
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=settings.reshard_after_forward,
                mp_policy=its_policy,
                offload_policy=offload,
            )
        self._blocks = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for block in self._blocks:
            block.set_gradient_divide_factor(1.0)  # sums over the ranks, not means
            block.set_force_sum_reduction_for_comms(True)  # gloo has no sums with a factor
        # Ranks must send the same tensors, also where the data decides which parameters the loss reaches.
        model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]

    def _run_together(self, number: int, *_: object) -> None:
        self._lockstep.step(number)

    def describe(self) -> str:
        """Say how many copies there are, and where the slices are kept."""
        blocks = f"{len(self._blocks) - 1} modules gathered one at a time"
        if self._world.size == 1:
            parts = [ONE_RANK]
        elif self._copies > 1:
            parts = [f"{self._copies} copies of the model", f"{self._world.size // self._copies} slices", blocks]
        else:
            parts = [f"{self._world.size} slices", blocks]
        return ", ".join(parts + ["slices in host memory"] * self._offload)

    def backward(self, loss: torch.Tensor, *, factor: float, last: bool) -> None:
        """Accumulate into the slices; the sums over copies of the model wait for the last micro-batch."""
        if self._copies > 1:
            for block in self._blocks:
                block.set_requires_all_reduce(last, recurse=False)
        self._lockstep.begin_backward()
        loss.backward(torch.full_like(loss, factor))
        self._lockstep.end_backward()

    def finish_gradients(self, *, unscale: float, max_norm: float) -> float:
        """Sum the squares over the ranks, unscale and clip in one multiplication."""
        for parameter in self._trainable:
            if parameter.grad is None:  # of a block that no rank has run
                parameter.grad = torch.zeros_like(parameter)
        slices = [local_part(p.grad) for p in self._trainable if p.grad is not None]
        square = torch.nn.utils.get_total_norm(slices).to(self._world.device, torch.float64).square()
        norm = (self._world.sum(square) / self._copies).sqrt().item() * unscale
        factor = unscale * clip_factor(norm, max_norm=max_norm)
        if factor != 1.0:
            for part in slices:
                part.mul_(factor)
        return norm

    def optimizer_step(self) -> None:
        """Apply the optimizer to the slices."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()

    def state(self) -> Iterator[Fragment]:
        """Yield this rank's slices."""
        self._reshard()
        return named_state(self.model, self.optimizer)

    def restore(self, reader: StateReader) -> None:
        """Read this rank's slices."""
        self._reshard()
        restore_named_state(self.model, self.optimizer, reader)

    def _reshard(self) -> None:
        """Put the slices back in the place of whole parameters, which an evaluation may have left."""
        for block in self._blocks:
            block.reshard()


class Hsdp(Fsdp2):
    """Keep several copies of the model, each in slices; sum gradients over the slices, then over the copies.

    On one rank it is FSDP2.
    """

    least_ranks = 4

    def _mesh(self, world: World, settings: Settings) -> DeviceMesh:
        if world.size == 1 and settings.shard_ranks <= 1:
            return super()._mesh(world, settings)
        machine = world.local_size if world.local_size < world.size else world.size // 2
        shard = settings.shard_ranks or machine
        if world.size % shard or shard == 1 or shard == world.size:
            divisors = [str(n) for n in range(2, world.size) if world.size % n == 0]
            advice = f"Give --shard-ranks {' or '.join(divisors)}, or use" if divisors else "Use"
            ranks = f"{world.size} rank{'s' * (world.size > 1)}"
            raise UserError(
                f"hsdp: {ranks} cannot be several copies of the model in {shard} slices each. "
                f"{advice} fsdp2 (one copy) or ddp (a copy on each rank)."
            )
        return init_device_mesh(world.device.type, (world.size // shard, shard), mesh_dim_names=("copies", "slices"))


def _check_shapes(model: nn.Module) -> None:
    """Raise UserError for parameters that have nothing to slice."""
    empty = [name for name, parameter in model.named_parameters() if parameter.numel() == 0]
    if empty:
        raise UserError(f"parameters without elements cannot be sliced: {some(empty)}; use ddp")
    scalars = [name for name, parameter in model.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise UserError(
            f"FSDP2 cannot slice parameters without dimensions: {some(scalars)}; use ddp, or zero1 to zero3"
        )


def _materialise(model: nn.Module, device: torch.device, *, offload: bool) -> None:
    """Give parameters memory for their slices, without values, and move the buffers with theirs to the device."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    moved = {id(buffer): buffer.to(device) for buffer in buffers.values()}
    model.to_empty(device=torch.device("cpu") if offload else device)
    for name, buffer in buffers.items():
        module, _, own_name = name.rpartition(".")
        setattr(model.get_submodule(module), own_name, moved[id(buffer)])
