"""A data set of tensors, column by column: a batch is indexed as a whole, not row by row."""

import numpy as np
import torch
import xxhash

from shardlaunch.errors import UserError


class TensorData:
    """A data set of tensor columns of equal length, whose batches are indexed as a whole, not row by row."""

    def __init__(self, **columns: torch.Tensor) -> None:
        self.columns = columns
        lengths = {len(column) for column in columns.values()}
        if len(lengths) != 1:
            raise UserError(f"columns have different lengths: { ({k: len(v) for k, v in columns.items()}) }")
        (self._length,) = lengths

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def select(self, indices: np.ndarray) -> "TensorData":
        """Return a data set of the rows at some positions (int64 array)."""
        return TensorData(**self.rows_at(indices))

    def rows_at(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the rows at some positions (int64 array), column by column."""
        rows = torch.from_numpy(indices)
        return {name: column.index_select(0, rows) for name, column in self.columns.items()}

    def fingerprint(self) -> str:
        """Return a digest of column names and contents."""
        digest = xxhash.xxh3_128()
        for name, column in sorted(self.columns.items()):
            digest.update(f"{name} {column.dtype} {tuple(column.shape)}".encode())
            digest.update(column.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
