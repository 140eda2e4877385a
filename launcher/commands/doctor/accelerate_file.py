"""What accelerate's default configuration file does to a plain `accelerate launch RECIPE`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardlaunch.launcher.commands.doctor.findings import Finding, note, ok, problem

# Settings of the file that a recipe refuses when `accelerate launch` passes them on, and the value that is fine.
_REFUSED = {
    "gradient_clipping": ("none", "use the recipe's --max-grad-norm"),
    "gradient_accumulation_steps": ("1", "it follows from --global-batch-size and --micro-batch-size"),
    "deepspeed_config_file": ("", "set zero_stage and offload_*_device in this file instead"),
    "fsdp_activation_checkpointing": ("false", "use the recipe's --gradient-checkpointing"),
    "dynamo_backend": ("no", "use the recipe's --compile"),
}


def default_file(env: Mapping[str, str]) -> Path:
    """Return where accelerate looks for its default configuration."""
    home = env.get("HF_HOME") or f"{env.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return Path(home).expanduser() / "accelerate" / "default_config.yaml"


def check_default_file(path: Path, *, num_gpus: int) -> list[Finding]:
    """Return what the file means, for `accelerate launch` without --config_file. Nothing if there is none."""
    if not path.is_file():
        return []
    try:
        settings = _read(path)
    except (OSError, ValueError) as error:
        return [problem(f"{path}: cannot be read, and accelerate launch neither: {error}", "delete it, or fix it")]
    kind, num_processes = str(settings.get("distributed_type", "")), settings.get("num_processes", 1)
    use_cpu = settings.get("use_cpu") is True
    advice = f"use `shardlaunch run RECIPE --ranks N`, which reads no such file; or fix or delete {path}"
    findings = []

    def refused(what: str) -> None:
        findings.append(problem(f"accelerate launch, by its default configuration ({kind}): {what}", advice))

    if not kind:
        refused("it names no distributed_type, and accelerate ends with a traceback")
    if kind == "MULTI_CPU" and num_processes != 1 and not (settings.get("mpirun_config") or {}).get("mpirun_hostfile"):
        refused(f"starts one process, not {num_processes}, since no MPI host file is given")
    if kind == "MULTI_GPU" and use_cpu:
        refused(
            f"with use_cpu, each of {num_processes} processes takes itself for the only one, and all write one folder"
        )
    elif kind == "MULTI_GPU" and num_processes == 1:
        refused("num_processes is 1, which accelerate refuses for several GPUs")
    elif num_gpus and kind in ("MULTI_GPU", "FSDP", "DEEPSPEED") and _per_machine(settings) > num_gpus:
        refused(f"starts {_per_machine(settings)} processes on this machine, which has {num_gpus} GPUs")
    num_machines = max(1, int(settings.get("num_machines", 1)))
    if kind in ("MULTI_GPU", "FSDP", "DEEPSPEED") and num_processes % num_machines:
        refused(
            f"starts {_per_machine(settings)} on each of {num_machines} machines, not {num_processes} processes; "
            f"torchrun and `shardlaunch run --hosts` take a number per machine"
        )
    fsdp = settings.get("fsdp_config") or {}
    if kind == "FSDP" and str(fsdp.get("fsdp_version", 1)) != "2":
        refused("FSDP version 1, which is the default of accelerate, is refused; write fsdp_version: 2")
    if kind in ("FSDP", "DEEPSPEED") and not num_gpus and not use_cpu:
        findings.append(
            note(
                f"accelerate's default configuration asks for {kind} and there is no GPU: under accelerate alone that "
                f"becomes plain data parallelism, or {num_processes} runs that know nothing of each other. A recipe "
                f"compares ranks and strategy with those in effect",
                "set ACCELERATE_USE_CPU=true, so that the ranks use the CPU",
            )
        )
    flat = {**settings, **fsdp, **(settings.get("deepspeed_config") or {}), **(settings.get("dynamo_config") or {})}
    for name, (fine, instead) in _REFUSED.items():
        value = str(flat.get(name, flat.get(f"dynamo_{name}", fine))).lower()
        if value not in (fine, "auto"):
            refused(f"{name} {value} is refused; {instead}")
    port = settings.get("main_process_port")
    if port and num_processes != 1 and settings.get("num_machines", 1) == 1:
        findings.append(
            note(
                f"accelerate's default configuration sets main_process_port {port}: a second run on this machine fails",
                "write main_process_port: 0, which takes any free port",
            )
        )
    if not findings:
        findings.append(ok(f"accelerate launch without --config_file reads {path}: {kind}, {num_processes} processes"))
    return findings


def _per_machine(settings: Mapping[str, Any]) -> int:
    return int(settings.get("num_processes", 1)) // max(1, int(settings.get("num_machines", 1)))


def _read(path: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    loader = YAML(typ="safe", pure=True)
    loader.version = (1, 1)  # as accelerate reads it, for which `no` is false
    try:
        settings = loader.load(path.read_text())
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(str(error).splitlines()[0]) from error
    if not isinstance(settings, dict):
        raise ValueError("it is no mapping")
    for name in ("num_processes", "num_machines"):
        if name in settings and not isinstance(settings[name], int):
            raise ValueError(f"{name} is {settings[name]!r}, not a number")
    return settings
