"""A second place for the checkpoints of a run (--save-to): copied there in the background, and brought back from it."""

import re
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from shardlaunch.checkpoints.copying import copy_checkpoint
from shardlaunch.checkpoints.copying_runs import RECORDS, RUN
from shardlaunch.checkpoints.files import error_text, is_there, make_folder, replace_file
from shardlaunch.checkpoints.listing import DamagedCheckpoint, listing_of
from shardlaunch.checkpoints.names import CHECKPOINTS, MANIFEST, step_dir_name, step_of_dir_name
from shardlaunch.checkpoints.places import LocalPlace, Place, committed_steps, entries, join, place_at
from shardlaunch.checkpoints.reader import Checkpoint, newest_complete, position_of
from shardlaunch.checkpoints.records import DamagedRecord, Position, RunRecord, decode
from shardlaunch.checkpoints.retention import sweep
from shardlaunch.errors import UserError
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.reporting.display import Display
from shardlaunch.launcher.runs.background import lower_priority
from shardlaunch.launcher.runs.identity import Identity
from shardlaunch.sharding.world import World

_PASSWORD = re.compile(r"://[^/@]*:[^/@]*@")
RETRY_S = 10.0
LAST_TRIES = 3
LAST_RETRY_S = 2.0


class SecondPlace:
    """The folder at --save-to, which is shaped as the run's own; without the option it is not used.

    All ranks call the methods; rank 0 alone copies.
    """

    def __init__(self, options: Options, output_dir: Path, world: World, display: Display, *, fold: int | None) -> None:
        url = options.save_to if fold is None else join(options.save_to, f"fold-{fold + 1}")
        if _PASSWORD.search(url):
            raise UserError(
                "--save-to: has a password, which would stand in the records of the run. Give it in the environment or "
                "the configuration of fsspec"
            )
        try:
            self._place: Place = place_at(url)
        except UserError as error:
            raise UserError(f"--save-to {error}") from error
        if options.save_to and place_at(output_dir.resolve()) == place_at(Path(self._place.shown).resolve()):
            raise UserError(f"--save-to {self._place.shown}: is the output folder itself; choose another place")
        self._is_used = bool(options.save_to) and world.is_main
        self._here = LocalPlace(output_dir)
        self._options = options
        self._world = world
        self._display = display
        self._changed = threading.Condition()
        self._waiting: list[int] = []
        self._copying: int | None = None
        self._best_step = 0
        self._error = self._said = ""
        self._num_errors = 0
        self._is_closing = False
        self._thread: threading.Thread | None = None

    def copy(self, position: Position) -> None:
        """Begin to copy the checkpoint of a position, which has just been saved."""
        if self._is_used:
            self._say()
            self._copy(position.step, position.best_step)

    def _copy(self, step: int, best_step: int) -> None:
        with self._changed:
            self._waiting.append(step)
            self._best_step = best_step
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="save-to", daemon=True)
                self._thread.start()

    def busy(self) -> list[int]:
        """Return the steps whose checkpoints are read just now. Rank 0."""
        with self._changed:
            return [] if self._copying is None else [self._copying]

    def finish(self) -> None:
        """Wait until all is copied. All ranks. Raises UserError if it cannot be."""
        if self._options.save_to:
            self._world.peers.together(self._finish)

    def close(self) -> None:
        """Wait until all is copied, at the end of a run that has failed."""
        try:
            self._finish()
        except UserError as error:
            self._display.warn(str(error))

    def _finish(self) -> None:
        with self._changed:
            self._is_closing, self._num_errors = True, 0
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._thread is None)
            self._is_closing, left, self._waiting = False, self._waiting, []
        if left:
            raise UserError(
                f"--save-to {self._place.shown}: the last checkpoint could not be copied there: {self._error}. Fix "
                f"that; then the same command copies it"
            )
        self._say()

    def _work(self) -> None:
        """Copy what waits, the newest first, until nothing does; or, at the end of the run, until that fails again."""
        lower_priority()
        while True:
            with self._changed:
                if not self._waiting or (self._is_closing and self._num_errors >= LAST_TRIES):
                    self._thread = None
                    self._changed.notify_all()
                    return
                step = self._copying = self._waiting.pop()
            error = self._error_of_copy(step)
            with self._changed:
                self._copying = None
                self._error = error
                if error:
                    self._waiting.append(step)
                    self._num_errors += 1
                    self._changed.wait(LAST_RETRY_S if self._is_closing else RETRY_S)

    def _error_of_copy(self, step: int) -> str:
        """Copy the records of the run, then the checkpoint, and delete superfluous ones. Return "" or why not."""
        name = step_dir_name(step)
        here, there = self._here.child(CHECKPOINTS).child(name), self._place.child(CHECKPOINTS).child(name)
        try:
            for record in RECORDS:
                _write_record(self._place, record, self._here)
            _make_way(here, there)
            copy_checkpoint(here, there)
            self._prune(step)
        except Exception as error:  # the packages behind fsspec have errors of their own
            with suppress(Exception):  # nothing ends this thread
                if not is_there(here.path):  # it was superfluous, and is deleted
                    return ""
            return " ".join(error_text(error).split())
        return ""

    def _prune(self, newest: int) -> None:
        """Keep what --keep says up to a step, and delete the others, and what copies that did not end have left."""
        folder, keep = self._place.child(CHECKPOINTS), self._options.keep
        committed = committed_steps(folder)
        superfluous = [step for step in committed if step <= newest][:-keep] if keep else []
        with self._changed:
            needed = {*self._waiting, *([self._best_step] if self._options.save_on_best else [])}
        halves = {step_of_dir_name(name) for name in folder.names()} - {None, *committed}
        for step in {*superfluous, *halves} - needed:
            assert step is not None
            _delete(folder.child(step_dir_name(step)))
        if isinstance(folder, LocalPlace):
            for error in sweep(folder.path):
                raise error

    def _say(self) -> None:
        """Say an error of the background once, and when it is over."""
        with self._changed:
            error = self._error
        if bool(error) != bool(self._said):
            where = f"--save-to {self._place.shown}"
            self._display.warn(
                f"{where}: checkpoints cannot be copied there ({error}); the run goes on, and tries again"
                if error
                else f"{where}: checkpoints are copied there again"
            )
        self._said = error

    def find(self, find_here: Callable[[], Checkpoint | None], identity: Identity, *, hint: str) -> Checkpoint | None:
        """Return the checkpoint that `find_here` finds, after bringing back a newer one. All ranks.

        Raises UserError if the second place holds another run, or cannot be read where the first has nothing.
        """
        if not self._options.save_to or self._options.resume != "auto":
            return find_here()
        peers = self._world.peers
        peers.together(lambda: self._is_used and self._bring_back(None, identity, hint))
        found = find_here()
        step = found.step if found is not None else -1
        # Again, since what looks newer here may be damaged.
        is_newer = peers.together(lambda: self._is_used and self._bring_back(step, identity, hint))
        if peers.of_first([is_newer])[0]:
            found = find_here()
        elif self._is_used and found is not None and found.step_dir.parent == self._here.child(CHECKPOINTS).path:
            self._copy(found.step, found.position.best_step)  # does nothing if it is there
        return found

    def _bring_back(self, step_here: int | None, identity: Identity, hint: str) -> bool:
        """Copy the newest checkpoint from the second place, if it is newer than that of a step, and say so."""
        folder = self._here.child(CHECKPOINTS)
        if step_here is None:
            newest = newest_complete(folder.path)
            step_here = (step_of_dir_name(newest.name) if newest is not None else None) or -1
        try:
            steps = [step for step in committed_steps(self._place.child(CHECKPOINTS)) if step > step_here]
            record = self._place.read(RUN) if self._place.size(RUN) is not None else None
        except UserError as error:
            if step_here < 0:
                raise UserError(f"--save-to {error}. Fix that, or leave out --save-to") from error
            self._error = str(error)
            self._say()
            return False
        if record is not None:
            where = f"{self._place.shown}/{RUN}"
            with suppress(DamagedRecord):  # each checkpoint says too which run it is of
                identity.check(decode(Path(where), record, RunRecord), self._place.shown, hint=hint)
        for step in reversed(steps):
            there = self._place.child(CHECKPOINTS).child(step_dir_name(step))
            try:
                for name in RECORDS:  # first: the log must know of all that the checkpoint does
                    _write_record(self._here, name, self._place)
                copy_checkpoint(there, folder.child(step_dir_name(step)))
                self._bring_back_best(position_of(folder.path / step_dir_name(step)).best_step)
            except (DamagedCheckpoint, DamagedRecord) as error:
                self._display.warn(f"skipped a damaged checkpoint: {error}")
                continue
            self._display.say(f"brought back step {step} from {self._place.shown}")
            return True
        return False

    def _bring_back_best(self, step: int) -> None:
        """Copy the best checkpoint too, where the second place has it."""
        here, there = (place.child(CHECKPOINTS).child(step_dir_name(step)) for place in (self._here, self._place))
        if here.size(MANIFEST) is None and there.size(MANIFEST) is not None:
            copy_checkpoint(there, here)


def _write_record(to: Place, name: str, of: Place) -> None:
    """Write a record of the run, at once as a whole where the place is a folder; an object store does so itself."""
    if isinstance(to, LocalPlace):
        make_folder(to.path)
        replace_file(to.path / name, b"".join(map(bytes, of.chunks(name))))
    else:
        to.write(name, of.chunks(name))


def _make_way(here: Place, there: Place) -> None:
    """Delete a checkpoint of the same step and run, which other ranks may have written in other files."""
    manifest = here.read(MANIFEST)
    if there.size(MANIFEST) is not None and there.read(MANIFEST) == manifest:
        return
    files = listing_of(f"{here.shown}/{MANIFEST}", manifest).files
    if any(name not in files for name in entries(there, files)):
        _delete(there)


def _delete(place: Place) -> None:
    """Delete a checkpoint, the manifest first, so that half of it is none."""
    place.remove(MANIFEST)
    for name in place.names():
        place.remove(name)
    with suppress(Exception):  # an object store has no folders
        place.path.rmdir() if isinstance(place, LocalPlace) else place.file_system.rmdir(place.path)  # type: ignore[attr-defined]
