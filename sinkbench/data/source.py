"""Where a run's sequences come from: one interface for token files and for synthetic tasks.

A sequence is a pure function of the recipe's data section, the seed and the sequence's index, so the
order depends neither on the parallel layout nor on train.steps: a longer run begins with the same
sequences, and a resumed run goes on at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy.typing as npt

from sinkbench.config import BigramBackcopyConfig, Config
from sinkbench.errors import DataError

Arrays: TypeAlias = dict[str, npt.NDArray[Any]]
"""``tokens`` int64, and what else the source knows of each position (``trigger`` bool; under
data.document_mask ``document_start`` int32, at which position each position's document begins)."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out sequences of one domain by index, in an order of which every beginning is a fair
    sample.

    Attributes:
        size: how many there are.
        sequences: (start, count) -> arrays [count, seq_length + 1].
    """

    size: int
    sequences: Callable[[int, int], Arrays]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Arrays:
        if not 0 <= index < self.size:
            raise IndexError(f"sequence {index} of {self.size}")
        return {name: rows[0] for name, rows in self.sequences(index, 1).items()}


class SequenceSource(Protocol):
    """
    Attributes:
        vocab_size: one more than the largest token id.
        seq_length: a sequence has one token more: inputs and targets overlap in all but one.
        domains: names of the held-out sets; empty if nothing is held out.
        fingerprint: equal for sources that give the same training sequences.
        tokenizer: main file of the tokenizer that made the tokens; None for those of a synthetic task.
    """

    vocab_size: int
    seq_length: int
    domains: tuple[str, ...]
    fingerprint: str
    tokenizer: Path | None

    def sequences(self, start: int, count: int) -> Arrays:
        """Training sequences start .. start + count - 1 of the run, [count, seq_length + 1]."""

    def sequence(self, index: int) -> Arrays:
        """One training sequence, [seq_length + 1]."""

    def origin(self, index: int) -> str:
        """In a few words, where a training sequence is from: its documents, if it has any."""

    def validation(self, domain: str) -> HeldOut:
        """The held-out sequences of a domain."""

    def probe(self, count: int, length: int) -> Arrays:
        """Fixed held-out sequences for the sink metric, [count, length]. No BOS is added.

        Raises:
            DataError: too little is held out.
        """


def open_source(config: Config) -> SequenceSource:
    """The source that a recipe names, checked so far as that is cheap. Prepares data on first use.

    Raises:
        DataError: the data is absent, damaged, too short, or does not fit the model.
        HostError: data cannot be prepared for want of a writable folder.
    """
    source: SequenceSource
    if isinstance(config.data, BigramBackcopyConfig):
        from sinkbench.data.bigram_backcopy import BigramBackcopy

        source = BigramBackcopy(config.data, seq_length=config.model.seq_length, seed=config.seed)
    else:
        from sinkbench.data.indexed import IndexedSource

        source = IndexedSource.open(config.data, seq_length=config.model.seq_length, seed=config.seed)
    if config.model.vocab_size is not None and config.model.vocab_size < source.vocab_size:
        problem = f"{config.model.vocab_size} is below the {source.vocab_size} tokens of the data"
        raise DataError("model.vocab_size", problem, "raise it, or leave it out")
    if config.validation.every:
        _check_validation(source)
    if config.measure.every:
        source.probe(config.measure.count, config.measure.length)
    return source


def _check_validation(source: SequenceSource) -> None:
    if not source.domains:
        problem = "no documents are held out"
        raise DataError("validation.every", problem, "prepare with --holdout above 0, or set it to 0")
    for domain in source.domains:
        if not len(source.validation(domain)):
            problem = f"{domain} holds out less than one sequence of {source.seq_length + 1} tokens"
            raise DataError(
                "validation.every", problem, "hold out more, shorten model.seq_length, or set it to 0"
            )
