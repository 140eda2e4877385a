"""The average of the weights in the training: when it is updated, and its evaluation beside that of the weights."""

from collections.abc import Callable, Iterable, Mapping

from shardlaunch.checkpoints.state import MODEL, TensorSpec
from shardlaunch.launcher.options import Options
from shardlaunch.launcher.reporting.tracking import EMA_PREFIX, EVAL_PREFIX, EVAL_PREFIXES
from shardlaunch.launcher.training.evaluation import Evaluation, Evaluator
from shardlaunch.launcher.training.stopping import BrokenOff
from shardlaunch.sharding.strategy import Strategy


class Averaging:
    """The average that a run keeps, if it does."""

    def __init__(self, options: Options, strategy: Strategy, *, num_steps: int) -> None:
        """Raises UserError if no step would be averaged."""
        self._options = options
        self._strategy = strategy
        self._first = options.first_averaged(num_steps) if strategy.average is not None else 0

    @property
    def num_averaged(self) -> int:
        """Return how many updates are in the average."""
        return self._strategy.average.num_updates if self._strategy.average is not None else 0

    def bytes_to_come(self, state: Iterable[TensorSpec]) -> int:
        """Return what an average that has not begun will add to the bytes of a state."""
        average = self._strategy.average
        if average is None or average.num_updates:
            return 0
        trained = {name for name, p in self._strategy.replicas[0].named_parameters() if p.requires_grad}
        averaged = trained | average.buffers.keys()
        return sum(spec.num_bytes for spec in state if spec.section == MODEL and spec.name in averaged)

    def update(self, step: int, *, num_samples: int) -> None:
        """Take in the weights after the update of a step, and the buffers."""
        average = self._strategy.average
        if average is not None and step >= self._first:
            average.update(self._options.weight_of_update(average.num_updates, num_samples))

    def evaluate(
        self, evaluator: Evaluator, on_progress: Callable[[int, int], None], poll: Callable[[], None]
    ) -> Evaluation:
        """Evaluate the weights and, once there is one, their average. All ranks.

        Results have the names that they have in metrics.jsonl. What `poll` raises is raised.
        """
        model, results = self._strategy.replicas[0], {}
        if not (self.num_averaged and self._options.eval_ema == "only"):
            results = _named(EVAL_PREFIX, evaluator.evaluate(model, on_progress, poll))
        if self.num_averaged:
            self._strategy.exchange_average()
            try:
                of_average = evaluator.evaluate(model, on_progress, poll)
            except BrokenOff:
                self._strategy.exchange_average()
                raise
            self._strategy.exchange_average()
            results |= _named(EMA_PREFIX, of_average)
        return results


def _named(prefix: str, results: Evaluation) -> Evaluation:
    return {f"{prefix}{name}": value for name, value in results.items()}


def best_metric_in(results: Mapping[str, object], wanted: str) -> str:
    """Return the full name of the best metric in the results of an evaluation; empty if there is no such result yet.

    `wanted` is what the recipe names: a metric of the average, where there is one, or a full name.
    """
    names = (wanted,) if wanted in results else (f"{prefix}{wanted}" for prefix in reversed(EVAL_PREFIXES))
    return next((name for name in names if name in results), "")
