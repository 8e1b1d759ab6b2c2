"""What one worker does with one unit of documents: hash, tokenise, write a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sinkbench.data.dialogue import Dialogue, segments
from sinkbench.data.documents import TextFile, Unit, documents, text_hash
from sinkbench.data.tokenizer import Tokenizer, load_tokenizer

_BATCH = 64
"""Documents given to the tokenizer at a time."""

Tokens: TypeAlias = npt.NDArray[np.integer[Any]]
"""One-dimensional, uint16 or int32."""
Mask: TypeAlias = npt.NDArray[np.bool_]


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """The type of stored token ids, by the rule of megatron's ``DType.optimal_dtype``."""
    return np.uint16 if vocab_size < 65500 else np.int32


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds, without the tokens.

    Attributes:
        lengths: tokens of each document, its closing EOS included, int64.
        hashes: uint64 [documents, 2], see ``text_hash``.
        input_index: the input that the unit belongs to.
        empty: documents left out because they hold nothing but white space.
        not_text: files of folders left out because they are not UTF-8.
        dialogues: some documents are, so that the shard has masks.
    """

    lengths: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    input_index: int
    empty: int
    not_text: int
    dialogues: bool

    @classmethod
    def load(cls, path: Path) -> ShardIndex:
        with np.load(path) as arrays:
            input_index, empty, not_text = (int(count) for count in arrays["counts"])
            return cls(
                arrays["lengths"], arrays["hashes"], input_index, empty, not_text, dialogues="mask" in arrays
            )


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"{index:07d}.npz"


def load_documents(path: Path) -> list[Tokens]:
    """The tokens of each document of a shard."""
    with np.load(path) as arrays:
        return np.split(arrays["tokens"], np.cumsum(arrays["lengths"]))[:-1]


def load_masks(path: Path) -> list[Mask]:
    """Of each document, which tokens are part of a response; all of a document that is no dialogue."""
    with np.load(path) as arrays:
        mask = arrays["mask"] if "mask" in arrays else np.ones(len(arrays["tokens"]), bool)
        return np.split(mask, np.cumsum(arrays["lengths"]))[:-1]


def _save(path: Path, tokens: Tokens, mask: Mask, index: ShardIndex) -> None:
    """Writes a shard under a temporary name, then renames it: a shard that exists is whole."""
    temporary = path.with_suffix(".tmp")
    counts = np.array([index.input_index, index.empty, index.not_text])
    with temporary.open("wb") as stream:
        arrays = {"tokens": tokens, "lengths": index.lengths, "hashes": index.hashes, "counts": counts}
        np.savez(stream, allow_pickle=False, **(arrays | ({"mask": mask} if index.dialogues else {})))
    temporary.replace(path)


def make_tokenise(tokenizer: Path, text_field: str, folder: Path) -> Callable[[tuple[int, Unit]], int]:
    """A function that writes the shard of (index, unit) into ``folder`` and returns the unit's size."""
    return partial(_tokenise, load_tokenizer(tokenizer), text_field, folder)


def make_sample(text_field: str, share: float) -> Callable[[Unit], tuple[int, list[tuple[bytes, str]]]]:
    """A function that returns a unit's size and (hash, text) of ``share`` of its documents, chosen by
    hash."""
    return partial(_sample, text_field, share)


def _tokenise(tokenizer: Tokenizer, text_field: str, folder: Path, job: tuple[int, Unit]) -> int:
    number, unit = job
    by_piece = [list(documents(piece, text_field)) for piece in unit.pieces]
    texts = [text for found in by_piece for text in found]
    filled = [text for text in texts if _has_text(text)]
    rows = [
        row
        for start in range(0, len(filled), _BATCH)
        for row in _encode(tokenizer, filled[start : start + _BATCH])
    ]
    tokens = np.concatenate([*(ids for ids, _ in rows), np.zeros(0, np.int32)])
    mask = np.concatenate([*(responses for _, responses in rows), np.zeros(0, bool)])
    hashes = np.frombuffer(b"".join(map(text_hash, filled)), "<u8").astype(np.uint64)
    index = ShardIndex(
        lengths=np.array([len(ids) for ids, _ in rows], np.int64),
        hashes=hashes.reshape(-1, 2),
        input_index=unit.input_index,
        empty=len(texts) - len(filled),
        not_text=sum(
            isinstance(piece, TextFile) and not found
            for piece, found in zip(unit.pieces, by_piece, strict=True)
        ),
        dialogues=any(isinstance(text, Dialogue) for text in filled),
    )
    _save(shard_path(folder, number), tokens.astype(token_dtype(tokenizer.vocab_size)), mask, index)
    return unit.size


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[tuple[Tokens, Mask]]:
    """Tokens and mask of each document. EOS ends every response, and the document. Segments are encoded
    one by one, so that a response begins with a token of its own."""
    parts = [segments(text) for text in texts]
    encoded = iter(tokenizer.encode([segment.text for part in parts for segment in part]))
    for part in parts:
        ids: list[Tokens] = []
        mask: list[Mask] = []
        for segment in part:
            ends = segment.response or segment is part[-1]
            found = next(encoded)
            ids.append(np.append(found, tokenizer.eos_id) if ends else found)
            mask.append(np.full(len(ids[-1]), segment.response))
        yield np.concatenate(ids), np.concatenate(mask)


def _sample(text_field: str, share: float, unit: Unit) -> tuple[int, list[tuple[bytes, str]]]:
    chosen = []
    for piece in unit.pieces:
        for text in documents(piece, text_field):
            digest = text_hash(text)
            if _has_text(text) and sample_key(digest) < share * 2**64:
                chosen.append((digest, text))
    return unit.size, chosen


def _has_text(text: str) -> bool:
    return bool(text) and not text.isspace()


def sample_key(digest: bytes) -> int:
    """Orders documents for the tokenizer's sample: by the half of the hash that does not choose what
    is held out."""
    return int.from_bytes(digest[8:], "little")
