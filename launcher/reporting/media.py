"""Pictures, texts and tables of a run: files in its folder, which trackers get too."""

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from shardlaunch.errors import UserError

MEDIA = "media"
"""Folder in that of a run, with one per step."""
_LONGEST_NAME = 80


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture under a name: uint8, of shape (height, width, 1, 3 or 4)."""

    name: str
    pixels: np.ndarray
    suffix = ".png"

    def data(self) -> bytes:
        """Return the content of a file."""
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(self.pixels[:, :, 0] if self.pixels.shape[2] == 1 else self.pixels).save(buffer, "PNG")
        return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text under a name."""

    name: str
    text: str
    suffix = ".txt"

    def data(self) -> bytes:
        """Return the content of a file."""
        return self.text.encode()


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table under a name."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    suffix = ".csv"

    def data(self) -> bytes:
        """Return the content of a file."""
        buffer = io.StringIO(newline="")
        csv.writer(buffer, lineterminator="\n").writerows([self.columns, *self.rows])
        return buffer.getvalue().encode()

    def markdown(self) -> str:
        """Return the table as markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(map(_cell_text, line))} |" for line in lines)


Medium = Picture | Text | Table


def file_name(medium: Medium) -> str:
    """Return the name of a file, another one for each name."""
    plain = re.sub(r"[^\w.-]+", "_", medium.name).lstrip(".")[:_LONGEST_NAME]
    mark = "" if plain == medium.name else f"-{xxhash.xxh3_64_hexdigest(medium.name.encode())[:8]}"
    return f"{plain}{mark}{medium.suffix}"


def picture(name: str, image: Any) -> Picture:
    """Return a picture of an image of PIL, a figure of matplotlib, an array or a tensor. Raises UserError.

    Arrays are (height, width) or (height, width, channels), tensors (height, width) or (channels, height, width), of
    uint8, or of numbers from 0 to 1.
    """
    _check_name(name)
    if hasattr(image, "savefig"):
        image = _of_figure(image)
    if hasattr(image, "convert") and hasattr(image, "getbands"):
        image = np.asarray(image.convert("RGBA" if "A" in image.getbands() else "RGB"))
    is_tensor = isinstance(image, torch.Tensor)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    if not isinstance(image, np.ndarray):
        raise UserError(
            f"log_image({name!r}, ...): takes an image of PIL, a figure, an array or a tensor, not {image!r}"
        )
    shown = f"{'a tensor' if is_tensor else 'an array'} of {image.dtype} and shape {list(image.shape)}"
    if image.ndim == 2:
        image = image[:, :, None]
    elif image.ndim == 3 and is_tensor:
        image = image.transpose(1, 2, 0)
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or not image.size:
        form = "(channels, height, width)" if is_tensor else "(height, width, channels)"
        raise UserError(f"log_image({name!r}, ...): must be of shape (height, width) or {form}, not {shown}")
    if image.dtype == np.bool_:
        image = image * 1.0
    if image.dtype.kind == "f":
        if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
            raise UserError(f"log_image({name!r}, ...): numbers must be from 0 to 1, not as in {shown}")
        image = np.rint(image * 255).astype(np.uint8)
    if image.dtype != np.uint8:
        raise UserError(f"log_image({name!r}, ...): must be uint8, or numbers from 0 to 1, not {shown}")
    return Picture(name=name, pixels=np.ascontiguousarray(image))


def text(name: str, value: str) -> Text:
    """Return a text. Raises UserError."""
    _check_name(name)
    if not isinstance(value, str):
        raise UserError(f"log_text({name!r}, ...): takes a text, not {value!r}")
    return Text(name=name, text=value)


def table(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Return a table. Raises UserError where a row is not as long as the columns, or a cell is no text or number."""
    _check_name(name)
    columns, rows = list(columns), [list(row) for row in rows]
    for number, row in enumerate(rows):
        if len(row) != len(columns):
            raise UserError(
                f"log_table({name!r}, ...): row {number} has {len(row)} cells, and there are {len(columns)} columns"
            )
    return Table(name=name, columns=list(map(str, columns)), rows=[[_cell(name, cell) for cell in row] for row in rows])


def _cell(name: str, cell: Any) -> Any:
    if isinstance(cell, torch.Tensor | np.ndarray | np.generic) and np.prod(cell.shape) == 1:
        cell = cell.item()
    if not isinstance(cell, str | int | float | None):
        raise UserError(f"log_table({name!r}, ...): a cell must be a text or a number, not {cell!r}")
    return cell


def _cell_text(cell: Any) -> str:
    if isinstance(cell, float) and math.isfinite(cell):
        return f"{cell:.6g}"
    return "" if cell is None else " ".join(str(cell).replace("|", "\\|").split())


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"{name!r}: is no name for a picture, text or table; use a short text")


def _of_figure(figure: Any) -> Any:
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)
