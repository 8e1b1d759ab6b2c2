"""Training on prepared folders: documents joined with EOS, cut into sequences, shuffled and blended.

As in the paper, the token stream of a folder is cut every seq_length + 1 tokens, wherever documents
end; a remainder is dropped. Each epoch is a new permutation of these chunks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from sinkbench.config import IndexedConfig
from sinkbench.data.manifest import (
    TRAIN,
    VALIDATION,
    Manifest,
    check_sizes,
    load_manifest,
    prepared_in,
    unfinished_in,
)
from sinkbench.data.source import Arrays, HeldOut
from sinkbench.data.verify import verify_at_start
from sinkbench.errors import DataError
from sinkbench.megatron.datasets import blend_table, open_tokens

Tokens: TypeAlias = npt.NDArray[np.integer[Any]]
Mask: TypeAlias = npt.NDArray[np.bool_]

BLEND_PERIOD = 1 << 16
"""A blend repeats its assignment of sequences to folders after so many; weights are met to within one
sequence in as many."""
_CHECKED_TOKENS = 4096
_EVERY_RUN = 0
"""Seed of what is the same in every run: the order of held-out sequences."""


class Chunks:
    """The token stream of one split of one folder, cut into chunks of ``size`` tokens.

    Args:
        tokens: all ids of the split, mapped from disk.
        lengths: tokens of each document.
        mask: of all tokens, mapped from disk; None if no document is a dialogue.
        name: where the stream is, for messages.
    """

    def __init__(
        self,
        tokens: Tokens,
        lengths: npt.NDArray[np.int32],
        size: int,
        mask: Mask | None = None,
        name: str = "",
    ) -> None:
        self.name = name
        self.count = len(tokens) // size
        self._tokens = tokens
        self._lengths = lengths.astype(np.int64)
        self._chunks = tokens[: self.count * size].reshape(self.count, size)
        self._masks = None if mask is None else mask[: self.count * size].reshape(self.count, size)

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        """Of the documents, in tokens of the stream."""
        return np.cumsum(self._lengths)

    @property
    def masked(self) -> bool:
        return self._masks is not None

    def rows(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """int64 [len(numbers), size]."""
        return self._chunks[numbers].astype(np.int64)

    def masks(self, numbers: npt.NDArray[np.int64]) -> Mask:
        """Which tokens are part of a response or of a document that is no dialogue, [len(numbers), size]."""
        if self._masks is None:
            return np.ones((len(numbers), self._chunks.shape[1]), bool)
        return self._masks[numbers]

    def documents(self, number: int) -> tuple[int, int]:
        """The first and last document, counted from 0, that a chunk holds tokens of."""
        size = self._chunks.shape[1]
        first, last = np.searchsorted(self._ends, [number * size, (number + 1) * size - 1], side="right")
        return int(first), int(last)

    def document_starts(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """At which position of its chunk each token's document begins, [len(numbers), size]; 0 for one that
        began in an earlier chunk."""
        size = self._chunks.shape[1]
        starts = np.zeros((len(numbers), size), np.int32)
        for row, number in zip(starts, numbers.tolist(), strict=True):
            first, last = np.searchsorted(self._ends, [number * size, (number + 1) * size - 1], side="right")
            begins = self._ends[first:last] - number * size
            row[begins] = begins
        return np.maximum.accumulate(starts, axis=1)

    def window(self, offset: int, length: int) -> npt.NDArray[np.int64]:
        return self._tokens[offset : offset + length].astype(np.int64)

    def window_offsets(self, length: int) -> npt.NDArray[np.int64]:
        """Where stretches of ``length`` tokens begin that lie within a document and do not overlap:
        first the beginnings of documents in a fixed random order, then the second stretches of
        documents, and so on."""
        per_document = (self._lengths - 1) // length  # the last token is EOS
        starts = np.cumsum(self._lengths) - self._lengths
        earlier = np.cumsum(per_document) - per_document
        number = np.arange(per_document.sum()) - np.repeat(earlier, per_document)
        offsets: npt.NDArray[np.int64] = np.repeat(starts, per_document) + number * length
        shuffled = _permutation(len(offsets), _EVERY_RUN)
        order: npt.NDArray[Any] = shuffled[np.argsort(number[shuffled], kind="stable")]
        ordered: npt.NDArray[np.int64] = offsets[order]
        return ordered


class Epochs:
    """An endless sequence of a split's chunks: one permutation after the other.

    Args:
        unique: share of the chunks that is used, at least one of them. A larger share holds a smaller one.
        seed: of the permutations, together with the epoch.
    """

    def __init__(self, chunks: Chunks, unique: float, *seed: int) -> None:
        self.chunks = chunks
        count = max(1, round(unique * chunks.count))
        self._count = count
        self._used = _permutation(chunks.count, _EVERY_RUN)[:count] if unique < 1 else None
        # Two, since a step may span two epochs; a cache that threads may share.
        self._order = lru_cache(maxsize=2)(partial(_permutation, count, *seed))

    def numbers(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Of the chunks at these places of the sequence."""
        epochs, positions = np.divmod(indices, self._count)
        numbers = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            of_epoch = epochs == epoch
            places = self._order(epoch)[positions[of_epoch]]
            numbers[of_epoch] = places if self._used is None else self._used[places]
        return numbers


class Blend:
    """Sequences of several folders by weight, see ``blend_table``.

    Raises:
        DataError: a weight is too small to be met within the period.
    """

    def __init__(self, parts: Sequence[Epochs], weights: Sequence[float], names: Sequence[str]) -> None:
        self.parts = parts
        if len(parts) == 1:
            return
        for name, weight in zip(names, weights, strict=True):
            if weight * BLEND_PERIOD < sum(weights):
                problem = f"weight {weight} is less than one sequence in {BLEND_PERIOD}"
                raise DataError(name, problem, "raise the weight, or leave the folder out")
        self._part, self._rank = blend_table(np.array(weights) / sum(weights), BLEND_PERIOD)
        self._per_period = np.bincount(self._part, minlength=len(parts))

    def located(
        self, indices: npt.NDArray[np.int64]
    ) -> Iterator[tuple[npt.NDArray[np.bool_], Chunks, npt.NDArray[np.int64]]]:
        """For each folder, which of the indices are its own, and the numbers of their chunks."""
        if len(self.parts) == 1:
            yield np.ones(len(indices), bool), self.parts[0].chunks, self.parts[0].numbers(indices)
            return
        periods, offsets = np.divmod(indices, BLEND_PERIOD)
        part = self._part[offsets]
        position = periods * self._per_period[part] + self._rank[offsets]
        for number in np.unique(part).tolist():
            own, epochs = part == number, self.parts[number]
            yield own, epochs.chunks, epochs.numbers(position[own])


@dataclass(frozen=True)
class _Folder:
    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str) -> _Folder:
        folder = Path(path).expanduser()
        manifest = load_manifest(folder)
        check_sizes(folder, manifest)
        verify_at_start(folder, manifest)
        return cls(folder, manifest)

    @classmethod
    def open_all(cls, path: str) -> list[_Folder]:
        """The folder of a path, or the prepared folders in it, by name.

        Raises:
            DataError: it cannot be used, or one in it is not prepared to its end.
        """
        folder = Path(path).expanduser()
        found = prepared_in(folder)
        if found == [folder]:
            return [cls.open(path)]
        if unfinished := unfinished_in(folder):
            problem = f"not yet prepared to the end: {', '.join(inner.name for inner in unfinished)}"
            remedy = "finish `sinkbench data prepare` or `sinkbench data pile`, or remove what is unfinished"
            raise DataError(str(folder), problem, remedy)
        return [cls.open(str(inner)) for inner in found]

    def has(self, split: str) -> bool:
        return self.manifest.tokens[split] > 0

    def chunks(self, split: str, size: int) -> Chunks:
        """Opens a split.

        Raises:
            DataError: the split is absent, or its files do not match the manifest or each other.
        """
        if not self.has(split):
            problem = f"has no {split} documents"
            raise DataError(str(self.path), problem, "prepare it with another --holdout")
        file = open_tokens(self.path / split)
        count, expected = len(file.tokens), self.manifest.tokens[split]
        if count != expected or file.tokens.dtype != self.manifest.dtype:
            problem = f"{split}.bin holds {count} {file.tokens.dtype} where the manifest says {expected} "
            raise DataError(str(self.path), problem + self.manifest.dtype, "prepare the folder again")
        largest = int(file.tokens[:: max(1, count // _CHECKED_TOKENS)].max())
        if largest >= self.manifest.tokenizer.vocab_size:
            problem = f"{split}.bin holds token {largest}, outside the tokenizer's vocabulary of "
            problem += str(self.manifest.tokenizer.vocab_size)
            raise DataError(str(self.path), problem, "it is damaged: prepare the folder again")
        mask = f"{split}.mask"
        masked = mask in self.manifest.files
        return Chunks(
            file.tokens,
            file.lengths,
            size,
            np.memmap(self.path / mask, bool, "r") if masked else None,
            str(self.path / split),
        )


class IndexedSource:
    """Prepared folders; see ``sinkbench.data.source.SequenceSource``."""

    def __init__(
        self,
        train: Blend,
        validation: dict[str, Chunks],
        *,
        seq_length: int,
        vocab_size: int,
        fingerprint: str,
        tokenizer: Path,
        document_mask: bool = False,
    ) -> None:
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self.tokenizer: Path | None = tokenizer
        self.domains: tuple[str, ...] = tuple(validation)
        self._train = train
        self._validation = validation
        self._document_mask = document_mask
        self._masked = any(c.masked for c in (*(part.chunks for part in train.parts), *validation.values()))

    @classmethod
    def open(cls, config: IndexedConfig, *, seq_length: int, seed: int) -> IndexedSource:
        """
        Raises:
            DataError: a folder cannot be used, or folders do not go together.
        """
        folders, weights, held_out = _open_folders(config)
        _check_tokenizers([*folders, *held_out.values()])
        size = seq_length + 1
        parts = []
        for number, folder in enumerate(folders):
            chunks = folder.chunks(TRAIN, size)
            if not chunks.count:
                problem = f"has {folder.manifest.tokens[TRAIN]} training tokens, below one sequence of {size}"
                raise DataError(str(folder.path), problem, "shorten model.seq_length, or prepare more text")
            parts.append(Epochs(chunks, config.unique_fraction, seed, number))
        names = [str(folder.path) for folder in folders]
        hashes = [folder.manifest.files["train.bin"].sha256 for folder in folders]
        identity = [hashes, weights, config.unique_fraction, size, seed]
        return cls(
            Blend(parts, weights, names),
            {name: folder.chunks(VALIDATION, size) for name, folder in held_out.items()},
            seq_length=seq_length,
            vocab_size=folders[0].manifest.tokenizer.vocab_size,
            fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
            tokenizer=folders[0].path / folders[0].manifest.tokenizer.path,
            document_mask=config.document_mask,
        )

    def sequences(self, start: int, count: int) -> Arrays:
        """``tokens``, ``loss_mask`` where any folder holds dialogues, and with a document mask
        ``document_start``."""
        shape = (count, self.seq_length + 1)
        arrays: Arrays = {"tokens": np.empty(shape, np.int64)}
        if self._masked:
            arrays["loss_mask"] = np.empty(shape, bool)
        if self._document_mask:
            arrays["document_start"] = np.empty(shape, np.int32)
        for own, chunks, numbers in self._train.located(np.arange(start, start + count)):
            for name, rows in self._read(chunks, numbers).items():
                arrays[name][own] = rows
        return arrays

    def _read(self, chunks: Chunks, numbers: npt.NDArray[np.int64]) -> Arrays:
        arrays: Arrays = {"tokens": chunks.rows(numbers)}
        if self._masked:
            arrays["loss_mask"] = chunks.masks(numbers)
        if self._document_mask:
            arrays["document_start"] = chunks.document_starts(numbers)
        return arrays

    def sequence(self, index: int) -> Arrays:
        return {name: rows[0] for name, rows in self.sequences(index, 1).items()}

    def origin(self, index: int) -> str:
        ((_, chunks, numbers),) = self._train.located(np.array([index]))
        first, last = chunks.documents(int(numbers[0]))
        which = f"document {first}" if first == last else f"documents {first} to {last}"
        return f"{which} of {chunks.name}"

    def validation(self, domain: str) -> HeldOut:
        chunks = self._validation[domain]
        order = _permutation(chunks.count, _EVERY_RUN)

        def read(start: int, count: int) -> Arrays:
            return self._read(chunks, order[start : start + count])

        return HeldOut(chunks.count, read)

    def probe(self, count: int, length: int) -> Arrays:
        """The first ``length`` tokens of held-out documents that are longer, domains in turn. Where
        there are fewer such documents than ``count``, their later stretches follow; none crosses the
        end of a document, and none overlaps another: a document mask would change nothing."""
        offsets = [chunks.window_offsets(length) for chunks in self._validation.values()]
        found = sum(map(len, offsets))
        if found < count:
            problem = f"{count} is above the {found} stretches of {length} tokens in held-out documents"
            remedy = "hold out more (--holdout), or lower it or measure.length"
            raise DataError("measure.count", problem, remedy)
        turn = np.concatenate([np.arange(len(of_domain)) for of_domain in offsets])
        domain = np.repeat(np.arange(len(offsets)), [len(of_domain) for of_domain in offsets])
        chosen = np.lexsort((domain, turn))[:count]
        chunks = list(self._validation.values())
        rows = [chunks[domain[i]].window(int(offsets[domain[i]][turn[i]]), length) for i in chosen]
        return {"tokens": np.stack(rows)}


def _permutation(count: int, *seed: int) -> npt.NDArray[Any]:
    """In the smallest integers that hold it, since one is kept for an epoch."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(count)
    return order.astype(np.min_scalar_type(count))


def _by_name(folders: Sequence[_Folder]) -> dict[str, _Folder]:
    """The folders that hold something out, by the last part of their path."""
    named: dict[str, _Folder] = {}
    for folder in folders:
        name = folder.path.resolve().name
        if name in named:
            problem = f"two folders are called {name}"
            raise DataError(str(folder.path), problem, "name the domains in data.validation")
        if folder.has(VALIDATION):
            named[name] = folder
    return named


def _open_folders(config: IndexedConfig) -> tuple[list[_Folder], list[float], dict[str, _Folder]]:
    """Training folders, their weights, and folders that hold validation documents by domain. A folder of
    prepared folders is blended by their sizes, as if their sequences were shuffled together."""
    if config.prepare is not None:
        from sinkbench.data.prepare import prepare_cached

        folder = _Folder.open(str(prepare_cached(config.prepare)))
        return [folder], [1.0], {"held_out": folder}
    folders: list[_Folder] = []
    weights: list[float] = []
    for entry in config.train:
        found = _Folder.open_all(entry.path)
        sizes = [folder.manifest.tokens[TRAIN] for folder in found]
        folders += found
        weights += [entry.weight * size / max(sum(sizes), 1) for size in sizes]
    held_out = {name: _Folder.open(path) for name, path in config.validation.items()}
    return folders, weights, held_out or _by_name(folders)


def _check_tokenizers(folders: Sequence[_Folder]) -> None:
    first = folders[0]
    wanted = first.manifest.tokenizer
    for folder in folders[1:]:
        found = folder.manifest.tokenizer
        # The EOS too: a file beside the hashed one may name it.
        if (found.sha256, found.eos_id) != (wanted.sha256, wanted.eos_id):
            problem = f"was prepared with another tokenizer than {first.path}"
            raise DataError(str(folder.path), problem, "prepare both with one tokenizer")
