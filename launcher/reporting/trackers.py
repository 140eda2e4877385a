"""Trackers: TensorBoard, W&B, MLflow, trackio and the others that accelerate has, given a run's metrics as it goes."""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from shardlaunch.checkpoints.files import error_text
from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.lasting import LastingFile
from shardlaunch.launcher.reporting.media import MEDIA, Medium, Picture, Text, file_name

MLFLOW_TAG = "shardlaunch.tracking_id"


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """Names under which trackers show a run."""

    project: str
    name: str
    tracking_id: str
    """Chosen once and kept in run.json, so that a resume goes on with the same run in each tracker."""
    is_new: bool
    """Whether the id was chosen by this launch: no tracker knows it yet."""
    output_dir: Path


@dataclass(frozen=True, kw_only=True)
class _Tracker:
    """One of accelerate's trackers, started."""

    tracker: Any
    first_step: int = 0
    """Steps before it are there already: a run that crashed logs again, with the same values, what it had logged."""


class Trackers:
    """The trackers of a run, each one of accelerate's. Rank 0, once accelerate's state is set up.

    A tracker that fails is dropped with a warning: it must not end the run. Raises UserError for one that cannot be
    started at the beginning of a run; at a resume it is dropped too.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: TrackedRun,
        *,
        resumed_step: int,
        options: Mapping[str, Any],
        warn: Callable[[str], None],
        silent: bool,
    ) -> None:
        self._warn = warn
        self._silent = silent
        self._trackers: dict[str, _Tracker] = {}
        self._without_media: set[str] = set()
        for name in names:
            start = _STARTS.get(name, _start_other)
            try:
                with self._output():
                    self._trackers[name] = start(
                        name, run, resumed_step=resumed_step, options=options, silent=silent, warn=warn
                    )
            except Exception as error:  # each tracker's package raises its own
                if not resumed_step:
                    self.close()
                    raise UserError(
                        f"--tracker {name}: cannot be started: {_reason(error)}. Fix that, or leave this tracker out."
                    ) from error
                warn(f"tracker {name} is dropped: {_reason(error)}")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars at a step."""
        self._tell(lambda one: one.tracker.log(dict(values), step=step) if step >= one.first_step else None)

    def show(self, medium: Medium, step: int) -> None:
        """Show a picture, text or table of a step, in the trackers that can; of others it is said once."""

        def show_in(one: _Tracker) -> None:
            how = _SHOWS.get(one.tracker.name)
            if how is None and one.tracker.name not in self._without_media:
                self._without_media.add(one.tracker.name)
                self._warn(f"tracker {one.tracker.name} is not shown pictures, texts and tables, which the folder has")
            if how is not None and step >= one.first_step:
                how(one.tracker, medium, step)

        self._tell(show_in)

    def close(self) -> None:
        """Finish all trackers."""
        self._tell(lambda one: one.tracker.finish())
        self._trackers.clear()

    def _tell(self, message: Callable[[_Tracker], object]) -> None:
        for name, one in list(self._trackers.items()):
            try:
                with self._output():
                    message(one)
            except Exception as error:  # each tracker's package raises its own
                self._warn(f"tracker {name} is dropped: {_reason(error)}")
                del self._trackers[name]

    @contextlib.contextmanager
    def _output(self) -> Iterator[None]:
        """Keep what trackers print from a run that is to be silent."""
        with contextlib.redirect_stdout(io.StringIO()) if self._silent else contextlib.nullcontext():
            yield


def tracker_names(option: str) -> list[str]:
    """Return the trackers that --tracker names. Raises UserError for unknown or missing ones."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    names = [name.strip() for name in option.split(",") if name.strip() not in ("", "none")]
    available = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"--tracker {name}: unknown; choose none or some of {', '.join(LOGGER_TYPE_TO_CLASS)}")
        if name not in available:
            raise UserError(f"--tracker {name}: its package is not installed; installed: {', '.join(available)}")
    return names


def _start_tensorboard(
    kind: str, run: TrackedRun, *, resumed_step: int, warn: Callable[[str], None], **_: Any
) -> _Tracker:
    # It drops what an earlier process logged after the step resumed from. It is not given the options: its summary of
    # them would show as a run of its own.
    with _lasting_events(warn):
        return _started(kind, "tensorboard", run.output_dir, purge_step=resumed_step + 1)


@contextlib.contextmanager
def _lasting_events(warn: Callable[[str], None]) -> Iterator[None]:
    """Let the file that TensorBoard opens outlast errors, which otherwise end its thread with a traceback."""
    module: Any = import_module("tensorboard.summary.writer.event_file_writer")
    of_records = module.RecordWriter
    module.RecordWriter = lambda file: of_records(_LastingEvents(Path(os.fsdecode(file.filename)), warn))
    try:
        yield
    finally:
        module.RecordWriter = of_records


class _LastingEvents:
    """The file that TensorBoard writes its records to."""

    closed = False

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._file = LastingFile(path, prepare=lambda: 0, warn=warn)

    def write(self, data: bytes) -> None:
        self._file.append(data)

    def flush(self) -> None:
        self._file.attempt()

    def close(self) -> None:
        self._file.close()
        self.closed = True


def _start_wandb(kind: str, run: TrackedRun, *, options: Mapping[str, Any], silent: bool, **_: Any) -> _Tracker:
    import wandb

    started = _started(
        kind,
        run.project,
        id=run.tracking_id,
        name=run.name,
        resume="allow",
        dir=os.environ.get("WANDB_DIR", run.output_dir),
        config=dict(options),
        reinit="create_new",  # a run that the caller has open stays open
        settings=wandb.Settings(silent=silent),
    )
    # Its server refuses steps that go back, with a warning each.
    return _Tracker(tracker=started.tracker, first_step=started.tracker.run.starting_step)


def _start_mlflow(kind: str, run: TrackedRun, *, options: Mapping[str, Any], **_: Any) -> _Tracker:
    from mlflow import MlflowClient

    client = MlflowClient()
    project = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.project)  # the tracker looks there first
    experiment = client.get_experiment_by_name(project)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(project)
    # MLflow chooses the ids of its runs itself; the tag is there from the first moment.
    found = client.search_runs([experiment_id], f"tags.`{MLFLOW_TAG}` = '{run.tracking_id}'")
    tags = {MLFLOW_TAG: run.tracking_id}
    kept = found[0] if found else client.create_run(experiment_id, run_name=run.name, tags=tags)
    run_id = kept.info.run_id
    started = _started(kind, project, run_id=run_id, nested_run=True)  # nested: the caller may have a run open
    # It refuses other values for what it has.
    started.tracker.store_init_configuration({name: v for name, v in options.items() if name not in kept.data.params})
    logged = client.get_metric_history(run_id, "loss") if "loss" in kept.data.metrics else []
    return _Tracker(tracker=started.tracker, first_step=max((point.step for point in logged), default=0))


def _start_trackio(kind: str, run: TrackedRun, *, options: Mapping[str, Any], **_: Any) -> _Tracker:
    # It finds a run by its name, the newest of those that share one.
    resume = "never" if run.is_new else "allow"
    return _started(kind, run.project, name=run.name, resume=resume, config=dict(options), embed=False)


def _start_other(kind: str, run: TrackedRun, *, options: Mapping[str, Any], **_: Any) -> _Tracker:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    has_folder = LOGGER_TYPE_TO_CLASS[kind].requires_logging_directory
    started = _started(kind, *((run.name, run.output_dir) if has_folder else (run.project,)))
    started.tracker.store_init_configuration(dict(options))
    return started


def _started(kind: str, /, *arguments: Any, **keywords: Any) -> _Tracker:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    tracker = LOGGER_TYPE_TO_CLASS[kind](*arguments, **keywords)
    tracker.start()
    return _Tracker(tracker=tracker)


def _show_in_tensorboard(tracker: Any, medium: Medium, step: int) -> None:
    if isinstance(medium, Picture):
        tracker.writer.add_image(medium.name, medium.pixels, step, dataformats="HWC")
    else:
        text = medium.text if isinstance(medium, Text) else medium.markdown()
        tracker.writer.add_text(medium.name, text, step)
    tracker.writer.flush()


def _show_in_wandb(tracker: Any, medium: Medium, step: int) -> None:
    if isinstance(medium, Picture):
        tracker.log_images({medium.name: [medium.pixels]}, step=step)
    elif isinstance(medium, Text):
        tracker.log_table(medium.name, columns=["text"], data=[[medium.text]], step=step)
    else:
        tracker.log_table(medium.name, columns=list(medium.columns), data=list(medium.rows), step=step)


def _show_in_mlflow(tracker: Any, medium: Medium, step: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / file_name(medium)
        path.write_bytes(medium.data())
        tracker.log_artifact(str(path), f"{MEDIA}/step-{step:08d}")


def _reason(error: Exception) -> str:
    return " ".join(error_text(error).split())[:300]


_STARTS: Mapping[str, Callable[..., _Tracker]] = {
    "tensorboard": _start_tensorboard,
    "wandb": _start_wandb,
    "mlflow": _start_mlflow,
    "trackio": _start_trackio,
}
_SHOWS: Mapping[str, Callable[[Any, Medium, int], None]] = {
    "tensorboard": _show_in_tensorboard,
    "wandb": _show_in_wandb,
    "mlflow": _show_in_mlflow,
}
