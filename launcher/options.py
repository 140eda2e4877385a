"""Options of a run: one dataclass per topic, and `Options`, which combines them."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from shardlaunch.errors import UserError, printable
from shardlaunch.launcher.durations import seconds_of
from shardlaunch.launcher.optimization.averaging import AveragingOptions
from shardlaunch.launcher.optimization.freezing import FreezingOptions
from shardlaunch.launcher.optimization.lora import LoraOptions
from shardlaunch.launcher.optimization.optimizers import OptimizerOptions
from shardlaunch.launcher.optimization.schedules import ScheduleOptions
from shardlaunch.launcher.option_fields import Mark, check_values, flag, inherited, option


@dataclass(kw_only=True)
class RunOptions:
    """Options of the run as a whole."""

    preset: str = option("", mark="free")
    """Named set of option defaults of this recipe, such as `demo`."""
    config: str = option("", mark="free", is_path=True)
    """YAML file of options, under the same names; the command line wins."""
    output_dir: str = option("", mark="free", is_path=True)
    """Output folder of the run (default: outputs/ and --run-name, or RECIPE, or RECIPE-PRESET)."""
    run_name: str = option("", mark="free")
    """Name of the run; its output folder is then outputs/NAME, unless --output-dir is given."""
    init_from: str = option("", mark="free", is_path=True)  # free, because a digest of the weights is compared instead
    """Initial weights of a new run: a run or checkpoint folder, or a safetensors file or folder."""
    epochs: int = option(1, minimum=1)
    """Number of passes over the training data."""
    max_steps: int = option(0, minimum=0)
    """Number of optimizer steps of the whole run, instead of --epochs (0: use --epochs)."""
    stop_at_step: int = option(0, mark="free", minimum=0)
    """Save and stop after this step; the run can be resumed (0: run to the end)."""
    extend_to_steps: int = option(0, mark="free", minimum=0)
    """Continue past the run's end to this step; needs a schedule that does not end at a learning rate of 0 (0: off)."""
    max_time: str = option("", mark="free")
    """Time from the launch on, such as 90m, 12h or 1-12:00:00, within which the run saves and stops (default: none)."""
    grace_s: float = option(30.0, mark="free", minimum=0)
    """Seconds from a signal that ends the run to the kill that may follow; a step that takes longer is broken off."""
    resume: str = option("auto", mark="free", is_path=True)
    """auto (newest valid checkpoint in the output folder), never, or a checkpoint or run folder."""
    max_grad_norm: float = option(0.0, group="optimization", minimum=0)
    """Clip the gradient to this L2 norm (0: no clipping)."""
    on_nonfinite: Literal["stop", "skip", "rollback"] = option("stop", mark="free", group="optimization")
    """When a loss or gradient is not finite: stop, skip the update, or go back to a checkpoint without the batch."""
    on_spike: Literal["off", "stop", "skip", "rollback"] = option("off", mark="free", group="optimization")
    """The same when the loss is far above the last 64."""
    spike_threshold: float = option(10.0, mark="free", group="optimization", above=0)
    """What is far: so many robust standard deviations above their median."""
    leave_out: int = option(1, mark="free", group="optimization", minimum=1)
    """Global batches that a rollback leaves out: the one whose loss was bad, and those just before it."""
    seed: int = option(0, minimum=0)
    """Random seed for data order, weight initialization, dropout and augmentation."""
    folds: int = option(0, minimum=0)
    """Number of cross-validation folds (0: no cross-validation)."""
    early_stopping_patience: int = option(0, minimum=0)
    """Stop after N evaluations without improvement of the best metric (0: never)."""
    callback: tuple[str, ...] = option((), mark="free")
    """Callbacks, each as MODULE:CLASS or path/to/FILE.py:CLASS; several words, or the option several times."""
    hang_after_s: float = option(600.0, mark="free", minimum=0)
    """End the run when a rank makes no progress for this long, and what it does usually takes far less (0: never)."""
    check: bool = option(False, mark="free")
    """Before training, check that the recipe resumes exactly: two steps in one go, and two with a resume between."""
    debug: bool = option(False, mark="free")
    """Show the traceback of errors."""

    def __post_init__(self) -> None:
        if self.run_name and (Path(self.run_name).name != self.run_name or self.run_name == ".."):
            raise UserError(f"--run-name {self.run_name}: must be a plain name; for a path use --output-dir")
        for name, value in (("run_name", self.run_name), ("output_dir", self.output_dir)):
            if printable(value, is_name=True) != value:
                raise UserError(f"{flag(name)} {printable(value, is_name=True)}: must have no control characters")
        if self.max_time:
            seconds_of(self.max_time, "--max-time")  # raises
        if self.folds == 1:
            raise UserError("--folds 1: must be at least 2, or 0 for no cross-validation")
        if self.folds and self.resume != "auto":
            raise UserError(f"--resume {self.resume}: with --folds, each fold resumes by itself; remove --resume")


@dataclass(kw_only=True)
class DataOptions:
    """Options of the data and its batches."""

    data: str = option("", mark="free", is_path=True)  # free, because the data's fingerprint is compared instead
    """Data set: a Hugging Face Hub id, or a file or folder of parquet, CSV, JSON lines, text or images."""
    global_batch_size: int = option(32, minimum=1)
    """Samples per optimizer step, over all ranks; a multiple of --micro-batch-size."""
    micro_batch_size: int = option(8, minimum=1)
    """Samples per forward pass, on any number of ranks."""
    # These are free, because what the order follows from is compared instead.
    order: Literal["shuffled", "sequential", "weighted", "balanced", "per-class"] = option("shuffled", mark="free")
    """Order of the training samples: shuffled, that of the data, drawn by the column `weight`, as many of each class,
    or micro-batches of some classes with --samples-per-class each."""
    samples_per_class: int = option(0, mark="free", minimum=0)
    """Samples of each class in a micro-batch, for --order per-class."""
    samples_per_epoch: int = option(0, mark="free", minimum=0)
    """Samples of an epoch, for --order weighted, balanced and per-class (0: as many as the data has)."""
    equal_work: bool = option(False, mark="free")
    """Put more short samples than long ones into a micro-batch, so that ranks finish together: each global batch has
    both. Needs lengths, as text recipes have them; --micro-batch-size is then an average."""
    shuffle_window: int = option(0, mark="free", minimum=0)
    """Samples that are shuffled together, of data that is read block by block (0: 16,384)."""
    data_weights: tuple[str, ...] = option((), mark="free")
    """Weights of mixed sources from a step on: STEP:WEIGHT,WEIGHT,..., such as 1000:0.5,0.5; several words."""
    num_workers: int = option(0, mark="free", minimum=0)
    """Data-loading worker processes per rank (0: load in the main process)."""

    def __post_init__(self) -> None:
        if self.global_batch_size % self.micro_batch_size:
            raise UserError(
                f"--global-batch-size {self.global_batch_size} is not a multiple of "
                f"--micro-batch-size {self.micro_batch_size}. Change one of the two."
            )

    @property
    def micro_batches(self) -> int:
        """Return M, the number of micro-batches in a full global batch."""
        return self.global_batch_size // self.micro_batch_size


@dataclass(kw_only=True)
class StrategyOptions:
    """Options of the distribution strategy, precision and memory use."""

    strategy: Literal["auto", "single", "dp", "ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"] = option(
        "auto", mark="free"
    )
    """Distribution strategy (auto: from the launcher, else ddp on several ranks and single on one)."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8"] = option("auto", mark="warn")
    """Precision of the computation (auto: from accelerate's configuration, else fp32); weights stay in fp32."""
    layer_classes: tuple[str, ...] = option((), mark="free")
    """Module classes that fsdp2 and hsdp gather as one unit (default: those that the recipe or model declares)."""
    reshard_after_forward: bool = option(True, mark="free")
    """Free gathered parameters after the forward pass (fsdp2, hsdp, zero3): less memory, more communication."""
    cpu_offload: bool = option(False, mark="free")
    """Keep parameter and optimizer shards in host memory (fsdp2, hsdp, zero1, zero2, zero3)."""
    shard_ranks: int = option(0, mark="free", minimum=0)
    """Ranks that share one copy of the model under hsdp (0: all ranks of a machine; on one machine, half of them)."""
    exact: bool = False
    """Compute so that no bit of a loss, metric or weight depends on ranks and strategy (not under zero1 to zero3;
    with one thread per rank unless --threads-per-rank says otherwise)."""
    tensor_parallel: int = option(1, mark="free", minimum=1)
    """Consecutive ranks that divide each layer among them and run the same micro-batches (fsdp2), as the tp_plan of the
    model says; the other dimension of the ranks shards as usual."""
    threads_per_rank: int = option(0, mark="warn", minimum=0)
    """CPU threads per rank (0: the machine's cores divided evenly)."""
    attention: Literal["auto", "plain"] = option("auto", mark="warn")
    """Attention with dropout on the CPU, of transformers' models: faster in sequences of 192 tokens or more, with other
    random numbers (auto), or as PyTorch does it (plain)."""
    compile: bool = option(False, mark="warn")
    """Compile the model with torch.compile."""
    gradient_checkpointing: bool = option(False, mark="warn")
    """Recompute activations in the backward pass to save memory."""
    gradient_checkpointing_every: int = option(1, mark="warn", minimum=1)
    """With --gradient-checkpointing, recompute those of one of N layers only: less memory saved, less time spent."""

    def __post_init__(self) -> None:
        if self.gradient_checkpointing_every > 1 and not self.gradient_checkpointing:
            raise UserError("--gradient-checkpointing-every: only with --gradient-checkpointing; add it")


@dataclass(kw_only=True)
class SavingOptions:
    """Options of checkpoints."""

    save_every: int | Literal["auto"] = option(500, mark="free", minimum=0)
    """Save every N steps and at the end (0: only at the end; auto: as --mtbf and the time of a save make it best)."""
    mtbf: str = option("1d", mark="free")
    """Mean time between failures that --save-every auto expects, of all machines together, such as 6h or 2d."""
    async_save: Literal["auto", "on", "off"] = option("auto", mark="free")
    """Write checkpoints while the training goes on, from a copy in host memory (auto: where there is room for it)."""
    replicate_every: int = option(0, mark="free", minimum=0)
    """Every N steps, keep a copy of the state in the memory of this machine and of the next one (0: off)."""
    save_on_best: bool = option(True, mark="free")
    """Also save when the best metric improves, and keep that checkpoint."""
    keep: int = option(2, mark="free", minimum=0)
    """Number of newest checkpoints to keep (0: all)."""
    save_to: str = option("", mark="free")
    """Second place for checkpoints, a folder or URL (s3://BUCKET/RUN): copied in the background, resumed from."""

    def __post_init__(self) -> None:
        seconds_of(self.mtbf, "--mtbf")  # raises


@dataclass(kw_only=True)
class ReportingOptions:
    """Options of evaluation and logging."""

    eval_every: int = option(0, mark="free", minimum=0)
    """Evaluate every N steps and at the end (0: after each epoch)."""
    eval_micro_batch_size: int = option(0, mark="warn", minimum=0)
    """Samples per forward pass of an evaluation, which keeps no activations (0: --micro-batch-size)."""
    log_every: int = option(1, mark="free", minimum=1)
    """Write training metrics to metrics.jsonl every N steps."""
    profile: int = option(0, mark="free", minimum=0)
    """Trace N steps with torch's profiler, after the first three of this start, and say where their time goes."""
    digest_every: int = option(0, mark="free", minimum=0)
    """Every N steps, write digests of weights and optimizer to metrics.jsonl, which a resume compares (0: off)."""
    tracker: str = option("tensorboard", mark="free")
    """Trackers, separated by commas (tensorboard, wandb, mlflow, trackio, ...), or none."""
    project: str = option("", mark="free")
    """Project of the run in its trackers: W&B or trackio project, MLflow experiment (default: the recipe's name)."""
    track_every: int = option(10, mark="free", minimum=1)
    """Send training metrics to the trackers every N steps; evaluations always."""
    plan: str = option("", mark="free", is_path=True)
    """Output of `shardlaunch plan --json`: a run on GPUs prints at its end how far the planned memory was off."""


@dataclass(kw_only=True)
class Options(
    ReportingOptions,
    SavingOptions,
    StrategyOptions,
    AveragingOptions,
    LoraOptions,
    FreezingOptions,
    ScheduleOptions,
    OptimizerOptions,
    DataOptions,
    RunOptions,
):
    """Options of every recipe."""

    explicitly_set = frozenset[str]()
    """Names of the options set on the command line, in a YAML file or by keyword. Not an option itself."""
    origins = dict[str, str]()
    """Places of the options that are set in a YAML file, by name, for messages. Not an option itself."""

    def __post_init__(self) -> None:
        check_values(self)
        for owner in GROUPS.values():
            if hasattr(owner, "__post_init__"):
                owner.__post_init__(self)
        self._check_lora()

    def _check_lora(self) -> None:
        """Raise UserError for options that --lora-rank does not go with."""
        others = {
            "--freeze": (bool(self.freeze), "which freezes all that it does not train; "),
            "--tensor-parallel": (self.tensor_parallel > 1, ""),
            "--precision fp8": (self.precision == "fp8", ""),
        }
        for other, (is_given, reason) in others.items() if self.lora_rank else ():
            if is_given:
                raise UserError(f"{other}: not with --lora-rank, {reason}remove one of the two")


# The headings of --help, in this order, each with the class of its options.
GROUPS = {
    "run": RunOptions,
    "data": DataOptions,
    "optimization": OptimizerOptions,
    "schedule": ScheduleOptions,
    "freezing": FreezingOptions,
    "averaging": AveragingOptions,
    "adapters": LoraOptions,
    "strategy": StrategyOptions,
    "saving": SavingOptions,
    "reporting": ReportingOptions,
}


def marks(options: Options) -> dict[str, Mark]:
    """Return each option's mark."""
    return {f.name: inherited(type(options), f.name, "mark", "identity") for f in fields(options)}


__all__ = ["GROUPS", "Mark", "Options", "flag", "marks", "option"]
