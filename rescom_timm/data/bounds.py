"""Bounds on tables and lists of images, checked before their text or rows take memory.

A few bytes of a compressed or dictionary-encoded file can decode to gigabytes, so the decoded size is bounded by the
file's size.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rescom_timm.errors import InputError
from rescom_timm.io import regular_size
from rescom_timm.text import escape_controls

MAX_ROWS = 100_000_000
"""Of a Parquet file."""
MAX_COLUMNS = 1000
MAX_LIST = 2**32
"""Bytes of the largest text file of rows that is read: CSV, TSV, JSON lines, annotations, index files."""
MAX_LINE = 2**20
"""Bytes of a line of such a file."""
MAX_TEXT = 4096
"""Characters of a path, a label, a class name or any other text of a row."""
MAX_DECODED, RATIO = 2**30, 100
"""A file of B bytes may decode to MAX_DECODED + RATIO * B bytes."""
MAX_BATCH = 2**31
"""Bytes that a batch of rows of a Parquet file may decode to."""
MAX_PROBLEMS = 10_000
SHOWN = 300
"""Characters of a value or a problem in a message."""


class Problems(list[str]):
    """The first MAX_PROBLEMS problems of a file, each shortened to a readable line."""

    def append(self, problem: str) -> None:
        """Add a problem, shortened; ignored after MAX_PROBLEMS."""
        if len(self) < MAX_PROBLEMS:
            super().append(shown(problem))


def shown(value: object) -> str:
    """A value for a message: control characters escaped, long text cut."""
    text = escape_controls(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({len(text):,} characters)"


def length_problem(what: str, text: str) -> str:
    """The problem of a text that is too long, or the empty string. what: a path, a label ..., with its article."""
    return f"{what} of {len(text):,} characters; at most {MAX_TEXT:,} are read" if len(text) > MAX_TEXT else ""


def limit(size: int) -> int:
    """How many bytes a file of `size` bytes may decode to."""
    return MAX_DECODED + RATIO * size


# ----------------------------------------------------------------------------------------------------------- text files


def check_size(path: str | Path) -> int:
    """Bytes of a text file of rows. Raises InputError (data.bounds) above MAX_LIST and if it is not a regular file."""
    if (size := regular_size(path)) > MAX_LIST:
        raise InputError("data.bounds", f"has {size / 2**30:,.1f} GiB; at most {MAX_LIST / 2**30:,.0f} are read")
    return size


def check_lines(path: str | Path, columns: int = 1) -> None:
    """Check that a text file of rows is within bounds.

    Raises InputError (data.bounds) if it is too large, is not a regular file, has a line above about MAX_LINE bytes, or
    more cells (lines times `columns`) than its size allows.
    """
    size, lines = check_size(path), 0
    with open(path, "rb") as file:
        while block := file.read(MAX_LINE):
            found = block.count(b"\n") or block.count(b"\r")
            if not found and len(block) == MAX_LINE:
                raise InputError("data.bounds", f"line {lines + 1} is longer than {MAX_LINE:,} bytes")
            lines += found
    if columns > MAX_COLUMNS:
        raise InputError("data.bounds", f"has {columns:,} columns; at most {MAX_COLUMNS:,} are read")
    if 16 * lines * columns > limit(size):
        raise InputError("data.bounds", f"most of its {lines:,} x {columns:,} cells in {size:,} bytes are empty")


# -------------------------------------------------------------------------------------------------------------- Parquet


def check_parquet(path: str | Path) -> int:
    """How many rows of a Parquet file can be decoded at a time within MAX_BATCH.

    Raises InputError (data.bounds) if it has more rows than MAX_ROWS, or decodes to more than `limit` allows by its
    compression or its repeated values.
    """
    most, largest = limit(regular_size(path)), Counter[int]()
    with pq.ParquetFile(path) as file:
        about = file.metadata
        if about.num_rows > MAX_ROWS:  # a few bytes can encode any number of equal rows
            raise InputError("data.bounds", f"it has {about.num_rows:,} rows; at most {MAX_ROWS:,} are read")
        decoded = 0
        for group, number, chunk in _chunks(about):
            column = file.schema.column(number)
            text = chunk.physical_type == "BYTE_ARRAY"
            width = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4}.get(chunk.physical_type, 8)
            decoded += max(chunk.total_uncompressed_size, 0 if text else chunk.num_values * max(width, column.length))
            if text and column.max_repetition_level and decoded + chunk.num_values * _longest(chunk) > most:
                decoded += _nested_bytes(path, group, chunk.path_in_schema)
            elif text:
                largest[group] += _longest(chunk)  # one row holds a value of every column
            if decoded > most:
                raise InputError("data.bounds", _decodes(decoded, path))
    return max(1, min(1000, MAX_BATCH // max(1, *largest.values(), 1)))


def _chunks(about: pq.FileMetaData) -> Iterator[tuple[int, int, pq.ColumnChunkMetaData]]:
    for group in range(about.num_row_groups):
        rows = about.row_group(group)
        yield from ((group, number, rows.column(number)) for number in range(rows.num_columns))


def _longest(chunk: pq.ColumnChunkMetaData) -> int:
    """Bytes that no text of the chunk exceeds."""
    return int(chunk.total_uncompressed_size)


def _nested_bytes(path: str | Path, group: int, column: str) -> int:
    """Bytes of the texts in a chunk of lists; repeated values are kept once while they are counted."""
    with pq.ParquetFile(path, read_dictionary=[column]) as file:
        values = file.read_row_group(group, columns=[column]).column(0)
    total = 0
    for chunk in values.chunks:
        while pa.types.is_nested(chunk.type):
            chunk = chunk.field(0) if pa.types.is_struct(chunk.type) else chunk.flatten()
        total += text_bytes(chunk)
    return total


def text_bytes(values: pa.Array) -> int:
    """Bytes of an array of texts, dictionary-encoded or not, with every value written out."""
    if isinstance(values, pa.DictionaryArray):
        lengths = pc.cast(pc.binary_length(values.dictionary), pa.int64())
        return int(pc.sum(pc.take(lengths, values.indices)).as_py() or 0)
    return int(pc.sum(pc.cast(pc.binary_length(values), pa.int64())).as_py() or 0)


_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def read_columns(path: str | Path, columns: Sequence[str]) -> pa.Table:
    """Columns of a Parquet file, one value per row; of `datasets` images the paths.

    Text columns are dictionary-encoded, so equal texts share memory. Raises InputError: data.bounds beyond the bounds
    and for a text above MAX_TEXT, data.column for columns of lists, other records and other kinds of text.
    """
    check_parquet(path)
    most, total, tables = limit(regular_size(path)), 0, []
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
    texts, fields = [], {name: name for name in columns}
    for name in columns:
        kind = schema.field(name).type
        inner = {one.name: one.type for one in kind.fields} if pa.types.is_struct(kind) else {}
        if inner.keys() == {"bytes", "path"} and any(holds(inner["path"]) for holds in _TEXTS):
            fields[name] = f"{name}.path"  # an image of `datasets`
            texts.append(fields[name])
        elif pa.types.is_nested(kind):
            raise InputError("data.column", f"column {name!r} holds several values of an image, which is not supported")
        elif any(holds(kind) for holds in _TEXTS):
            texts.append(name)
        elif not (pa.types.is_primitive(kind) or pa.types.is_null(kind) or pa.types.is_dictionary(kind)):
            raise InputError("data.column", f"column {name!r} is of type {kind}: save it as plain text or numbers")
    with pq.ParquetFile(path, read_dictionary=texts) as file:
        for batch in file.iter_batches(65_536, columns=list(fields.values())):
            plain = {
                name: batch.column(name) if fields[name] == name else batch.column(name).field("path")
                for name in columns
            }
            batch = pa.RecordBatch.from_pydict(plain)
            for name in columns:
                values = batch.column(name)
                if isinstance(values, pa.DictionaryArray):
                    longest = pc.max(pc.binary_length(values.dictionary)).as_py() or 0
                    if longest > MAX_TEXT:
                        raise InputError("data.bounds", f"column {name!r} has a text of {longest:,} bytes")
                    total += text_bytes(values)
            if total > most:
                raise InputError("data.bounds", _decodes(total, path))
            tables.append(pa.Table.from_batches([batch]))
    return pa.concat_tables(tables).unify_dictionaries() if tables else schema.empty_table().select(list(columns))


def _decodes(decoded: int, path: str | Path) -> str:
    return (
        f"it decodes to more than {decoded / 2**30:,.1f} GiB, and the file has {os.stat(path).st_size:,} bytes: "
        "its values are repeated or compressed beyond what is read"
    )


# ---------------------------------------------------------------------------------------------------------------- Arrow


def check_arrow(path: str | Path) -> None:
    """Check an Arrow file (stream or file format).

    Raises InputError: data.bounds if it decodes to more than `limit` allows or has more rows than MAX_ROWS, data.column
    for columns whose rows can share memory, which `datasets` does not write. Raises pa.ArrowInvalid for offsets outside
    its buffers.
    """
    most, rows = limit(regular_size(path)), 0
    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            source.seek(8)
        else:
            source.seek(0)
        start, decoded = source.tell(), 0
        for message in pa.ipc.MessageReader.open_stream(source):
            decoded += _uncompressed(message)
            if decoded > most:
                raise InputError("data.bounds", _decodes(decoded, path))
        source.seek(start)
        reader = pa.ipc.open_stream(source)
        for field in reader.schema:
            _refuse_shared(field.name, field.type)
        for batch in reader:
            rows += batch.num_rows  # rows of nulls take no bytes
            if rows > MAX_ROWS:
                raise InputError("data.bounds", f"it has more than {MAX_ROWS:,} rows")
            batch.validate(full=True)


def _refuse_shared(name: str, kind: pa.DataType) -> None:
    shared = (pa.types.is_dictionary, pa.types.is_run_end_encoded, pa.types.is_string_view, pa.types.is_binary_view)
    if any(holds(kind) for holds in shared) or "list_view" in str(kind):
        raise InputError("data.column", f"column {name!r} is of type {kind}: save it as plain values")
    for number in range(kind.num_fields):
        _refuse_shared(name, kind.field(number).type)


def _uncompressed(message: pa.ipc.Message) -> int:
    """The decoded bytes that a message's compressed buffers declare; 0 if none is compressed.

    The layout is that of Arrow's Message.fbs: a record batch is the header itself or, in a dictionary batch, its field
    1.
    """
    metadata, body = memoryview(message.metadata), memoryview(message.body)
    root = struct.unpack_from("<I", metadata)[0]
    kind, header = _field(metadata, root, 1), _table(metadata, root, 2)
    if kind is None or header is None or metadata[kind] not in (2, 3):
        return 0
    batch = header if metadata[kind] == 3 else _table(metadata, header, 1)
    if batch is None or _field(metadata, batch, 3) is None or (vector := _table(metadata, batch, 2)) is None:
        return 0
    total, count = 0, struct.unpack_from("<I", metadata, vector)[0]
    for offset, length in struct.iter_unpack("<qq", metadata[vector + 4 : vector + 4 + 16 * count]):
        if length >= 8:
            total += max(length, struct.unpack_from("<q", body, offset)[0])
    return total


def _field(buffer: memoryview, table: int, number: int) -> int | None:
    """Where a flatbuffers table has its field; None if it has none."""
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", buffer, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", buffer, vtable + 4 + 2 * number)[0]
    return table + offset if offset else None


def _table(buffer: memoryview, table: int, number: int) -> int | None:
    """Where the table or vector that a field refers to starts."""
    place = _field(buffer, table, number)
    return None if place is None else place + struct.unpack_from("<I", buffer, place)[0]


# ------------------------------------------------------------------------------------------------------------------ tar

_PACKED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
"""How a compressed archive begins, and what reads it."""
_PACKED_MEMBERS = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".npz", ".pth")
"""Endings of members that are decompressed when they are read."""


class _Bounded(io.RawIOBase):
    """A stream that raises InputError (data.bounds) after `most` bytes."""

    def __init__(self, stream: BinaryIO, most: int) -> None:
        self.stream, self.left = stream, most

    def read(self, size: int = -1) -> bytes:
        block = self.stream.read(min(size, self.left) if size >= 0 else self.left)
        self.left -= len(block)
        if self.left <= 0:
            raise InputError("data.bounds", "it decodes to more than is read for its size")
        return block


def check_tar(path: str | Path) -> None:
    """Check a tar archive of a web data set.

    Raises InputError: data.damaged if it is not a tar archive; data.bounds if it, compressed or not, decodes to more
    than `limit` allows, or has sparse or compressed members.
    """
    most = limit(regular_size(path))
    with open(path, "rb") as raw:
        opened = _PACKED.get(raw.read(2))
        raw.seek(0)
        stream = cast(BinaryIO, opened(raw) if opened else raw)
        try:
            members: Any = _Bounded(stream, most) if opened else stream
            with tarfile.open(fileobj=members, mode="r|" if opened else "r:") as archive:
                for member in archive:
                    if member.issparse() or member.name.lower().endswith(_PACKED_MEMBERS):
                        raise InputError("data.bounds", f"member {shown(member.name)} is compressed")
                    archive.members = []  # type: ignore[attr-defined]
        except (tarfile.TarError, EOFError, lzma.LZMAError) as error:
            raise InputError("data.damaged", f"is no archive of a web data set ({error})") from None
