"""Data sets derived from others, kept in the cache."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import xxhash

from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.phases import Advance, phase
from shardlaunch.launcher.toolkit.cache import cache_dir, filling, refusal

CACHE_VERSION = 2  # increment it when a function passed to `derived` changes


def derived(
    dataset: Any,
    function: Callable[..., dict[str, Any]],
    *,
    key: Sequence[object],
    doing: str = "preparing",
    **options: Any,
) -> Any:
    """Map a data set in batches, cached on disk under `key` and the data set's own fingerprint.

    A person is shown a bar, with the words `doing`. The function runs in this process: tokenizers use all its cores by
    themselves, for less than it costs to pass rows to other processes and back.

    `key` must hold everything besides the data that the result depends on. By default datasets would hash the
    function's closure, which differs between processes for tokenizers. The cache is one folder, whichever folder the
    data set is in; of several processes one fills it.
    """
    fingerprint = xxhash.xxh3_128_hexdigest(repr((CACHE_VERSION, dataset._fingerprint, key)).encode())
    path = cache_dir() / f"{fingerprint}.arrow"
    with ExitStack() as stack:
        advance: Advance | None = None

        def shown(*columns: Any) -> dict[str, Any]:
            nonlocal advance
            if advance is None:  # not before there is something to do: the outcome may be cached
                advance = stack.enter_context(phase(doing, num_rows=len(dataset)))
            outcome = function(*columns)
            first = columns[0]  # a column, or without input_columns all of them by name
            advance(len(next(iter(first.values()))) if isinstance(first, Mapping) else len(first))
            return outcome

        stack.enter_context(filling(path))
        try:
            return dataset.map(shown, batched=True, new_fingerprint=fingerprint, cache_file_name=str(path), **options)
        except (OSError, ValueError) as error:  # datasets goes on to write into a file that an error has closed
            problem = refusal(error, is_of_cache=True)
            if problem is None:
                raise
            raise problem from error


def by_row(
    split: Any,
    function: Callable[..., Mapping[str, Any]],
    *,
    columns: Sequence[str],
    key: Sequence[object],
    where: str,
) -> Any:
    """Return a data set with what `function` returns for each row's `columns` in place of these; cached under `key`.

    It returns columns by name, and is given values in the order of `columns`. Other columns stay.
    A UserError that it raises is raised with `where` in front, in which {row} is the number of the row, from 1.
    """

    def tokenize(*batch: Any) -> dict[str, Any]:
        *of_columns, rows = batch
        found: list[Mapping[str, Any]] = []
        for row, *values in zip(rows, *of_columns, strict=True):
            try:
                found.append(function(*values))
            except UserError as error:
                raise UserError(f"{where.format(row=row + 1)}: {error}") from error
        return {name: [one[name] for one in found] for name in found[0]}

    return derived(
        split,
        tokenize,
        key=key,
        doing="tokenizing",
        with_indices=True,
        input_columns=list(columns),
        remove_columns=list(columns),
    )
