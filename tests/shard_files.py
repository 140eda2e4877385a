"""Small shards of every kind that is read block by block, with the same samples: numbers, texts and arrays."""

import io
import json
import struct
import tarfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Sample = Mapping[str, Any]


def samples(first: int, count: int) -> list[dict[str, Any]]:
    """Return samples with a number, a text, a whole number as its class, and an array of four numbers."""
    return [
        {"number": n, "txt": f"text {n}", "cls": n % 3, "npy": np.full(4, n % 7, np.float32)}
        for n in range(first, first + count)
    ]


def write_parquet(path: Path, rows: Iterable[Sample], *, row_group_size: int = 10) -> None:
    """Write a Parquet file; arrays become lists."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def write_json_lines(path: Path, rows: Iterable[Sample]) -> None:
    """Write a file of JSON lines, with a blank line behind the first one."""
    lines = [json.dumps({name: np.asarray(value).tolist() for name, value in row.items()}) for row in rows]
    path.write_text("\n\n".join(lines[:1]) + "\n\n" + "\n".join(lines[1:]) + "\n")


def write_tar(path: Path, rows: Iterable[Sample]) -> None:
    """Write an archive with the members KEY.NAME of each sample, in a folder; numbers become `number.id`."""
    with tarfile.open(path, "w") as archive:
        for place, row in enumerate(rows):
            for name, value in row.items():
                if isinstance(value, np.ndarray):
                    buffer = io.BytesIO()
                    np.save(buffer, value)
                    data = buffer.getvalue()
                else:
                    data = str(value).encode()
                add_member(archive, f"./some/{place:05}.{'number.id' if name == 'number' else name}", data)


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to an archive."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_mds(path: Path, rows: Iterable[Sample]) -> None:
    """Write an MDS file of version 2, as MosaicML's streaming library does."""
    columns: dict[str, tuple[str, int | None, Callable[[Any], bytes]]] = {
        "cls": ("int", 8, lambda value: np.int64(value).tobytes()),
        "npy": ("ndarray:float32", None, lambda value: bytes([1 << 2, len(value)]) + value.tobytes()),
        "number": ("uint16", 2, lambda value: np.uint16(value).tobytes()),
        "txt": ("str", None, str.encode),
    }
    names, encodings, sizes = list(columns), [], []
    for encoding, size, _ in columns.values():
        encodings.append(encoding)
        sizes.append(size)
    config = {"column_names": names, "column_encodings": encodings, "column_sizes": sizes}
    head = json.dumps({**config, "compression": None, "format": "mds", "hashes": [], "version": 2}).encode()
    bodies = []
    for row in rows:
        values = [encode(row[name]) for name, (_, _, encode) in columns.items()]
        lengths = [len(value) for value, size in zip(values, sizes, strict=True) if size is None]
        bodies.append(struct.pack(f"<{len(lengths)}I", *lengths) + b"".join(values))
    first = 4 * (len(bodies) + 2) + len(head)
    offsets = np.cumsum([first, *map(len, bodies)]).astype("<u4")
    path.write_bytes(struct.pack("<I", len(bodies)) + offsets.tobytes() + head + b"".join(bodies))


WRITERS: Mapping[str, Callable[[Path, Iterable[Sample]], None]] = {
    "parquet": write_parquet,
    "jsonl": write_json_lines,
    "tar": write_tar,
    "mds": write_mds,
}
