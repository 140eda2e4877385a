"""Folders of images or sounds with a folder for each class."""

from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, Literal

import xxhash

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.reporting.notes import counted, current
from shardlaunch.launcher.toolkit.cache import content_digest
from shardlaunch.launcher.toolkit.files import DataFile, Listing, refuse_unread, split_of

Media = Literal["image", "sound"]
_SOUNDS = {
    *(".wav", ".wave", ".w64", ".flac", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf"),
    *(".mp3", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".wma"),
}
_IMAGES = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def has_class_folders(listing: Listing) -> bool:
    """Return whether a folder is one of images or sounds: it has no tables, and files in folders that are no texts."""
    if listing.folder is None or any(file.kind not in ("other", "text") for file in listing.files):
        return False
    depth = len(listing.folder.parts) + 1
    return any(file.kind == "other" and len(file.path.parts) > depth for file in listing.files)


def media_of(listing: Listing) -> Media:
    """Return what is in the folders of classes. Raises UserError for images beside sounds."""
    sound, image = (_first_of(listing.files, suffixes) for suffixes in (_SOUNDS, _IMAGES))
    if sound is not None and image is not None:
        raise UserError(
            f"--data {listing.source}: has sounds and images: {sound} and {image}; remove those that are no data, or "
            f"name them with --ignore-files"
        )
    return "image" if sound is None else "sound"


def _first_of(files: Sequence[DataFile], suffixes: set[str]) -> PurePath | None:
    return next((file.path for file in files if file.path.suffix.lower() in suffixes), None)


def load_class_folders(listing: Listing, media: Media) -> dict[str, Any]:
    """Return data sets of the columns `image` or `audio`, and `label`, of a folder of images or sounds.

    Raises UserError as `files_of_classes` does.
    """
    import datasets
    import pyarrow as pa

    found = files_of_classes(listing, media)
    classes = sorted({name for _, name in found["train"]})
    column, feature = ("image", datasets.Image()) if media == "image" else ("audio", datasets.Audio(decode=False))
    features = datasets.Features({column: feature, "label": datasets.ClassLabel(names=classes)})
    splits = {}
    for word, files in found.items():
        digest = content_digest(path for path, _ in files)
        labels = [classes.index(name) for _, name in files]
        paths = pa.array([str(path) for path, _ in files], pa.string())
        nothing = pa.nulls(len(files), pa.binary())
        stored = pa.StructArray.from_arrays([nothing, paths], names=["bytes", "path"])
        table = pa.table({column: stored, "label": pa.array(labels, pa.int64())})
        fingerprint = xxhash.xxh3_128_hexdigest(repr((digest, labels, classes)).encode())
        info = datasets.DatasetInfo(features=features)
        splits[word] = datasets.Dataset(datasets.table.InMemoryTable(table), info=info, fingerprint=fingerprint)
        current().data.append(f"{word}: {counted(len(files), media)} in {counted(len({*labels}), 'folder')}")
    return splits


def files_of_classes(listing: Listing, media: Media) -> dict[str, list[tuple[Path, str]]]:
    """Return each split's files, (path, class), of a folder with train/CLASS/ and test/CLASS/, or CLASS/ alone.

    Raises UserError for files elsewhere, and for classes of held-out files that the training data lacks.
    """
    folder, source = listing.folder, listing.source
    assert folder is not None
    inner = {file.path: file.path.relative_to(folder).parts for file in listing.files}
    tops = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name not in listing.skipped)
    roots: dict[str, str] = {}
    for name in tops:
        word = split_of(name)
        if word in roots:
            raise UserError(f"--data {source}: two folders of {word} {media}s: {roots[word]} and {name}; remove one")
        if word:
            roots[word] = name
    if "train" not in roots:
        roots = {"train": ""}
    depth = 2 if roots["train"] else 1  # of the folders between --data and the files
    splits = {name: word for word, name in roots.items()}
    found: dict[str, list[tuple[Path, str]]] = {word: [] for word in roots}
    elsewhere = []
    for file in listing.files:
        parts = inner[file.path]
        if len(parts) == depth + 1 and (depth == 1 or parts[0] in splits):
            found[splits[parts[0]] if depth == 2 else "train"].append((file.path, parts[-2]))
        else:
            elsewhere.append(file)
    where = f"{roots['train']}/CLASS/" if roots["train"] else "CLASS/"
    deeper = next((file.path for file in elsewhere if len(inner[file.path]) > depth + 1), None)
    if deeper is not None and (depth == 1 or inner[deeper][0] in splits):
        outer = inner[deeper][depth - 1]
        raise UserError(f"--data {source}: put {media}s directly into {outer}/, not into a subfolder: {deeper.parent}")
    refuse_unread(source, elsewhere, f"{media}s are expected in {where}, and nothing beside")
    _require_same_classes(listing, roots, found, media)
    return found


def _require_same_classes(
    listing: Listing, roots: dict[str, str], found: dict[str, list[tuple[Path, str]]], media: Media
) -> None:
    source, folder = listing.source, listing.folder
    assert folder is not None
    known = {name for _, name in found["train"]}
    for word, root in roots.items():
        if not found[word]:
            raise UserError(f"--data {source}: no class folders in {root}; put {media}s into {root}/CLASS/")
        unknown = sorted({name for _, name in found[word]} - known)
        if unknown:
            raise UserError(
                f"--data {source}: the classes differ: {root}/{unknown[0]} exists, but "
                f"{roots['train']}/{unknown[0]} does not, or has no {media}s"
            )
    classes = {entry.name for entry in (folder / roots["train"]).iterdir() if entry.is_dir()}
    prefix = f"{roots['train']}/" if roots["train"] else ""
    empty = sorted(prefix + name for name in classes - known if prefix + name not in listing.skipped)
    if empty:
        raise UserError(f"--data {source}: no {media}s in {some(empty)}; add some, or remove the folder")
