"""Documents packed into blocks of equal length for causal language models, without attention across documents."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from shardlaunch.errors import UserError
from shardlaunch.launcher.tensor_data import TensorData
from shardlaunch.launcher.toolkit.derived import derived

Unit = Literal["byte", "character"]
Rows = Mapping[str, torch.Tensor]
NO_TARGET = -100  # the label that cross_entropy ignores


def document_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens before and after a document: BOS (or else EOS), and EOS; empty if the tokenizer has none."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return (end if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]), end


def tokenized(texts: Sequence[str], tokenizer: Any, *, unit: Unit, framed: bool) -> dict[str, list[np.ndarray]]:
    """Return each text's tokens, and the number of units (bytes or characters) that each token covers: int32.

    Text after the last token counts for that token, so that all units of a text are counted with any tokenizer. If
    `framed`, documents get the tokens of `document_frame`. Text that looks like a special token is treated as text.
    """
    start, end = document_frame(tokenizer) if framed else ([], [])
    encoded = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    columns: dict[str, list[np.ndarray]] = {"tokens": [], "units": []}
    for text, ids, offsets in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        before = np.cumsum(units_of(text, unit))
        ends = np.maximum.accumulate(np.array([0, *(last for _, last in offsets)]))
        ends[-1] = len(text)
        columns["tokens"].append(np.array([*start, *ids, *end], dtype=np.int32))
        columns["units"].append(np.pad(np.diff(before[ends]), (len(start), len(end))).astype(np.int32))
    return columns


def units_of(text: str, unit: Unit) -> np.ndarray:
    """Return 0, then for each character of a text 1, or the number of its UTF-8 bytes."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    sizes = np.ones(len(points) + 1, dtype=np.int64)
    if unit == "byte":
        for first in (0x80, 0x800, 0x10000):  # one more byte from these code points on
            sizes[1:] += points >= first
    sizes[0] = 0
    return sizes


def pack(documents: Any, *, block_length: int, window: int = 0) -> TensorData:
    """Return rows of input tokens, their labels (the next token) and document numbers: int32.

    `documents` is a data set of tokenized documents. The last token of a document is not an input, since it has no
    label. A row starts every `block_length` inputs and has max(`block_length`, `window`) inputs: longer rows overlap
    and share memory. The last row is padded with inputs without labels. `units` holds the labels' units of text.
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
    num_padding = (num_rows - 1) * block_length + window - len(inputs)

    def rows(values: np.ndarray, padding: int) -> torch.Tensor:
        padded_values = np.concatenate((values, np.full(num_padding, padding))).astype(np.int32)
        return torch.from_numpy(padded_values).unfold(0, window, block_length)

    return TensorData(
        inputs=rows(tokens[inputs], 0),
        labels=rows(tokens[inputs + 1], NO_TARGET),
        units=rows(units[inputs + 1], 0),
        documents=rows(np.repeat(np.arange(len(lengths)), lengths)[inputs], -1),
    )


def rows_of_documents(documents: Any, *, block_length: int, key: Sequence[object]) -> Any:
    """Return a data set of rows that each hold one document, or a part of one that is longer than `block_length`.

    Columns as those of `pack`, of each row's own length, and `length`. With a column `is_target` (0 or 1 per token),
    other tokens have no label, and a longer document is cut off; rows without a label are left out.
    """
    chosen = "is_target" in documents.column_names

    def cut(*columns: list[list[int]]) -> dict[str, Any]:
        rows: dict[str, list[Any]] = {"inputs": [], "labels": [], "units": [], "length": []}
        for tokens, units, *target in zip(*columns, strict=True):
            labels = [*tokens] if not chosen else np.where(target[0], tokens, NO_TARGET).tolist()
            counted = [*units] if not chosen else np.where(target[0], units, 0).tolist()
            for first in range(0, min(len(tokens) - 1, 1) if chosen else len(tokens) - 1, block_length):
                last = min(first + block_length, len(tokens) - 1)
                if max(labels[first + 1 : last + 1]) >= 0:
                    rows["inputs"].append(tokens[first:last])
                    rows["labels"].append(labels[first + 1 : last + 1])
                    rows["units"].append(sum(counted[first + 1 : last + 1]))
                    rows["length"].append(last - first)
        return rows

    columns = ["tokens", "units", *(["is_target"] if chosen else [])]
    rows = derived(
        documents,
        cut,
        key=("rows", block_length, *key),
        doing="cutting documents",
        input_columns=columns,
        remove_columns=documents.column_names,
    )
    if not len(rows):
        raise UserError("no document in the data has a token to predict")
    return rows


def _flat(dataset: Any, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a column of lists as one array, and the lists' lengths."""
    lists = dataset.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    return lists.flatten().to_numpy(), lists.value_lengths().to_numpy()


def cut_blocks(rows: Rows, seeds: np.ndarray | None, *, block_length: int) -> Rows:
    """Return one block per row of `pack`, at an offset given by the row's seed if the row is longer than a block.

    Without seeds, blocks start at the beginning of the rows.
    """
    longest = rows["inputs"].shape[1]
    if seeds is None or longest == block_length:
        return {name: column[:, :block_length] for name, column in rows.items()}
    places = torch.from_numpy(seeds % (longest - block_length))[:, None] + torch.arange(block_length)
    return {name: column.gather(1, places) for name, column in rows.items()}


def positions(documents: torch.Tensor) -> torch.Tensor:
    """Return each input's position counted from its document's start in the block; `documents`: [rows, length]."""
    places = torch.arange(documents.shape[1]).expand_as(documents)
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - places.where(is_first, 0).cummax(dim=1).values


def padded(rows: Sequence[Sequence[int]], value: int, *, side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids padded with `value` on a side, and their attention mask (both int64, [rows, longest])."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        places = slice(longest - len(row), longest) if side == "left" else slice(len(row))
        ids[number, places] = torch.tensor(row)
        mask[number, places] = 1
    return ids, mask


def shifted_right(labels: torch.Tensor, *, start: int, padding: int) -> torch.Tensor:
    """Return decoder inputs: `start`, then the labels but the last; `padding` where there is no label."""
    inputs = torch.nn.functional.pad(labels, (1, 0), value=start)[:, :-1]
    return inputs.masked_fill(inputs == NO_TARGET, padding)
