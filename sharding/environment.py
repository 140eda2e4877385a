"""The launch environment. No other module reads the variables that launchers set."""

import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from shardlaunch.errors import UserError
from shardlaunch.sharding import clusters, launchers

STRATEGY_VARIABLE = "SHARDLAUNCH_STRATEGY"
RANKS_VARIABLE = "SHARDLAUNCH_RANKS"
RESULT_VARIABLE = "SHARDLAUNCH_RESULT_FILE"
PROGRESS_VARIABLE = "SHARDLAUNCH_PROGRESS_FILE"
JOIN_TIMEOUT_VARIABLE = "SHARDLAUNCH_JOIN_TIMEOUT_S"
JOIN_TIMEOUT_S = 600
JOB_END_VARIABLE = "SLURM_JOB_END_TIME"
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
    launcher: str = "no launcher"  # who started this process, in words
    named_ranks: str = ""  # the variables that say which rank this is
    is_found: bool = False  # by variables that others than torchrun set, so that it is said
    address_source: str = ""  # what the address is taken or derived from
    local_is_known: bool = True  # the local rank is what the launcher says, and no guess
    knows_neighbours: bool = True  # so are the ranks of this machine: torch's agent numbers them in one range
    warnings: tuple[str, ...] = ()  # of a process that may be meant to be one of several
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

    def describe(self) -> str:
        """Describe which rank this is, and what says so."""
        address = f"{self.master_addr}:{self.master_port}"
        source = f" ({self.address_source})" if self.address_source not in ("", "MASTER_ADDR") else ""
        return f"{self.named_ranks}; the ranks meet at {address}{source}"


def read_environment(environ: Mapping[str, str] | None = None) -> LaunchEnvironment:
    """Read the environment of this process. Raises UserError for invalid or unsupported values."""
    env = os.environ if environ is None else environ

    def number(name: str) -> int | None:
        return launchers.number(env, name)

    def positive(name: str) -> int | None:
        found = number(name)
        if found is not None and found < 1:
            raise UserError(f"environment variable {name}={found} must be at least 1; change or unset it")
        return found

    found = clusters.find_launch(env)
    launch = found.launch
    is_distributed = _is_distributed(launch)
    _check_ranks(launch if is_distributed else None, positive("LOCAL_WORLD_SIZE"))
    world_size = launch.size if launch is not None else 1
    num_replicas = number("PARALLELISM_CONFIG_DP_REPLICATE_SIZE") or 1
    shard_ranks = number("PARALLELISM_CONFIG_DP_SHARD_SIZE") or 1
    _check_accelerate(env, num_replicas=num_replicas, shard_ranks=shard_ranks, world_size=world_size)
    is_hybrid = num_replicas > 1
    accelerate_strategy = None
    if _is_true(env.get("ACCELERATE_USE_DEEPSPEED")):
        accelerate_strategy = f"zero{env.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '')}"
    elif _is_true(env.get("ACCELERATE_USE_FSDP")):
        accelerate_strategy = "hsdp" if is_hybrid else "fsdp2"
    return LaunchEnvironment(
        **_placed(launch if is_distributed else None, env),
        launcher=launch.launcher if launch is not None else "no launcher",
        warnings=found.warnings,
        uses_agent_store=_is_true(env.get("TORCHELASTIC_USE_AGENT_STORE")),
        join_timeout_s=positive(JOIN_TIMEOUT_VARIABLE) or JOIN_TIMEOUT_S,
        attempt=number("TORCHELASTIC_RESTART_COUNT") or 0,
        has_agent=launchers.has_agent(env),
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


def _is_distributed(launch: launchers.Launch | None) -> bool:
    return launch is not None and (launch.size > 1 or launch.key == "variables")


def _placed(launch: launchers.Launch | None, env: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of LaunchEnvironment that say where among the ranks this process is."""
    if launch is None:
        return {"master_addr": env.get("MASTER_ADDR", ""), "master_port": launchers.number(env, "MASTER_PORT")}
    return {
        "rank": launch.rank,
        "world_size": launch.size,
        "local_rank": launch.local_rank or 0,
        "local_world_size": launch.local_size or launch.size,
        "is_distributed": True,
        "named_ranks": launch.named_ranks,
        "is_found": launch.key != "variables",
        "address_source": launch.host_source,
        "local_is_known": launch.local_rank is not None,
        "knows_neighbours": launch.size == 1 or launchers.has_agent(env),
        "master_addr": launch.host,
        "master_port": launch.port,
    }


def _check_ranks(launch: launchers.Launch | None, local_world_size: int | None) -> None:
    """Raise UserError for variables of a launch that say what cannot be."""
    if launch is None:
        return
    if not 0 <= launch.rank < launch.size:
        raise UserError(
            f"{launch.named_ranks} contradict each other: ranks count from 0 to {launch.size_variable} - 1. "
            f"For one process, unset both."
        )
    port, local_rank = launch.port, launch.local_rank or 0
    if port == 0:
        raise UserError(
            "MASTER_PORT=0 is not supported: all ranks must use the same port. "
            "Start torchrun with --standalone instead of --master_port 0."
        )
    if port is not None and not 0 < port <= MOST_PORT:
        raise UserError(f"MASTER_PORT={port} is no port: choose one from 1 to {MOST_PORT}, the same on all ranks")
    most = launch.local_size or launch.size
    if local_rank < 0 or (local_rank >= most > 1):
        raise UserError(
            f"LOCAL_RANK={local_rank} and {most} ranks on this machine contradict each other: local ranks count from 0"
        )


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
    """Return whether this process was started as part of a group. Raises UserError for contradictory variables."""
    return _is_distributed(clusters.find_launch(os.environ if environ is None else environ).launch)


def is_main_process() -> bool:
    """Return whether this is rank 0 or not a distributed launch."""
    try:
        launch = clusters.find_launch(os.environ).launch
    except UserError:  # which is to be printed, by one process
        return clusters.apparent_rank(os.environ) == 0
    return launch is None or launch.rank == 0


def one_of_several_launchers(environ: Mapping[str, str] | None = None) -> str:
    """Return a warning if a cluster has started this launcher several times, for runs of their own, or nothing."""
    env = os.environ if environ is None else environ
    try:
        launch = clusters.find_launch({name: env[name] for name in env if name not in ("RANK", "WORLD_SIZE")}).launch
    except UserError:  # of what this launcher sets anew
        return ""
    if launch is None or launch.size == 1:
        return ""
    return (
        f"{launch.launcher} has started this launcher {launch.size} times, each for a run of its own. For one run, use "
        f"`python RECIPE` instead, or one launcher per machine with --hosts and --rendezvous"
    )


def has_agent() -> bool:
    """Return whether a launcher such as torchrun watches the ranks of this launch."""
    return launchers.has_agent(os.environ)


def tell_libraries(env: LaunchEnvironment, *, local_rank: int, local_size: int) -> None:
    """Set the variables from which accelerate and DeepSpeed read the ranks; for one process, remove them.

    `local_rank` is the number of the GPU, too.
    """
    ranks = {
        "RANK": env.rank,
        "WORLD_SIZE": env.world_size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_size,
    }
    if not env.is_distributed:
        for name in clusters.RANK_VARIABLES:
            os.environ.pop(name, None)
    else:
        os.environ.update({name: str(value) for name, value in ranks.items()})
        if env.master_addr and env.master_port is not None:
            os.environ.update({"MASTER_ADDR": env.master_addr, "MASTER_PORT": str(env.master_port)})


def end_of_job(environ: Mapping[str, str] | None = None) -> tuple[float | None, str]:
    """Return when the cluster ends this job, in seconds as of time.time(), and why what is set is of no use."""
    text = (os.environ if environ is None else environ).get(JOB_END_VARIABLE, "")
    if not text:
        return None, ""
    if not text.isdecimal():
        return None, f"{JOB_END_VARIABLE}={text} is not a time in seconds, and is ignored"
    if int(text) <= time.time():
        return None, f"{JOB_END_VARIABLE}={text} is in the past, as of a job that has ended, and is ignored"
    return float(text), ""


def report_checkpoint() -> None:
    """Tell `shardlaunch run` on this machine that there is a new checkpoint. One rank per machine."""
    if path := os.environ.get(PROGRESS_VARIABLE):
        with suppress(OSError), open(path, "ab") as file:  # the launcher may be gone
            file.write(b".")


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes", "y", "on")
