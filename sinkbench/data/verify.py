"""Checks of a prepared folder against its manifest: in full, and what a run does when it starts.

A run compares the checksums of files up to ``CHECKED_BYTES``, once on each machine: what was found whole is
noted by path, size and time of change in the cache folder. Larger files are left to `sinkbench data verify`;
their sizes, and their token ids at regular distances, are compared at every start.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from sinkbench.data.manifest import Manifest, check_sizes, file_sha256, load_manifest
from sinkbench.errors import DataError, HostError
from sinkbench.files import write_atomically
from sinkbench.megatron.datasets import open_tokens

CACHE = Path("~/.cache/sinkbench/verified")
CHECKED_BYTES = 1 << 30
"""A second or two of reading for each file, the first time."""
_BLOCK = 1 << 24
_REMEDY = "copy it again, or prepare the folder again"

_log = logging.getLogger(__name__)


def verify(folder: Path) -> Manifest:
    """Compares a prepared folder with its manifest: sizes and checksums of all files, counts of
    documents and tokens, token ids against the vocabulary.

    Returns:
        The manifest, which the folder matches.

    Raises:
        DataError: the first difference.
    """
    manifest = load_manifest(folder)
    check_sizes(folder, manifest)
    for name, sha256 in _checksums(manifest).items():
        path = folder / name
        if not path.is_file():
            raise DataError(str(path), "is missing", _REMEDY)
        _compare(path, sha256)
    for split, expected in manifest.tokens.items():
        if expected:
            _verify_split(folder / split, manifest, split)
    return manifest


def verify_at_start(folder: Path, manifest: Manifest) -> None:
    """Compares the checksums of a prepared folder's files, its tokenizer's among them, unless that was done
    on this machine before or would take long.

    Raises:
        DataError: a file was altered, or is another tokenizer's.
    """
    note = CACHE.expanduser() / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]}.json"
    noted = _read_note(note)
    states = dict(noted)
    for name, sha256 in _checksums(manifest).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size > CHECKED_BYTES:
            continue  # training does without the tokenizer; the others were seen to be there
        status = path.stat()
        state: list[int | str] = [status.st_size, status.st_mtime_ns, sha256]
        if noted.get(name) != state:
            _compare(path, sha256)
            states[name] = state
    if states != noted:
        try:
            write_atomically(note, json.dumps(states))
        except HostError as error:
            _log.info("the checksums of %s are compared again next time: %s", folder, error)


def _read_note(path: Path) -> dict[str, list[int | str]]:
    """What was found whole; nothing if no note can be read, which costs a comparison."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return noted if isinstance(noted, dict) else {}


def _checksums(manifest: Manifest) -> dict[str, str]:
    files = {name: record.sha256 for name, record in manifest.files.items()}
    return {**files, manifest.tokenizer.path: manifest.tokenizer.sha256}


def _compare(path: Path, sha256: str) -> None:
    try:
        found = file_sha256(path)
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", _REMEDY) from error
    if found != sha256:
        raise DataError(str(path), "is not what was prepared (its sha256 differs)", _REMEDY)


def _verify_split(prefix: Path, manifest: Manifest, split: str) -> None:
    file = open_tokens(prefix)
    found = (len(file.lengths), len(file.tokens))
    expected = (manifest.documents[split], manifest.tokens[split])
    if found != expected:
        problem = f"holds {found} documents and tokens where the manifest says {expected}"
        raise DataError(str(prefix), problem, _REMEDY)
    vocab_size = manifest.tokenizer.vocab_size
    for start in range(0, len(file.tokens), _BLOCK):
        block = file.tokens[start : start + _BLOCK]
        if not 0 <= block.min() <= block.max() < vocab_size:
            problem = f"holds a token outside the tokenizer's vocabulary of {vocab_size}"
            raise DataError(f"{prefix}.bin", problem, _REMEDY)
