"""What the image classifier makes of a pretrained model's expectations, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, ConvNextConfig

from shardlaunch.checkpoints.layout import step_dir_name
from shardlaunch.launcher.command_line.parsing import parse_options
from shardlaunch.recipes.image_classifier import ImageClassifier, ImageClassifierOptions
from shardlaunch.text import num_labels_to_load
from tests.recipes import run_quietly, save_small_convnext

ARGV = ("--preset", "demo", "--max-steps", "1", "--tracker", "none", "--threads-per-rank", "1", "--lr", "1e-4")


def test_images_are_as_the_pretrained_model_expects(tmp_path: Path) -> None:
    save_small_convnext(tmp_path / "model")
    argv = [*ARGV, "--model", str(tmp_path / "model"), "--output-dir", str(tmp_path / "run")]
    presets = ImageClassifier.presets
    recipe = ImageClassifier(parse_options(ImageClassifierOptions, presets, argv, program="", description=""))
    samples = {"pixels": torch.full((1, 24, 24, 3), 255, dtype=torch.uint8), "labels": torch.zeros(1)}
    assert recipe.datasets()["train"].columns["pixels"].shape[1:] == (24, 24, 3)
    assert recipe.collate(samples, None)["pixel_values"].unique().tolist() == [2.0], "(1 - 0.5) / 0.25"
    status, output = run_quietly(ImageClassifier, argv)
    assert status == 0, output
    folder = tmp_path / "run" / "checkpoints" / step_dir_name(1)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert list(processor.image_mean) == [0.5, 0.5, 0.5]
    assert processor.size["height"] == 24
    assert len(json.loads((folder / "config.json").read_text())["id2label"]) == 10


def test_heads_are_kept_for_the_same_classes_only() -> None:
    config = ConvNextConfig(id2label={1: "b", 0: "a"})
    assert num_labels_to_load(config, ["a", "b"]) == 2
    assert num_labels_to_load(config, ["b", "a"]) != 2
    assert num_labels_to_load(config, ["a", "b", "c"]) != 2
    assert num_labels_to_load(ConvNextConfig(num_labels=2), ["a", "b"]) == 2, "its classes have no names"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--architecture", "vit", "--patch-size", "5"), "--patch-size 5: does not divide the images' size, 32"),
        (("--architecture", "vit", "--width", "32"), "--width 32 is not a multiple of --heads 3; change one"),
        (("--heads", "2"), "--heads: only for --architecture vit, not resnet; remove it"),
        (("--model", "{folder}", "--layers", "2"), "--layers: only for a model from scratch, not with --model"),
        (("--model", "{folder}"), "has no preprocessor_config.json, which says how its images are normalized"),
        (("--metrics", "f2"), "f2"),
    ],
)
def test_what_cannot_be_is_refused(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    save_small_convnext(tmp_path / "model")
    (tmp_path / "model" / "preprocessor_config.json").unlink()
    given = [word.format(folder=tmp_path / "model") for word in words]
    status, output = run_quietly(ImageClassifier, [*ARGV, *given, "--output-dir", str(tmp_path / "run")])
    assert status == 2, output
    assert message in " ".join(output.split())
