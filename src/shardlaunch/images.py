"""Images: options, loading, classes, augmentation."""

from shardlaunch.launcher.toolkit.images import ImageOptions, augmented, load_images, normalized, select_classes

__all__ = ["ImageOptions", "augmented", "load_images", "normalized", "select_classes"]
