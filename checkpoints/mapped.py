"""Tensors that a library has mapped into memory: where they are in their files."""

import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from shardlaunch.checkpoints.stored import Place, StoredTensors
from shardlaunch.checkpoints.tensorfile import read_header
from shardlaunch.errors import UserError

_MAPS = Path("/proc/self/smaps")  # Linux; elsewhere nothing is known to be in a file
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) \S+ \d+ +(/.*\.safetensors)$")
_CHANGED = re.compile(r"(?:Anonymous|Swap): +(\d+) kB")


def in_files(tensors: Mapping[str, torch.Tensor]) -> StoredTensors:
    """Return tensors of which those that are unchanged views of safetensors files are read from there when needed.

    The others are kept as they are. No tensor may be changed meanwhile.
    """
    regions = _regions()
    places: dict[str, Place] = {}
    headers: dict[Path, dict[int, Place]] = {}
    for name, tensor in tensors.items():
        address = tensor.data_ptr()
        for begin, end, offset, path in regions:
            if begin <= address < end:
                if path not in headers:
                    headers[path] = _by_offset(path)
                place = headers[path].get(offset + address - begin)
                if place is not None and _is_same(tensor, place):
                    places[name] = place
    return StoredTensors(places=places, tensors={name: t for name, t in tensors.items() if name not in places})


def _is_same(tensor: torch.Tensor, place: Place) -> bool:
    entry = place.entry
    return (tensor.dtype, tuple(tensor.shape)) == (entry.dtype, entry.shape) and tensor.is_contiguous()


def _by_offset(path: Path) -> dict[int, Place]:
    try:
        header = read_header(path, follows_links=True)
    except UserError:  # a dtype that is not known here
        return {}
    return {entry.offset: Place(path=path, entry=entry) for entry in header.values() if prod(entry.shape)}


def _regions() -> list[tuple[int, int, int, Path]]:
    """Return begin, end, offset in the file, and file, of the mapped safetensors files that nobody has written to."""
    regions: list[tuple[int, int, int, Path]] = []
    if not _MAPS.exists():
        return regions
    changed: set[Path] = set()
    path = None
    for line in _MAPS.read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            found = _REGION.match(line)
            path = Path(found[4]) if found else None
            if found:
                begin, end, offset = (int(found[number], 16) for number in (1, 2, 3))
                regions.append((begin, end, offset, Path(found[4])))
        elif path is not None and (size := _CHANGED.match(line)) and int(size[1]):
            changed.add(path)  # pages of a private mapping that differ from the file's
    return [region for region in regions if region[3] not in changed]
