"""Data sets from a hub id or a local path, with checks before any training."""

import glob
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import xxhash

from shardlaunch.errors import UserError
from shardlaunch.launcher.reporting.phases import Advance, phase

_LOADERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
# Prefixes of file and split names of held-out data; the first one found is used.
_HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test")
HELD_OUT_FRACTION = 0.1
CACHE_VERSION = 1  # of the results of `derived`: increment it when a function passed to it changes


def load_splits(source: str, *, seed: int, eval_split: str = "") -> dict[str, Any]:
    """Return the data sets `train` and `eval` from a hub id, a folder of data files or images, or a single data file.

    A hub id may include a configuration: OWNER/NAME:CONFIGURATION. A folder may also be one written by `save_to_disk`.
    A .txt file is one row, with its whole content in the column `text`.
    The evaluation data is the split `eval_split`, else the first split or file whose name starts with validation,
    valid, val, dev, eval or test, else a tenth of the training data, chosen by `seed` (of a single text, the last
    tenth). Raises UserError when the source is not found or not readable.
    """
    import datasets

    path = Path(source).expanduser()
    if path.exists():
        splits = _load_path(path)
    elif _looks_like_a_path(source):
        raise UserError(f"--data {source}: no such file or folder")
    else:
        splits = _load_hub(source)
    if "train" not in splits:
        raise UserError(f"--data {source}: no training data; it has {', '.join(splits)}")
    if eval_split and eval_split not in splits:
        raise UserError(f"--eval-split {eval_split}: --data {source} has {', '.join(splits)}")
    held_out = eval_split or next((name for word in _HELD_OUT for name in splits if name.startswith(word)), None)
    train = splits["train"]
    if held_out is not None:
        return {"train": train, "eval": splits[held_out]}
    if len(train) == 1 and train.column_names == ["text"]:
        return {"train": _excerpt(train, 0, 1 - HELD_OUT_FRACTION), "eval": _excerpt(train, 1 - HELD_OUT_FRACTION, 1)}
    if len(train) < 2:
        return {"train": train, "eval": train.select([])}
    halves: datasets.DatasetDict = train.train_test_split(test_size=HELD_OUT_FRACTION, seed=seed)
    return {"train": halves["train"], "eval": halves["test"]}


def _excerpt(texts: Any, begin: float, end: float) -> Any:
    """Return an excerpt of each text; `begin` and `end` are fractions of its length."""
    return derived(
        texts,
        lambda texts: {"text": [text[int(begin * len(text)) : int(end * len(text))] for text in texts]},
        key=("part", begin, end),
        input_columns=["text"],
    )


def _looks_like_a_path(source: str) -> bool:
    """Return whether a source that does not exist looks like a path: a hub id is NAME or OWNER/NAME."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).suffix in _LOADERS


def _load_path(path: Path) -> Any:
    import datasets

    if (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(path))
    if (path / "state.json").exists():
        return {"train": datasets.load_from_disk(str(path))}
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _LOADERS)
    has_folders = path.is_dir() and any(folder.is_dir() and _split_of(folder) for folder in path.iterdir())
    if not files or (has_folders and all(file.suffix == ".txt" for file in files)):  # text files next to the images
        return _built("imagefolder", _image_folders(path), path=path, drop_labels=False, drop_metadata=True)
    for file in files:
        if not file.stat().st_size:
            raise UserError(f"--data {file}: the file is empty")
    kinds = {_LOADERS.get(file.suffix) for file in files}
    if len(kinds) > 1 or None in kinds:
        raise UserError(f"--data {path}: all files must have the same type, one of {', '.join(_LOADERS)}")
    # Texts are documents, whatever their files are called; of tables, each file must say which split it is.
    are_documents = kinds == {"text"} and not any(_split_of(file) for file in files)
    by_split: dict[str, list[str]] = {}
    for file in files:
        word = _split_of(file)
        if word is None and len(files) > 1 and not are_documents:
            raise UserError(
                f"--data {path}: {file.name} must have a name that starts with train, {', '.join(_HELD_OUT)}. "
                f"Rename it, or move it out of the folder"
            )
        by_split.setdefault(word if path.is_dir() and word else "train", []).append(glob.escape(str(file)))
    kind = str(kinds.pop())
    options = {"sample_by": "document"} if kind == "text" else {}
    # One at a time: splits may differ in columns that the run does not use.
    return {word: _built(kind, {word: names}, path=path, **options)[word] for word, names in by_split.items()}


def _split_of(path: Path) -> str | None:
    """Return the split that the name of a file or folder starts with."""
    return next((word for word in ("train", *_HELD_OUT) if path.name.startswith(word)), None)


def _image_folders(path: Path) -> dict[str, list[str]]:
    """Return the file patterns of a folder's images by split: train/CLASS/* and test/CLASS/*, or CLASS/* alone."""
    roots: dict[str, Path] = {}
    for folder in sorted(path.iterdir()):
        word = _split_of(folder) if folder.is_dir() else None
        if word in roots:
            raise UserError(
                f"--data {path}: two folders of {word} images: {roots[word].name} and {folder.name}; remove one"
            )
        if word:
            roots[word] = folder
    if "train" not in roots:
        roots = {"train": path}
    classes = {word: {folder.name for folder in root.iterdir() if folder.is_dir()} for word, root in roots.items()}
    if not classes["train"]:
        raise UserError(f"--data {path}: no {', '.join(_LOADERS)} file in this folder, and no images in train/CLASS/")
    for word, found in classes.items():
        unknown = sorted(found - classes["train"])
        if unknown:
            raise UserError(
                f"--data {path}: the classes differ: {roots[word].name}/{unknown[0]} exists, but "
                f"{roots['train'].name}/{unknown[0]} does not"
            )
        if not found:
            raise UserError(
                f"--data {path}: no class folders in {roots[word].name}; put images into {roots[word].name}/CLASS/"
            )
        for folder in (roots[word] / name for name in sorted(found)):
            deeper = next((entry for entry in sorted(folder.iterdir()) if entry.is_dir()), None)
            if deeper is not None:
                raise UserError(
                    f"--data {path}: put images directly into {folder.name}/, not into a subfolder: {deeper}"
                )
    return {word: [str(Path(glob.escape(str(root))) / "*" / "*")] for word, root in roots.items()}


def _built(kind: str, files: Mapping[str, list[str]], *, path: Path, **options: Any) -> Any:
    """Return the data sets that a builder of the datasets library makes of files, by split."""
    import datasets

    try:
        return datasets.load_dataset(kind, data_files=files, **options)
    except datasets.exceptions.DatasetGenerationError as error:
        if "No space left" in str(error.__cause__):
            raise UserError(f"--data {path}: no space left for the cache of the datasets library (HF_HOME)") from error
        raise UserError(f"--data {path}: not readable: {_one_line(error.__cause__ or error)}") from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        if "corresponds to no data" in str(error):
            raise UserError(f"--data {path}: no rows") from error
        raise UserError(f"--data {path}: not readable: {_one_line(error)}") from error


def _load_hub(source: str) -> Any:
    import datasets

    name, _, configuration = source.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None)
    except Exception as error:
        # The hub client raises many kinds of errors; each means that the data set cannot be loaded.
        raise UserError(
            f"--data {source}: not found locally or on the Hugging Face Hub ({_one_line(error)}). "
            f"Give a local path or a hub id, or use --preset demo, which works offline."
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


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
    function's closure, which differs between processes for tokenizers.
    """
    fingerprint = xxhash.xxh3_64_hexdigest(repr((CACHE_VERSION, dataset._fingerprint, key)).encode())
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

        return dataset.map(shown, batched=True, new_fingerprint=fingerprint, **options)
