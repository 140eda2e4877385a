"""Pretrained features for VGG-16: under the names of torchvision and timm, and files that do not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardlaunch import UserError
from shardlaunch.recipes.vgg16_transfer import Vgg16, Vgg16Transfer, VggOptions

# What comes with the features in their checkpoints.
TORCHVISION_HEAD = ("classifier.0.weight", "classifier.0.bias", "classifier.6.weight")
TIMM_HEAD = ("pre_logits.fc1.weight", "pre_logits.fc2.bias", "head.fc.weight")


def _recipe(source: Path, *, width: float = 0.02, batch_norm: bool = False) -> Vgg16Transfer:
    recipe = Vgg16Transfer(VggOptions(weights=str(source), width=width, batch_norm=batch_norm))
    recipe.class_names = ["cat", "ship"]
    return recipe


def _features(*, batch_norm: bool = False) -> dict[str, torch.Tensor]:
    weights = Vgg16(2, width=0.02, batch_norm=batch_norm).state_dict()
    return {name: tensor for name, tensor in weights.items() if name.startswith("features.")}


@pytest.mark.parametrize(
    ("batch_norm", "positions"),
    [
        (False, (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
        (True, (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)),
    ],
)
def test_convolutions_have_the_names_and_shapes_of_torchvision(batch_norm: bool, positions: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = Vgg16(10, width=1, batch_norm=batch_norm)
    shapes = {name: list(p.shape) for name, p in model.named_parameters() if p.ndim == 4}
    channels = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    assert list(shapes) == [f"features.{position}.weight" for position in positions]
    assert list(shapes.values()) == [[channels[i + 1], channels[i], 3, 3] for i in range(13)]
    assert sum(p.numel() for name, p in model.named_parameters() if "features" in name) == (
        14_714_688 + (8_448 if batch_norm else 0)
    )
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, 10)


@pytest.mark.parametrize("head", [(), TORCHVISION_HEAD, TIMM_HEAD], ids=["features alone", "torchvision", "timm"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_features_are_taken_and_other_heads_left(tmp_path: Path, head: tuple[str, ...], batch_norm: bool) -> None:
    features = _features(batch_norm=batch_norm)
    save_file({**features, **{name: torch.ones(2) for name in head}}, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        found = _recipe(source, batch_norm=batch_norm).weights()
        assert found.keys() == features.keys()
        assert all(torch.equal(found[name], features[name]) for name in features)


def test_files_from_before_batch_norm_counted(tmp_path: Path) -> None:
    features = {n: t for n, t in _features(batch_norm=True).items() if not n.endswith("num_batches_tracked")}
    save_file(features, tmp_path / "model.safetensors")
    assert _recipe(tmp_path, batch_norm=True).weights().keys() == features.keys()


def test_fresh_features_that_would_never_learn() -> None:
    assert VggOptions(weights="none") == VggOptions(weights="")
    recipe = Vgg16Transfer(VggOptions(weights="none", width=0.02, freeze=("features.1*",)))
    recipe.class_names = ["cat", "ship"]
    with pytest.raises(
        UserError, match=r"--freeze: without --weights, features\.10\.weight would keep its random values"
    ):
        recipe.model()


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(_features(), path)
    with pytest.raises(UserError, match=r"features.0.weight is \[1, 3, 3, 3\] and must be \[3, 3, 3, 3\]"):
        _recipe(path, width=0.04).weights()
    with pytest.raises(UserError, match=r"features.1.weight is missing and must be \[1\]"):
        _recipe(path, batch_norm=True).weights()
    save_file({"conv1.weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match=r"features.0.weight is missing"):
        _recipe(path).weights()
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        _recipe(path).weights()
    path.unlink()
    with pytest.raises(UserError, match=r"no model\*.safetensors file in this folder"):
        _recipe(tmp_path).weights()
