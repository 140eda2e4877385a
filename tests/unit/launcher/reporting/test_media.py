"""Pictures, texts and tables: what is taken, the files in the run's folder, and what trackers get."""

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shardlaunch import Callback, Event, UserError, fit
from shardlaunch.launcher.reporting.media import MEDIA, file_name, picture, table, text
from tests.recipes import LinearNet

GRAY = np.arange(6, dtype=np.uint8).reshape(2, 3)
RGB = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (GRAY, GRAY[:, :, None]),
        (GRAY > 2, (GRAY > 2)[:, :, None].astype(np.uint8) * 255),
        (RGB, RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1).to(torch.bfloat16) / 256 * 256 / 255, None),
        (RGB / 255, RGB),
        (Image.fromarray(RGB), RGB),
        (Image.fromarray(GRAY), np.repeat(GRAY[:, :, None], 3, axis=2)),
    ],
)
def test_images_of_many_kinds(image: Any, expected: np.ndarray | None) -> None:
    pixels = picture("x", image).pixels
    assert pixels.dtype == np.uint8
    if expected is not None:
        assert np.array_equal(pixels, expected)
    again = np.asarray(Image.open(_written(picture("x", image))))
    assert np.array_equal(again.reshape(pixels.shape), pixels)


def _written(one: Any) -> Any:
    return io.BytesIO(one.data())


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (GRAY + 0.5, "numbers must be from 0 to 1"),
        (np.full((2, 2), math.nan), "numbers must be from 0 to 1"),
        (GRAY.astype(np.int64), "must be uint8, or numbers from 0 to 1, not an array of int64"),
        (torch.zeros(2, 3, 3), r"must be of shape \(height, width\) or \(channels, height, width\), not a tensor"),
        (np.zeros((3, 4, 5, 6)), r"\(height, width, channels\), not an array of float64 and shape \[3, 4, 5, 6\]"),
        ("cat.png", "takes an image of PIL, a figure, an array or a tensor"),
    ],
)
def test_what_is_no_image(image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        picture("x", image)


def test_names_and_tables() -> None:
    names = [file_name(text(name, "")) for name in ("a", "a/b", "a_b", "../../etc/passwd", ".", "ü b", "a" * 300)]
    assert len(set(names)) == len(names)
    assert all(Path(name).name == name and not name.startswith(".") and len(name) < 120 for name in names)
    made = table("t", ["a", "b|c"], [[torch.ones(()), "x|y\nz"], [np.float32(0.5), None]])
    assert made.markdown().splitlines() == ["| a | b\\|c |", "| --- | --- |", "| 1 | x\\|y z |", "| 0.5 |  |"]
    for rows, message in (([[1]], "row 0 has 1 cells, and there are 2"), ([[1, {}]], "a cell must be a text or")):
        with pytest.raises(UserError, match=message):
            table("t", ["a", "b"], rows)
    with pytest.raises(UserError, match="is no name for a picture"):
        text("", "x")


class Shows(Callback):
    """Shows one of each."""

    def on_evaluation(self, event: Event) -> None:
        event.log_image("picture", RGB)
        event.log_text("words", "two words")
        event.log_table("numbers", ["a", "b"], [[event.step, "x"]])


def test_files_and_tensorboard(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tracker": "tensorboard", "callbacks": [Shows], "threads_per_rank": 1}
    fit(LinearNet, output_dir=tmp_path / "run", max_steps=2, eval_every=1, **options)
    folder = tmp_path / "run" / MEDIA / "step-00000002"
    assert sorted(path.name for path in folder.iterdir()) == ["numbers.csv", "picture.png", "words.txt"]
    assert np.array_equal(np.asarray(Image.open(folder / "picture.png")), RGB)
    assert list(csv.reader((folder / "numbers.csv").read_text().splitlines())) == [["a", "b"], ["2", "x"]]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = tmp_path.glob("run/tensorboard/events.*")
    shown = EventAccumulator(str(file)).Reload()
    assert [image.step for image in shown.Images("picture")] == [1, 2]
    assert shown.Tensors("words/text_summary")[0].tensor_proto.string_val[0] == b"two words"
    assert b"| 2 | x |" in shown.Tensors("numbers/text_summary")[1].tensor_proto.string_val[0]
