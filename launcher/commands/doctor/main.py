"""All checks in order, and their report."""

import contextlib
import errno
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardlaunch.checkpoints.files import error_text
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.ckpt.output import print_json
from shardlaunch.launcher.commands.doctor import accelerate_file, devices, disk, launch, network, versions
from shardlaunch.launcher.commands.doctor.findings import (
    Finding,
    Section,
    document,
    num_problems,
    print_section,
    problem,
)
from shardlaunch.sharding.environment import LaunchEnvironment, has_agent, is_main_process

if TYPE_CHECKING:
    from shardlaunch.launcher.commands.doctor.recipe import Command

EXIT_PROBLEM = 1
_ROOT = Path("/")


@dataclass(kw_only=True)
class _Asked:
    """What is to be checked."""

    path: Path | None
    argv: Sequence[str]
    ranks: int
    strategy: str
    measured: bool
    network: bool
    env: dict[str, str]
    launch: LaunchEnvironment | None = None
    num_gpus: int = 0
    command: "Command | None" = None
    num_parameters: int = 0

    @property
    def known(self) -> LaunchEnvironment:
        """Return the launch, or one of one process where the environment contradicts itself."""
        return self.launch or LaunchEnvironment()

    @property
    def is_sharded(self) -> bool:
        """Return whether ranks share the state of the model."""
        from shardlaunch.sharding.resolve import STRATEGIES

        options = self.command.options if self.command is not None else None
        names = (options.strategy if options is not None else "auto", self.strategy, self.known.strategy)
        name = next((name for name in names if name and name != "auto"), self.known.accelerate_strategy)
        return name in STRATEGIES and STRATEGIES[name].is_sharded

    @property
    def num_machines(self) -> int:
        return -(-self.known.world_size // max(1, self.known.local_world_size))


def examine(
    path: Path | None,
    argv: Sequence[str],
    *,
    ranks: int,
    strategy: str,
    measured: bool,
    network: bool,
    as_json: bool,
) -> int:
    """Print what is found for a command, and return 1 if it has a problem. Raises UserError for options of none."""
    from shardlaunch.sharding.resolve import check_strategy_name

    if ranks < 0:
        raise UserError(f"--ranks {ranks}: must be at least 1, or 0 for one per GPU")
    if strategy != "auto":
        check_strategy_name(strategy, f"--strategy {strategy}")
    env = dict(os.environ)
    if not network:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when its library is imported
    asked = _Asked(path=path, argv=argv, ranks=ranks, strategy=strategy, measured=measured, network=network, env=env)
    asked.launch, of_environment = launch.check_environment(env)
    # Another rank of this machine says it; but a leftover RANK, of no launch, is one of the things to find.
    if (asked.launch is None and has_agent() and not is_main_process()) or asked.known.local_rank:
        return 0
    sections = []
    for section in _sections(asked, of_environment):
        sections.append(section)
        if not as_json:
            print_section(section)
    count = num_problems(sections)
    if as_json:
        print_json(document(sections))
    else:
        print(f"\n{count} problem{'s' if count != 1 else ''} found" if count else "\nno problem found")
    return EXIT_PROBLEM if count else 0


def _sections(asked: _Asked, of_environment: list[Finding]) -> Iterator[Section]:
    gpus, torch_cuda = devices.gpus_of_torch()
    asked.num_gpus = 0 if asked.known.use_cpu else len(gpus)
    if asked.known.is_distributed:
        asked.ranks = asked.known.local_world_size
    else:
        from shardlaunch.sharding.resolve import STRATEGIES

        is_alone = asked.strategy != "auto" and STRATEGIES[asked.strategy].for_one_process
        asked.ranks = asked.ranks or (1 if is_alone else asked.num_gpus or 2)
    yield _section("this launch", lambda: (_this_launch(asked, of_environment, num_seen=len(gpus)), {}))
    yield _section("devices", lambda: (_devices(asked, gpus, torch_cuda), {}))
    yield _section("network", lambda: (_network(asked), {}))
    yield _section("disk", lambda: _disk(asked))
    yield _section("versions", lambda: (versions.check_versions(), {}))
    traps = _section("traps", lambda: (_traps(asked), {}))
    if traps.findings:
        yield traps
    if asked.measured and asked.ranks > 1 and asked.launch is not None and not asked.known.is_distributed:
        from shardlaunch.launcher.commands.doctor.collectives import check_collectives

        yield _section(
            "between ranks",
            lambda: check_collectives(
                ranks=asked.ranks, use_cuda=bool(asked.num_gpus), num_parameters=asked.num_parameters
            ),
        )


def _section(name: str, check: Callable[[], tuple[list[Finding], dict[str, Any]]]) -> Section:
    """Return what a check finds, or that it cannot be made."""
    try:
        findings, figures = check()
    except OSError as error:
        advice = "raise the limit of open files: ulimit -n 1024" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
        findings, figures = [problem(f"this cannot be checked: {error_text(error)}", advice)], {}
    return Section(name=name, findings=findings, figures=figures)


def _this_launch(asked: _Asked, of_environment: list[Finding], *, num_seen: int) -> list[Finding]:
    findings = list(of_environment)
    strategy = asked.strategy
    if asked.path is not None:
        asked.command, more = _load(asked.path, asked.argv)
        findings += more
        if asked.command is not None:
            from shardlaunch.launcher.commands.doctor.recipe import count_parameters

            with contextlib.redirect_stdout(sys.stderr):
                asked.num_parameters, more = count_parameters(asked.command)
            findings += more
            option = asked.command.options.strategy
            if option != "auto":
                if strategy not in ("auto", option):
                    raise UserError(
                        f"two strategies were requested: --strategy {strategy} and, of the recipe, {option}"
                    )
                strategy = f"option:{option}"
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked.launch is not None:
        findings += launch.check_strategy(asked.launch, ranks=asked.ranks, strategy=strategy, num_gpus=asked.num_gpus)
        precision = asked.command.options.precision if asked.command is not None else "auto"
        findings += launch.check_precision(precision, asked.launch)
        findings += launch.check_threads(asked.launch, ranks=asked.ranks, num_cores=num_cores, num_gpus=asked.num_gpus)
        findings += launch.check_gpu_variables(asked.env, num_gpus=num_seen, use_cpu=asked.launch.use_cpu)
    findings += launch.check_variables(asked.env)
    return findings


def _load(path: Path, argv: Sequence[str]) -> "tuple[Command | None, list[Finding]]":
    from shardlaunch.launcher.commands.doctor.recipe import load_command

    with contextlib.redirect_stdout(sys.stderr):  # what the file prints is no part of the report
        return load_command(path, argv)


def _devices(asked: _Asked, gpus: Sequence[devices.Gpu], torch_cuda: str | None) -> list[Finding]:
    import psutil

    from shardlaunch.sharding.world import available_cores

    options = asked.command.options if asked.command is not None else None
    num_workers = options.num_workers if options is not None else None
    memory = psutil.virtual_memory()
    needed = 0
    if asked.num_parameters and not asked.num_gpus:
        from shardlaunch.launcher.commands.doctor.recipe import BYTES_TRAINING

        needed = BYTES_TRAINING * asked.num_parameters // (asked.ranks if asked.is_sharded else 1)
    return [
        *devices.check_cores(_ROOT, num_affine=available_cores(), num_all=os.cpu_count() or 1, ranks=asked.ranks),
        *devices.check_memory(
            _ROOT,
            available_bytes=memory.available,
            total_bytes=memory.total,
            ranks=asked.ranks,
            needed_per_rank=needed,
        ),
        *devices.check_shared_memory(devices.shared_memory_bytes(), num_workers=num_workers),
        *devices.check_descriptors(
            resource.getrlimit(resource.RLIMIT_NOFILE)[0], ranks=asked.ranks, num_workers=num_workers or 0
        ),
        *devices.check_tasks(_ROOT, ranks=asked.ranks, num_cores=available_cores()),
        *devices.check_limits({name: resource.getrlimit(getattr(resource, name))[0] for name in devices.LIMITS}),
        *devices.check_gpus(gpus, devices.rows_of_smi(), torch_cuda=torch_cuda),
    ]


def _network(asked: _Asked) -> list[Finding]:
    interfaces, env = network.interfaces_here(), asked.env
    return [
        *network.check_loopback(),
        *network.check_meeting_point(env, interfaces, network.addresses_of_host(), num_machines=asked.num_machines),
        *network.check_named_interfaces(env, interfaces, num_machines=asked.num_machines),
        *network.check_address(asked.known, num_machines=asked.num_machines),
        *network.check_proxies(env),
        *network.check_hub(env, network=asked.network),
    ]


def _disk(asked: _Asked) -> tuple[list[Finding], dict[str, float]]:
    from shardlaunch.launcher.runs.folder import run_folder

    mounts = disk.mounts_of(_text(Path("/proc/self/mountinfo")))
    output_dir = Path("outputs")
    if asked.command is not None:
        output_dir = run_folder(asked.command.options, asked.command.name)
    findings = [
        *disk.check_folder("runs in", output_dir, mounts, num_machines=asked.num_machines),
        *(finding for cache in _caches(asked.env) for finding in disk.check_folder("caches in", cache, mounts)),
        *disk.check_temp(tempfile.gettempdir(), asked.env.get("TMPDIR", ""), mounts),
    ]
    if asked.command is not None:
        findings += disk.check_use(output_dir)
        from shardlaunch.launcher.commands.doctor.recipe import BYTES_SAVED

        num_bytes = disk.size_of_newest(output_dir) or BYTES_SAVED * asked.num_parameters
        if num_bytes:
            keep, save_on_best = asked.command.options.keep, asked.command.options.save_on_best
            findings += disk.check_room(output_dir, num_bytes=num_bytes, keep=keep, save_on_best=save_on_best)
    if not asked.measured:
        return findings, {}
    written, figures = disk.check_writing(output_dir)
    return [*findings, *written], figures


def _caches(env: dict[str, str]) -> list[Path]:
    """Return the folders of downloads and prepared data."""
    home = accelerate_file.default_file(env).parents[1]
    others = [env[name] for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE") if env.get(name)]
    return list(dict.fromkeys([home, *(Path(other).expanduser() for other in others)]))


def _traps(asked: _Asked) -> list[Finding]:
    findings = launch.check_signals(launch.ignores_hangup(_text(Path("/proc/self/status"))))
    findings += accelerate_file.check_default_file(accelerate_file.default_file(asked.env), num_gpus=asked.num_gpus)
    if asked.path is not None:
        from shardlaunch.launcher.commands.doctor.recipe import check_shadows

        findings += check_shadows(asked.path, sys.path)
    if asked.command is not None:
        options = asked.command.options
        chosen = options.strategy if options.strategy != "auto" else asked.strategy
        if options.compile or (chosen.startswith("zero") and options.cpu_offload):
            findings += versions.check_compiler("--compile" if options.compile else "--cpu-offload of ZeRO")
    return findings


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
