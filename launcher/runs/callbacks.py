"""Call the hooks of a run's recipe and callbacks, keep the state of callbacks, and end a run whose hook fails."""

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shardlaunch.checkpoints.files import is_there
from shardlaunch.checkpoints.layout import step_dir_name
from shardlaunch.checkpoints.records import Position, as_meant, to_json
from shardlaunch.errors import UserError, some
from shardlaunch.launcher.callbacks import Callback, Event, RunHooks
from shardlaunch.launcher.reporting.recorder import StepReport
from shardlaunch.launcher.reporting.tracking import EMA_PREFIX, EVAL_PREFIX, EVAL_PREFIXES
from shardlaunch.launcher.runs.loading_callbacks import HOOKS, described
from shardlaunch.launcher.runs.result import Result
from shardlaunch.launcher.seeding import derive_seed, seed_model_stream
from shardlaunch.launcher.training.evaluation import Evaluation
from shardlaunch.launcher.training.in_place import changed_parameters
from shardlaunch.launcher.training.loss_check import evaluating

if TYPE_CHECKING:
    from shardlaunch.launcher.runs.run import Run

MOST_STATE_BYTES = 1 << 20


@dataclass(kw_only=True)
class _Member:
    """Something with hooks, and the name that messages have for it."""

    name: str
    hooks: RunHooks
    has_failed: bool = False

    def has(self, hook: str) -> bool:
        return getattr(type(self.hooks), hook) is not getattr(RunHooks, hook) or hook in vars(self.hooks)

    @property
    def has_state(self) -> bool:
        return isinstance(self.hooks, Callback) and type(self.hooks).state_dict is not Callback.state_dict


class Callbacks:
    """The recipe's hooks and the callbacks of a run, which costs nothing in a step where there are none."""

    def __init__(
        self, run: "Run", callbacks: Sequence[Callback], first_states: dict[str, dict[str, Any]] | None = None
    ) -> None:
        """`first_states` keeps those that the callbacks begin with, also in the folds to come."""
        self._run = run
        self._first_states = first_states if first_states is not None else {}
        self._options = copy(run.options)  # what a hook changes there is not the run's
        self._members = [_Member(name="the recipe", hooks=run.recipe)]
        for callback in callbacks:
            name = type(callback).__qualname__
            number = sum(other.name.partition("#")[0] == name for other in self._members) + 1
            self._members.append(_Member(name=name if number == 1 else f"{name}#{number}", hooks=callback))
        self._with = {hook: [member for member in self._members if member.has(hook)] for hook in HOOKS}
        self._looked_into: set[str] = set()
        self._saved: list[Position] = []
        self._at_save: dict[int, Mapping[str, Any]] = {}  # the last evaluation before the save of a step
        self._failure = ""
        self._has_started = False

    def states(self) -> dict[str, dict[str, Any]]:
        """Return the states of the callbacks for a checkpoint. All ranks. Raises UserError."""
        stateful = [member for member in self._members if member.has_state]
        if not stateful:
            return {}
        return self._run.world.peers.together(lambda: {member.name: _state_of(member) for member in stateful})

    def join(self) -> None:
        """Give the callbacks their state, and let the run's trainer call the hooks that there are. All ranks."""
        self._restore()
        trainer = self._run.trainer
        hooks = trainer.hooks

        def on_step(step: int, report: StepReport) -> None:
            hooks.on_step(step, report)
            if self._with["after_update"]:
                self._call("after_update", step, metrics=report.metrics, is_skipped=report.is_skipped)
            self._tell_of_saves()

        def on_evaluation(step: int, results: Evaluation) -> None:
            hooks.on_evaluation(step, results)
            self._call("on_evaluation", step, metrics=results)

        def save(position: Position) -> None:
            last = self._run.recorder.last_evaluation
            self._at_save[position.step] = {name: last[name] for name in last if name.startswith(EVAL_PREFIXES)}
            hooks.save(position)

        trainer.hooks = replace(hooks, on_step=on_step, on_evaluation=on_evaluation, states=self.states)
        if self._run.world.is_main and self._with["on_save"]:
            trainer.hooks = replace(trainer.hooks, save=save)

    def start(self) -> None:
        """Call on_start once. All ranks. Raises UserError if it fails."""
        if not self._has_started:
            self._has_started = True
            resumed = self._run.resumed
            self._call("on_start", self._run.position.step, checkpoint=resumed.step_dir if resumed else None)
            self._raise_failure("")

    def noting(self, then: Callable[[Position], None]) -> Callable[[Position], None]:
        """Return a function, for any thread, that notes that a checkpoint is complete and does something else."""

        def on_saved(position: Position) -> None:
            then(position)
            if self._run.world.is_main and self._with["on_save"]:
                self._saved.append(position)

        return on_saved

    def finish(self) -> None:
        """Tell of the last saves, and end a run of which a hook has failed. All ranks. Raises UserError."""
        self._tell_of_saves()
        last = self._run.saver.last_saved
        self._raise_failure(f" The run has ended; the same command resumes from {last}." if last else "")

    def end(self, result: Result) -> Result:
        """Call on_end if this start has trained, and return the result. All ranks. Raises UserError if it fails."""
        if not self._has_started:
            return result
        evaluation = result.evaluations[-1] if result.evaluations else {}
        names = evaluation.keys() - {"step", "epoch"}
        self._call(
            "on_end",
            result.step,
            metrics={
                name if name.startswith(EMA_PREFIX) else f"{EVAL_PREFIX}{name}": evaluation[name]
                for name in evaluation
                if name in names
            },
            checkpoint=result.last_checkpoint,
            is_finished=result.is_finished,
        )
        self._raise_failure(" All is saved.")
        return result

    def _restore(self) -> None:
        """Give the callbacks their state at the run's position. All ranks. Raises UserError."""
        position, peers = self._run.position, self._run.world.peers
        is_resumed = position.step > 0
        stateful = [member for member in self._members if member.has_state]
        saved: Mapping[str, Any] = as_meant(position.callbacks)
        for member in stateful:
            if member.name not in self._first_states:
                self._first_states[member.name] = peers.together(partial(_state_of, member))
            elif not is_resumed:
                peers.together(partial(_load, member, deepcopy(self._first_states[member.name])))
            if member.name in saved:
                peers.together(partial(_load, member, saved[member.name]))
            elif is_resumed:
                self._run.display.warn(f"callback {member.name}: the checkpoint has no state of it; it begins anew")
        if left := saved.keys() - {member.name for member in stateful}:
            self._run.display.warn(
                f"the checkpoint has the state of the callback {some(sorted(left))}, which this start is not given: it "
                f"is dropped"
            )

    def _tell_of_saves(self) -> None:
        while self._saved:
            position = self._saved.pop(0)
            folder = self._run.checkpoints_dir / step_dir_name(position.step)
            if not is_there(folder):  # the run has gone back behind it
                continue
            metrics = self._at_save.get(position.step, {})
            self._at_save = {step: known for step, known in self._at_save.items() if step > position.step}
            self._call("on_save", position.step, metrics=metrics, checkpoint=folder)

    def _call(self, hook: str, step: int, **told: Any) -> None:
        """Call a hook of all members that have it. All ranks, but on_save on rank 0.

        The first call of a hook is looked into: one that changes the model would make it depend on ranks and resumes.
        """
        members = [member for member in self._with[hook] if not member.has_failed]
        if not members:
            return
        run = self._run
        event = self._event(step, **told)
        model = run.strategy.replicas[0]
        looks = hook not in self._looked_into and hook != "on_save"
        self._looked_into.add(hook)
        problem = ""
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if hook not in ("after_update", "on_save"):
                stack.enter_context(evaluating(model))
            for member in members:
                seed = derive_seed(run.options.seed, "hooks", hook)  # the same numbers on all ranks, and in a resume
                seed_model_stream(seed, step, 0, run.world.device)
                look: AbstractContextManager[list[str]] = changed_parameters(model) if looks else nullcontext([])
                with look as changed:
                    try:
                        getattr(member.hooks, hook)(event)
                    except (Exception, SystemExit) as error:  # the user's own code
                        self._fail(member, hook, step, error)
                if changed:
                    problem = problem or _problem(member, hook, changed)
        if looks:
            run.world.peers.together(partial(_raise, problem))

    def _event(
        self,
        step: int,
        *,
        metrics: Mapping[str, Any] | None = None,
        checkpoint: Path | None = None,
        is_finished: bool = False,
        is_skipped: bool = False,
    ) -> Event:
        run = self._run
        return Event(
            step=step,
            num_steps=run.data.last_step,
            epoch=step // run.data.plan.steps_per_epoch,
            samples=run.data.plan.samples_until(step),
            metrics=metrics or {},
            run_dir=run.output_dir,
            checkpoint=checkpoint,
            is_main=run.world.is_main,
            is_finished=is_finished,
            is_skipped=is_skipped,
            model=run.strategy.replicas[0],
            options=self._options,
            say=run.display.say,
            show=partial(run.recorder.on_medium, step),
        )

    def _fail(self, member: _Member, hook: str, step: int, error: BaseException) -> None:
        """Keep an error; all ranks hear of it with the sums of the next step, and stop at its end."""
        if self._run.options.debug:
            traceback.print_exception(error)
        member.has_failed = True
        owner = member.name if member.hooks is self._run.recipe else f"callback {member.name}"
        self._failure = self._failure or f"{owner}: {hook}() failed at step {step}: {described(error)}."
        self._run.requests.stop()

    def _raise_failure(self, outcome: str) -> None:
        """Raise UserError on all ranks if a hook has failed on any. All ranks."""
        if not any(self._with.values()):
            return
        if error := self._run.world.peers.share_error(self._failure or None):
            raise UserError(
                f"{error}{outcome} Fix it, or go on without: hooks may change, a resume does not compare them"
            )


def _problem(member: _Member, hook: str, changed: Sequence[str]) -> str:
    return (
        f"{member.name}: {hook}() changes {some(sorted(changed))}: the run would depend on when hooks are called, and "
        f"no longer be that of its options. Change a copy (copy.deepcopy), or do it in the recipe's optimizer() or "
        f"forward()"
    )


def _raise(problem: str) -> None:
    if problem:
        raise UserError(problem)


def _load(member: _Member, state: dict[str, Any]) -> None:
    assert isinstance(member.hooks, Callback)
    try:
        member.hooks.load_state_dict(state)
    except Exception as error:  # the user's own code
        raise UserError(f"callback {member.name}: load_state_dict() failed: {described(error)}") from error


def _state_of(member: _Member) -> dict[str, Any]:
    """Return a copy of a callback's state, as JSON gives it back. Raises UserError if that would not be the same."""
    assert isinstance(member.hooks, Callback)
    where = f"callback {member.name}: state_dict()"
    try:
        state = member.hooks.state_dict()
    except Exception as error:  # the user's own code
        raise UserError(f"{where} failed: {described(error)}") from error
    try:
        data = to_json(state)
        back: dict[str, Any] = as_meant(json.loads(data))
    except (TypeError, ValueError, RecursionError):
        data, back = b"", {"": ()}
    if not isinstance(state, dict) or repr(back) != repr(state):
        raise UserError(
            f"{where} must return a dictionary of what JSON holds, and gives back as it was: texts, numbers of Python, "
            f"lists, and dictionaries with texts as keys; it returned {repr(state)[:200]}"
        )
    if len(data) > MOST_STATE_BYTES:
        raise UserError(f"{where} has {len(data):,} bytes as JSON; at most {MOST_STATE_BYTES:,} are kept")
    return back
