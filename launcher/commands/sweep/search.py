"""The search of a sweep by optuna: which options a trial has, and when it is pruned. Its records are in SQLite."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardlaunch.checkpoints.files import error_text
from shardlaunch.errors import UserError
from shardlaunch.launcher.commands.sweep.space import Parameter, grid
from shardlaunch.launcher.seeding import derive_seed

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

DATABASE = "sweep.db"
SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("median", "hyperband", "none")
RANDOM_FIRST = 10
"""Trials that tpe draws at random, before it has seen enough."""
COMPLETE_FIRST = 5
"""Complete trials before the median pruner stops any."""
_NAME = "sweep"


def check_optuna() -> None:
    """Raise UserError where optuna is missing."""
    if find_spec("optuna") is None:
        raise UserError('sweep: optuna is not installed: pip install "shardlaunch[sweep]"')


class Search:
    """The trials of a sweep, in the SQLite file of its folder.

    What the sampler draws for a trial follows from --seed, the trial's number and the trials before, not from the
    process: a sweep that was killed goes on as it would have gone.
    """

    def __init__(
        self, folder: Path, space: Mapping[str, Parameter], *, sampler: str, pruner: str, seed: int, is_min: bool
    ) -> None:
        import optuna

        self._optuna = optuna
        self._space = space
        self._sampler, self._seed = sampler, seed
        self.is_min = is_min
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        optuna.logging.disable_propagation()
        logging.getLogger("alembic").setLevel(logging.ERROR)
        path = folder / DATABASE
        with _explained(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._study = optuna.create_study(
                storage=f"sqlite:///{path}",
                study_name=_NAME,
                direction="minimize" if is_min else "maximize",
                sampler=optuna.samplers.RandomSampler(),
                pruner=_pruner(pruner),
                load_if_exists=True,
            )

    def trials(self) -> "list[FrozenTrial]":
        """Return all trials, by number."""
        return self._study.get_trials(deepcopy=False)

    def ask(self) -> "Trial":
        """Return a new trial, with the values that it is to have."""
        number = len(self.trials())
        self._study.sampler = self._sampler_of(number)
        trial = self._study.ask()
        self._suggest(trial)
        self._study.sampler = self._optuna.samplers.RandomSampler()
        return trial

    def attach(self, trial: "FrozenTrial") -> "Trial":
        """Return a trial that was running when the sweep ended; it keeps its values."""
        self._study.sampler = self._sampler_of(trial.number)  # for values that it has not got yet
        attached = self._optuna.trial.Trial(self._study, trial._trial_id)
        self._suggest(attached)
        self._study.sampler = self._optuna.samplers.RandomSampler()
        return attached

    def _suggest(self, trial: "Trial") -> None:
        for name, one in self._space.items():
            if one.choices:
                trial.suggest_categorical(name, one.choices)
            elif one.is_int:
                trial.suggest_int(name, int(one.low), int(one.high), step=int(one.step or 1), log=one.is_log)
            else:
                trial.suggest_float(name, one.low, one.high, step=one.step, log=one.is_log)

    def completed(self, trial: "Trial", value: float) -> None:
        """Note a trial's objective."""
        self._study.tell(trial, value)

    def pruned(self, trial: "Trial") -> None:
        """Note that a trial was pruned; its objective is the one reported last."""
        self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)

    def failed(self, trial: "Trial") -> None:
        """Note that a trial has failed."""
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)

    def importances(self) -> dict[str, float]:
        """Return how much of the differences between complete trials each option explains; empty for too few trials."""
        complete = [trial for trial in self.trials() if trial.state.name == "COMPLETE"]
        if len(complete) < 4 or len({trial.value for trial in complete}) < 2:
            return {}
        evaluator = self._optuna.importance.FanovaImportanceEvaluator(seed=self._seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = self._optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        return {name: float(share) for name, share in found.items()}

    def _sampler_of(self, number: int) -> "BaseSampler":
        from optuna import samplers

        if self._sampler == "grid":
            return samplers.GridSampler(grid(self._space), seed=self._seed)
        seed = derive_seed(self._seed, "trial", number) % 2**32
        if self._sampler == "random":
            return samplers.RandomSampler(seed=seed)
        return samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_FIRST)


def _pruner(name: str) -> Any:
    import optuna

    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=COMPLETE_FIRST)
    return optuna.pruners.HyperbandPruner() if name == "hyperband" else optuna.pruners.NopPruner()


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raise UserError for a file that is no database, or cannot be written."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (OSError, SQLAlchemyError) as error:
        why = error_text(error) if isinstance(error, OSError) else str(getattr(error, "orig", error)).splitlines()[0]
        raise UserError(f"{path}: cannot be used: {why}; choose another --output-dir") from error


def describe(sampler: str, pruner: str, seed: int) -> str:
    """Say what the sampler and the pruner do."""
    how = {
        "tpe": f"tpe, the first {RANDOM_FIRST} trials at random",
        "random": "random",
        "grid": "grid, all combinations in random order",
    }[sampler]
    when = {
        "median": f"median of the earlier trials at the same evaluation, once {COMPLETE_FIRST} are complete",
        "hyperband": "hyperband, by evaluations, from one to as many as the first complete trial has",
        "none": "none",
    }[pruner]
    return f"sampler: {how} (--seed {seed}); pruner: {when}"
