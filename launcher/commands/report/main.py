"""`shardlaunch report`: read runs and write the page."""

from collections.abc import Sequence
from pathlib import Path

from shardlaunch.checkpoints.files import error_text, make_folder, replace_file
from shardlaunch.errors import UserError, some
from shardlaunch.launcher.commands.ckpt.output import size
from shardlaunch.launcher.commands.report.page import GENERATOR, page
from shardlaunch.launcher.commands.report.reading import RunFacts, read_runs

REPORT = "report.html"
_MARK = f'content="{GENERATOR}"'.encode()


def write_report(paths: Sequence[Path], *, output: Path | None) -> int:
    """Write the report of some runs, and say where. Raises UserError for what is no run, or has no metrics."""
    runs = read_runs(paths)
    if not any(run.series for run in runs):
        raise UserError(f"{some([str(run.path) for run in runs])}: no metrics yet, so there is nothing to show")
    target = output.expanduser() if output is not None else _beside(runs)
    document = page(runs).encode()
    try:
        if target.is_dir() or (target.exists() and _MARK not in target.read_bytes()[:1000]):
            raise UserError(f"{target}: exists and is no report; choose another --output")
        make_folder(target.parent)
        replace_file(target, document)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error_text(error)}; choose another --output") from error
    for run in runs:
        if not run.series:
            print(f"{run.name}: no metrics yet")
    print(f"{target}: {len(runs)} run{'s' * (len(runs) != 1)}, {size(len(document))}")
    return 0


def _beside(runs: Sequence[RunFacts]) -> Path:
    return runs[0].path / REPORT if len(runs) == 1 else Path(REPORT)
