"""Images: reading, invalid images, augmentation by the sample's own seed, selected classes."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from shardlaunch import TensorData, UserError, demo, images
from shardlaunch.images import ImageOptions
from shardlaunch.launcher.reporting.notes import collected
from shardlaunch.launcher.seeding import sample_seeds

SIZE = 8


def _picture(number: int, *, size: int = SIZE, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, size=(size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _stored(picture: Image.Image) -> dict[str, object]:
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return {"bytes": content.getvalue(), "path": None}


def _options(folder: Path, rows: Sequence[dict[str, object] | None], **options: object) -> ImageOptions:
    """Write the rows as training and test data, and return options for them."""
    for name in ("train", "test"):
        table = {"image": list(rows), "label": [number % 2 for number in range(len(rows))]}
        pd.DataFrame(table).to_parquet(folder / f"{name}.parquet")
    return ImageOptions(data=str(folder), **options)  # type: ignore[arg-type]


def test_pixels_are_those_of_the_images(tmp_path: Path) -> None:
    pictures = [_picture(number) for number in range(3)]
    splits, classes = images.load_images(_options(tmp_path, [*map(_stored, pictures)]), size=SIZE, num_channels=3)
    expected = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    assert torch.equal(splits["train"].columns["pixels"], expected)
    assert splits["eval"].columns["labels"].tolist() == [0, 1, 0]
    assert classes == ["0", "1"]


def test_the_column_may_be_named_as_on_the_hub(tmp_path: Path) -> None:
    rows = {"img": [_stored(_picture(0))] * 2, "label": ["cat", "dog"]}
    for name in ("train", "test"):
        pd.DataFrame(rows).to_parquet(tmp_path / f"{name}.parquet")
    splits, classes = images.load_images(ImageOptions(data=str(tmp_path)), size=SIZE, num_channels=3)
    assert (len(splits["train"]), len(splits["eval"]), classes) == (2, 2, ["cat", "dog"])


def test_images_of_another_size_or_mode_are_refused_or_converted(tmp_path: Path) -> None:
    pictures = [_picture(0), _picture(1, size=9), _picture(2, mode="L")]
    options = _options(tmp_path, [*map(_stored, pictures)])
    with pytest.raises(UserError, match="train data must hold 8x8 RGB images: row 1 is 9x9 RGB, row 2 is 8x8 L"):
        images.load_images(options, size=SIZE, num_channels=3)
    options.convert_images = True
    splits, _ = images.load_images(options, size=SIZE, num_channels=3)
    assert splits["train"].columns["pixels"].shape == (3, SIZE, SIZE, 3)
    assert torch.equal(splits["train"].columns["pixels"][0], torch.from_numpy(np.array(pictures[0])))


@pytest.mark.parametrize("row", [None, {"bytes": b"no image", "path": None}, {"bytes": None, "path": "none.png"}])
def test_what_is_no_image_is_refused(tmp_path: Path, row: dict[str, object] | None) -> None:
    options = _options(tmp_path, [_stored(_picture(0)), row])
    with pytest.raises(UserError, match=r"column 'image' of the train data: row 1.* is not a readable image"):
        images.load_images(options, size=SIZE, num_channels=3)


def test_a_column_of_numbers_is_refused(tmp_path: Path) -> None:
    pd.DataFrame({"image": [1, 2] * 4, "label": [0, 1] * 4}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="must hold images, not"):
        images.load_images(ImageOptions(data=str(tmp_path / "train.parquet")), size=SIZE, num_channels=3)


def _folder(folder: Path, *classes: str) -> None:
    for name in classes:
        (folder / name).mkdir(parents=True)
        for number, suffix in enumerate(("png", "jpg", "png")):
            _picture(number).save(folder / name / f"{number}.{suffix}")


def test_a_folder_of_images(tmp_path: Path) -> None:
    _folder(tmp_path / "train", "cat", "ship")
    _folder(tmp_path / "test", "ship")
    splits, classes = images.load_images(ImageOptions(data=str(tmp_path)), size=SIZE, num_channels=3)
    assert classes == ["cat", "ship"]
    assert splits["train"].columns["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    assert splits["eval"].columns["labels"].tolist() == [1, 1, 1]
    splits, _ = images.load_images(ImageOptions(data=str(tmp_path / "train")), size=SIZE, num_channels=3)
    assert (len(splits["train"]), len(splits["eval"])) == (5, 1)


def test_folders_with_other_classes_are_refused(tmp_path: Path) -> None:
    _folder(tmp_path / "train", "cat")
    _folder(tmp_path / "test", "cat", "dog")
    with pytest.raises(UserError, match="classes differ: test/dog exists, but train/dog does not"):
        images.load_images(ImageOptions(data=str(tmp_path)), size=SIZE, num_channels=3)


def test_folders_that_would_lose_images_are_refused(tmp_path: Path) -> None:
    _folder(tmp_path / "train", "cat", "cat/black", "dog")
    with pytest.raises(UserError, match=r"put images directly into cat/, not into a subfolder: .*cat/black"):
        images.load_images(ImageOptions(data=str(tmp_path)), size=SIZE, num_channels=3)
    _folder(tmp_path / "flat" / "train", "cat", "dog")
    (tmp_path / "flat" / "test").mkdir()
    with pytest.raises(UserError, match="no class folders in test"):
        images.load_images(ImageOptions(data=str(tmp_path / "flat")), size=SIZE, num_channels=3)


def test_files_that_change_are_read_anew(tmp_path: Path) -> None:
    """The cache depends on the content of the files in a table, not on their names."""
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    table = {"image": [{"bytes": None, "path": str(path)} for path in paths], "label": [0, 1, 0, 1]}
    for name in ("train", "test"):
        pd.DataFrame(table).to_parquet(tmp_path / f"{name}.parquet")
    for first in (0, 10):
        for number, path in enumerate(paths):
            _picture(first + number).save(path)
        splits, _ = images.load_images(ImageOptions(data=str(tmp_path)), size=SIZE, num_channels=3)
        expected = torch.from_numpy(np.stack([np.asarray(_picture(first + number)) for number in range(4)]))
        assert torch.equal(splits["train"].columns["pixels"], expected)


def _loaded(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """Return the converted training images of a folder as RGB, and what was said of them."""
    with collected() as notes:
        options = ImageOptions(data=str(folder), convert_images=True)
        splits, _ = images.load_images(options, size=SIZE, num_channels=3)
    return splits["train"].columns["pixels"], notes.remarks


def _square(mode: str, ground: Any, mark: Any) -> Image.Image:
    """Return an image with a mark in its upper left quarter."""
    image = Image.new(mode, (SIZE, SIZE), ground)
    image.paste(mark, (0, 0, SIZE // 2, SIZE // 2))
    return image


def _palette(alpha: bytes | int) -> Image.Image:
    image = Image.new("P", (SIZE, SIZE), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (0, 0, SIZE // 2, SIZE // 2))
    image.info["transparency"] = alpha
    return image


RED, WHITE, BLACK, GRAY = [255, 0, 0], [255] * 3, [0] * 3, [128] * 3


@pytest.mark.parametrize(
    ("image", "suffix", "mark", "ground", "says"),
    [
        (_square("RGBA", (0, 0, 0, 0), (255, 0, 0, 255)), "png", RED, WHITE, "with transparency put on white"),
        (_square("RGBA", (0, 0, 0, 255), (255, 0, 0, 255)), "png", RED, BLACK, ""),
        (_square("LA", (0, 0), (0, 255)), "png", BLACK, WHITE, "with transparency put on white"),
        (_palette(0), "png", RED, WHITE, "with transparency put on white"),
        (_palette(bytes([0, 255])), "png", RED, WHITE, "with transparency put on white"),
        (
            Image.fromarray(np.where(np.indices((SIZE, SIZE)).max(0) < SIZE // 2, 0x8000, 0).astype(np.uint16)),
            "png",
            GRAY,
            BLACK,
            "of 16 bits scaled to 8",
        ),
        (_square("I;16B", 65535, 0), "tiff", BLACK, WHITE, "of 16 bits scaled to 8"),
        (_square("CMYK", (0, 0, 0, 255), (0, 255, 255, 0)), "tiff", RED, BLACK, "of other colors converted"),
        (_square("1", 0, 1), "png", WHITE, BLACK, ""),
        (_square("L", 0, 128), "png", GRAY, BLACK, ""),
    ],
)
def test_images_are_converted_as_they_are_seen(
    tmp_path: Path, image: Image.Image, suffix: str, mark: list[int], ground: list[int], says: str
) -> None:
    for name in ("train/a", "train/b", "test/a"):
        (tmp_path / name).mkdir(parents=True)
        image.save(tmp_path / name / f"0.{suffix}")
    pixels, remarks = _loaded(tmp_path)
    assert pixels[0, 0, 0].tolist() == mark
    assert pixels[0, -1, -1].tolist() == ground
    assert (f"2 images of the train data {says}" in str(remarks)) if says else not remarks


def test_photos_are_turned_upright_with_and_without_conversion(tmp_path: Path) -> None:
    image = _square("RGB", (0, 0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    for name in ("train/a", "train/b", "test/a"):
        (tmp_path / name).mkdir(parents=True)
        image.save(tmp_path / name / "0.png", exif=exif)
    pixels, remarks = _loaded(tmp_path)
    assert pixels[0, 0, -1].tolist() == WHITE
    assert pixels[0, 0, 0].tolist() == BLACK
    assert "2 images of the train data turned by the EXIF orientation" in remarks
    splits, _ = images.load_images(ImageOptions(data=str(tmp_path)), size=SIZE, num_channels=3)
    assert torch.equal(splits["train"].columns["pixels"], pixels)


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (Image.new("F", (SIZE, SIZE), 0.5), "mode F, whose range of values is not known"),
        (Image.new("I", (SIZE, SIZE), 70000), "mode I, whose range of values is not known"),
        (Image.new("LAB", (SIZE, SIZE)), "mode LAB; store RGB"),
        ([_picture(0), _picture(1)], "is not a readable image .it has 2 frames"),
    ],
)
def test_images_without_one_conversion_are_refused(tmp_path: Path, image: Any, says: str) -> None:
    (tmp_path / "a").mkdir()
    first, *others = image if isinstance(image, list) else [image]
    first.save(tmp_path / "a" / "0.tiff", **({"save_all": True, "append_images": others} if others else {}))
    _folder(tmp_path, "b")
    with pytest.raises(UserError, match=rf"row \d+ \(.*0.tiff\) .*{says}"):
        _loaded(tmp_path)


def test_every_file_and_folder_of_images_is_read_or_named(tmp_path: Path) -> None:
    """Classes of any name, files of any name, links; what is no image is refused."""
    _folder(tmp_path / "train", "__other__", "cat")
    _folder(tmp_path / "elsewhere", "dog")
    (tmp_path / "train" / "dog").symlink_to(tmp_path / "elsewhere" / "dog", target_is_directory=True)
    (tmp_path / "train" / "cat" / "0.png").rename(tmp_path / "train" / "cat" / "no suffix")
    (tmp_path / "train" / "cat" / ".DS_Store").write_text("")
    options = ImageOptions(data=str(tmp_path / "train"))
    splits, classes = images.load_images(options, size=SIZE, num_channels=3)
    assert classes == ["__other__", "cat", "dog"]
    assert sum(map(len, splits.values())) == 9
    (tmp_path / "train" / "cat" / "notes.doc").write_text("")
    with pytest.raises(UserError, match=r"notes.doc\) is not a readable image"):
        images.load_images(options, size=SIZE, num_channels=3)
    options.ignore_files = ("*.doc",)
    assert sum(map(len, images.load_images(options, size=SIZE, num_channels=3)[0].values())) == 9
    with pytest.raises(UserError, match=r"elsewhere/dog/0.png.* images are expected in train/CLASS/"):
        images.load_images(ImageOptions(data=str(tmp_path), ignore_files=("*.doc",)), size=SIZE, num_channels=3)
    (tmp_path / "train" / "fox").mkdir()
    with pytest.raises(UserError, match="no images in fox; add some, or remove the folder"):
        images.load_images(options, size=SIZE, num_channels=3)


def test_images_replaced_with_the_same_time_are_read_anew(tmp_path: Path) -> None:
    for first in (0, 10):
        for number, name in enumerate(("a", "b")):
            (tmp_path / name).mkdir(exist_ok=True)
            for row in range(2):
                path = tmp_path / name / f"{row}.bmp"
                _picture(first + 2 * number + row).save(path)
                os.utime(path, ns=(10**18, 10**18))
        splits, _ = images.load_images(ImageOptions(data=str(tmp_path)), size=SIZE, num_channels=3)
        found = torch.cat([split.columns["pixels"] for split in splits.values()])
        expected = [np.asarray(_picture(first + number)).sum() for number in range(4)]
        assert sorted(found.sum(dim=(1, 2, 3)).tolist()) == sorted(expected)


def test_digits_are_enlarged_in_equal_channels() -> None:
    digits = demo.digits(size=32, num_channels=3)
    pixels = digits["train"].columns["pixels"]
    assert (pixels.shape, pixels.dtype) == ((4000, 32, 32, 3), torch.uint8)
    assert torch.equal(pixels[..., 0], pixels[..., 2])
    assert sorted(digits["eval"].columns["labels"].unique().tolist()) == list(range(10))


PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, size=(100, SIZE, SIZE, 3), dtype=np.uint8))
SEEDS = sample_seeds(0, 1, np.arange(len(PIXELS)))


def test_augmentation_is_the_samples_own() -> None:
    options = ImageOptions(flip=True, shift=3, cutout=2)
    whole = images.augmented(PIXELS, SEEDS, options)
    order = np.random.default_rng(1).permutation(len(PIXELS))
    for rows in np.split(order, (1, 6, 17)):
        assert torch.equal(images.augmented(PIXELS[torch.from_numpy(rows)], SEEDS[rows], options), whole[rows])
    assert not torch.equal(whole, images.augmented(PIXELS, sample_seeds(0, 2, np.arange(len(PIXELS))), options))
    assert images.augmented(PIXELS, None, options) is PIXELS, "evaluation sees the images as they are"


def test_a_shift_is_a_crop_of_the_padded_image() -> None:
    found = set()
    shifted = images.augmented(PIXELS, SEEDS, ImageOptions(shift=1)).permute(0, 3, 1, 2)
    padded = F.pad(PIXELS.float().permute(0, 3, 1, 2), (1, 1, 1, 1), mode="reflect").to(torch.uint8)
    for image, large in zip(shifted, padded, strict=True):
        crops = {(y, x): large[:, y : y + SIZE, x : x + SIZE] for y in range(3) for x in range(3)}
        corners = [corner for corner, crop in crops.items() if torch.equal(image, crop)]
        assert len(corners) == 1
        found.update(corners)
    assert len(found) == 9, "every shift happens"


def test_half_of_the_images_are_mirrored() -> None:
    flipped = images.augmented(PIXELS, SEEDS, ImageOptions(flip=True))
    same = (flipped == PIXELS).flatten(1).all(dim=1)
    mirrored = (flipped == PIXELS.flip(2)).flatten(1).all(dim=1)
    assert torch.equal(same, ~mirrored)
    assert 30 <= int(same.sum()) <= 70


def test_a_square_is_grayed_out() -> None:
    cut = images.augmented(PIXELS, SEEDS, ImageOptions(cutout=3)) != PIXELS
    found = set()
    for changed in cut.any(dim=3):
        rows, columns = changed.any(dim=1).nonzero().flatten(), changed.any(dim=0).nonzero().flatten()
        assert (len(rows), len(columns)) == (3, 3)
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        found.add((int(rows[0]), int(columns[0])))
    assert len(found) > 20, "of 36 places"


def test_normalized_images_keep_their_order_in_memory() -> None:
    inputs = images.normalized(PIXELS)
    assert inputs.shape == (100, 3, SIZE, SIZE)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(inputs[0, 1, 2, 3], (PIXELS[0, 2, 3, 1] / 255 - 0.456) / 0.224)


def _select(wanted: Sequence[str], samples_per_class: int = 0) -> tuple[dict[str, TensorData], list[str]]:
    data = TensorData(pixels=torch.arange(12), labels=torch.arange(12) % 3)
    return images.select_classes(
        {"train": data, "eval": data},
        ["cat", "dog", "ship"],
        wanted=wanted,
        samples_per_class=samples_per_class,
        seed=0,
    )


def test_classes_are_chosen_and_renumbered() -> None:
    splits, names = _select(("2", "cat"), 3)
    assert names == ["ship", "cat"]
    assert splits["train"].columns["labels"].tolist() == [0, 0, 0, 1, 1, 1]
    assert {pixel % 3 for pixel in splits["train"].columns["pixels"][:3].tolist()} == {2}
    assert splits["eval"].columns["pixels"].tolist() == [2, 5, 8, 11, 0, 3, 6, 9]
    assert _select(())[1] == ["cat", "dog", "ship"]


@pytest.mark.parametrize(
    ("wanted", "samples", "says"),
    [
        (("cow",), 0, "no such class"),
        (("cat", "0"), 0, "listed twice"),
        (("cat",), 0, "--classes cat: at least two classes are required"),
        ((), 5, "class cat has only 4 training images"),
    ],
)
def test_classes_that_are_not_there(wanted: tuple[str, ...], samples: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        _select(wanted, samples)
