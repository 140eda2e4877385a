"""Images: decoded once into uint8 tensors, then augmented and normalized in operations on whole batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shardlaunch.errors import UserError, some
from shardlaunch.launcher.options import flag, option
from shardlaunch.launcher.seeding import derive_seed
from shardlaunch.launcher.tensor_data import TensorData
from shardlaunch.launcher.toolkit import demo_data
from shardlaunch.launcher.toolkit.column_types import ColumnKind
from shardlaunch.launcher.toolkit.columns import class_names, select_columns
from shardlaunch.launcher.toolkit.datasets import load_splits
from shardlaunch.launcher.toolkit.derived import derived
from shardlaunch.launcher.toolkit.files import FileOptions
from shardlaunch.launcher.toolkit.other_data import numbered, other_rows, other_source
from shardlaunch.launcher.toolkit.pixels import MODES, WORDS, in_mode, opened, upright
from shardlaunch.launcher.toolkit.stored_files import content_of_files, name_of_row, note_conversions

_GRAY = 128
# Of ImageNet's training images scaled to 0..1, as pretrained nets expect.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(kw_only=True)
class ImageOptions(FileOptions):
    """Options of every recipe that reads images."""

    image_column: str = option("", mark="free", group="image")
    """Column of the images (default: image, or img)."""
    label_column: str = option("label", mark="free", group="image")
    """Column of the classes: names or whole numbers."""
    convert_images: bool = option(False, mark="free", group="image")
    """Resize, center-crop and convert images of another size or mode, instead of refusing them."""
    flip: bool = option(False, group="image")
    """Flip half of the training images horizontally."""
    shift: int = option(0, group="image", minimum=0)
    """Shift training images at random by up to N pixels in each direction."""
    cutout: int = option(0, group="image", minimum=0)
    """Gray out a random square of N x N pixels in each training image (DeVries and Taylor 2017)."""


def load_images(options: ImageOptions, *, size: int, num_channels: int) -> tuple[dict[str, TensorData], list[str]]:
    """Return the data sets `train` and `eval` of --data (or the demo's digits), and the names of the classes.

    Columns: `pixels`, uint8 of shape [size, size, num_channels] per row, and `labels`. Pixels are cached on disk.
    Raises UserError for invalid images, and for images of another size or mode without --convert-images.
    """
    source = options.data
    for name, value in (("--shift", options.shift), ("--cutout", options.cutout)):
        if value >= size:
            raise UserError(f"{name} {value}: must be less than the images' size, {size}")
    if source == demo_data.DEMO:
        unused = [
            flag(name) for name in ("image_column", "label_column", "convert_images") if name in options.explicitly_set
        ]
        if unused:
            raise UserError(f"{', '.join(unused)}: has no effect with --data demo; remove it")
        return _demo_digits(options, size=size, num_channels=num_channels)
    splits = load_splits(source, seed=options.seed, columns=_columns(options), options=options)
    splits, column = _selected(splits, options, source)
    splits, classes = class_names(splits, source=source, called=options.label_column)
    decoded = {
        name: _decoded(
            split,
            size=size,
            num_channels=num_channels,
            convert=options.convert_images,
            where=f"--data {source}: column {column!r} of the {name} data",
        )
        for name, split in splits.items()
    }
    return decoded, classes


def _selected(splits: Mapping[str, Any], options: ImageOptions, source: str) -> tuple[dict[str, Any], str]:
    """Return the splits with the columns `image` and `label`, and what the first is called in the data."""
    names = splits["train"].column_names
    column = options.image_column or ("img" if "img" in names and "image" not in names else "image")
    columns = {"image": column, "label": options.label_column, **options.groups()}
    return select_columns(splits, columns, source=source), column


def _demo_digits(options: ImageOptions, *, size: int, num_channels: int) -> tuple[dict[str, TensorData], list[str]]:
    """Return the demo's digits, or in an evaluation on other data these as `eval`, and the names of the classes."""
    classes = [str(digit) for digit in range(10)]
    digits = demo_data.digits(size=size, num_channels=num_channels)
    rows = other_rows(columns=_columns(options), options=options)
    if rows is not None:
        source = other_source()
        rows = numbered(rows, options.label_column, classes, source=source)
        selected, column = _selected({"train": rows}, options, source)
        digits["eval"] = _decoded(
            selected["train"],
            size=size,
            num_channels=num_channels,
            convert=options.convert_images,
            where=f"--data {source}: column {column!r}",
        )
    return digits, classes


def _columns(options: ImageOptions) -> dict[str, ColumnKind]:
    """Return the columns that may be used, with their kinds."""
    images: tuple[str, ...] = (options.image_column,) if options.image_column else ("image", "img")
    return {**dict.fromkeys(images, "any"), options.label_column: "label"}


def _decoded(split: Any, *, size: int, num_channels: int, convert: bool, where: str) -> TensorData:
    import datasets
    from PIL import ImageOps

    mode = MODES[num_channels]
    expected = f"{size}x{size} {mode}"

    def pixels(images: list[Any], rows: list[int]) -> dict[str, Any]:
        found, done, other = [], [], []
        for row, stored in zip(rows, images, strict=True):
            name = name_of_row(row, stored)
            try:
                image, how = upright(opened(stored))
            except Exception as error:  # Pillow's decoders raise many kinds of errors
                raise UserError(f"{where}: {name} is not a readable image ({error})") from error
            if convert:
                try:
                    image, more = in_mode(image, mode)
                except (ValueError, OSError) as error:
                    raise UserError(f"{where}: {name} cannot be converted: {error}") from error
                image, how = ImageOps.fit(image, (size, size)), how | more
            elif f"{image.width}x{image.height} {image.mode}" != expected:
                other.append(f"{name} is {image.width}x{image.height} {image.mode}")
                continue
            found.append(np.asarray(image).reshape(-1))
            done.append(how)
        if other:
            raise UserError(
                f"{where} must hold {expected} images: {some(other)}; --convert-images scales and converts them"
            )
        return {"pixels": found, "done": done}

    try:
        split = split.cast_column("image", datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"{where} must hold images, not {split.features['image']}") from error
    row_type = datasets.List(datasets.Value("uint8"), length=size * size * num_channels)
    kept = {name: datasets.Value("int64") for name in split.column_names if name != "image"}
    decoded = derived(
        split,
        pixels,
        key=("pixels", size, num_channels, convert, *content_of_files(split, "image")),
        doing="decoding images",
        input_columns=["image"],
        with_indices=True,
        remove_columns=["image"],
        features=datasets.Features({"pixels": row_type, "done": datasets.Value("uint8"), **kept}),
    )
    # Read from the Arrow table: row by row, datasets would need 20 times the memory.
    stored = decoded.data.column("pixels").chunks
    flat = torch.from_numpy(np.concatenate([chunk.flatten().to_numpy() for chunk in stored]))
    numbers = {name: torch.from_numpy(np.array(decoded.with_format("numpy")[name][:])) for name in kept}
    note_conversions(np.asarray(decoded.with_format("numpy")["done"][:]), WORDS, noun="image", where=where)
    labels = numbers.pop("label")
    return TensorData(pixels=flat.view(-1, size, size, num_channels), labels=labels, **numbers)


def select_classes(
    splits: Mapping[str, TensorData], names: Sequence[str], *, wanted: Sequence[str], samples_per_class: int, seed: int
) -> tuple[dict[str, TensorData], list[str]]:
    """Return the rows of the `wanted` classes, renumbered in this order, and the names of these classes.

    `wanted` has names or numbers (empty: all classes). `samples_per_class` training rows of each class are chosen by
    `seed` (0: all). Raises UserError for unknown classes and for too few samples.
    """
    numbers = [_class_number(word, names) for word in wanted] or list(range(len(names)))
    if len(set(numbers)) < len(numbers):
        raise UserError(f"--classes {' '.join(wanted)}: a class is listed twice")
    if len(numbers) < 2:
        raise UserError(f"--classes {' '.join(wanted)}: at least two classes are required")
    selected = {}
    for name, split in splits.items():
        labels = split.columns["labels"]
        rows = [torch.nonzero(labels == number).flatten() for number in numbers]
        if name == "train" and samples_per_class:
            least, scarcest = min(zip(map(len, rows), numbers, strict=True))
            if least < samples_per_class:
                raise UserError(
                    f"--samples-per-class {samples_per_class}: class {names[scarcest]} has only {least} training images"
                )
            rng = np.random.default_rng(derive_seed(seed, "samples per class"))
            rows = [found[rng.permutation(len(found))[:samples_per_class]] for found in rows]
        columns = split.rows_at(torch.cat(rows).numpy())
        position = torch.zeros(len(names), dtype=torch.int64).index_copy(
            0, torch.tensor(numbers), torch.arange(len(numbers))
        )
        selected[name] = TensorData(**{**columns, "labels": position[columns["labels"]]})
    return selected, [names[number] for number in numbers]


def _class_number(word: str, names: Sequence[str]) -> int:
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < len(names):
        return int(word)
    raise UserError(f"--classes {word}: no such class; available: {some(names)}")


def augmented(pixels: torch.Tensor, seeds: np.ndarray | None, options: ImageOptions) -> torch.Tensor:
    """Return images ([n, height, width, channels]) augmented at random, each by its own seed; unchanged without seeds.

    Pixels that a shift brings in from beyond the border are reflected ones.
    """
    if seeds is None or not (options.flip or options.shift or options.cutout):
        return pixels
    height, width = pixels.shape[1:3]
    bits = torch.from_numpy(seeds)
    down, right = ((bits >> first_bit) % (2 * options.shift + 1) - options.shift for first_bit in (1, 32))
    rows = _reflected(torch.arange(height) + down[:, None], height)
    columns = _reflected(torch.arange(width) + right[:, None], width)
    if options.flip:
        columns = torch.where((bits & 1).bool()[:, None], width - 1 - columns, columns)
    moved = pixels[torch.arange(len(pixels))[:, None, None], rows[:, :, None], columns[:, None, :]]
    if options.cutout:
        rows, columns = (_span(bits >> first_bit, length, options) for first_bit, length in ((16, height), (48, width)))
        moved.masked_fill_((rows[:, :, None] & columns[:, None, :])[..., None], _GRAY)
    return moved


def _span(numbers: torch.Tensor, length: int, options: ImageOptions) -> torch.Tensor:
    """Return, for each number, a mask of the positions up to `length` that the square placed by it covers."""
    before = torch.arange(length) - (numbers % (length - options.cutout + 1))[:, None]
    return (before >= 0) & (before < options.cutout)


def _reflected(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Return positions with those beyond either end reflected at it."""
    last = length - 1
    return last - (last - positions.abs()).abs()


def normalized(
    pixels: torch.Tensor, *, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> torch.Tensor:
    """Return RGB images (uint8, [n, height, width, 3]) as normalized floats, [n, 3, height, width].

    `mean` and `std` are of the channels, scaled to 0..1, in the data that a pretrained net was trained on.
    They stay in channels-last memory order, in which convolutions on CPU are 20 % faster.
    """
    return ((pixels.float() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)
