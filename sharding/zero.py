"""ZeRO by DeepSpeed: optimizer state (stage 1), gradients (2) and parameters (3) sharded over the ranks.

DeepSpeed holds the partitions and runs the collectives and updates, in fp32 throughout. Everything that decides the
numbers is here: what is summed, when a step ends, the norm, clipping, loss scaling, learning rates, state.
"""

import logging
import math
import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from shardlaunch.checkpoints.state import Fragment, StateReader
from shardlaunch.errors import UserError, some
from shardlaunch.sharding.gradients import clip_factor
from shardlaunch.sharding.layers import check_gradient_hooks, refuse_layer_dropping, refuse_sparse_gradients
from shardlaunch.sharding.lockstep import Lockstep
from shardlaunch.sharding.named_state import check_optimizer
from shardlaunch.sharding.strategy import DEFAULT_SETTINGS, ONE_RANK, BuildOptimizer, Settings, Strategy
from shardlaunch.sharding.world import World
from shardlaunch.sharding.zero_order import GradientOrder, fill_gradient, gather_in_lockstep, release_all
from shardlaunch.sharding.zero_partitions import Partitions

BUCKET_ELEMENTS = 1 << 24  # 64 MiB of gradients are reduced at a time
PERSISTENT_ELEMENTS = 100_000  # stage 3 keeps parameters of up to this size gathered between steps
# Partitions are flat, so the update of an element may depend only on that element's own history.
# (Adagrad is elementwise too, but DeepSpeed rebuilds it without its parameter groups.)
ELEMENTWISE: tuple[type[torch.optim.Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adadelta,
    torch.optim.Rprop,
)


class Zero(Strategy):
    """Train with DeepSpeed's ZeRO (see `Strategy`)."""

    stage: ClassVar[int]

    def __init__(
        self, model: nn.Module, build_optimizer: BuildOptimizer, *, world: World, settings: Settings = DEFAULT_SETTINGS
    ) -> None:
        self.world = world
        self.model = model
        self.replicas = [model]
        self.devices = [world.device]
        # Built while all parameters have their true shapes: parameter groups may depend on them.
        self.optimizer = build_optimizer([(name, p) for name, p in model.named_parameters() if p.requires_grad])
        check_optimizer(model, self.optimizer)
        _check_elementwise(self.optimizer)
        refuse_sparse_gradients(model, "ZeRO")
        check_gradient_hooks(model, "ZeRO 3" if self.stage == 3 else "")
        if self.stage == 3 and world.size > 1:
            refuse_layer_dropping(model, "ZeRO 3")
        _check_dtypes(model)
        if any(parameter.numel() == 0 for parameter in model.parameters()):
            raise UserError("ZeRO cannot shard parameters without elements; use --strategy ddp")
        config = _config(self.stage, world, settings)
        with imported_deepspeed(world) as deepspeed:
            if self.stage == 3:
                _materialise(model, config)
            self._engine, self._zero, _, _ = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)
        self.partitions = Partitions(
            model, self._zero, self.optimizer, rank=world.rank, is_offloaded=settings.cpu_offload
        )
        self._parameters = list(model.parameters())
        self._trained = [p for p in model.parameters() if id(p) in self.partitions.ranges]
        self._lockstep = Lockstep(model, world=world) if self.stage == 3 else None
        if self._lockstep is not None:
            gather_in_lockstep(self._zero, self._lockstep)
        self._order = GradientOrder(self._zero, self._trained, lockstep=self._lockstep) if self.stage > 1 else None
        # DeepSpeed's stage 3 averages over the ranks; the other stages can be set to sum.
        self._mean_over = world.size if self.stage == 3 else 1

    @classmethod
    def check_available(cls) -> None:
        """Raise UserError when DeepSpeed is not installed."""
        if find_spec("deepspeed") is None:
            raise UserError(f'--strategy zero{cls.stage} needs DeepSpeed: pip install "shardlaunch[deepspeed]"')

    def describe(self) -> str:
        """Return that one rank has everything, and where the partitions are kept, if in host memory."""
        alone = [ONE_RANK] if self.world.size == 1 else []
        return ", ".join(alone + ["shards in host memory"] * self.partitions.is_offloaded)

    def backward(self, loss: torch.Tensor, *, factor: float, last: bool) -> None:
        """Accumulate: stage 1 locally, with one reduction at the last micro-batch; stages 2 and 3 reduce each time.

        DeepSpeed's engine is told when a step ends; its own micro-batch counter is not used.
        """
        self._zero.clear_backward_seen_flag()
        self._engine.set_gradient_accumulation_boundary(last)
        if self._lockstep is not None:
            self._lockstep.begin_backward()
        loss.backward(torch.full_like(loss, factor))
        if self._order is not None:
            self._order.finish()
        elif last:
            self._zero.setup_buckets()
            for parameter in self._trained:
                fill_gradient(parameter)
        if self._lockstep is not None:
            self._lockstep.end_backward()
        self._engine.allreduce_gradients()
        self._zero.backward_epilogue()
        if self.stage == 3:
            release_all(self._zero, self._parameters)

    def finish_gradients(self, *, unscale: float, max_norm: float) -> float:
        """Compute the norm over all partitions, then unscale and clip in one multiplication."""
        unscale *= self._mean_over
        gradients = self.partitions.gradients()
        squares = sum(torch.linalg.vector_norm(gradient).double() ** 2 for gradient in gradients)
        total = self.world.sum(torch.as_tensor(squares, dtype=torch.float64, device=self.world.device))
        norm = math.sqrt(total.item()) * unscale
        factor = unscale * clip_factor(norm, max_norm=max_norm)
        if factor != 1.0:
            for gradient in gradients:
                gradient.mul_(factor)
        return norm

    def optimizer_step(self) -> None:
        """Apply the optimizer to the partitions and gather the weights."""
        self._zero.step()
        assert not self._zero.overflow, "DeepSpeed skipped an update"
        self._zero.zero_grad()

    def discard(self) -> None:
        """Drop the gradients, as DeepSpeed does after an overflow."""
        self._zero.zero_grad()
        self._zero.reset_cpu_buffers()
        if self.stage < 3:
            self._zero.micro_step_id = -1
            for index in self._zero.averaged_gradients:
                self._zero.averaged_gradients[index] = None
                self._zero.all_grad_tensors[index] = None
        else:
            self._zero.averaged_gradients = {}

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """Return this rank's partitions, whose names are numbers."""
        return {str(index): master for index, master in enumerate(self.partitions.masters)}

    def exchange_average(self) -> None:
        """Exchange partitions, and gather what is kept gathered."""
        self.partitions.begin_change()
        super().exchange_average()
        self.partitions.end_change()

    def state(self) -> Iterator[Fragment]:
        """Yield this rank's shards, as views of its partitions."""
        return self.partitions.state(self.average)

    def restore(self, reader: StateReader) -> None:
        """Read this rank's shards into its partitions; stages 1 and 2 read all weights."""
        self.partitions.restore(reader, self.average)


class Zero1(Zero):
    """Shard the optimizer state."""

    stage = 1


class Zero2(Zero):
    """Shard optimizer state and gradients."""

    stage = 2


class Zero3(Zero):
    """Shard optimizer state, gradients and parameters; a module is gathered while it runs."""

    stage = 3
    gathers_weights = True
    differentiates_twice = False  # weights are dropped after the first backward pass
    starts_empty = True


def _check_elementwise(optimizer: torch.optim.Optimizer) -> None:
    if type(optimizer) not in ELEMENTWISE:
        raise UserError(
            f"{type(optimizer).__name__} is not supported with ZeRO, which flattens parameters; supported: "
            f"{', '.join(kind.__name__ for kind in ELEMENTWISE)}. Use one of these, or --strategy ddp or fsdp2"
        )
    if any(not group["params"] for group in optimizer.param_groups):
        raise UserError(
            "ZeRO does not support a parameter group without parameters; remove it from the recipe's optimizer()"
        )


def _check_dtypes(model: nn.Module) -> None:
    other = [name for name, parameter in model.named_parameters() if parameter.dtype != torch.float32]
    if other:
        raise UserError(
            f"ZeRO by DeepSpeed trains in float32, but these have another dtype: {some(other)}; convert them in "
            f"model(), or use --strategy ddp or fsdp2"
        )


def _config(stage: int, world: World, settings: Settings) -> dict[str, Any]:
    """Return DeepSpeed's configuration: fp32, sums, no clipping or loss scaling by DeepSpeed, our bucket sizes."""
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "round_robin_gradients": False,
        "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
        "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
        # In elements: how close a module's next use must be for its parameters to stay gathered, and the maximum number
        # of gathered elements up to which parameters are prefetched.
        "stage3_max_reuse_distance": 0 if settings.reshard_after_forward else 10**12,
        "stage3_max_live_parameters": 4 * BUCKET_ELEMENTS if settings.reshard_after_forward else 10**12,
    }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "zero_optimization": zero,
    }
    if stage < 3:
        config["gradient_allreduce_op"] = "sum"
        zero["compute_grad_norm"] = settings.cpu_offload
    if settings.cpu_offload:
        pinned = {"device": "cpu", "pin_memory": world.device.type != "cpu"}
        zero["offload_optimizer"] = pinned
        if stage == 3:
            zero["offload_param"] = pinned
    return config


@contextmanager
def imported_deepspeed(world: World) -> Iterator[Any]:
    """Import DeepSpeed for the ranks' device, without its log output during set-up."""
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", "0")
    # DeepSpeed calls two collectives by names that torch has deprecated, in each step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

        # A CPU collective that is not used here; compiling it with g++ and ninja would take half a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # The models are identical on all ranks already, and the broadcast fails for a parameter without dimensions.
        deepspeed.DeepSpeedEngine._broadcast_model = lambda engine: None
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        _forget_earlier_groups()
        yield deepspeed


def _forget_earlier_groups() -> None:
    """Let DeepSpeed drop the process groups of an earlier run in this process, which it keeps in module variables."""
    from deepspeed.utils import groups

    if groups._WORLD_GROUP is not None:
        try:
            dist.get_rank(groups._WORLD_GROUP)
        except ValueError:  # destroyed
            groups._release_process_group_references(group=None)


def _materialise(model: nn.Module, config: dict[str, Any]) -> None:
    """Allocate the parameters one at a time and shard each immediately. Values are arbitrary. All ranks.

    Parameters keep their identity, so that tied weights and the optimizer's groups stay valid.
    """
    from deepspeed.runtime.zero import Init, linear

    class EmptyInit(Init):
        def _zero_init_param(self, parameter: Any) -> None:  # DeepSpeed's version would broadcast the values
            self._convert_to_deepspeed_param(parameter)
            parameter.partition()

    # DeepSpeed replaces torch's linear function, which would keep gathered weights alive. Its version rounds the bias
    # differently, which shows under autocast; so its forward pass is set to torch's.
    linear.LinearFunctionForZeroStage3.forward = staticmethod(_linear)
    init = EmptyInit(module=nn.Module(), config_dict_or_path=config, dtype=torch.float32)
    # All in the same memory: pieces of it freed between the shards would not be given back.
    most = max(parameter.numel() for parameter in model.parameters())
    memory = torch.empty(most, dtype=torch.float32, device=init.local_device)
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    for rnn in recurrent:
        rnn._flat_weight_refs = []  # else the parameters could not be swapped
    for parameter in model.parameters():
        if parameter.is_meta:
            empty = memory[: parameter.numel()].view(parameter.shape)
            real = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            real.__dict__.update(parameter.__dict__)
            torch.utils.swap_tensors(parameter, real)
        init._convert_to_zero_parameters([parameter])
    for rnn in recurrent:
        rnn._flat_weight_refs = [weight if weight is None else weakref.ref(weight) for weight in rnn._flat_weights]
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(init.local_device)


def _linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch._C._nn.linear(inputs, weight, bias)
