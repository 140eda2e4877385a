"""Data sets from a hub id or a local path, with checks before any training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.reporting.notes import counted, current
from shardlaunch.launcher.splitting import HELD_OUT_FRACTION, held_out_rows
from shardlaunch.launcher.toolkit.cache import content_digest, refusal
from shardlaunch.launcher.toolkit.class_folders import has_class_folders, load_class_folders, media_of
from shardlaunch.launcher.toolkit.column_types import ColumnKind, typed
from shardlaunch.launcher.toolkit.derived import derived
from shardlaunch.launcher.toolkit.files import (
    GROUP,
    HELD_OUT,
    KNOWN,
    MOST_FILES,
    DataFile,
    FileOptions,
    Listing,
    is_no_text,
    listed,
    paths_of,
    refuse_unread,
)
from shardlaunch.launcher.toolkit.mixture import sources_of
from shardlaunch.launcher.toolkit.other_data import with_other_rows
from shardlaunch.launcher.toolkit.tables import ReadFile, read_file

LONGEST_PATH = 4096


def load_splits(
    source: str,
    *,
    seed: int,
    eval_split: str = "",
    columns: Mapping[str, ColumnKind] | None = None,
    options: FileOptions | None = None,
    of_texts: bool = False,
) -> dict[str, Any]:
    """Return the data sets `train` and `eval` from a hub id, files, or a folder of data files, images or sounds.

    A hub id may include a configuration: OWNER/NAME:CONFIGURATION. Files may be several, or patterns. A folder may also
    be one written by `save_to_disk`. A .txt file is one row, with its whole content in the column `text`; `of_texts`
    says that a file with any other unknown name is one too.

    `columns` gives the kind of each column that is used: others are not read. Without it, all are, and a column of a
    CSV file is of numbers if all of its cells are. `options` says which files not to read, how CSV files are written,
    and which column has groups: it becomes the column `group`, whole numbers.

    The evaluation data is the split `eval_split`, else the first split or file whose name starts with validation,
    valid, val, dev, eval or test, else a tenth of the training data, chosen by `seed` (of a single text, the last
    tenth): in equal shares of each class, where a column is a `label`, and without dividing a group. Raises UserError
    when the source is not found or not readable, and for files that would not be read.
    """
    options = options or FileOptions()
    splits = _own_splits(source, columns, options, seed=seed, eval_split=eval_split, of_texts=of_texts)
    return with_other_rows(splits, columns=columns, options=options, of_texts=of_texts)


def _own_splits(
    source: str,
    columns: Mapping[str, ColumnKind] | None,
    options: FileOptions,
    *,
    seed: int,
    eval_split: str,
    of_texts: bool,
) -> dict[str, Any]:
    if sources_of(source):
        raise UserError(f"--data {source}: weights of several sources, which this recipe does not mix; give one source")
    if options.group_column and columns is not None:
        columns = {options.group_column: "text", **columns}
    splits = load_source(source, columns, options, of_texts=of_texts)
    if "train" not in splits:
        raise UserError(f"--data {source}: no training data; it has {', '.join(splits)}")
    if eval_split and eval_split not in splits:
        raise UserError(f"--eval-split {eval_split}: --data {source} has {', '.join(splits)}")
    held_out = eval_split or next((name for word in HELD_OUT for name in splits if name.startswith(word)), None)
    labels = [name for name, kind in (columns or {}).items() if kind == "label"]
    chosen = {"train": splits["train"]} if held_out is None else {"train": splits["train"], "eval": splits[held_out]}
    if options.group_column:
        if held_out is not None and not options.folds:
            raise UserError(
                f"--group-column {options.group_column}: nothing is divided, because --data {source} has evaluation "
                f"data ({held_out}) and there are no --folds; remove it"
            )
        chosen = {name: _with_groups(split, options.group_column, source) for name, split in chosen.items()}
    for name in [name for name in splits if name not in ("train", held_out)]:
        current().data.append(f"split {name} not used ({counted(len(splits[name]), 'row')})")
    if held_out is not None:
        for name, split in chosen.items():
            origin = "train" if name == "train" else held_out
            current().splits[name] = f"{counted(len(split), 'row')}, all of {origin}"
        return chosen
    return _with_held_out(chosen["train"], seed, labels[0] if labels else None, source=source)


def load_source(
    source: str, columns: Mapping[str, ColumnKind] | None, options: FileOptions, *, of_texts: bool = False
) -> dict[str, Any]:
    """Return all data sets of a source by the names that they have there. Raises UserError as `load_splits` does."""
    paths = paths_of(source)
    if paths:
        return _load_paths(source, paths, columns, options, of_texts=of_texts)
    _refuse_file_options(options, "ignore_files", "delimiter", "encoding", where=f"--data {source} is on the hub")
    splits = _load_hub(source)
    current().data.append(f"{source} (Hugging Face Hub)")
    return splits


def _refuse_file_options(options: FileOptions, *names: str, where: str) -> None:
    for name in names:
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')}: has no effect, because {where}; remove it")


def _with_held_out(train: Any, seed: int, label: str | None, *, source: str) -> dict[str, Any]:
    """Return `train` and `eval`: all but a tenth of the rows and that tenth, or such parts of a single text."""
    notes = current()
    if len(train) == 1 and train.column_names == ["text"]:
        notes.splits["train"] = "the first nine tenths of the text"
        notes.splits["eval"] = "the last tenth of the text"
        return {"train": _excerpt(train, 0, 1 - HELD_OUT_FRACTION), "eval": _excerpt(train, 1 - HELD_OUT_FRACTION, 1)}
    if len(train) < 2:
        return {"train": train, "eval": train.select([])}
    classes = _numbered_values(train, label) if label in train.column_names else None
    groups = _numbered_values(train, GROUP) if GROUP in train.column_names else None
    if classes is not None and classes.max(initial=0) == 0:
        classes = None  # reported later: at least two classes are required
    try:
        rows, held_out = held_out_rows(len(train), seed=seed, classes=classes, groups=groups)
    except UserError as error:
        raise UserError(f"--data {source}: {error}") from error
    how = [f"a tenth of {len(train):,}, chosen by --seed"]
    if classes is not None:
        how.append("in equal shares of each class" if groups is None else "in shares of each class that groups allow")
    how += ["with whole groups"] if groups is not None else []
    notes.splits["train"] = f"{len(rows):,} of {len(train):,} rows"
    notes.splits["eval"] = f"{counted(len(held_out), 'row')}: {', '.join(how)}"
    return {"train": train.select(rows), "eval": train.select(held_out)}


def _numbered_values(dataset: Any, column: str | None) -> np.ndarray:
    """Return the position of each row's value among the column's values, in the order in which they appear."""
    table = dataset.select_columns([column]).with_format("arrow")[:]
    values = table.column(0).combine_chunks()
    if not hasattr(values, "dictionary_encode"):
        return np.zeros(len(values), dtype=np.int64)
    try:
        indices = values.dictionary_encode(null_encoding="encode").indices
    except NotImplementedError:  # lists and the like, which are reported later
        return np.zeros(len(values), dtype=np.int64)
    found: np.ndarray = indices.to_numpy(zero_copy_only=False)
    return found


def _with_groups(split: Any, column: str, source: str) -> Any:
    """Return a data set with the column `group`: the position of each row's value of a column among all of them."""
    if column not in split.column_names:
        raise UserError(
            f"--group-column {column}: --data {source} has no such column; it has "
            f"{', '.join(map(repr, split.column_names))}"
        )
    if split.with_format("arrow")[:].column(column).null_count:
        raise UserError(f"--group-column {column}: --data {source} has rows without a value; complete or remove them")
    numbers = _numbered_values(split, column)
    if GROUP in split.column_names:
        split = split.remove_columns([GROUP])
    fingerprint = xxhash.xxh3_128_hexdigest(repr((split._fingerprint, column, GROUP)).encode())
    return split.add_column(GROUP, numbers, new_fingerprint=fingerprint)


def _excerpt(texts: Any, begin: float, end: float) -> Any:
    """Return an excerpt of each text; `begin` and `end` are fractions of its length."""
    return derived(
        texts,
        lambda texts: {"text": [text[int(begin * len(text)) : int(end * len(text))] for text in texts]},
        key=("part", begin, end),
        input_columns=["text"],
    )


def _load_paths(
    source: str,
    paths: Sequence[Path],
    columns: Mapping[str, ColumnKind] | None,
    options: FileOptions,
    *,
    of_texts: bool,
) -> dict[str, Any]:
    if len(paths) == 1 and any((paths[0] / name).exists() for name in ("dataset_dict.json", "state.json")):
        _refuse_file_options(options, "ignore_files", "delimiter", "encoding", where=f"{source} is a saved data set")
        return _load_saved(paths[0], source)
    listing = listed(source, paths, options.ignore_files)
    if not of_texts and has_class_folders(listing):
        media = media_of(listing)
        _refuse_file_options(options, "delimiter", "encoding", where=f"--data {source} is a folder of {media}s")
        return load_class_folders(listing, media)
    others = [file for file in listing.files if file.kind == "other"]
    if not listing.files or (len(others) == len(listing.files) and not of_texts):
        where = "" if paths[0].is_file() else " in this folder, and no images or sounds in train/CLASS/"
        raise UserError(f"--data {source}: no {KNOWN} file{where}")
    if options.delimiter and not any(file.kind in ("csv", "tsv") for file in listing.files):
        raise UserError(f"--delimiter: has no effect, because --data {source} has no CSV or TSV file; remove it")
    if of_texts:
        refuse_unread(source, [file for file in others if is_no_text(file.path)], "not text")
        return _load_tables(listing, columns, options)
    known = [file for file in listing.files if file.kind != "other"]
    splits = _load_tables(replace(listing, files=known), columns, options)
    named = _paths_in(splits.values(), columns) if others else set()
    unread = [file for file in others if file.path.resolve() not in named]
    refuse_unread(source, unread, f"not of a kind that is read ({KNOWN})")
    return splits


def _paths_in(splits: Iterable[Any], columns: Mapping[str, ColumnKind] | None) -> set[Path]:
    """Return the files that the rows refer to, such as images by their paths."""
    import pyarrow as pa

    named: set[Path] = set()
    for split in splits:
        for name in split.column_names:
            values = split.data.column(name)
            if (columns or {}).get(name, "any") == "any" and pa.types.is_struct(values.type):
                has_path = values.type.get_field_index("path") >= 0
                values = pa.chunked_array([chunk.field("path") for chunk in values.chunks]) if has_path else values
            if pa.types.is_string(values.type):
                named |= {Path(text).resolve() for text in values.to_pylist() if text and len(text) < LONGEST_PATH}
    return named


def files_by_split(listing: Listing) -> dict[str, list[DataFile]]:
    """Return the files of each split. Raises UserError if just some have a split's name, or of tables none has."""
    files = listing.files
    if len(files) == 1:
        is_named = listing.folder is not None and files[0].split
        return {files[0].split if is_named and files[0].split else "train": files}
    unnamed = [file for file in files if file.split is None]
    are_texts = all(file.kind in ("text", "other") for file in files)
    # Texts are documents, whatever their files are called, and so are files that are named one by one.
    if len(unnamed) == len(files) and (are_texts or listing.folder is None):
        return {"train": files}
    if unnamed:
        raise UserError(
            f"--data {listing.source}: {some(file.path.name for file in unnamed)} must have a name that starts with "
            f"train, {', '.join(HELD_OUT)}. Rename it, --ignore-files it, or name all files of the training data: "
            f"--data {listing.folder or '.'}/*{unnamed[0].path.suffix}"
        )
    by_split: dict[str, list[DataFile]] = {}
    for file in files:
        by_split.setdefault(str(file.split), []).append(file)
    return by_split


def _load_tables(listing: Listing, columns: Mapping[str, ColumnKind] | None, options: FileOptions) -> dict[str, Any]:
    names = None if columns is None else tuple(dict.fromkeys(n for name in columns for n in (name, name.split(".")[0])))
    by_split = files_by_split(listing)
    read: dict[str, list[ReadFile]] = {}
    for word, files in by_split.items():
        read[word] = []
        for file in files:
            found = read_file(file, columns=names, delimiter=options.delimiter, encoding=options.encoding)
            if columns is not None and _lacks(found, columns):  # all of them, for the message about it
                found = read_file(file, columns=None, delimiter=options.delimiter, encoding=options.encoding)
            read[word].append(found)
    everything = [file for files in read.values() for file in files]
    tables = iter(typed(everything, columns))
    splits = {word: _joined(files, [next(tables) for _ in files]) for word, files in read.items()}
    for word, split in splits.items():
        if not len(split):
            raise UserError(f"--data {some(str(file.file.path) for file in read[word])}: no rows")
    _note_files(read, splits, columns)
    return splits


def _lacks(file: ReadFile, columns: Mapping[str, ColumnKind]) -> bool:
    """Return whether a file lacks a column that is used; of those that are of `any` kind, one is enough."""
    has = {name: not {name, name.split(".")[0]}.isdisjoint(file.names) for name in columns}
    others = [has[name] for name, kind in columns.items() if kind == "any"]
    return not all(has[name] for name, kind in columns.items() if kind != "any") or not any(others or [True])


def _joined(files: Sequence[ReadFile], tables: Sequence[Any]) -> Any:
    """Return one data set of several tables with the same columns."""
    import datasets
    import pyarrow as pa

    first = tables[0]
    for file, table in zip(files, tables, strict=True):
        here, there = ({field.name: _family(field.type) for field in one.schema} for one in (table, first))
        if here != there:
            name = next(name for name in {**there, **here} if here.get(name) != there.get(name))
            raise UserError(
                f"--data {file.file.path}: column {name!r} is {here.get(name, 'missing')}, but "
                f"{there.get(name, 'missing')} in {files[0].file.path}; make the files alike"
            )
    table = first
    if len(tables) > 1:
        alike = [one.select(first.column_names).replace_schema_metadata(first.schema.metadata) for one in tables]
        table = pa.concat_tables(alike, promote_options="permissive")
    types = [(field.name, str(field.type)) for field in table.schema]
    digest = xxhash.xxh3_128_hexdigest(repr(([file.digest for file in files], types)).encode())
    return datasets.Dataset(datasets.table.InMemoryTable(table), fingerprint=digest)


def _family(kind: Any) -> str:
    """Return what a type of Arrow is called, whatever the bits that it takes."""
    import pyarrow as pa

    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_integer(kind):
        return "whole numbers"
    return "numbers" if pa.types.is_floating(kind) else str(kind)


def _note_files(
    read: Mapping[str, Sequence[ReadFile]], splits: Mapping[str, Any], columns: Mapping[str, ColumnKind] | None
) -> None:
    notes = current()
    for word, files in read.items():
        how = [" ".join((file.file.path.name, *(f"({word})" for word in file.how))) for file in files]
        files_word = " files" if len(how) > MOST_FILES else ""
        notes.data.append(f"{word}: {some(how, MOST_FILES)}{files_word}, {counted(len(splits[word]), 'row')}")
    names = dict.fromkeys(name for files in read.values() for file in files for name in file.names)
    used = {part for name in columns or names for part in (name, name.split(".")[0])}
    unused = [name for name in names if name not in used]
    if unused:
        notes.data.append(f"columns not used: {some(map(repr, unused))}")


def _load_saved(path: Path, source: str) -> dict[str, Any]:
    """Return the data sets of a folder that `save_to_disk` wrote, whose content decides what is in the cache."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--data {source}: not readable: {_one_line(error)}") from error
    splits = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    for name, split in splits.items():
        files = [Path(file["filename"]) for file in split.cache_files]
        # The fingerprint that is stored there says nothing of files that were replaced since.
        digest = xxhash.xxh3_128_hexdigest(repr((content_digest(files), str(split.features))).encode())
        # As a table without files: otherwise datasets would write what it caches beside them.
        table = datasets.table.InMemoryTable(split.data.table)
        splits[name] = datasets.Dataset(table, info=split.info, fingerprint=digest)
        current().data.append(f"{name}: {path.name} (saved data set), {counted(len(split), 'row')}")
    return splits


def _load_hub(source: str) -> dict[str, Any]:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        return dict(datasets.load_dataset(name, configuration or None))
    except Exception as error:
        problem = refusal(error)
        if problem is not None:
            raise problem from error
        # The hub client raises many kinds of errors; each means that the data set cannot be loaded.
        raise UserError(
            f"--data {source}: not found locally or on the Hugging Face Hub ({_one_line(error)}). "
            f"Give a local path or a hub id, or use --preset demo, which works offline."
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
