"""Losses of rows that are compared over a whole global batch, such as embeddings with negatives from all ranks.

The micro-batches run twice (GradCache: Gao, Zhang, Han, Callan 2021). At first without a graph: the ranks put the rows
of all micro-batches together. The gradient of the loss with respect to all rows is computed micro-batch by micro-batch.
Then each micro-batch runs again with a graph, through which the gradient of its rows goes on.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shardlaunch.errors import UserError
from shardlaunch.launcher.logged import collecting
from shardlaunch.launcher.step import Embed, LossOfRows
from shardlaunch.launcher.training.batches import GlobalBatch, MicroBatch
from shardlaunch.launcher.training.forward import Denominators, source_of, to_device, total_loss
from shardlaunch.progress import FORWARD, progress

if TYPE_CHECKING:
    from shardlaunch.launcher.training.updates import Updater

TOLERANCE = 1e-3
"""Relative: how far rows may differ from one pass to the next, of which kernels may differ."""


class Rows:
    """The rows of a global batch, and the gradient of a loss with respect to them."""

    def __init__(
        self,
        run: "Updater",
        batch: GlobalBatch,
        embed: Embed,
        loss: LossOfRows,
        denominators: Denominators,
        seed: Callable[[int, torch.device], None],
        *,
        is_looked_into: bool,
    ) -> None:
        """Run the micro-batches without a graph, and compute loss and gradient. All ranks."""
        self._run = run
        self._batch = batch
        self._embed = embed
        self._seed = seed
        self._is_looked_into = is_looked_into
        mine = {micro_batch.index: rows for micro_batch, rows in zip(batch.micro_batches, self._all(), strict=True)}
        counts = torch.zeros(batch.num_micro_batches + 1, dtype=torch.int64, device=run.world.device)
        for micro_batch in batch.micro_batches:
            if micro_batch.weight:
                counts[micro_batch.index + 1] = len(mine[micro_batch.index][0])
        self._first: list[int] = run.world.sum_of_data(counts).cumsum(0).tolist()
        self._mine = mine
        self.losses = self._differentiate(loss, denominators)

    def _all(self) -> list[list[torch.Tensor]]:
        """Return the rows of this rank's micro-batches, which leave the buffers as they were. All ranks."""
        run, found = self._run, []
        replicas, devices = run.strategy.replicas, run.strategy.devices
        run.buffers.begin_step()
        with torch.no_grad():
            for slot, micro_batch in enumerate(self._batch.micro_batches):
                model, device = replicas[slot % len(replicas)], devices[slot % len(replicas)]
                progress.begin_slot(FORWARD, self._batch.step + 1, slot, len(self._batch.micro_batches))
                self._seed(micro_batch.index, device)
                inputs = to_device(micro_batch.inputs, device)
                with run.precision.forward_context(), collecting(run.recipe):
                    rows = self._checked(self._embed(model, inputs))
                found.append([_whole(each.to(run.world.device)) for each in rows])
                run.buffers.end_micro_batch(model, index=micro_batch.index, weight=0)
        return found

    def _differentiate(self, loss: LossOfRows, denominators: Denominators) -> list[torch.Tensor]:
        """Return the losses of this rank's micro-batches, divided; keep the gradient of the sum of all. All ranks."""
        run, batch = self._run, self._batch
        everything = [self._of_all_ranks(number) for number in range(len(next(iter(self._mine.values()))))]
        for each in everything:
            each.requires_grad_(each.is_floating_point())
        losses, own = [], {}
        for micro_batch in batch.micro_batches:
            first, end = self._first[micro_batch.index : micro_batch.index + 2]
            rows = [each[first:end].detach().requires_grad_(each.requires_grad) for each in everything]
            self._seed(micro_batch.index, run.world.device)
            with collecting(run.recipe) as logged:
                found = loss(rows, everything, first)
                total = total_loss(run.recipe, found, micro_batch, denominators, source=source_of(loss))
            if total is found:  # a single loss
                total = total / max(1, denominators.num_targets)
            losses.append(total.detach())
            if not micro_batch.weight:
                continue
            if logged and run.takes_logs:
                run.logs.add(logged)
            if not total.requires_grad:
                raise UserError(
                    f"the loss of {source_of(loss)} does not depend on the rows that {source_of(self._embed)} returns"
                )
            total.backward()
            own[micro_batch.index] = [each.grad for each in rows]
        self._gradients = {
            index: [
                None if part is None else part if of_rows is None else part + of_rows
                for part, of_rows in zip(self._parts(summed, index), of_own, strict=True)
            ]
            for summed in [[self._summed_gradient(each) for each in everything]]
            for index, of_own in own.items()
        }
        return losses

    def _of_all_ranks(self, number: int) -> torch.Tensor:
        """Return all rows of a tensor, in the order of the micro-batches. All ranks."""
        like = next(iter(self._mine.values()))[number]
        rows = like.new_zeros((self._first[-1], *like.shape[1:]))
        for micro_batch in self._batch.micro_batches:
            if micro_batch.weight:
                first, end = self._first[micro_batch.index : micro_batch.index + 2]
                rows[first:end] = self._mine[micro_batch.index][number]
        return self._run.world.sum_of_data(rows)

    def _summed_gradient(self, rows: torch.Tensor) -> torch.Tensor | None:
        """Return the gradient of all rows, of the losses of all ranks. All ranks."""
        if not rows.requires_grad:
            return None
        return self._run.world.sum_of_data(torch.zeros_like(rows) if rows.grad is None else rows.grad)

    def _parts(self, summed: Sequence[torch.Tensor | None], index: int) -> list[torch.Tensor | None]:
        first, end = self._first[index : index + 2]
        return [None if each is None else each[first:end] for each in summed]

    def propagating(self, micro_batch: MicroBatch) -> Callable[[nn.Module, Any], torch.Tensor]:
        """Return a loss of a micro-batch whose gradient is that of the rows' loss."""

        def loss(model: nn.Module, inputs: Any) -> torch.Tensor:
            rows = self._checked(self._embed(model, inputs))
            if self._is_looked_into:
                self._check_same(rows, self._mine[micro_batch.index])
            gradients = self._gradients.get(micro_batch.index, [None] * len(rows))
            products = [
                (_whole(each) * (torch.zeros_like(each) if gradient is None else gradient.to(each.device))).sum()
                for each, gradient in zip(rows, gradients, strict=True)
                if each.requires_grad
            ]
            if not products:
                raise UserError(f"the rows that {source_of(self._embed)} returns do not depend on trained parameters")
            return sum(products[1:], products[0])

        return loss

    def _checked(self, rows: Any) -> list[torch.Tensor]:
        """Return rows as a list. Raises UserError for what has no rows."""
        found = [rows] if isinstance(rows, torch.Tensor) else list(rows) if isinstance(rows, list | tuple) else []
        are_tensors = bool(found) and all(isinstance(each, torch.Tensor) and each.ndim for each in found)
        if not are_tensors or len({len(each) for each in found}) > 1:
            raise UserError(
                f"{source_of(self._embed)} must return a tensor with one entry per row, or several with as many rows; "
                f"it returned {_described(rows)}"
            )
        return found

    def _check_same(self, rows: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> None:
        """Raise UserError if rows differ from those of the first pass."""
        for now, then in zip(rows, before, strict=True):
            mine = _whole(now.detach()).to(then.device)
            if mine.shape != then.shape or not _is_close(mine, then):
                raise UserError(
                    f"{source_of(self._embed)} returns other rows in its second pass over a micro-batch, so that their "
                    f"gradient would be wrong: it draws from a random generator of its own, or keeps something. "
                    f"Draw from the global generators"
                )


def _is_close(rows: torch.Tensor, others: torch.Tensor) -> bool:
    """Return whether rows differ by no more than kernels do; whole numbers, whose sums may overflow, not at all."""
    if not rows.is_floating_point():
        return bool((rows == others).all())
    return not (rows - others).abs().sum() > TOLERANCE * others.abs().sum()  # NaN is reported elsewhere


def _whole(rows: torch.Tensor) -> torch.Tensor:
    """Return rows in a dtype that sums over the ranks keep."""
    if rows.is_floating_point():
        return rows if rows.dtype == torch.float64 else rows.float()
    return rows.long()


def _described(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_described, value))})"
    return f"shape {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
