"""The manifest of a prepared folder: what is in it and how to tell that it is whole.

A prepared folder holds ``train.bin/.idx`` and ``validation.bin/.idx`` (megatron IndexedDataset), the
tokenizer's files in ``tokenizer/`` and ``manifest.json``, which is written last. If any document is a
dialogue there are ``train.mask`` and ``validation.mask`` too: for each token a byte, 1 if it is part of a
response or of a document that is no dialogue.
"""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sinkbench.errors import DataError

MANIFEST = "manifest.json"
TRAIN = "train"
VALIDATION = "validation"
SPLITS = (TRAIN, VALIDATION)
SCHEMA: Literal[1] = 1
WORK = ".prepare"
"""In a folder that is being prepared: what goes when it is whole."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRecord(_Record):
    bytes: int
    sha256: str


class TokenizerRecord(_Record):
    kind: Literal["sentencepiece", "huggingface"]
    path: str
    """of its main file, relative to the folder."""
    sha256: str
    """of that file."""
    vocab_size: int
    """one more than the largest token id."""
    eos_id: int
    """the token that ends every document."""


class InputRecord(_Record):
    """What one INPUT gave; duplicates count for the input in which they are the later copy."""

    input: str
    documents: int
    tokens: int
    duplicates: int
    empty: int
    not_text: int


class Manifest(_Record):
    schema_version: Literal[1] = SCHEMA
    request: str
    """sha256 of the inputs (names, sizes, times of change) and of the options."""
    documents: dict[str, int]
    """per split."""
    tokens: dict[str, int]
    """per split, the closing EOS of each document included."""
    duplicates: int
    """documents left out because an earlier one has the same text."""
    empty: int
    """documents left out because they hold nothing but white space."""
    not_text: int
    """files of folders left out because they are not UTF-8."""
    inputs: list[InputRecord]
    tokenizer: TokenizerRecord
    dtype: Literal["uint16", "int32"]
    files: dict[str, FileRecord]
    """of the .bin, .idx and .mask files; a split without documents has none."""


def _prepare_or(folder: Path) -> str:
    beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    close = difflib.get_close_matches(folder.name, beside, n=1)
    remedy = "prepare it with `sinkbench data prepare`"
    return f"did you mean {folder.parent / close[0]}? Or {remedy}" if close else remedy


def prepared_in(folder: Path) -> list[Path]:
    """The folder, or the prepared folders in it by name; itself if there are none."""
    if not folder.is_dir() or (folder / MANIFEST).exists():
        return [folder]
    return sorted(manifest.parent for manifest in folder.glob(f"*/{MANIFEST}")) or [folder]


def unfinished_in(folder: Path) -> list[Path]:
    """The folders in it, by name, whose preparation is under way or was interrupted."""
    names = (WORK, *(f"{split}.bin" for split in SPLITS))
    begun = {found.parent for name in names for found in folder.glob(f"*/{name}")}
    return sorted(inner for inner in begun if not (inner / MANIFEST).exists())


def load_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        DataError: the folder or the manifest is absent, damaged, or of another version.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(str(folder), "no such folder", _prepare_or(folder))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        problem = f"has no {MANIFEST}"
        raise DataError(str(folder), problem, "prepare it with `sinkbench data prepare`") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), f"cannot be read ({error})", "prepare the folder again") from error
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        problem = f"{key} is not as sinkbench writes it ({first['msg']})"
        remedy = "prepare the folder again with this version of sinkbench"
        raise DataError(str(path), problem, remedy) from error


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Compares the sizes of the token files with the manifest, which reads none of them.

    Raises:
        DataError: a file is missing, too short or too long.
    """
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise DataError(str(path), "is missing", "copy it again, or prepare the folder again")
        size = path.stat().st_size
        if size != record.bytes:
            problem = f"has {size} bytes where the manifest says {record.bytes}"
            raise DataError(str(path), problem, "copy it again, or prepare the folder again")
