"""Images: options, loading, classes, augmentation."""

from shardlaunch.launcher.toolkit.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageOptions,
    augmented,
    load_images,
    normalized,
    select_classes,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "ImageOptions",
    "augmented",
    "load_images",
    "normalized",
    "select_classes",
]
