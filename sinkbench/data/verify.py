"""The full check of a prepared folder, which reads all of it."""

from __future__ import annotations

from pathlib import Path

from sinkbench.data.manifest import Manifest, check_sizes, file_sha256, load_manifest
from sinkbench.errors import DataError
from sinkbench.megatron.datasets import open_tokens

_BLOCK = 1 << 24
_REMEDY = "copy it again, or prepare the folder again"


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
    checksums = {name: record.sha256 for name, record in manifest.files.items()}
    checksums[manifest.tokenizer.path] = manifest.tokenizer.sha256
    for name, sha256 in checksums.items():
        path = folder / name
        if not path.is_file():
            raise DataError(str(path), "is missing", _REMEDY)
        if file_sha256(path) != sha256:
            raise DataError(str(path), "is not what was prepared (its sha256 differs)", _REMEDY)
    for split, expected in manifest.tokens.items():
        if expected:
            _verify_split(folder / split, manifest, split)
    return manifest


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
