"""Which strategy a run uses, and the checks that requested settings are in effect."""

from shardlaunch.errors import UserError
from shardlaunch.sharding.data_parallel import DataParallel
from shardlaunch.sharding.environment import RANKS_VARIABLE, STRATEGY_VARIABLE, LaunchEnvironment
from shardlaunch.sharding.exact import MOST_SUMMANDS
from shardlaunch.sharding.fsdp2 import Fsdp2, Hsdp
from shardlaunch.sharding.replicated import Replicated, Single
from shardlaunch.sharding.strategy import Settings, Strategy
from shardlaunch.sharding.world import World
from shardlaunch.sharding.zero import Zero1, Zero2, Zero3

STRATEGIES: dict[str, type[Strategy]] = {
    "single": Single,
    "dp": DataParallel,
    "ddp": Replicated,
    "fsdp2": Fsdp2,
    "hsdp": Hsdp,
    "zero1": Zero1,
    "zero2": Zero2,
    "zero3": Zero3,
}


def resolve_strategy(option: str, env: LaunchEnvironment) -> str:
    """Return the strategy's name: the option, else our variable, else accelerate's configuration, else by world size.

    Raises UserError for an unknown name, for two sources that differ, and for a name that the world size contradicts.
    """
    sources = {
        f"--strategy {option}": None if option == "auto" else option,
        f"{STRATEGY_VARIABLE}={env.strategy}": env.strategy,
        f"accelerate's configuration ({env.accelerate_strategy})": env.accelerate_strategy,
    }
    asked = {source: name for source, name in sources.items() if name is not None}
    for source, name in asked.items():
        check_strategy_name(name, source)
    if len(set(asked.values())) > 1:
        raise UserError(f"two strategies were requested: {' and '.join(asked)}. Remove one of them.")
    if not asked:
        return "ddp" if env.world_size > 1 else "single"
    source, name = next(iter(asked.items()))
    STRATEGIES[name].check_available()
    if STRATEGIES[name].for_one_process and env.world_size > 1:
        raise UserError(f"{source} is for one process, but {env.world_size} ranks were started. Use ddp, or one rank.")
    least = STRATEGIES[name].least_ranks
    if 1 < env.world_size < least:
        raise UserError(
            f"{source} is for at least {least} ranks, or for one; started: {env.world_size}. Start more: "
            f"`shardlaunch run RECIPE --strategy {name} --ranks {least}`, or torchrun --nproc_per_node {least}."
        )
    return name


def check_settings(name: str, settings: Settings) -> None:
    """Raise UserError for a memory setting that the strategy would ignore."""
    if settings.cpu_offload and not STRATEGIES[name].is_sharded:
        raise UserError(f"--cpu-offload: {name} does not shard; use --strategy fsdp2, hsdp, zero1, zero2 or zero3")
    if settings.shard_ranks and name != "hsdp":
        raise UserError(f"--shard-ranks: {name} has no sharded replicas; use --strategy hsdp")


def check_quantized_base(name: str) -> None:
    """Raise UserError for a strategy that takes weights in floating point only."""
    if STRATEGIES[name].is_sharded:
        raise UserError(
            f"--lora-base-bits: not under {name}, which takes weights in floating point only; use --strategy ddp, or "
            f"remove it"
        )


def check_exact(name: str, world: World, *, num_micro_batches: int, compiles: bool, has_own_step: bool) -> None:
    """Raise UserError where sums cannot be exact."""
    if not STRATEGIES[name].can_be_exact:
        raise UserError(f"--exact: not under {name}, which sums by itself; use --strategy ddp, fsdp2 or hsdp")
    if has_own_step:
        raise UserError("--exact: not with a recipe's own step(); remove it")
    if world.model_ranks > 1:
        raise UserError("--exact: not with --tensor-parallel; remove one of the two")
    if compiles:
        raise UserError("--exact: not with --compile; remove one of the two")
    if num_micro_batches > MOST_SUMMANDS:
        raise UserError(
            f"--exact: a global batch of {num_micro_batches:,} micro-batches is too many; at most {MOST_SUMMANDS:,} "
            f"can be summed. Choose a larger --micro-batch-size"
        )


def check_tensor_parallel(name: str, model_ranks: int, num_ranks: int, *, compiles: bool) -> None:
    """Raise UserError when ranks cannot divide layers among them as --tensor-parallel says."""
    flag = f"--tensor-parallel {model_ranks}"
    if name != "fsdp2":
        raise UserError(f"{flag}: {name} keeps layers whole; use --strategy fsdp2, or remove it")
    if num_ranks % model_ranks:
        raise UserError(
            f"{flag}: {num_ranks} ranks are not a multiple of it; start {model_ranks} ranks or twice as many"
        )
    if compiles:
        raise UserError(f"{flag}: not with --compile; remove one of the two")


def fitting(name: str, ranks: int) -> str:
    """Return the strategy that a run goes on under with `ranks` ranks: FSDP2 for replicas that cannot be divided."""
    is_divisible = ranks >= Hsdp.least_ranks and ranks % 2 == 0
    return "fsdp2" if name == "hsdp" and not is_divisible else name


def check_strategy_name(name: str, source: str) -> None:
    """Raise UserError when there is no strategy of this name."""
    if name not in STRATEGIES:
        raise UserError(f"{source}: unknown strategy {name!r}; choose one of {', '.join(STRATEGIES)}")


def check_ranks(env: LaunchEnvironment, world: World, accelerate_ranks: int) -> None:
    """Raise UserError when the requested number of ranks differs from the actual one."""
    if env.lone_of_many:
        raise UserError(
            "accelerate launch was asked for several processes but started one (as it does on CPU without MPI). "
            "Use `shardlaunch run RECIPE --ranks N`, or torchrun --nproc_per_node N. "
            "If you want one process, unset MASTER_ADDR."
        )
    if env.ranks is not None and env.ranks != world.size:
        raise UserError(
            f"{RANKS_VARIABLE}={env.ranks} ranks were requested, but {world.size} are running. "
            f"Start the recipe with `shardlaunch run RECIPE --ranks {env.ranks}`, or unset the variable."
        )
    if not env.world_size == world.size == accelerate_ranks:
        raise UserError(
            f"the launcher started {env.world_size} ranks, but torch.distributed has {world.size} "
            f"and accelerate {accelerate_ranks}"
        )
