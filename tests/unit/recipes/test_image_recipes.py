"""Errors of the image recipes: one message that says what, where and what to do, before any step."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from shardlaunch import Recipe
from shardlaunch.recipes.cifar_cnn import CifarCnn
from shardlaunch.recipes.mnist_mlp import MnistMlp
from shardlaunch.recipes.vgg16_transfer import Vgg16Transfer
from tests.recipes import run_quietly


def _write_images(path: Path, size: int, mode: str, labels: tuple[int, ...] = (0, 1, 2)) -> None:
    rows = []
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, size=(size, size, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(content, format="PNG")
        rows.append({"bytes": content.getvalue(), "path": None})
    pd.DataFrame({"image": rows, "label": labels}).to_parquet(path)


@pytest.mark.parametrize(
    ("recipe_type", "size", "mode", "words", "says"),
    [
        (MnistMlp, 32, "RGB", (), "must hold 28x28 L images: row 0 is 32x32 RGB"),
        (CifarCnn, 28, "L", (), "must hold 32x32 RGB images: row 0 is 28x28 L"),
        (CifarCnn, 32, "RGBA", (), "row 2 is 32x32 RGBA; --convert-images"),
        (CifarCnn, 32, "RGB", ("--image-column", "photo"), "no column 'photo'"),
        (CifarCnn, 32, "RGB", ("--label-column", "kind"), "Choose with --label-column NAME"),
        (CifarCnn, 32, "RGB", ("--shift", "32"), "--shift 32: must be less than the images' size, 32"),
        (MnistMlp, 28, "L", ("--hidden", "8", "0"), "--hidden 8 0"),
        (Vgg16Transfer, 32, "RGB", ("--classes", "9", "--image-size", "32"), "--classes 9: no such class"),
    ],
)
def test_refused(
    recipe_type: type[Recipe], size: int, mode: str, words: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    for name in ("train", "test"):
        _write_images(tmp_path / f"{name}.parquet", size, mode)
    argv = ["--data", str(tmp_path), "--output-dir", str(tmp_path / "run"), *words]
    status, output = run_quietly(recipe_type, argv)
    assert (status, output.count("error: "), "Traceback" in output) == (2, 1, False), output
    assert says in output
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_class_that_only_the_held_out_data_has(tmp_path: Path) -> None:
    _write_images(tmp_path / "train.parquet", 32, "RGB")
    _write_images(tmp_path / "test.parquet", 32, "RGB", labels=(0, 1, 3))
    status, output = run_quietly(CifarCnn, ["--data", str(tmp_path), "--output-dir", str(tmp_path / "run")])
    assert status == 2
    assert "labels out of range: 3 in the eval data" in output
    assert "those of the training data are 0, 1, 2" in output


def test_options_that_the_demo_leaves_idle(tmp_path: Path) -> None:
    argv = ["--data", "demo", "--max-steps", "1", "--output-dir", str(tmp_path)]
    status, output = run_quietly(Vgg16Transfer, [*argv, "--image-column", "photo"])
    assert status == 2
    assert "--image-column: has no effect with --data demo; remove it" in output


def test_an_option_that_is_its_default_is_refused_as_any_other_is(tmp_path: Path) -> None:
    status, output = run_quietly(CifarCnn, ["--data", "demo", "--width", "32", "--output-dir", str(tmp_path)])
    assert status == 2
    assert "--width: only affects --net modern" in output
