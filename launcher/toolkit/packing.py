"""Documents packed into blocks of equal length for causal language models, each document apart from its neighbours."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from shardlaunch.errors import UserError
from shardlaunch.launcher.tensor_data import TensorData

Unit = Literal["byte", "character"]
Rows = Mapping[str, torch.Tensor]
NO_TARGET = -100  # a label that cross_entropy leaves out


def document_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a document begins and ends with: beginning or else end of text; end of text; or none."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return (end if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), end


def tokenized(texts: Sequence[str], tokenizer: Any, *, unit: Unit, framed: bool) -> dict[str, list[np.ndarray]]:
    """Return each text's tokens, and how many units of text each adds to those before it: int32.

    What comes after the last token counts as its own, so that a text's units are all there, whatever the tokenizer.
    Documents that are `framed` have the tokens of `document_frame` around them. Text that reads like a special token is
    text.
    """
    start, end = document_frame(tokenizer) if framed else ([], [])
    encoded = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    columns: dict[str, list[np.ndarray]] = {"tokens": [], "units": []}
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        before = np.cumsum(_units(text, unit))
        ends = np.maximum.accumulate(np.array([0, *(last for _, last in offsets)]))
        ends[-1] = len(text)
        columns["tokens"].append(np.array([*start, *ids, *end], dtype=np.int32))
        columns["units"].append(np.pad(np.diff(before[ends]), (len(start), len(end))).astype(np.int32))
    return columns


def _units(text: str, unit: Unit) -> np.ndarray:
    """Return 0, and for each character of a text 1, or the number of its bytes in UTF-8."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = np.ones(len(points) + 1, dtype=np.int64)
    if unit == "byte":
        for first in (0x80, 0x800, 0x10000):  # from these code points on, a byte more
            sizes[1:] += points >= first
    sizes[0] = 0
    return sizes


def pack(documents: Any, *, block_length: int, window: int = 0) -> TensorData:
    """Return rows of input tokens, their labels (the next token) and document numbers: int32.

    `documents` is a data set of tokenized documents. The last token of a document has no label and is no input. A row
    begins every `block_length` inputs and is as long, or `window` inputs long if that is more: such rows overlap and
    share their memory. The last row is filled up with inputs without labels. `units` holds the labels' units of text.
    """
    tokens, lengths = _flat(documents, "tokens")
    units, _ = _flat(documents, "units")
    lengths = lengths[lengths > 0]
    is_input = np.ones(len(tokens), dtype=bool)
    is_input[np.cumsum(lengths) - 1] = False
    (inputs,) = np.nonzero(is_input)
    num_rows = -(-len(inputs) // block_length)
    if not num_rows:
        raise UserError("no document in the data has a token to predict")
    window = max(window, block_length)
    num_filled = (num_rows - 1) * block_length + window - len(inputs)

    def rows(values: np.ndarray, filling: int) -> torch.Tensor:
        filled = np.concatenate((values, np.full(num_filled, filling))).astype(np.int32)
        return torch.from_numpy(filled).unfold(0, window, block_length)

    return TensorData(
        inputs=rows(tokens[inputs], 0),
        labels=rows(tokens[inputs + 1], NO_TARGET),
        units=rows(units[inputs + 1], 0),
        documents=rows(np.repeat(np.arange(len(lengths)), lengths)[inputs], -1),
    )


def _flat(dataset: Any, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a column of lists as one array, and the lists' lengths."""
    lists = dataset.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    return lists.flatten().to_numpy(), lists.value_lengths().to_numpy()


def cut_blocks(rows: Rows, seeds: np.ndarray | None, *, block_length: int) -> Rows:
    """Return a block of each row of `pack`, from a place that the row's seed decides if the row is longer.

    Without seeds, blocks begin where the rows do.
    """
    longest = rows["inputs"].shape[1]
    if seeds is None or longest == block_length:
        return {name: column[:, :block_length] for name, column in rows.items()}
    places = torch.from_numpy(seeds % (longest - block_length))[:, None] + torch.arange(block_length)
    return {name: column.gather(1, places) for name, column in rows.items()}


def positions(documents: torch.Tensor) -> torch.Tensor:
    """Return each input's position within its document's part of the block, for document numbers (rows, length)."""
    places = torch.arange(documents.shape[1]).expand_as(documents)
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - places.where(is_first, 0).cummax(dim=1).values


def padded(rows: Sequence[Sequence[int]], value: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids filled up at their ends with `value`, and the mask of what is none (int64: rows x longest)."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask
