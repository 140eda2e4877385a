"""What is deleted in the folder of a run: superfluous checkpoints, and what saves that did not end have left."""

from collections.abc import Callable
from pathlib import Path

from shardlaunch.checkpoints.files import error_text
from shardlaunch.checkpoints.reader import Checkpoint
from shardlaunch.checkpoints.records import Position
from shardlaunch.checkpoints.retention import prune, sweep
from shardlaunch.launcher.options import Options


class Upkeep:
    """Deletes what is superfluous; what cannot be deleted is said once and tried again the next time. Rank 0."""

    def __init__(self, checkpoints_dir: Path, options: Options, *, warn: Callable[[str], None]) -> None:
        self._checkpoints_dir = checkpoints_dir
        self._options = options
        self._warn = warn
        self._said: set[str] = set()
        self.busy: Callable[[], list[int]] = list
        """Returns steps whose checkpoints are being read, and so stay for now."""

    def sweep(self) -> None:
        """Delete the staging and trash folders."""
        self._say(sweep(self._checkpoints_dir))

    def prune(self, position: Position) -> None:
        """Delete checkpoints as --keep says, after the one of `position` was committed or has been resumed from."""
        options = self._options
        protected = [*self.busy(), *([position.best_step] if options.save_on_best else [])]
        errors = prune(self._checkpoints_dir, newest=position.step, keep=options.keep, protected=protected)
        self._say(errors + sweep(self._checkpoints_dir))

    def prune_resumed(self, resumed: Checkpoint | None, position: Position) -> None:
        """Do so at the start of a resume, if it is from this folder, once the checkpoint is loaded."""
        if resumed is not None and resumed.step_dir.parent == self._checkpoints_dir:
            self.prune(position)

    def _say(self, errors: list[OSError]) -> None:
        for text in dict.fromkeys(map(error_text, errors)):
            if text not in self._said:
                self._said.add(text)
                self._warn(f"could not be deleted, and is tried again at each save and at a resume: {text}")
