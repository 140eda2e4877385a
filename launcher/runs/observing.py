"""What looks at a run's steps: the record that `parity` compares, the profile of --profile, a check of adapters."""

from pathlib import Path

from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.training.idle_adapters import AdapterWatch
from shardlaunch.launcher.training.recording import record_if_asked
from shardlaunch.launcher.training.trainer import Trainer


def observe(trainer: Trainer, output_dir: Path, *, first: int, display: Display) -> None:
    """Let what is asked for look at the steps after `first`. All ranks."""
    record_if_asked(trainer, output_dir)
    if trainer.options.lora_rank and not (first or trainer.options.l1):  # --l1 sets small values to zero again
        AdapterWatch(trainer, warn=display.warn)
    if trainer.options.profile:
        from shardlaunch.launcher.training.profiling import profile_steps  # loads torch's profiler

        profile_steps(trainer, output_dir, first=first, display=display)
