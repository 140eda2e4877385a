"""The launch environment. No other module reads the variables that launchers set."""

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from shardlaunch.errors import UserError

STRATEGY_VARIABLE = "SHARDLAUNCH_STRATEGY"
RANKS_VARIABLE = "SHARDLAUNCH_RANKS"
RESULT_VARIABLE = "SHARDLAUNCH_RESULT_FILE"
PROGRESS_VARIABLE = "SHARDLAUNCH_PROGRESS_FILE"
JOIN_TIMEOUT_VARIABLE = "SHARDLAUNCH_JOIN_TIMEOUT_S"
JOIN_TIMEOUT_S = 600
MOST_PORT = 65535
_OFFLOAD_OPTIMIZER = "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"
_OFFLOAD_PARAMETERS = "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"


@dataclass(frozen=True, kw_only=True)
class LaunchEnvironment:
    """Settings that the launcher (torchrun, accelerate launch, shardlaunch run, or none) passed to this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    is_distributed: bool = False  # started as part of a group, even a group of one
    master_addr: str = ""  # where the ranks meet
    master_port: int | None = None
    uses_agent_store: bool = False  # the launcher, not rank 0, listens there
    join_timeout_s: int = JOIN_TIMEOUT_S  # how long a rank waits for the others to start
    attempt: int = 0  # number of restarts of the worker group
    has_agent: bool = False  # a launcher watches the ranks: it ends the others when one has failed
    use_cpu: bool = False
    threads: int | None = None  # OMP_NUM_THREADS
    strategy: str | None = None  # requested by `shardlaunch run --strategy`
    ranks: int | None = None  # requested by `shardlaunch run --ranks`
    result_file: str | None = None  # where `shardlaunch.start` expects the path of the run folder
    accelerate_strategy: str | None = None  # requested by accelerate's configuration, with the fields below
    layer_classes: tuple[str, ...] = ()
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    shard_ranks: int = 0
    accelerate_precision: str | None = None
    lone_of_many: bool = False  # accelerate was asked for several processes and started one


def read_environment(environ: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """Read the environment of this process. Raises UserError for invalid or unsupported values."""
    env = os.environ if environ is None else environ

    def number(name: str) -> int | None:
        text = env.get(name, "")
        if not text:
            return None
        try:
            return int(text)
        except ValueError:
            raise UserError(f"environment variable {name}={text!r} is not a whole number") from None

    def positive(name: str) -> int | None:
        found = number(name)
        if found is not None and found < 1:
            raise UserError(f"environment variable {name}={found} must be at least 1; change or unset it")
        return found

    _check_ranks(env, number, positive)
    num_replicas = number("PARALLELISM_CONFIG_DP_REPLICATE_SIZE") or 1
    shard_ranks = number("PARALLELISM_CONFIG_DP_SHARD_SIZE") or 1
    _check_accelerate(env, num_replicas=num_replicas, shard_ranks=shard_ranks, world_size=positive("WORLD_SIZE") or 1)
    is_hybrid = num_replicas > 1
    accelerate_strategy = None
    if _is_true(env.get("ACCELERATE_USE_DEEPSPEED")):
        accelerate_strategy = f"zero{env.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '')}"
    elif _is_true(env.get("ACCELERATE_USE_FSDP")):
        accelerate_strategy = "hsdp" if is_hybrid else "fsdp2"
    is_distributed = is_distributed_launch(env)
    world_size = number("WORLD_SIZE") or 1 if is_distributed else 1
    rank = number("RANK") or 0 if is_distributed else 0
    if not 0 <= rank < world_size:
        raise UserError(
            f"RANK={rank} and WORLD_SIZE={world_size} contradict each other: ranks count from 0 to WORLD_SIZE - 1. "
            f"For one process, unset both."
        )
    return LaunchEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=number("LOCAL_RANK") or 0 if is_distributed else 0,
        local_world_size=number("LOCAL_WORLD_SIZE") or world_size if is_distributed else 1,
        is_distributed=is_distributed,
        master_addr=env.get("MASTER_ADDR", ""),
        master_port=number("MASTER_PORT"),
        uses_agent_store=_is_true(env.get("TORCHELASTIC_USE_AGENT_STORE")),
        join_timeout_s=positive(JOIN_TIMEOUT_VARIABLE) or JOIN_TIMEOUT_S,
        attempt=number("TORCHELASTIC_RESTART_COUNT") or 0,
        has_agent=_has_agent(env),
        use_cpu=_is_true(env.get("ACCELERATE_USE_CPU")),
        threads=positive("OMP_NUM_THREADS"),
        strategy=env.get(STRATEGY_VARIABLE) or None,
        ranks=number(RANKS_VARIABLE),
        result_file=env.get(RESULT_VARIABLE) or None,
        accelerate_strategy=accelerate_strategy,
        layer_classes=tuple(filter(None, re.split(r"[,\s]+", env.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")))),
        reshard_after_forward=env.get("FSDP_RESHARD_AFTER_FORWARD", "true") != "false",
        cpu_offload=_is_true(env.get("FSDP_OFFLOAD_PARAMS"))
        or "cpu" in (env.get(_OFFLOAD_OPTIMIZER), env.get(_OFFLOAD_PARAMETERS)),
        shard_ranks=shard_ranks if is_hybrid else 0,
        accelerate_precision=env.get("ACCELERATE_MIXED_PRECISION") or None,
        # accelerate's one-process launcher sets a rendezvous address only when several processes were requested.
        lone_of_many="ACCELERATE_MIXED_PRECISION" in env and "MASTER_ADDR" in env and not is_distributed,
    )


def _check_ranks(
    env: Mapping[str, str], number: Callable[[str], int | None], positive: Callable[[str], int | None]
) -> None:
    """Raise UserError for variables of a launch that say too little, or what cannot be.

    One of several processes that takes itself for the only one would train alone, into the folder of all.
    """
    empty = [name for name in ("RANK", "WORLD_SIZE") if env.get(name) == ""]
    if empty:
        raise UserError(f"{empty[0]} is set to nothing: set a number, or for one process unset RANK and WORLD_SIZE")
    rank, world_size = number("RANK"), positive("WORLD_SIZE")
    if (rank or 0) > 0 and world_size is None:
        raise UserError(f"RANK={rank} is set, but no WORLD_SIZE: set both, or unset RANK for one process")
    if (world_size or 1) > 1 and rank is None:
        raise UserError(f"WORLD_SIZE={world_size} is set, but no RANK: set both, or unset WORLD_SIZE for one process")
    if not is_distributed_launch(env):
        return
    port, local_rank = number("MASTER_PORT"), number("LOCAL_RANK") or 0
    if port == 0:
        raise UserError(
            "MASTER_PORT=0 is not supported: all ranks must use the same port. "
            "Start torchrun with --standalone instead of --master_port 0."
        )
    if port is not None and not 0 < port <= MOST_PORT:
        raise UserError(f"MASTER_PORT={port} is no port: choose one from 1 to {MOST_PORT}, the same on all ranks")
    local_world_size = positive("LOCAL_WORLD_SIZE") or world_size or 1
    if local_rank < 0 or (local_rank >= local_world_size > 1):
        raise UserError(
            f"LOCAL_RANK={local_rank} and {local_world_size} ranks on this machine contradict each other: local ranks "
            f"count from 0"
        )


def _has_agent(env: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in env


def _check_accelerate(env: Mapping[str, str], *, num_replicas: int, shard_ranks: int, world_size: int) -> None:
    """Raise UserError for settings of accelerate's configuration that no strategy supports."""
    problems = []
    if _is_true(env.get("ACCELERATE_USE_FSDP")) and env.get("FSDP_VERSION") != "2":
        problems.append("FSDP version 1 (set fsdp_version: 2)")
    if env.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD") != "FULL_SHARD":
        problems.append(
            f"fsdp_sharding_strategy {env['FSDP_SHARDING_STRATEGY']} (FSDP2 uses fsdp_reshard_after_forward instead, "
            f"and parallelism_config_dp_replicate_size for replicas)"
        )
    if env.get("FSDP_AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP":
        problems.append("fsdp_auto_wrap_policy SIZE_BASED_WRAP (use TRANSFORMER_BASED_WRAP)")
    if env.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        problems.append(f"dynamo_backend {env['ACCELERATE_DYNAMO_BACKEND']} (use the recipe's --compile instead)")
    is_fsdp = _is_true(env.get("ACCELERATE_USE_FSDP"))
    if is_fsdp and num_replicas > 1 and (shard_ranks < 2 or num_replicas * shard_ranks != world_size):
        problems.append(
            f"{num_replicas} replicas x {shard_ranks} shards on {world_size} ranks "
            f"(parallelism_config_dp_replicate_size times parallelism_config_dp_shard_size must equal the number of "
            f"ranks, and both must be at least 2; for a full replica on each rank use distributed_type MULTI_GPU)"
        )
    if env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3" and env.get(_OFFLOAD_OPTIMIZER, "none") != env.get(
        _OFFLOAD_PARAMETERS, "none"
    ):
        problems.append("offloading only parameters or only optimizer state (ZeRO-3 offloads both or none)")
    if _is_true(env.get("FSDP_ACTIVATION_CHECKPOINTING")):
        problems.append("fsdp_activation_checkpointing (use the recipe's --gradient-checkpointing instead)")
    if env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        problems.append("deepspeed_config_file (set zero_stage and offload_*_device in accelerate's file instead)")
    if "nvme" in (env.get(_OFFLOAD_OPTIMIZER), env.get(_OFFLOAD_PARAMETERS)):
        problems.append("offload to nvme (use cpu or none)")
    if env.get("ACCELERATE_GRADIENT_CLIPPING", "none").lower() != "none":
        problems.append("gradient_clipping (use the recipe's --max-grad-norm instead)")
    if env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("1", "auto"):
        problems.append("gradient_accumulation_steps (it follows from --global-batch-size and --micro-batch-size)")
    for kind in ("TP", "CP", "SP"):
        if env.get(f"PARALLELISM_CONFIG_{kind}_SIZE", "1") != "1":
            problems.append(f"parallelism_config_{kind.lower()}_size (no strategy supports it)")
    if problems:
        raise UserError(f"not supported in accelerate's configuration: {'; '.join(problems)}")


def is_distributed_launch(environ: Mapping[str, str] | None = None) -> bool:
    """Return whether this process was started as part of a group."""
    env = os.environ if environ is None else environ
    return "RANK" in env and "WORLD_SIZE" in env


def is_main_process() -> bool:
    """Return whether this is rank 0 or not a distributed launch."""
    return not is_distributed_launch() or os.environ["RANK"] == "0"


def has_agent() -> bool:
    """Return whether a launcher such as torchrun watches the ranks of this launch."""
    return _has_agent(os.environ)


def report_checkpoint() -> None:
    """Tell `shardlaunch run` on this machine that there is a new checkpoint. One rank per machine."""
    if path := os.environ.get(PROGRESS_VARIABLE):
        with suppress(OSError), open(path, "ab") as file:  # the launcher may be gone
            file.write(b".")


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes", "y", "on")
