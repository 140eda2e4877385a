"""What launchers and clusters say about this process: torchrun's variables, Slurm's, MPI's, LSF's, Kubernetes'.

A launcher may run inside another, as torchrun in a Slurm step: the inner one decides. It starts at least one rank per
task of the outer one, so that fewer, or the same number in another order, is a contradiction, which is refused.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from shardlaunch.errors import UserError
from shardlaunch.sharding.launchers import (
    FAMILIES,
    Launch,
    by_family,
    by_kubernetes,
    by_slurm,
    by_variables,
    has_agent,
    number,
    slurm_task,
)

LAUNCHER_VARIABLE = "SHARDLAUNCH_LAUNCHER"
NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Found:
    """The launcher that counts, if any, and what is to be said about it."""

    launch: Launch | None = None
    warnings: tuple[str, ...] = ()


KEYS = ("variables", *(family.key for family in FAMILIES), "slurm", "kubernetes", NONE)
# What other libraries read to find out whether they are one of several processes.
RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    *(name for family in FAMILIES for name in (family.rank, family.size, *family.local_rank, *family.local_size)),
)


def find_launch(env: Mapping[str, str]) -> Found:
    """Return the launcher that started this process. Raises UserError if the variables contradict each other."""
    wanted = env.get(LAUNCHER_VARIABLE, "")
    if wanted and wanted not in KEYS:
        raise UserError(f"{LAUNCHER_VARIABLE}={wanted}: unknown launcher; choose one of {', '.join(KEYS)}")
    if wanted == NONE:
        return Found()
    in_slurm, warning = by_slurm(env)
    task = slurm_task(env)
    others = [found for found in (by_family(family, env) for family in FAMILIES) if found is not None]
    # srun --mpi=pmi2 sets Slurm's ranks a second time.
    others = [found for found in others if found.key not in ("pmi", "pals") or (found.rank, found.size) != task]
    outer = [found for found in (*others, in_slurm, by_kubernetes(env)) if found is not None]
    inner = by_variables(env)
    if wanted:
        candidates = [found for found in (inner, *outer) if found is not None and found.key == wanted]
        if not candidates:
            raise UserError(f"{LAUNCHER_VARIABLE}={wanted}: its variables are not set; unset {LAUNCHER_VARIABLE}")
        return Found(launch=_completed(candidates[0], candidates, env))
    if inner is None:
        _check_halves(env, outer[0] if outer else None, is_in_slurm=bool(warning))
    candidates = [found for found in (inner, *outer) if found is not None]
    if not candidates:
        _check_sizes(env)
        return Found(warnings=(warning,) if warning else ())
    if not has_agent(env):
        for other in candidates[1:]:
            _check_inside(candidates[0], other)
    return Found(launch=_completed(candidates[0], candidates, env))


def apparent_rank(env: Mapping[str, str]) -> int:
    """Return a rank even where variables contradict each other: the greatest, so that one process has 0."""
    names = ["RANK", *(family.rank for family in FAMILIES), *(["SLURM_PROCID"] if not has_agent(env) else [])]
    ranks = [0]
    for name in names:
        with suppress(UserError):
            ranks.append(number(env, name) or 0)
    return max(ranks) if env.get(LAUNCHER_VARIABLE) != NONE else 0


def _check_sizes(env: Mapping[str, str]) -> None:
    """Raise UserError for one of several processes that does not know of how many."""
    for family in FAMILIES:
        if number(env, family.rank) is not None and number(env, family.size) is None:
            raise UserError(
                f"{family.rank}={env[family.rank]} is set, but no {family.size}: set it to the number of ranks of "
                f"{family.launcher}, or {LAUNCHER_VARIABLE}={NONE} for one process"
            )


def _check_halves(env: Mapping[str, str], launch: Launch | None, *, is_in_slurm: bool) -> None:
    """Raise UserError if one of RANK and WORLD_SIZE is set, and does not say what the launcher does.

    One of several processes that takes itself for the only one would train alone, into the folder of all.
    """
    rank, size = number(env, "RANK"), number(env, "WORLD_SIZE")
    if launch is not None:
        said = (
            ("RANK", rank, launch.rank_variable, launch.rank),
            ("WORLD_SIZE", size, launch.size_variable, launch.size),
        )
        for name, value, other_name, other in said:
            if value is not None and value != other:
                raise UserError(_contradiction(f"{name}={value}", f"{other_name}={other} ({launch.launcher})", name))
        return
    hint = ", or in Slurm start the recipe with srun" if is_in_slurm else ""
    if (rank or 0) > 0 and size is None:
        raise UserError(f"RANK={rank} is set, but no WORLD_SIZE: set both{hint}, or unset RANK for one process")
    if (size or 1) > 1 and rank is None:
        raise UserError(f"WORLD_SIZE={size} is set, but no RANK: set both{hint}, or unset WORLD_SIZE for one process")


def _check_inside(inner: Launch, outer: Launch) -> None:
    """Raise UserError if `inner` cannot have been started by, or inside, the tasks of `outer`."""
    if outer.size == 1 or inner.size > outer.size or (inner.size == outer.size and inner.rank == outer.rank):
        return
    names = f"{inner.rank_variable} and {inner.size_variable}"
    raise UserError(_contradiction(inner.named_ranks, f"{outer.named_ranks} ({outer.launcher})", names))


def _contradiction(one: str, other: str, names: str) -> str:
    return (
        f"{one} and {other} contradict each other: unset {names}, or choose whom to follow by SHARDLAUNCH_LAUNCHER, "
        f"one of {', '.join(KEYS)}"
    )


def _completed(launch: Launch, candidates: list[Launch], env: Mapping[str, str]) -> Launch:
    """Return a launch with what other launchers say about the same ranks, and the address that is set."""
    for other in candidates:
        if (other.rank, other.size) == (launch.rank, launch.size):
            launch = replace(
                launch,
                local_rank=other.local_rank if launch.local_rank is None else launch.local_rank,
                local_size=other.local_size if launch.local_size is None else launch.local_size,
                host=launch.host or other.host,
                host_source=launch.host_source or other.host_source,
                port=other.port if launch.port is None else launch.port,
            )
    if env.get("MASTER_ADDR"):
        launch = replace(launch, host=env["MASTER_ADDR"], host_source="MASTER_ADDR")
    return replace(launch, port=port) if (port := number(env, "MASTER_PORT")) is not None else launch
