"""The trials of a sweep as they run: started, followed, pruned, stopped and taken up again."""

import math
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from shardlaunch.errors import EXIT_INTERRUPTED, EXIT_STOPPED, UserError
from shardlaunch.launcher.commands.sweep.process import LOG, Evaluated, Follower, TrialProcess, is_busy
from shardlaunch.launcher.commands.sweep.record import (
    MESSAGE,
    SECONDS,
    SPREAD,
    STEP,
    WORDS,
    best_of,
    result_of,
    spread_of,
)
from shardlaunch.launcher.commands.sweep.search import Search
from shardlaunch.launcher.option_fields import flag
from shardlaunch.launcher.training.stopping import handled_signals

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

POLL_S = 0.1
FOLLOW_EVERY_S = 0.5
FIRST_FEW = 3
"""Trials that fail for one reason, before any other ends, end the sweep."""
_PID, _BEGUN = "pid", "begun"
_NUMBER = re.compile(r"\d+(\.\d+)?(e-?\d+)?")


@dataclass(kw_only=True)
class Running:
    """A trial that runs, and its place among those side by side."""

    trial: "Trial"
    place: int
    process: TrialProcess
    follower: Follower
    is_pruned: bool = False
    best: Evaluated | None = None
    followed_at: float = 0.0
    before_s: float = 0.0
    """Seconds of its former starts."""
    reported: int = 0
    """Number of the last evaluation that the search knows of."""
    judged: int = 0
    """Number of the last one after which the pruner was asked."""


class Trials:
    """Runs the trials of a sweep, as many side by side as there are places."""

    def __init__(
        self,
        folder: Path,
        search: Search,
        *,
        objective: str,
        places: Sequence[Mapping[str, str]],
        command: Callable[[Path, Sequence[str]], list[str]],
        words_of: Callable[[Mapping[str, Any]], list[str]],
        say: Callable[[str], None],
    ) -> None:
        """`places` are variables of trials side by side. `command` returns the words that start a trial in a folder.

        `words_of` returns a trial's options as words, or raises UserError for a combination that no run can have.
        """
        self._folder, self._search, self._objective = folder, search, objective
        self._places, self._command, self._words_of, self._say = places, command, words_of, say
        self._running: list[Running] = []
        self._signals: list[int] = []
        self._num_sent = 0
        self._status = 0  # that ends the sweep
        self._failures: list[str] = []  # of this start, as long as no trial ends otherwise
        self._has_ended_well = any(trial.state.name in ("COMPLETE", "PRUNED") for trial in search.trials())

    def run(self, num_trials: int) -> int:
        """Run until there are so many trials, or a signal comes. Return the exit status.

        Raises UserError if the first trials fail for the same reason. No process is left behind.
        """
        former = {number: signal.signal(number, self._on_signal) for number in handled_signals()}
        try:
            interrupted = [trial for trial in self._search.trials() if not trial.state.is_finished()]
            while True:
                self._pass_signals_on()
                while not self._is_ending and len(self._running) < len(self._places):
                    if interrupted:
                        self._take_up(interrupted.pop(0))
                    elif len(self._search.trials()) < num_trials:
                        self._begin()
                    else:
                        break
                if not self._running:
                    trials = self._search.trials()
                    is_done = len(trials) >= num_trials and all(trial.state.is_finished() for trial in trials)
                    return 0 if is_done else self._status
                time.sleep(POLL_S)
                for one in list(self._running):
                    self._look_at(one)
        finally:
            self._end_all()
            for number, handler in former.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._signals.append(number)

    @property
    def _is_ending(self) -> bool:
        return bool(self._signals) or self._status != 0

    def _pass_signals_on(self) -> None:
        for number in self._signals[self._num_sent :]:
            name = signal.Signals(number).name
            if not self._num_sent:
                self._status = self._status or (EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED)
                if self._running:
                    self._say(f"{name}: the running trials save and stop; a second signal ends them at once")
            self._num_sent += 1
            for one in self._running:
                one.process.stop(number)

    def _begin(self) -> None:
        trial = self._search.ask()
        try:
            words = self._words_of(trial.params)
        except UserError as error:
            self._fail(trial, str(error))
            return
        trial.set_user_attr(WORDS, words)
        self._say(f"trial {trial.number}: {_shown(trial.params)}")
        self._start(trial, words)

    def _take_up(self, frozen: "FrozenTrial") -> None:
        """Go on with a trial that was running when the sweep ended, from its last checkpoint."""
        trial = self._search.attach(frozen)
        about = frozen.user_attrs
        folder = self._folder / result_of(frozen).folder
        is_said = False
        while is_busy(folder, about.get(_PID, 0), about.get(_BEGUN, 0.0)):
            if not is_said:
                self._say(f"trial {trial.number}: waiting for its processes of the last start to end")
                is_said = True
            if self._signals:
                return
            time.sleep(POLL_S)
        try:
            words = self._words_of(trial.params)
        except UserError as error:
            self._fail(trial, str(error))
            return
        trial.set_user_attr(WORDS, words)
        self._say(f"trial {trial.number} goes on: {_shown(trial.params)}")
        self._start(trial, words, reported=max(frozen.intermediate_values, default=0))

    def _start(self, trial: "Trial", words: Sequence[str], *, reported: int = 0) -> None:
        taken = {one.place for one in self._running}
        place = next(number for number in range(len(self._places)) if number not in taken)
        folder = self._folder / f"trial-{trial.number:04d}"
        process = TrialProcess(folder, self._command(folder, words), self._places[place])
        trial.set_user_attr(_PID, process.pid)
        trial.set_user_attr(_BEGUN, psutil.Process(process.pid).create_time())
        before_s = trial.user_attrs.get(SECONDS, 0.0)
        one = Running(
            trial=trial,
            place=place,
            process=process,
            follower=Follower(folder),
            before_s=before_s,
            reported=reported,
            judged=max(0, reported - 1),  # it may have been ended before
        )
        self._running.append(one)

    def _look_at(self, one: Running) -> None:
        """Note what a trial has found, prune it, and note its end."""
        status = one.process.status()
        is_due = time.monotonic() - one.followed_at > FOLLOW_EVERY_S or status is not None
        if is_due and not one.is_pruned:
            one.followed_at = time.monotonic()
            self._follow(one)
        if status is None:
            return
        self._running.remove(one)
        if one.is_pruned:
            return
        self._note_time(one)
        if status == 0:
            self._complete(one)
        elif status in (EXIT_STOPPED, EXIT_INTERRUPTED):
            said = one.process.message()
            self._say(f"trial {one.trial.number} has stopped: {said}")
            if not self._signals:  # by itself, as before the end of a job
                self._status = EXIT_STOPPED
                for other in self._running:
                    other.process.stop()
            elif status == EXIT_STOPPED:
                self._status = EXIT_STOPPED
        elif self._signals and len(self._signals) > 1:
            pass  # it was ended at once, and goes on as after a kill
        else:
            self._fail(one.trial, _how(status) + one.process.message())

    def _follow(self, one: Running) -> None:
        """Tell the search of each evaluation in turn, and stop the trial where it is to be pruned.

        What is decided does not depend on how far the run has gone by then.
        """
        evaluations = list(one.follower.evaluations())
        for evaluated in evaluations:
            found = evaluated.metrics.get(self._objective)
            values = found if isinstance(found, list) else [found]
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
                continue
            value = sum(values) / len(values)
            if isinstance(found, list) or self._is_better(value, one.best):  # of folds, all so far
                one.best = evaluated
            if evaluated.number > one.reported:
                one.trial.report(value, evaluated.number)
                one.reported = evaluated.number
            if evaluated.number <= one.judged:
                continue
            one.judged = evaluated.number
            if not evaluated.is_last and one.trial.should_prune():
                one.is_pruned = True
                self._note_time(one)
                one.trial.set_user_attr(STEP, evaluated.step)
                self._search.pruned(one.trial)
                self._has_ended_well = True
                where = "fold" if isinstance(found, list) else "step"
                at = evaluated.number if isinstance(found, list) else evaluated.step
                self._say(f"trial {one.trial.number} pruned at {where} {at}: {self._objective} {value:.6g}")
                one.process.stop()
                return

    def _is_better(self, value: float, than: Evaluated | None) -> bool:
        if than is None:
            return True
        best = than.metrics[self._objective]
        return bool(value < best if self._search.is_min else value > best)

    def _complete(self, one: Running) -> None:
        trial, best = one.trial, one.best
        if best is None:
            names = sorted({name for each in one.follower.evaluations() for name in each.metrics if "/" in name})
            has = f"they have {', '.join(names)}" if names else "there are none: the recipe has no evaluation data"
            self._fail(trial, f"its evaluations have no finite {self._objective}; {has}")
            return
        found = best.metrics[self._objective]
        values = found if isinstance(found, list) else [found]
        if isinstance(found, list) and not best.is_last:
            self._fail(trial, f"{self._objective} is missing or not finite in fold {len(values) + 1}")
            return
        value = sum(values) / len(values)
        trial.set_user_attr(STEP, best.step)
        spread = spread_of(values)
        if spread is not None:
            trial.set_user_attr(SPREAD, spread)
        self._search.completed(trial, value)
        self._has_ended_well = True
        first = best_of([result_of(each) for each in self._search.trials()], is_min=self._search.is_min)
        mark = ", the best so far" if first is not None and first.number == trial.number else ""
        deviation = f" (standard deviation {spread:.3g} over {len(values)} folds)" if spread is not None else ""
        where = "" if isinstance(found, list) else f" at step {best.step}"
        self._say(f"trial {trial.number} complete: {self._objective} {value:.6g}{deviation}{where}{mark}")

    def _fail(self, trial: "Trial", message: str) -> None:
        trial.set_user_attr(MESSAGE, message)
        self._search.failed(trial)
        self._say(f"trial {trial.number} failed ({_shown(trial.params)}): {message}")
        self._failures.append(message)
        alike = {_NUMBER.sub("N", text) for text in self._failures}
        if not self._has_ended_well and len(self._failures) >= max(FIRST_FEW, len(self._places)) and len(alike) == 1:
            raise UserError(
                f"the first {len(self._failures)} trials failed for the same reason: {message}\n"
                f"({self._folder}/trial-*/{LOG} has all that they have said)"
            )

    def _note_time(self, one: Running) -> None:
        one.trial.set_user_attr(SECONDS, round(one.before_s + time.monotonic() - one.process.begun, 2))

    def _end_all(self) -> None:
        """Stop what still runs, and wait for it."""
        for one in self._running:
            one.process.stop()
        for one in self._running:
            while one.process.status() is None:
                self._pass_signals_on()
                time.sleep(POLL_S)
        self._running = []


def _how(status: int) -> str:
    """Return how a process has ended that was killed, as the beginning of a message."""
    number = -status if status < 0 else status - 128
    if number == signal.SIGKILL:
        return "killed (SIGKILL), maybe for want of memory; it said last: "
    return f"ended by {signal.Signals(number).name}: " if number in {*signal.Signals} else ""


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{flag(name)} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
