"""Devices: cores, memory, shared memory, descriptors and GPUs that ranks of this machine may use."""

import os
import resource
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardlaunch.launcher.commands.ckpt.output import size
from shardlaunch.launcher.commands.doctor.findings import Finding, note, ok, problem

DOCKER_SHM_BYTES = 64 * 2**20
BASE_DESCRIPTORS = 10  # libraries, logs, metrics and checkpoint files of a rank
_PER_WORKER = 6  # pipes of a loading worker, with those for its end
FEW_TASKS = 40  # threads of a rank besides those for its cores: gloo, loading, writing
# Limits of a shell: the letter of ulimit's option, and what happens at the limit.
LIMITS = {
    "RLIMIT_AS": ("v", "a rank that maps more memory fails, and torch maps much that it does not use"),
    "RLIMIT_FSIZE": ("f", "a checkpoint or log that is larger cannot be written"),
    "RLIMIT_CPU": ("t", "a rank is killed after so much time of its cores"),
}
_NO_LIMIT = 2**60  # cgroups say "none" by a number near 2**63
_MEMORY_LIMITS = ("memory.max", "memory.limit_in_bytes")
_SMI_FIELDS = ("name", "driver_version", "compute_mode", "ecc.errors.uncorrected.volatile.total")


def check_cores(root: Path, *, num_affine: int, num_all: int, ranks: int) -> list[Finding]:
    """Return how many cores ranks may use, by affinity and by the control group's quota. `root` is /."""
    quota = cpu_quota(root)
    groups = root / "sys/fs/cgroup"
    if _text(root / "proc/self/cgroup") and not (groups.is_dir() and any(groups.iterdir())):
        return [
            note(
                "/sys/fs/cgroup is hidden: limits of cores and memory are not known, and Slurm's daemon fails",
                "inside `ip netns exec`, use `nsenter --net=/run/netns/NAME` instead",
            )
        ]
    if quota is not None and quota < num_affine:
        share = max(1, int(quota) // ranks)
        return [
            problem(
                f"the control group of this container or job allows the time of {quota:g} cores, while {num_affine} "
                f"are visible: {num_affine} threads are paused again and again",
                f"set --threads-per-rank {share} (or OMP_NUM_THREADS={share}), or ask for whole cores",
            )
        ]
    if ranks > num_affine:
        return [
            note(
                f"{ranks} ranks share {num_affine} core{'s' if num_affine > 1 else ''}: none is faster than one alone",
                "start fewer ranks, unless this is a test",
            )
        ]
    if num_affine < num_all:
        return [note(f"this process may use {num_affine} of {num_all} cores (affinity, as of taskset, MPI or Slurm)")]
    return [ok(f"{num_affine} cores for {ranks} rank{'s' if ranks > 1 else ''}")]


def check_memory(
    root: Path, *, available_bytes: int, total_bytes: int, ranks: int, needed_per_rank: int
) -> list[Finding]:
    """Return how much memory there is, and whether the state of a model fits. `needed_per_rank` is 0 if unknown."""
    limit = memory_limit(root)
    free, whose = available_bytes, "free"
    if limit is not None and limit < total_bytes:
        free, whose = min(free, limit), "allowed by the control group"
    needed = ranks * needed_per_rank
    if needed and needed > free:
        return [
            problem(
                f"{size(free)} of memory are {whose}; {ranks} ranks need at least {size(needed)} for weights, "
                f"gradients and optimizer state",
                "start fewer ranks, or shard them: --strategy fsdp2",
            )
        ]
    for_state = f"; the state of {ranks} ranks takes at least {size(needed)}" if needed else ""
    text = f"{size(free)} of memory {whose}, of {size(total_bytes)}{for_state}"
    return [ok(text)]


def check_shared_memory(total_bytes: int | None, *, num_workers: int | None) -> list[Finding]:
    """Return whether loading workers can pass batches. `total_bytes` of /dev/shm, None if there is none."""
    advice = "start the container with --shm-size 8g (docker) or --ipc host, or use --num-workers 0"
    uses = num_workers is None or num_workers > 0
    level = problem if num_workers else note
    if total_bytes is None:
        return [level("no /dev/shm: loading workers (--num-workers) cannot pass batches", advice)] if uses else []
    if total_bytes <= DOCKER_SHM_BYTES and uses:
        return [
            level(
                f"/dev/shm has {size(total_bytes)}, docker's default: loading workers (--num-workers) die with a bus "
                f"error when their batches are larger",
                advice,
            )
        ]
    return [ok(f"/dev/shm has {size(total_bytes)} for the batches of loading workers")]


def check_descriptors(limit: int, *, ranks: int, num_workers: int) -> list[Finding]:
    """Return whether a rank may open as many files and sockets as it needs."""
    needed = BASE_DESCRIPTORS + 12 + 2 * ranks + _PER_WORKER * num_workers
    if limit == resource.RLIM_INFINITY or limit >= 4 * needed:
        return []
    text = f"{limit} open files are allowed per process; one of {ranks} ranks needs about {needed}"
    advice = f"ulimit -n {max(1024, 4 * needed)} in the shell that starts the run"
    return [problem(text, advice)] if limit < needed else [note(f"{text}, and more for data in many files", advice)]


def check_limits(limits: Mapping[str, int]) -> list[Finding]:
    """Return which limits of this shell a run meets sooner or later. `limits`: values by the names in `LIMITS`."""
    findings = []
    for name, (option, means) in LIMITS.items():
        if limits[name] != resource.RLIM_INFINITY:
            text = f"{limits[name]} s" if name == "RLIMIT_CPU" else size(limits[name])
            findings.append(
                note(f"ulimit -{option} is {text}: {means}", f"ulimit -{option} unlimited, if it is not meant")
            )
    return findings


def check_tasks(root: Path, *, ranks: int, num_cores: int) -> list[Finding]:
    """Return whether the control group allows as many threads as ranks start."""
    path = _limit_file(root, "pids", ("pids.max",))
    text = path.read_text().strip() if path is not None else "max"
    needed = ranks * FEW_TASKS + num_cores
    if not text.isdecimal() or int(text) >= needed:
        return []
    return [
        problem(
            f"the control group allows {text} threads in all; {ranks} ranks start about {needed}",
            "raise the limit (docker: --pids-limit), or start fewer ranks",
        )
    ]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as torch sees it."""

    name: str
    free_bytes: int
    total_bytes: int


def check_gpus(gpus: Sequence[Gpu], smi: Sequence[Sequence[str]], *, torch_cuda: str | None) -> list[Finding]:
    """Return what the GPUs are, from torch and from rows of nvidia-smi (`_SMI_FIELDS`), empty without it.

    `torch_cuda` is the CUDA version that torch was built for, None for a CPU build.
    """
    if smi and not gpus:
        if torch_cuda is None:
            why, advice = "this torch is a build for the CPU", "install a build of torch for CUDA"
        else:
            why = f"torch is built for CUDA {torch_cuda}, which driver {smi[0][1]} may be too old for"
            advice = "update the driver, or install torch for an older CUDA; see also CUDA_VISIBLE_DEVICES"
        return [problem(f"{len(smi)} GPUs ({smi[0][0]}), and torch uses none: {why}", advice)]
    if not gpus:
        build = f"; torch is built for CUDA {torch_cuda}, which works here too" if torch_cuda else ""
        return [ok(f"no GPU: ranks use the CPU{build}")]
    findings = [
        ok(f"{len(gpus)} x {gpus[0].name}, {size(gpus[0].total_bytes)} each; torch is built for CUDA {torch_cuda}")
    ]
    if len({gpu.name for gpu in gpus}) > 1:
        names = ", ".join(sorted({gpu.name for gpu in gpus}))
        findings.append(note(f"the GPUs differ ({names}): the slowest sets the pace of all ranks"))
    for index, gpu in enumerate(gpus):
        if gpu.free_bytes < 0.9 * gpu.total_bytes:
            findings.append(
                note(
                    f"GPU {index}: another process uses {size(gpu.total_bytes - gpu.free_bytes)} of its memory",
                    "see nvidia-smi, or choose others with CUDA_VISIBLE_DEVICES",
                )
            )
    for index, (_, _, mode, errors) in enumerate(smi):
        if mode == "Prohibited":
            findings.append(
                problem(f"GPU {index}: its compute mode is Prohibited", f"nvidia-smi -i {index} -c DEFAULT")
            )
        if errors.isdecimal() and int(errors):
            findings.append(
                problem(f"GPU {index}: {errors} memory errors that could not be corrected", "reset or replace it")
            )
    return findings


def gpus_of_torch() -> tuple[list[Gpu], str | None]:
    """Return the GPUs that torch sees, and the version of CUDA that it was built for."""
    import torch

    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        gpus.append(Gpu(name=name, free_bytes=free_bytes, total_bytes=total_bytes))
    return gpus, torch.version.cuda


def rows_of_smi() -> list[list[str]]:
    """Return what nvidia-smi says of each GPU, nothing where there is none or it does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    words = [command, f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader"]
    try:
        ended = subprocess.run(words, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in ended.stdout.splitlines()]
    return [row for row in rows if len(row) == len(_SMI_FIELDS)] if ended.returncode == 0 else []


def cpu_quota(root: Path) -> float | None:
    """Return the cores whose time the control group of this process allows, None without a limit."""
    quotas = []
    for folder in _groups(root, "cpu"):
        text = _text(folder / "cpu.max").split()
        if len(text) != 2:
            text = [_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")]
        if all(part.isdecimal() for part in text) and int(text[1]):
            quotas.append(int(text[0]) / int(text[1]))
    return min(quotas, default=None)


def memory_limit(root: Path) -> int | None:
    """Return the memory in bytes that the control group of this process allows, None without a limit."""
    texts = [_text(folder / name) for folder in _groups(root, "memory") for name in _MEMORY_LIMITS]
    return min((int(text) for text in texts if text.isdecimal() and int(text) < _NO_LIMIT), default=None)


def _limit_file(root: Path, controller: str, names: Sequence[str]) -> Path | None:
    paths = [folder / name for folder in _groups(root, controller) for name in names]
    return next((path for path in paths if path.is_file()), None)


def _groups(root: Path, controller: str) -> list[Path]:
    """Return the folders of this process's control group and those above it, in version 2 and version 1.

    Inside a container the path that /proc names may not exist, and its root is the group of the container.
    """
    folders = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controller if controllers else "")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        folders += [top.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]
    return folders


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def shared_memory_bytes(path: str = "/dev/shm") -> int | None:
    """Return the size of the file system for shared memory, None if there is none."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize
