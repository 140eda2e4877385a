"""What decides the order of training samples, where it is not the usual shuffle."""

from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Order(Protocol):
    """The order of samples in each epoch: a function of seed and epoch, of which any part can be asked for.

    It keeps no position, so that any rank can begin at any step. Three attributes more are read where it has them:
    `num_in_data`, how many samples the data must have; `fixes_batches`, whether it also says which samples are in a
    batch, which are then not sorted by their lengths; `group_size`, a divisor of the micro-batch size. `digest()`
    returns what the order follows from as a text; without it, the samples of two epochs are digested.
    """

    @property
    def num_samples(self) -> int:
        """The samples per epoch, which need not be as many as the data has."""
        ...

    def samples(self, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the samples (integers from 0) at some positions of an epoch (int64), each time the same."""
        ...


@runtime_checkable
class OrderedData(Protocol):
    """Training data that has a shuffled order of its own, such as data that is read block by block."""

    def shuffled_order(self, options: Any) -> Order:
        """Return the order of a run with these options, unless the recipe or --order chooses another."""
        ...

    def hold_samples(self, order: Any, span: int) -> None:
        """Prepare for an order, of which any `span` consecutive positions are read in any order."""
        ...
