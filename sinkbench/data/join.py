"""Joins shards into token files: duplicates dropped, some documents held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from sinkbench.data.manifest import SPLITS, TRAIN, VALIDATION, FileRecord, InputRecord, file_sha256
from sinkbench.data.shards import Mask, ShardIndex, Tokens, load_documents, load_masks, token_dtype
from sinkbench.errors import DataError
from sinkbench.megatron.datasets import TokenWriter


@dataclass(frozen=True)
class Joined:
    """What was written: counts per split and per input, and the files."""

    documents: dict[str, int]
    tokens: dict[str, int]
    inputs: list[InputRecord]
    dtype: Literal["uint16", "int32"]
    files: dict[str, FileRecord]


def join(
    shards: Sequence[Path],
    target: Path,
    *,
    inputs: Sequence[str],
    holdout: float,
    held_out_from: int | None,
    vocab_size: int,
    advance: Callable[[int], None],
) -> Joined:
    """Writes ``train`` and ``validation`` token files into ``target``, with masks if there are dialogues;
    a split without documents gets none.

    Args:
        shards: in order; of equal documents the first is kept.
        inputs: names of the inputs, for the counts and for errors.
        holdout: share of documents for validation, see ``_splits``.
        held_out_from: instead, the documents of inputs from this number on.
        advance: told the bytes of each shard when it is done.

    Raises:
        DataError: an input holds no text, or all that is held out is trained on.
    """
    indices = [ShardIndex.load(path) for path in shards]
    hashes = np.concatenate([index.hashes for index in indices])
    kept = _first_copies(hashes)
    owner = np.repeat([index.input_index for index in indices], [len(index.lengths) for index in indices])
    records = _counts(inputs, indices, owner, kept)
    if held_out_from is None:
        held_out = _held_out(hashes[:, 0], kept, holdout)
        cut = holdout if kept.sum() == 1 and 0 < holdout < 1 else None
    else:
        held_out, cut = owner >= held_out_from, None
        if not (held_out & kept).any():
            problem = "all its documents are among the inputs, which are trained on"
            remedy = "hold out others, or a share of the inputs (--holdout)"
            raise DataError(", ".join(inputs[held_out_from:]), problem, remedy)
    masked = any(index.dialogues for index in indices)

    writers: dict[str, TokenWriter] = {}
    documents, tokens = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    position = 0
    for path in shards:
        for document, mask in zip(load_documents(path), load_masks(path), strict=True):
            if kept[position]:
                for split, part, responses in _splits(document, mask, bool(held_out[position]), cut):
                    if split not in writers:
                        writers[split] = TokenWriter(target / split, token_dtype(vocab_size), masked=masked)
                    writers[split].add(part, responses)
                    documents[split] += 1
                    tokens[split] += len(part)
            position += 1
        advance(path.stat().st_size)
    for writer in writers.values():
        writer.close()
    kinds = ("bin", "idx", "mask") if masked else ("bin", "idx")
    names = [f"{split}.{kind}" for split in SPLITS if split in writers for kind in kinds]
    files = {
        name: FileRecord(bytes=(target / name).stat().st_size, sha256=file_sha256(target / name))
        for name in names
    }
    dtype: Literal["uint16", "int32"] = "uint16" if token_dtype(vocab_size) is np.uint16 else "int32"
    return Joined(documents, tokens, records, dtype, files)


def _first_copies(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    kept = np.zeros(len(hashes), bool)
    kept[np.unique(hashes, axis=0, return_index=True)[1]] = True
    return kept


def _counts(
    inputs: Sequence[str],
    indices: Sequence[ShardIndex],
    owner: npt.NDArray[np.int64],
    kept: npt.NDArray[np.bool_],
) -> list[InputRecord]:
    lengths = np.concatenate([index.lengths for index in indices])
    records = []
    for number, name in enumerate(inputs):
        mine = owner == number
        if not mine.any():
            raise DataError(name, "holds no text", "give files that hold text")
        records.append(
            InputRecord(
                input=name,
                documents=int((mine & kept).sum()),
                tokens=int(lengths[mine & kept].sum()),
                duplicates=int((mine & ~kept).sum()),
                empty=sum(index.empty for index in indices if index.input_index == number),
                not_text=sum(index.not_text for index in indices if index.input_index == number),
            )
        )
    return records


def _held_out(
    keys: npt.NDArray[np.uint64], kept: npt.NDArray[np.bool_], holdout: float
) -> npt.NDArray[np.bool_]:
    """Documents whose key, as a fraction of 2^64, is below ``holdout``. Of the kept ones at least one
    is held out and at least one is not, unless ``holdout`` is 0 or 1."""
    chosen = (keys >> np.uint64(11)) * 2.0**-53 < holdout
    if 0 < holdout < 1:
        order = np.flatnonzero(kept)[np.argsort(keys[kept], kind="stable")]
        chosen[order[-1]] = False
        chosen[order[0]] = True
    return chosen


def _splits(
    document: Tokens, mask: Mask, held_out: bool, cut: float | None
) -> Iterator[tuple[str, Tokens, Mask]]:
    """The splits a document goes to: one, but the only document of all is cut and its end held out."""
    if cut is None:
        yield (VALIDATION if held_out else TRAIN), document, mask
        return
    end = len(document) - round(cut * len(document))
    end = min(max(end, 1), len(document) - 1)
    yield TRAIN, document[:end], mask[:end]
    yield VALIDATION, document[end:], mask[end:]
