"""A run's options: one dataclass, its command line, its YAML file."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from shardlaunch.errors import UserError
from shardlaunch.launcher.optimization.freezing import FreezingOptions
from shardlaunch.launcher.optimization.optimizers import OptimizerOptions, for_its_optimizer
from shardlaunch.launcher.optimization.schedules import ScheduleOptions

Mark = Literal["identity", "warn", "free"]
OptionsT = TypeVar("OptionsT", bound="Options")


def option(default: Any, *, mark: Mark = "identity") -> Any:
    """Declare an option and what it means at a resume (a dataclass field).

    `identity` changes the run: a resume with another value is refused. `warn` changes rounding. `free` changes nothing.
    An option declared without this function is `identity`.
    """
    return field(default=default, metadata={"mark": mark})


@dataclass(kw_only=True)
class RunOptions:
    """Options of how a run goes."""

    data: str = option("", mark="free")  # free, because the data's fingerprint is compared instead
    """Data set: a hub id or a local path (a folder of parquet, CSV, JSON-lines, text or image files, or a file)."""
    preset: str = option("", mark="free")
    """Named set of defaults of the recipe, such as `demo`."""
    config: str = option("", mark="free")
    """YAML file with the same names as these options; the command line wins."""
    output_dir: str = option("", mark="free")
    """Folder of the run: metrics, TensorBoard, checkpoints (default: outputs/RECIPE, with the preset's name)."""
    run_name: str = option("", mark="free")
    """Name of the run: its folder is outputs/NAME unless --output-dir says otherwise."""
    init_from: str = option("", mark="free")  # free, because a digest of the weights is compared instead
    """Start a new run from these weights: a run, a checkpoint, a folder or file of safetensors."""
    epochs: int = option(1)
    """Passes over the training data."""
    max_steps: int = option(0)
    """Number of steps of the whole run; if above 0, it takes the place of --epochs."""
    global_batch_size: int = option(32)
    """Samples in one step, over all ranks: a multiple of --micro-batch-size."""
    micro_batch_size: int = option(8)
    """Samples in one forward pass. It is part of the run, whatever the number of ranks."""
    max_grad_norm: float = option(0.0)
    """Clip the gradient to this 2-norm; 0: no clipping."""
    seed: int = option(0)
    """Decides order, fresh weights, dropout and augmentation."""
    folds: int = option(0)
    """Cross-validate: as many runs, each with another part of the training data held out; 0: a run on all of it."""
    precision: str = option("auto", mark="warn")
    """fp32, bf16, fp16, fp8 (newer GPUs), or auto: what accelerate's configuration says, else fp32."""
    save_every: int = option(500, mark="free")
    """Save a checkpoint every so many steps, besides the last; 0: only the last."""
    save_on_best: bool = option(True, mark="free")
    """Save a checkpoint also when an evaluation is the best so far, and keep the best one."""
    keep: int = option(2, mark="free")
    """Checkpoints to keep; 0: all."""
    eval_every: int = option(0, mark="free")
    """Evaluate every so many steps; 0: at the end of each epoch. The last step is always evaluated."""
    early_stopping_patience: int = option(0)
    """End the run after so many evaluations without a better metric; 0: never."""
    log_every: int = option(1, mark="free")
    """Write training metrics to metrics.jsonl every so many steps."""
    tracker: str = option("tensorboard", mark="free")
    """accelerate trackers, separated by commas (tensorboard, wandb, mlflow, ...), or none."""
    project: str = option("", mark="free")
    """Project under which trackers file the run (W&B project, MLflow experiment, ...); default: the recipe's name."""
    track_every: int = option(10, mark="free")
    """Pass training metrics to the trackers every so many steps; evaluations always."""
    resume: str = option("auto", mark="free")
    """auto: from the newest valid checkpoint of the output folder; never; or the path of a checkpoint or run folder."""
    extend_to_steps: int = option(0, mark="free")
    """Go on after the end of the run, up to this step, where the schedule says how; 0: do not."""
    stop_at_step: int = option(0, mark="free")
    """End early after this step, with a checkpoint. The run stays the same and can be resumed; 0: do not."""
    strategy: str = option("auto", mark="free")
    """single, dp, ddp, fsdp2, hsdp, zero1, zero2, zero3, or auto: what was launched."""
    layer_classes: tuple[str, ...] = option((), mark="free")
    """Classes of modules that are gathered as one under fsdp2 and hsdp; none: what recipe or model declares."""
    reshard_after_forward: bool = option(True, mark="free")
    """Drop gathered parameters after the forward pass (fsdp2, hsdp, zero3): less memory, more traffic."""
    cpu_offload: bool = option(False, mark="free")
    """Keep slices of parameters and optimizer state in host memory (fsdp2, hsdp, zero1, zero2, zero3)."""
    shard_ranks: int = option(0, mark="free")
    """Ranks among which hsdp slices one copy of the model; 0: those of a machine, or half of all on one machine."""
    threads_per_rank: int = option(0, mark="warn")
    """CPU threads of each rank; 0: the ranks share the cores evenly."""
    num_workers: int = option(0, mark="free")
    """Processes a rank that load data ahead; 0: load in the rank itself."""
    compile: bool = option(False, mark="warn")
    """Compile the model with torch.compile."""
    gradient_checkpointing: bool = option(False, mark="warn")
    """Recompute activations in the backward pass, to save memory."""
    debug: bool = option(False, mark="free")
    """Show tracebacks of errors."""

    def __post_init__(self) -> None:
        if self.folds == 1:
            raise UserError("--folds 1: must be at least 2, or 0 for no cross-validation")
        if self.folds and self.resume != "auto":
            raise UserError(f"--resume {self.resume}: with --folds, each fold resumes by itself; drop the option")
        least = {
            "folds": 0,
            "epochs": 1,
            "max_steps": 0,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "max_grad_norm": 0,
            "seed": 0,
            "save_every": 0,
            "keep": 0,
            "eval_every": 0,
            "early_stopping_patience": 0,
            "log_every": 1,
            "track_every": 1,
            "stop_at_step": 0,
            "extend_to_steps": 0,
            "threads_per_rank": 0,
            "num_workers": 0,
            "shard_ranks": 0,
        }
        for name, minimum in least.items():
            if not getattr(self, name) >= minimum:
                raise UserError(f"{flag(name)} {getattr(self, name)}: must be at least {minimum}")
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
class Options(ScheduleOptions, OptimizerOptions, FreezingOptions, RunOptions):
    """Options of every recipe."""

    explicitly_set = frozenset[str]()
    """Names of those that the command line or a YAML file gave; no option itself."""

    def __post_init__(self) -> None:
        for owner in (RunOptions, FreezingOptions, OptimizerOptions, ScheduleOptions):
            owner.__post_init__(self)


def flag(name: str) -> str:
    """Return an option's name as it stands on the command line."""
    return f"--{name.replace('_', '-')}"


def marks(options: Options) -> dict[str, Mark]:
    """Return each option's mark."""
    return {f.name: f.metadata.get("mark", "identity") for f in fields(options)}


def parse_options(
    options_type: type[OptionsT],
    presets: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str],
    *,
    program: str,
    description: str,
    show: bool = True,
) -> OptionsT:
    """Return the options: the class's defaults, then the preset's, then the YAML file's, then the command line's.

    `show` is False on the ranks that keep silent. Raises UserError or SystemExit for what cannot be understood.
    """
    config_path = _peek(argv, "--config")
    config_argv = _config_argv(options_type, Path(config_path)) if config_path else []
    preset = _peek(argv, "--preset") or _peek(config_argv, "--preset")
    if preset and preset not in presets:
        known = f"choose one of {', '.join(presets)}" if presets else "this recipe has none"
        raise UserError(f"--preset {preset}: unknown; {known}")
    try:
        default = options_type()
    except TypeError as error:
        raise UserError(f"every option of a recipe needs a default: {error}") from error
    if preset:
        default = replace(default, **presets[preset])
    words = [*config_argv, *argv]
    options = tyro.cli(
        options_type, prog=program, description=description, default=default, args=words, console_outputs=show
    )
    explicitly_set = _names_set(words, options_type)
    options = for_its_optimizer(options, default, explicitly_set=explicitly_set)
    options.explicitly_set = explicitly_set
    return options


def options_from_keywords(
    options_type: type[OptionsT],
    presets: Mapping[str, Mapping[str, Any]],
    keywords: Mapping[str, Any],
    *,
    base: Options | None = None,
) -> OptionsT:
    """Return the options: those of `base`, or the class's defaults, the preset's and the YAML file's; then `keywords`.

    Raises UserError for unknown names and for values that an option does not take.
    """
    hints = get_type_hints(options_type)
    unknown = [name for name in keywords if name not in {f.name for f in fields(options_type)}]
    if unknown:
        raise UserError(f"{options_type.__name__} has no option {unknown[0]!r}")
    if base is not None and ("preset" in keywords or "config" in keywords):
        raise UserError("preset and config go with a recipe class, not with an instance, whose options are set")
    if base is None:
        words = [f"{flag(name)}={keywords[name]}" for name in ("preset", "config") if keywords.get(name)]
        base = parse_options(options_type, presets, words, program="", description="")
    assert isinstance(base, options_type)
    values = {name: _converted(value, hints[name]) for name, value in keywords.items()}
    options = replace(base, **values)
    explicitly_set = frozenset(base.explicitly_set | values.keys())
    options = for_its_optimizer(options, base, explicitly_set=explicitly_set)
    options.explicitly_set = explicitly_set
    return options


def _converted(value: Any, hint: Any) -> Any:
    """Return a Python value as an option's type has it: paths as text, lists as tuples, whole numbers as floats."""
    arms = (hint, *get_args(hint))
    if isinstance(value, Path) and str in arms:
        return str(value)
    if isinstance(value, list) and any(get_origin(arm) is tuple for arm in arms):
        return tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in arms and int not in arms:
        return float(value)
    return value


def _names_set(words: Sequence[str], options_type: type[Options]) -> frozenset[str]:
    """Return the options that stand among command-line words."""
    flags = (word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--"))
    names = {f.name for f in fields(options_type)}
    return frozenset(name if name in names else name.removeprefix("no_") for name in flags) & names


def _peek(argv: Sequence[str], name: str) -> str | None:
    """Return the last value given to an option, before the command line is parsed as a whole."""
    found = None
    for position, word in enumerate(argv):
        if word == name and position + 1 < len(argv):
            found = argv[position + 1]
        elif word.startswith(f"{name}="):
            found = word.removeprefix(f"{name}=")
    return found


def _config_argv(options_type: type[Options], path: Path) -> list[str]:
    """Return a YAML file as command-line words, so that its values are parsed by the same rules."""
    try:
        with open(path) as file:
            content = yaml.safe_load(file)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: must be a mapping of option names to values")
    known = {f.name: f for f in fields(options_type)}
    hints = get_type_hints(options_type)
    words: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known or name == "config":
            raise UserError(f"--config {path}: unknown option {key!r}")
        is_sequence = any(get_origin(arm) is tuple for arm in (hints[name], *get_args(hints[name])))
        if isinstance(value, dict) or isinstance(value, list) != (is_sequence and value is not None):
            expected = "a list of values" if is_sequence else "a single value"
            raise UserError(f"--config {path}: option {key!r} takes {expected}, not {value!r}")
        if isinstance(value, bool) or isinstance(_default(known[name]), bool):
            if not isinstance(value, bool) or not isinstance(_default(known[name]), bool):
                raise UserError(f"--config {path}: option {key!r} cannot be {value!r}")
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, list):
            words += [flag(name), *map(str, value)]
        elif value is not None:
            words.append(f"{flag(name)}={value}")
    return words


def _default(option_field: Any) -> Any:
    return None if option_field.default is MISSING else option_field.default
