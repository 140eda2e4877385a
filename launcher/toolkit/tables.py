"""Files of rows as tables, read once into the cache: the content of a file names the table, not its path or time."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from shardlaunch.errors import UserError
from shardlaunch.launcher.toolkit.cache import cache_dir, content_digest, filled
from shardlaunch.launcher.toolkit.conll_files import conll_table
from shardlaunch.launcher.toolkit.csv_files import csv_table, not_encoded
from shardlaunch.launcher.toolkit.files import DataFile
from shardlaunch.launcher.toolkit.json_files import json_table

READER_VERSION = 1  # of the tables in the cache: increment it when a file is read in another way
_OURS = b"shardlaunch"
_MARKS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


@dataclass(frozen=True, kw_only=True)
class ReadFile:
    """A file's rows. `names` are all of its columns, `digest` is of its content and how it was read."""

    file: DataFile
    table: Any
    names: Sequence[str]
    how: Sequence[str]
    digest: str


def read_file(file: DataFile, *, columns: Sequence[str] | None, delimiter: str = "", encoding: str = "") -> ReadFile:
    """Return the rows of a file, with the columns that are used (None: all), from the cache if they are there.

    The cells of CSV and TSV files are text. Raises UserError for what cannot be read.
    """
    import pyarrow as pa

    with _readable(file):
        if not file.path.stat().st_size:
            raise UserError(f"--data {file.path}: the file is empty")
        key = (READER_VERSION, content_digest([file.path]), file.kind, file.compression, columns, delimiter, encoding)
        digest = xxhash.xxh3_128_hexdigest(repr(key).encode())
        if file.kind in ("text", "other"):  # small and many, or large and few: the cache would not help
            table, facts = _text_table(file, encoding)
            return ReadFile(file=file, table=table, digest=digest, **facts)

        def fill(path: Path) -> None:
            batches, schema, facts = _batches(file, columns, delimiter=delimiter, encoding=encoding)
            schema = schema.with_metadata({**(schema.metadata or {}), _OURS: json.dumps(facts).encode()})
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as stream:
                for batch in batches:
                    stream.write_batch(batch.replace_schema_metadata(schema.metadata))

        path = cache_dir() / "tables" / f"{digest}.arrow"
        filled(path, fill)
        try:
            table = _stored(path)
        except (pa.ArrowInvalid, OSError):  # cut short by a crash of the machine: made anew, once
            path.unlink()
            table = _stored(filled(path, fill))
    metadata = dict(table.schema.metadata)
    facts = json.loads(metadata.pop(_OURS))
    return ReadFile(file=file, table=table.replace_schema_metadata(metadata), digest=digest, **facts)


def _stored(path: Path) -> Any:
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


@contextmanager
def _readable(file: DataFile) -> Iterator[None]:
    """Turn the errors of pyarrow and of the file system into a UserError that names the file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, NotImplementedError) as error:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"--data {file.path}: not readable: {text}") from error


def _batches(
    file: DataFile, columns: Sequence[str] | None, *, delimiter: str, encoding: str
) -> tuple[Iterable[Any], Any, dict[str, Any]]:
    """Return a file's record batches, their schema, and `names` and `how` as of `ReadFile`."""
    where = f"--data {file.path}"
    if file.kind in ("parquet", "arrow"):
        return _binary_batches(file, columns)
    content, found = _utf8(file, encoding)
    if file.kind in ("csv", "tsv"):
        table, facts = csv_table(content, columns=columns, delimiter=delimiter, is_tsv=file.kind == "tsv", where=where)
    elif file.kind == "conll":
        table, facts = conll_table(_decoded(content, "utf-8", where), where=where)
        if columns is not None:
            table = table.select([name for name in table.column_names if name in columns])
    else:
        text = _decoded(content, "utf-8", where)
        table, facts = json_table(text, columns=columns, is_lines=file.kind == "jsonl", where=where)
    facts["how"] += [] if found == "utf-8" else [found]
    return table.to_batches(), table.schema, facts


def _content(file: DataFile) -> Any:
    """Return the bytes of a file, decompressed, as a buffer."""
    import pyarrow as pa

    if file.compression is None:
        return pa.memory_map(str(file.path)).read_buffer()
    with pa.input_stream(str(file.path), compression=file.compression) as stream:
        return pa.py_buffer(stream.read())


def _utf8(file: DataFile, encoding: str) -> tuple[Any, str]:
    """Return the text of a file as a buffer of UTF-8 without a byte order mark, and the encoding that it had."""
    import pyarrow as pa

    content = _content(file)
    mark = next((mark for mark in _MARKS if bytes(content[: len(mark)]) == mark), None)
    encoding = encoding.lower().replace("utf8", "utf-8").replace("_", "-") or (_MARKS[mark] if mark else "utf-8")
    if encoding in ("utf-8", "utf-8-sig"):
        return content[3:] if mark == b"\xef\xbb\xbf" else content, "utf-8"
    return pa.py_buffer(_decoded(content, encoding, f"--data {file.path}").encode()), encoding


def _decoded(content: Any, encoding: str, where: str) -> str:
    try:
        return str(bytes(content).decode(encoding))
    except UnicodeDecodeError as error:
        raise not_encoded(bytes(content), encoding, where) from error


def _text_table(file: DataFile, encoding: str) -> tuple[Any, dict[str, Any]]:
    """Return a table of one row: the text of a file."""
    import pyarrow as pa

    where = f"--data {file.path}"
    content, found = _utf8(file, encoding)
    text = _decoded(content, "utf-8", where)
    if "\0" in text:
        raise UserError(f"{where}: holds null bytes, so it is no text; remove it, or name it with --ignore-files")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return pa.table({"text": [text]}), {"names": ["text"], "how": [] if found == "utf-8" else [found]}


def _binary_batches(file: DataFile, columns: Sequence[str] | None) -> tuple[Iterable[Any], Any, dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet

    source = pa.BufferReader(_content(file))
    if file.kind == "parquet":
        parquet = pyarrow.parquet.ParquetFile(source)
        whole = parquet.schema_arrow
        used = [name for name in whole.names if columns is None or name in columns]
        batches: Iterable[Any] = parquet.iter_batches(columns=used)
    else:
        try:
            stream = pa.ipc.open_stream(source)
        except pa.ArrowInvalid:  # with a footer: the other of Arrow's two forms
            source.seek(0)
            stream = pa.ipc.open_file(source).read_all().to_reader()
        whole = stream.schema
        used = [name for name in whole.names if columns is None or name in columns]
        batches = (batch.select(used) for batch in stream)
    schema = pa.schema([_plain(whole.field(name)) for name in used], metadata=whole.metadata)
    plain = (pa.Table.from_batches([batch]).cast(schema).combine_chunks().to_batches() for batch in batches)
    return (batch for found in plain for batch in found), schema, {"names": whole.names, "how": []}


def _plain(field: Any) -> Any:
    """Return a column's type, of pandas' categories that of their values."""
    import pyarrow as pa

    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
