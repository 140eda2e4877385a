"""This launch: what the environment says to the command that follows."""

import re
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.commands.doctor.findings import Finding, note, ok, problem
from shardlaunch.sharding import environment
from shardlaunch.sharding.clusters import LAUNCHER_VARIABLE
from shardlaunch.sharding.environment import LaunchEnvironment, end_of_job, read_environment

OUR_VARIABLES = frozenset(
    {LAUNCHER_VARIABLE, *(value for name, value in vars(environment).items() if name.endswith("_VARIABLE"))}
)
_PREFIX = "SHARDLAUNCH_"
_OF_TESTS = "SHARDLAUNCH_DATA"
# Variables that change what a run does without a word of its own: the value that matters, and its meaning.
_TELLING = {
    "CUDA_LAUNCH_BLOCKING": ("1", "each GPU kernel is waited for, for debugging: steps are slow"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "each collective is checked on all ranks, for debugging: steps are slow"),
    "NCCL_P2P_DISABLE": ("1", "GPUs of one machine exchange data through host memory: slow, unless it is needed"),
    "NCCL_SHM_DISABLE": ("1", "GPUs of one machine exchange data through the network: slow, unless it is needed"),
    "NCCL_IB_DISABLE": ("1", "NCCL leaves InfiniBand aside and uses sockets: slow between machines that have it"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("0", "ranks wait for ever when NCCL has failed on another"),
    "PYTHONOPTIMIZE": ("", "Python leaves out `assert`, and with it checks of libraries"),
    "MKL_NUM_THREADS": ("", "it counts for matrix products instead of --threads-per-rank"),
    "OMP_PROC_BIND": ("TRUE", "threads are bound to cores, those of several ranks perhaps to the same ones"),
    "GOMP_CPU_AFFINITY": ("", "threads are bound to these cores, those of all ranks to the same ones"),
    "KMP_AFFINITY": ("", "threads are bound to cores, those of several ranks perhaps to the same ones"),
    "TRANSFORMERS_OFFLINE": ("1", "transformers downloads nothing"),
    "HF_DATASETS_OFFLINE": ("1", "datasets downloads nothing"),
    "HF_HOME": ("", "downloads, prepared data and accelerate's configuration are there"),
}


def check_environment(env: Mapping[str, str]) -> tuple[LaunchEnvironment | None, list[Finding]]:
    """Return what the launcher's variables say, None if they contradict each other, and the findings."""
    try:
        launch = read_environment(env)
    except UserError as error:
        advice = "a recipe stops with this message; only `shardlaunch run` sets the variables of ranks anew"
        return None, [problem(str(error), advice)]
    findings = [note(text) for text in launch.warnings]
    if launch.lone_of_many:
        findings.append(
            problem(
                "accelerate launch was asked for several processes and has started one: a recipe would be refused",
                "use `shardlaunch run RECIPE --ranks N`, or unset MASTER_ADDR for one process",
            )
        )
    elif launch.is_distributed:
        findings += _one_of_several(launch)
    else:
        findings.append(ok("no launcher around this process: `python RECIPE` is one rank, `shardlaunch run` several"))
        lone = [
            name for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name in env
        ]
        if lone:
            findings.append(
                note(
                    f"{', '.join(f'{name}={env[name]}' for name in lone)}: left over, and of no effect for one rank",
                    f"unset {' '.join(lone)}, which other programs may read",
                )
            )
    decided = {
        "the strategy": launch.accelerate_strategy,
        "the precision": launch.accelerate_precision not in (None, "no"),
    }
    if what := [thing for thing, is_set in decided.items() if is_set]:
        names = [name for name in env if name.startswith("ACCELERATE_") and name != "ACCELERATE_USE_CPU"]
        findings.append(
            note(
                f"{some(sorted(names))}: variables of accelerate launch decide {' and '.join(what)}",
                "" if launch.is_distributed else "unset them if they are left over from another launch",
            )
        )
    if launch.has_agent and launch.attempt:
        findings.append(note(f"the launcher has restarted its ranks {launch.attempt} times"))
    return launch, findings


def _one_of_several(launch: LaunchEnvironment) -> list[Finding]:
    if launch.world_size == 1:
        return [
            note(
                f"{launch.named_ranks}: a launch of one rank, or what one has left over",
                "" if launch.has_agent else "unset RANK and WORLD_SIZE if no launcher has set them",
            )
        ]
    if launch.has_agent or launch.is_found:
        by = launch.launcher if launch.is_found else "torchrun, accelerate launch or shardlaunch run"
        return [
            note(
                f"this process is one of {launch.world_size} ranks, started by {by}: {launch.describe()}. It only "
                f"checks: a rank cannot start ranks"
            )
        ]
    if not launch.master_addr or launch.master_port is None:
        return [
            problem(
                f"{launch.named_ranks} are set, but no address where the ranks meet: a recipe would be refused",
                "unset RANK and WORLD_SIZE for one process; for several, start all with `shardlaunch run` or torchrun",
            )
        ]
    return [
        note(
            f"{launch.describe()}, and no launcher watches: a recipe that is started here waits "
            f"{launch.join_timeout_s} s for the other {launch.world_size - 1}",
            "unset RANK and WORLD_SIZE if they are left over from another launch",
        )
    ]


def check_strategy(launch: LaunchEnvironment, *, ranks: int, strategy: str, num_gpus: int) -> list[Finding]:
    """Return what the strategy is, and whether the number of ranks suits it and the machine.

    `ranks` and `strategy` are those of the command that follows, or `option:NAME` for a recipe's own --strategy.
    """
    from shardlaunch.sharding.resolve import RANKS_VARIABLE, resolve_strategy

    findings = []
    will_be = launch if launch.is_distributed else replace(launch, world_size=ranks)
    own = strategy.removeprefix("option:")
    if own == strategy and strategy != "auto":
        will_be = replace(will_be, strategy=None)  # `shardlaunch run` sets it anew
    try:
        chosen = resolve_strategy(own, will_be)
    except UserError as error:
        findings.append(problem(str(error)))
    else:
        count = f"{will_be.world_size} rank{'s' if will_be.world_size > 1 else ''}"
        how = " (auto)" if strategy == "auto" and will_be.strategy is None else ""
        by_accelerate = ", from accelerate's configuration" if launch.accelerate_strategy == chosen else ""
        findings.append(ok(f"strategy {chosen}{how} on {count}{by_accelerate}"))
    if num_gpus and ranks > num_gpus and not launch.is_distributed:
        findings.append(
            problem(
                f"--ranks {ranks}: this machine has {num_gpus} GPUs, and a rank needs one",
                "start fewer, or set ACCELERATE_USE_CPU=true",
            )
        )
    if launch.is_distributed and launch.ranks not in (None, launch.world_size):
        findings.append(
            problem(
                f"{RANKS_VARIABLE}={launch.ranks}, but {launch.world_size} ranks run: a recipe would be refused",
                f"unset {RANKS_VARIABLE}",
            )
        )
    elif not launch.is_distributed and launch.ranks is not None:
        findings.append(
            note(
                f"{RANKS_VARIABLE}={launch.ranks} is left over: a recipe that another launcher starts on another "
                f"number of ranks is refused",
                f"unset {RANKS_VARIABLE}",
            )
        )
    return findings


def check_threads(launch: LaunchEnvironment, *, ranks: int, num_cores: int, num_gpus: int) -> list[Finding]:
    """Return how many threads a rank has."""
    per_rank = max(1, num_cores // ranks)
    if launch.threads is None or launch.threads == 1:
        is_one = "OMP_NUM_THREADS=1 counts as unset: " if launch.threads else ""
        return [ok(f"{is_one}{per_rank} thread{'s' if per_rank > 1 else ''} per rank, the cores divided by {ranks}")]
    total = launch.threads * ranks
    if total <= num_cores:
        return [ok(f"{launch.threads} threads per rank (OMP_NUM_THREADS)")]
    where = "`shardlaunch run` divides the cores instead; under other launchers " if not num_gpus else ""
    return [
        note(
            f"OMP_NUM_THREADS={launch.threads}: {where}{ranks} ranks have {total} threads on {num_cores} cores, "
            f"which wait for each other",
            f"unset it, or set OMP_NUM_THREADS={per_rank}",
        )
    ]


def check_gpu_variables(env: Mapping[str, str], *, num_gpus: int, use_cpu: bool) -> list[Finding]:
    """Return what CUDA_VISIBLE_DEVICES and ACCELERATE_USE_CPU do to the GPUs. `num_gpus` are those torch sees."""
    findings = []
    text = env.get("CUDA_VISIBLE_DEVICES")
    if text is not None:
        names = [name.strip() for name in text.split(",")]
        if names in ([""], ["-1"]):
            findings.append(
                note(f"CUDA_VISIBLE_DEVICES={text}: hides all GPUs from this command", "unset it to use them")
            )
        elif len(set(names)) < len(names):
            findings.append(
                problem(
                    f"CUDA_VISIBLE_DEVICES={text}: names a GPU twice, and then CUDA finds none", "name each one once"
                )
            )
        elif len(names) > num_gpus:
            findings.append(
                problem(
                    f"CUDA_VISIBLE_DEVICES={text}: names {len(names)} GPUs, of which torch sees {num_gpus}: those "
                    f"behind one that does not exist are hidden too",
                    "name GPUs that nvidia-smi -L lists, or unset it",
                )
            )
    if num_gpus and use_cpu:
        findings.append(
            note(
                f"ACCELERATE_USE_CPU={env['ACCELERATE_USE_CPU']}: the {num_gpus} GPUs are not used",
                "unset it to use them",
            )
        )
    if num_gpus and not use_cpu and env.get("DS_ACCELERATOR", "cuda") != "cuda":
        findings.append(
            problem(
                f"DS_ACCELERATOR={env['DS_ACCELERATOR']}: DeepSpeed would use another device than the ranks, which use "
                f"GPUs",
                "unset it",
            )
        )
    return findings


def check_variables(env: Mapping[str, str]) -> list[Finding]:
    """Return what other variables change, and names that look like ours and are not."""
    findings = []
    for name, (value, means) in _TELLING.items():
        if env.get(name) and (not value or env[name].upper() == value):
            findings.append(note(f"{name}={env[name]}: {means}"))
    for name in sorted(env):
        if name.startswith(_PREFIX) and name not in OUR_VARIABLES and name != _OF_TESTS:
            ours = {known.removeprefix(_PREFIX): known for known in OUR_VARIABLES}
            near = get_close_matches(name.removeprefix(_PREFIX), ours, n=1)
            findings.append(
                problem(
                    f"{name}={env[name]}: there is no such variable, so it has no effect",
                    f"did you mean {ours[near[0]]}?"
                    if near
                    else f"unset it; there are {', '.join(sorted(OUR_VARIABLES))}",
                )
            )
    ends_at, text = end_of_job(env)
    if text:
        findings.append(note(text))
    if ends_at is not None:
        findings.append(ok(f"the job ends in {(ends_at - time.time()) / 60:.0f} min; a run saves and stops before"))
    return findings


def check_precision(option: str, launch: LaunchEnvironment) -> list[Finding]:
    """Return which precision a recipe with this --precision would train in."""
    from shardlaunch.sharding.precision import resolve_precision

    try:
        precision = resolve_precision(option, launch.accelerate_precision)
    except UserError as error:
        return [problem(str(error))]
    return [] if precision == "fp32" else [ok(f"precision {precision}")]


def check_signals(is_hangup_ignored: bool) -> list[Finding]:
    """Return whether a run would go on after its terminal is closed."""
    if not is_hangup_ignored:
        return []
    return [
        note(
            "SIGHUP: ignored in this shell, and so in a run, which goes on after its terminal is closed",
            "start without nohup, or `trap ''`, if a run is to stop for it",
        )
    ]


def ignores_hangup(status: str) -> bool:
    """Return whether a process ignores SIGHUP, from the text of its /proc/PID/status."""
    found = re.search(r"^SigIgn:\s*([0-9a-f]+)", status, re.M)
    return found is not None and bool(int(found[1], 16) >> (signal.SIGHUP - 1) & 1)
