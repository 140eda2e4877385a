"""Digests of what goes into a model and comes out: tensors, in collections of any kind."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from shardlaunch.checkpoints.digests import crc64nvme
from shardlaunch.checkpoints.state_digests import crc_of


def leaves_of(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the tensors, arrays, numbers and texts of a value, each with its place in it, such as `[0].logits`.

    Looks into mappings, lists, tuples and dataclasses; other objects are left out.
    """
    if isinstance(value, torch.Tensor | np.ndarray | np.generic | bool | int | float | str | bytes):
        yield path, value
    elif isinstance(value, Mapping) or (hasattr(value, "items") and not isinstance(value, type)):
        for key, item in value.items():
            yield from leaves_of(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves_of(item, f"{path}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves_of(getattr(value, field.name), f"{path}.{field.name}")


def digest_of(leaf: Any) -> int:
    """Return the digest of a leaf: of shape, dtype and bytes."""
    if isinstance(leaf, torch.Tensor):
        values = leaf.detach()
        values = values.to_dense() if values.layout != torch.strided else values
        return crc_of(values, crc64nvme(f"{list(values.shape)} {values.dtype}".encode()))
    if isinstance(leaf, np.ndarray):
        return crc64nvme(leaf.tobytes(), crc64nvme(f"{list(leaf.shape)} {leaf.dtype}".encode()))
    return crc64nvme(repr(leaf).encode())
