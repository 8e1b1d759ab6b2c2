"""Inputs of ``sinkbench data prepare``: files, folders and the running Python's own text, cut into
units of work whose order and content depend on nothing but the inputs."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkbench.data import dialogue, python_text
from sinkbench.data.dialogue import RESPONDENT, Dialogue
from sinkbench.errors import DataError

_TEXT = (".txt", ".md", ".py", ".rst")
_COMPRESSION = {".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
_PARQUET = ".parquet"
_STRINGS = ("string", "large_string", "string_view")
"""Arrow's types of text, by name since older releases lack the last."""
EXTENSIONS = (".jsonl", *_COMPRESSION, *_TEXT, _PARQUET)

_PYTHON_DOCS = {"python:docs": False, "python:help": True}
"""Inputs without files, and whether they are dialogues."""
_FIELD_REMEDY = "name the text's field with --text-field (data.prepare.text_field in a recipe)"


@dataclass(frozen=True)
class Input:
    """One INPUT argument with the files it stands for, sorted; python:docs has none."""

    name: str
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.files)

    def identity(self) -> list[object]:
        """What changes when the input changes."""
        if self.name in python_text.NAMES:
            return [self.name, sys.version]
        stats = ((path.resolve(), path.stat()) for path in self.files)
        return [self.name, [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]]


@dataclass(frozen=True)
class TextFile:
    """A file that is one document.

    Attributes:
        named: the user named it; one found in a folder is passed over if it is no text.
    """

    path: Path
    named: bool


@dataclass(frozen=True)
class JsonLines:
    """Whole lines of a .jsonl file.

    Attributes:
        first_line: number of the first of them in the file, from 1.
    """

    path: Path
    first_line: int
    lines: bytes


@dataclass(frozen=True)
class RowGroup:
    """A row group of a parquet file."""

    path: Path
    index: int


@dataclass(frozen=True)
class PythonDocs:
    """The reference documentation of the running Python.

    Attributes:
        dialogues: each document answers a question.
    """

    dialogues: bool


Piece = TextFile | JsonLines | RowGroup | PythonDocs


@dataclass(frozen=True)
class Unit:
    """Pieces of one input that one worker turns into one shard.

    Attributes:
        input_index: position of the input among the inputs.
        size: bytes of the input's files that these pieces took, for the progress bar.
    """

    input_index: int
    size: int
    pieces: tuple[Piece, ...]


# --- inputs ---------------------------------------------------------------------------------------


def find_inputs(names: Iterable[str]) -> list[Input]:
    """Resolves the INPUT arguments to files.

    Raises:
        DataError: an input does not exist, is of no known kind, or is empty.
    """
    return [_find_input(name) for name in names]


def _find_input(name: str) -> Input:
    if name in _PYTHON_DOCS:
        return Input(name, ())
    if name == "python:stdlib":
        return Input(name, tuple(python_text.stdlib_files()))
    if name.startswith("python:"):
        raise DataError(name, "no such text of Python", f"give one of {', '.join(python_text.NAMES)}")
    path = Path(name).expanduser()
    if path.is_dir():
        files = tuple(_walk(path))
        if not files:
            problem = f"no file in this folder ends in one of {' '.join(EXTENSIONS)}"
            raise DataError(name, problem, "give a folder of documents")
    elif path.is_file():
        if not path.name.endswith(EXTENSIONS):
            problem = f"unknown kind of file (known: {' '.join(EXTENSIONS)})"
            raise DataError(name, problem, "convert it, or rename it to what it is")
        files = (path,)
    else:
        raise DataError(name, "no such file or folder", "correct the path")
    found = Input(name, files)
    if not found.size:
        raise DataError(name, "is empty", "give files that hold text")
    return found


def _walk(root: Path) -> Iterator[Path]:
    """Files of known kinds below a folder, in sorted order; hidden folders and caches are skipped."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if not s.startswith(".") and s != "__pycache__")
        for name in sorted(names):
            path = Path(folder, name)
            if name.endswith(EXTENSIONS) and not name.startswith(".") and path.is_file():
                yield path


# --- units ----------------------------------------------------------------------------------------


def units(inputs: Iterable[Input], unit_bytes: int) -> Iterator[Unit]:
    """Cuts the inputs into units of about ``unit_bytes``: small files together, large .jsonl files by
    lines, parquet files by row groups. Compressed files are unpacked here, one after the other.

    Raises:
        DataError: a compressed or parquet file is damaged or cannot be read.
    """
    for input_index, entry in enumerate(inputs):
        pieces: list[Piece] = []
        size = content = 0
        for piece, piece_size, piece_content in _pieces(entry, unit_bytes):
            pieces.append(piece)
            size += piece_size
            content += piece_content
            if content >= unit_bytes:
                yield Unit(input_index, size, tuple(pieces))
                pieces, size, content = [], 0, 0
        if pieces:
            yield Unit(input_index, size, tuple(pieces))


def _pieces(entry: Input, unit_bytes: int) -> Iterator[tuple[Piece, int, int]]:
    """Pieces with the bytes they took on disk and the bytes they hold."""
    if entry.name in _PYTHON_DOCS:
        yield PythonDocs(_PYTHON_DOCS[entry.name]), 0, unit_bytes
    for path in entry.files:
        try:
            if path.name.endswith(_TEXT):
                size = path.stat().st_size
                yield TextFile(path, named=path == Path(entry.name).expanduser()), size, size
            elif path.name.endswith(_PARQUET):
                yield from _row_groups(path)
            else:
                yield from _line_blocks(path, unit_bytes)
        except OSError as error:
            raise _unreadable(path, error) from error


def _line_blocks(path: Path, unit_bytes: int) -> Iterator[tuple[Piece, int, int]]:
    compression = next((c for end, c in _COMPRESSION.items() if path.name.endswith(end)), None)
    with path.open("rb") as raw:
        stream: io.BufferedReader = raw
        if compression:
            # Arrow's reader, unlike those of gzip and zstandard, notices every truncated file.
            import pyarrow

            stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, compression))
        line, position = 1, 0
        while lines := stream.readlines(unit_bytes):
            block = b"".join(lines)
            end = raw.tell()
            yield JsonLines(path, line, block), end - position, len(block)
            line, position = line + len(lines), end


def _row_groups(path: Path) -> Iterator[tuple[Piece, int, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except pyarrow.ArrowException as error:
        raise DataError(str(path), "is not a parquet file, or is damaged", "replace it") from error
    size = path.stat().st_size
    for index in range(metadata.num_row_groups):
        share = size * (index + 1) // metadata.num_row_groups - size * index // metadata.num_row_groups
        yield RowGroup(path, index), share, metadata.row_group(index).total_byte_size


# --- documents ------------------------------------------------------------------------------------


def documents(piece: Piece, text_field: str) -> Iterator[str]:
    """The texts of a piece, a ``Dialogue`` where records hold one and have no text field; none for a file
    found in a folder that is not UTF-8. Characters that UTF-8 cannot carry (lone surrogates, which JSON can
    spell) become question marks.

    Raises:
        DataError: bytes that are not UTF-8, a line that is not a JSON object, a missing text.
    """
    match piece:
        case TextFile(path, named):
            try:
                yield _decode(path.read_bytes(), str(path))
            except OSError as error:
                raise _unreadable(path, error) from error
            except DataError:
                if named:
                    raise
        case JsonLines():
            yield from _json_texts(piece, text_field)
        case RowGroup(path, index):
            yield from _parquet_texts(path, index, text_field)
        case PythonDocs(dialogues):
            for name, text in python_text.reference_documents():
                yield Dialogue.of([("user", f"help on {name}"), (RESPONDENT, text)]) if dialogues else text


def text_hash(text: str) -> bytes:
    """The 16 bytes that stand for a document: equal texts are duplicates."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def _json_texts(piece: JsonLines, text_field: str) -> Iterator[str]:
    for number, line in enumerate(piece.lines.split(b"\n"), piece.first_line):
        if not line.strip():
            continue
        where = f"{piece.path}:{number}"
        try:
            record = json.loads(_decode(line, where))
        except (ValueError, RecursionError) as error:
            raise DataError(where, f"is not valid JSON ({error})", "correct or remove the line") from error
        if not isinstance(record, dict):
            raise DataError(where, "is not a JSON object", f'write {{"{text_field}": ...}}')
        yield _record_text(record, text_field, where)


def _record_text(record: dict[str, Any], text_field: str, where: str) -> str:
    if text_field in record:
        text = record[text_field]
        if not isinstance(text, str):
            raise DataError(where, f"{text_field!r} is not a string", "correct or remove the line")
        return dialogue.encodable(text)
    if dialogue.fields(record):
        return dialogue.read(record, where)
    found = ", ".join(list(record)[:8]) or "none"
    raise DataError(where, f"has no field {text_field!r} (fields: {found})", _FIELD_REMEDY)


def _parquet_texts(path: Path, index: int, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        # Opened through Python, so that a missing file is an OSError with its reason.
        with path.open("rb") as stream, pyarrow.parquet.ParquetFile(stream) as parquet:
            schema = parquet.schema_arrow
            columns = [text_field] if text_field in schema.names else [*dialogue.fields(schema.names)]
            if not columns:
                found = ", ".join(schema.names[:8])
                raise DataError(str(path), f"has no column {text_field!r} (columns: {found})", _FIELD_REMEDY)
            kind = schema.field(columns[0]).type
            values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if columns == [text_field] and str(values) not in _STRINGS:
                raise DataError(str(path), f"column {text_field!r} holds {kind}, not strings", _FIELD_REMEDY)
            records = parquet.read_row_group(index, columns=columns).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(str(path), f"is damaged (row group {index})", "replace it") from error
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), error) from error
    for row, record in enumerate(records):
        where = f"{path}: row {row} of row group {index}"
        if record[columns[0]] is None:
            raise DataError(where, f"{columns[0]!r} is null", "remove the row")
        yield _record_text(record, text_field, where)


def _decode(data: bytes, where: str) -> str:
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from error


def _not_utf8(where: str, error: UnicodeDecodeError) -> DataError:
    return DataError(where, f"is not UTF-8 (byte {error.start})", "convert it to UTF-8, or leave it out")


def _unreadable(path: Path, error: OSError) -> DataError:
    problem = f"is damaged or cannot be read ({error.strerror or error})"
    return DataError(str(path), problem, "replace it, or leave it out")
