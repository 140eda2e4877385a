"""One stored image as pixels: turned, composited, scaled and cropped as it is meant to be seen, or refused."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from shardlaunch.launcher.toolkit.stored_files import stored_bytes

MODES = {1: "L", 3: "RGB"}  # Pillow's modes by number of channels
# What was done to an image besides scaling and cropping, as bits, and the words for it.
TURNED, COMPOSITED, SCALED, CONVERTED = 1, 2, 4, 8
WORDS = {
    TURNED: "turned by the EXIF orientation",
    COMPOSITED: "with transparency put on white",
    SCALED: "of 16 bits scaled to 8",
    CONVERTED: "of other colors converted",
}
_ORIENTATION = 0x0112
_DEPTH_RATIO = 257  # 65535 / 255


def opened(stored: Mapping[str, Any] | None) -> Any:
    """Return a stored image (`bytes`, or a `path`), whole. Raises many kinds of errors for what is no image."""
    from PIL import Image

    image: Any = Image.open(io.BytesIO(stored_bytes(stored)))
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a photo with a preview is one image
        raise ValueError(f"it has {image.n_frames} frames; store one of them")
    image.load()
    return image


def upright(image: Any) -> tuple[Any, int]:
    """Return an image turned as its EXIF orientation says, and what was done."""
    from PIL import ImageOps

    if image.getexif().get(_ORIENTATION, 1) == 1:
        return image, 0
    return ImageOps.exif_transpose(image), TURNED


def in_mode(image: Any, mode: str) -> tuple[Any, int]:
    """Return an image in the mode L or RGB, and what was done. Raises ValueError if there is no one way to convert it.

    Transparent parts become white; 16 bits are scaled to 8.
    """
    from PIL import Image

    done = 0
    if image.mode.startswith("I;16"):
        values = np.asarray(image.convert("I"), dtype=np.float64)
        image, done = Image.fromarray(np.rint(values / _DEPTH_RATIO).astype(np.uint8)), SCALED
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it has mode {image.mode}, whose range of values is not known; store 8 or 16 bits")
    if image.mode == "LAB":  # Pillow converts it with a color profile only
        raise ValueError("it has mode LAB; store RGB")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:  # otherwise nothing of it is transparent
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            done |= COMPOSITED
        image = image.convert("RGB")
    elif image.mode not in ("1", "L", "P", "RGB"):
        done |= CONVERTED
    return image if image.mode == mode else image.convert(mode), done
