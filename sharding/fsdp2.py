"""FSDP2: parameters, gradients and optimizer state are sharded over the ranks; a block is gathered while it runs.

The same code runs on gloo (CPU) and NCCL (GPUs). HSDP keeps several replicas of the model, each sharded over a group of
ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from math import gcd

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from shardlaunch.checkpoints.state import Fragment, StateReader
from shardlaunch.errors import UserError, some
from shardlaunch.sharding import direct
from shardlaunch.sharding.direct import DirectGather, DirectReduction
from shardlaunch.sharding.exact_shards import ExactShards
from shardlaunch.sharding.exact_step import step_exactly
from shardlaunch.sharding.gradients import clip_factor
from shardlaunch.sharding.layers import (
    check_gradient_hooks,
    fp32_modules,
    large_ends,
    layers_to_wrap,
    refuse_layer_dropping,
    refuse_sparse_gradients,
)
from shardlaunch.sharding.lockstep import Lockstep
from shardlaunch.sharding.named_state import (
    check_optimizer,
    named_state,
    optimized,
    restore_named_state,
    trained_by,
)
from shardlaunch.sharding.optimizers import Optimizers, only_needing_gradients, optimizers_by_name
from shardlaunch.sharding.parts import Part, mark, part_of
from shardlaunch.sharding.sharded_parameters import copy_attributes, materialise, whole_scalars
from shardlaunch.sharding.shards import local_shard
from shardlaunch.sharding.strategy import DEFAULT_SETTINGS, ONE_RANK, BuildOptimizer, Settings, Strategy
from shardlaunch.sharding.tensor_parallel import divide
from shardlaunch.sharding.world import World

_DIMENSIONS = ("data", "model")
# torch optimizers that compute norms or products of full weight matrices.
FULL_MATRIX_OPTIMIZERS = ("Adafactor", "Muon")


class Fsdp2(Strategy):
    """Shard every parameter over the ranks (see `Strategy`).

    Each micro-batch's gradients are reduced into shards immediately: full gradients of all blocks would take as much
    memory as the model.
    """

    gathers_weights = True
    can_be_exact = True
    takes_several_optimizers = True
    is_choice_of_one_rank = True  # which may keep shards in host memory
    starts_empty = True

    def __init__(
        self, model: nn.Module, build_optimizer: BuildOptimizer, *, world: World, settings: Settings = DEFAULT_SETTINGS
    ) -> None:
        _check_shapes(model)
        refuse_sparse_gradients(model, "FSDP2")
        check_gradient_hooks(model, "FSDP2")
        attributes = {name: dict(parameter.__dict__) for name, parameter in model.named_parameters()}
        if world.size > 1:
            refuse_layer_dropping(model, "FSDP2")
        for parameter in model.parameters():
            if not parameter.is_contiguous():  # shards are contiguous in memory
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        self._world = world
        self._offload = settings.cpu_offload
        parts, mesh = self._divide(model, world, settings)
        self._num_replicas = mesh.size() // mesh.size(mesh.ndim - 1)
        self._wrap(model, mesh, settings)
        materialise(model, world.device, offload=settings.cpu_offload)
        for name, parameter in model.named_parameters() if parts else ():
            mark(parameter, parts[name])
        self._scalars = whole_scalars(model, mesh, world.device)
        for name, parameter in model.named_parameters():
            copy_attributes(attributes[name], parameter)
            copy_attributes(attributes[name], optimized(parameter))
        self.model = model
        self.replicas = [model]
        self.devices = [world.device]
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._trained = trainable
        self._trainable = [p for p in trainable.values() if p.ndim]
        self.optimizer = build_optimizer([(name, optimized(p)) for name, p in trainable.items()])
        check_optimizer(model, self.optimizer)
        self._updated = self.optimizer
        _check_elementwise(self.optimizer)
        scalars = {name: p for name, p in trainable.items() if not p.ndim}
        self._exact = ExactShards(model, self._blocks, scalars, world=world) if settings.exact else None
        self._lockstep = Lockstep(model, world=world)
        for number, block in enumerate(self._blocks):
            block.register_forward_pre_hook(partial(self._step_together, number), prepend=True)

    def _divide(self, model: nn.Module, world: World, settings: Settings) -> tuple[dict[str, Part], DeviceMesh]:
        """Leave to this rank its part of the model. Return the parts, if any, and the mesh that shards each."""
        if world.model_ranks == 1:
            return {}, self._mesh(world, settings)
        mesh = init_device_mesh(
            world.device.type, (world.num_data_ranks, world.model_ranks), mesh_dim_names=_DIMENSIONS
        )
        group = mesh[_DIMENSIONS[1]].get_group()
        parts = divide(model, index=world.rank % world.model_ranks, count=world.model_ranks, group=group)
        return parts, mesh[_DIMENSIONS[0]]

    def _mesh(self, world: World, settings: Settings) -> DeviceMesh:
        return init_device_mesh(world.device.type, (world.size,))

    def _wrap(self, model: nn.Module, mesh: DeviceMesh, settings: Settings) -> None:
        offload = (
            CPUOffloadPolicy(pin_memory=self._world.device.type == "cuda") if settings.cpu_offload else OffloadPolicy()
        )
        fp32 = MixedPrecisionPolicy()
        policy = fp32
        whole: list[nn.Module] = []
        layers = layers_to_wrap(model, settings.layer_classes)
        layers += large_ends(model, layers)
        # Exact sums are of gradients as `ddp` has them, in fp32.
        if settings.compute_dtype != torch.float32 and not settings.exact:
            # Autocast decides the dtype of each operation, as under every strategy. Weights that it casts at each use
            # are gathered in that dtype, which halves the traffic; others are gathered in fp32.
            policy = MixedPrecisionPolicy(
                param_dtype=settings.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            whole = [module for layer in layers for module in fp32_modules(layer)]
        low = [layer for layer in layers if layer not in whole]
        policies = dict.fromkeys(whole, fp32) | dict.fromkeys(low, policy) | {model: fp32}
        for module, its_policy in policies.items():
            fully_shard(
                module,
                mesh=mesh,
                reshard_after_forward=settings.reshard_after_forward,
                mp_policy=its_policy,
                offload_policy=offload,
                ignored_params={parameter for parameter in model.parameters() if parameter.ndim == 0},
            )
        self._blocks = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for block in self._blocks:
            block.set_gradient_divide_factor(1.0)  # sum over the ranks, not mean
            block.set_force_sum_reduction_for_comms(True)  # gloo has no premultiplied sum
            if direct.fits(mesh.get_group(mesh.ndim - 1)):
                block.set_custom_all_gather(DirectGather())
                block.set_custom_reduce_scatter(DirectReduction())
        # All ranks must reduce the same tensors, even if the data decides which parameters the loss reaches.
        model.set_reduce_scatter_unused_params(True)  # type: ignore[operator]

    def _step_together(self, number: int, *_: object) -> None:
        self._lockstep.step(number)

    def describe(self) -> str:
        """Return the number of replicas, shards and blocks, and where the shards are kept."""
        blocks = f"{len(self._blocks) - 1} modules gathered one at a time"
        if self._world.size == 1:
            words = [ONE_RANK]
        elif self._num_replicas > 1:
            words = [f"{self._num_replicas} replicas", f"{self._world.size // self._num_replicas} shards", blocks]
        else:
            words = [f"{self._world.num_data_ranks} shards", blocks]
        if self._world.model_ranks > 1:
            words.insert(1, f"each over {self._world.model_ranks} ranks by tensor parallelism")
        return ", ".join(words + ["shards in host memory"] * self._offload)

    @contextmanager
    def updating(self, name: str) -> Iterator[None]:
        """Reduce the gradients of this optimizer's parameters alone."""
        self._lockstep.name_pass(name)
        if not isinstance(self.optimizer, Optimizers):
            yield
            return
        self._updated = self.optimizer.by_name[name]
        chosen = trained_by(self._updated, self._trained.values())
        self._trainable, self._scalars = [p for p in chosen if p.ndim], [p for p in chosen if not p.ndim]
        self._reshard()  # whether a gathered parameter needs a gradient is set as it is gathered
        with only_needing_gradients(chosen, self._trained.values()):
            yield
            self._reshard()

    @contextmanager
    def keeping_graph(self) -> Iterator[None]:
        """Keep what is gathered, which the second backward pass needs, and reduce nothing."""
        self._set_ends_backward(False)
        try:
            yield
        finally:
            self._set_ends_backward(True)

    def _set_ends_backward(self, value: bool) -> None:
        for block in self._blocks:
            block.set_reshard_after_backward(value, recurse=False)
            block.set_requires_gradient_sync(value, recurse=False)

    def backward(self, loss: torch.Tensor, *, factor: float, last: bool) -> None:
        """Accumulate into the shards; the all-reduce over replicas waits for the last micro-batch."""
        if self._num_replicas > 1:
            for block in self._blocks:
                block.set_requires_all_reduce(last, recurse=False)
        if self._exact is not None and last:
            self._exact.arm()
        self._lockstep.begin_backward()
        loss.backward(torch.full_like(loss, factor))
        self._lockstep.end_backward()

    def must_repeat(self) -> bool:
        """Ask the exact sums. All ranks."""
        return self._exact is not None and self._exact.must_repeat()

    @property
    def exact_exponents(self) -> dict[str, int]:
        """The units of exact sums by parameter."""
        return self._exact.exponents if self._exact is not None else {}

    @exact_exponents.setter
    def exact_exponents(self, saved: dict[str, int]) -> None:
        if self._exact is not None:
            self._exact.exponents = saved

    def _finish_exactly(self, exact: ExactShards, *, unscale: float, max_norm: float) -> float:
        exact.finish()
        norm = exact.norm(num_replicas=self._num_replicas) * unscale
        exact.scale(unscale * clip_factor(norm, max_norm=max_norm))
        for parameter in self._scalars:
            assert parameter.grad is not None
            self._give_to_optimizer(parameter, parameter.grad)
        return norm

    def finish_gradients(self, *, unscale: float, max_norm: float) -> float:
        """Compute the norm over all ranks, then unscale and clip in one multiplication."""
        if self._exact is not None:
            return self._finish_exactly(self._exact, unscale=unscale, max_norm=max_norm)
        for parameter in self._trainable:
            if parameter.grad is None:  # in a block that no rank has run
                parameter.grad = torch.zeros_like(parameter)
        self._sum_partial_gradients()
        shards = [local_shard(p.grad) for p in self._trainable if p.grad is not None]
        counted = [shard for shard, p in zip(shards, self._trainable, strict=True) if self._is_counted(p)]
        square = torch.nn.utils.get_total_norm(counted).to(self._world.device, torch.float64).square()
        total = self._world.sum(square) / self._num_replicas
        if self._scalars:
            scalars = self._sum_scalars()
            total = total + scalars.double().square().sum()
            shards.extend(scalars)
        norm = total.sqrt().item() * unscale
        factor = unscale * clip_factor(norm, max_norm=max_norm)
        if factor != 1.0:
            for shard in shards:
                shard.mul_(factor)
        return norm

    def _is_counted(self, parameter: nn.Parameter) -> bool:
        """Whether the norm is to have this rank's shard: of equal ones in a model group, one."""
        part = part_of(parameter)
        return part is None or part.dim is not None or self._world.is_counted

    def _sum_partial_gradients(self) -> None:
        """Sum gradients over the ranks of a model group where each has that of its own features only. All ranks."""
        for parameter in self._trainable:
            part = part_of(parameter)
            if part is not None and part.has_partial_gradient and parameter.grad is not None:
                dist.all_reduce(local_shard(parameter.grad), group=part.group)

    def _sum_scalars(self) -> torch.Tensor:
        """Sum the gradients of parameters without dimensions over the ranks; the optimizer gets views. All ranks."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._scalars]
        total = self._world.sum_of_data(torch.stack(gradients))
        for parameter, gradient in zip(self._scalars, total, strict=True):
            self._give_to_optimizer(parameter, gradient)
        return total

    def _give_to_optimizer(self, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Give the view of a parameter without dimensions that the optimizer has its gradient."""
        view = optimized(parameter)
        assert isinstance(view, DTensor)
        view.grad = DTensor.from_local(gradient, view.device_mesh, view.placements, run_check=False)
        parameter.grad = None

    def optimizer_step(self) -> None:
        """Apply the optimizer to the shards."""
        if self._exact is not None:
            step_exactly(self._updated)
        else:
            self._updated.step()
        self.discard()

    def discard(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad()
        if self._exact is not None:
            self._exact.zero()

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """Return the sharded parameters, and those without dimensions."""
        return dict(self._trained)

    def exchange_average(self) -> None:
        """Exchange shards, of which an evaluation may have left some gathered."""
        self._reshard()
        super().exchange_average()

    def state(self) -> Iterator[Fragment]:
        """Yield this rank's shards."""
        self._reshard()
        return named_state(self.model, self.optimizer, self.average)

    def restore(self, reader: StateReader) -> None:
        """Read this rank's shards."""
        self._reshard()
        restore_named_state(self.model, self.optimizer, reader, self.average)

    def _reshard(self) -> None:
        """Reshard parameters that an evaluation may have left gathered."""
        for block in self._blocks:
            block.reshard()


class Hsdp(Fsdp2):
    """Keep several sharded replicas; reduce gradients within each replica, then over the replicas.

    On one rank it is FSDP2.
    """

    is_choice_of_one_rank = False
    least_ranks = 4

    def _mesh(self, world: World, settings: Settings) -> DeviceMesh:
        if world.size == 1 and settings.shard_ranks <= 1:
            return super()._mesh(world, settings)
        sizes = [world.local_size]
        if world.local_size < world.size:  # machines may have unequal numbers of ranks: all choose alike
            sizes = sorted({size for (size,) in world.peers.gather([world.local_size])})
        shard = settings.shard_ranks or (gcd(*sizes) if sizes[0] < world.size else world.size // 2)
        if world.size % shard or shard == 1 or shard == world.size:
            divisors = [str(n) for n in range(2, world.size) if world.size % n == 0]
            advice = f"Give --shard-ranks {' or '.join(divisors)}, or use" if divisors else "Use"
            ranks = f"{world.size} rank{'s' * (world.size > 1)}"
            if len(sizes) > 1:
                ranks += f", on machines of {' and '.join(map(str, sizes))},"
            raise UserError(
                f"hsdp: {ranks} cannot be divided into several replicas of {shard} shards each. "
                f"{advice} fsdp2 (one replica) or ddp (one full replica per rank)."
            )
        return init_device_mesh(world.device.type, (world.size // shard, shard), mesh_dim_names=("replicas", "shards"))


def _check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    for one in optimizers_by_name(optimizer).values():
        if type(one).__name__ in FULL_MATRIX_OPTIMIZERS:
            raise UserError(
                f"{type(one).__name__} needs full weight matrices, but FSDP2 shards them; use an elementwise optimizer "
                f"such as AdamW, or --strategy ddp"
            )


def _check_shapes(model: nn.Module) -> None:
    """Raise UserError for parameters that cannot be sharded."""
    empty = [name for name, parameter in model.named_parameters() if parameter.numel() == 0]
    if empty:
        raise UserError(f"parameters without elements cannot be sharded: {some(empty)}; use --strategy ddp")
    dtypes = {parameter.dtype: name for name, parameter in model.named_parameters()}
    if len(dtypes) > 1:
        found = [f"{name} ({str(dtype).removeprefix('torch.')})" for dtype, name in dtypes.items()]
        raise UserError(
            f"FSDP2 gathers the parameters of a module together, which must be of one dtype: {some(found)}; "
            f"convert them in model(), or use --strategy ddp"
        )
