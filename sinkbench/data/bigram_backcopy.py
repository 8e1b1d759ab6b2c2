"""The Bigram-Backcopy task (Guo et al. 2410.13835): a language in which attention has work to do at a
few tokens only, so that a sink appears within minutes on a small machine.

x_0 = <s>; x_1 is drawn from the unigram distribution without triggers; then x_t = x_{t-2} if x_{t-1}
is a trigger, else x_t is drawn from the bigram row of x_{t-1}. No trigger follows a trigger: a drawn
trigger follows a non-trigger, which is what is copied next.

Where the paper counts bigrams of a text, the rows here are drawn from a symmetric Dirichlet prior; the
unigram distribution is the stationary one of those rows, and the triggers are its most frequent
tokens. <s> occurs at position 0 only.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sinkbench.config import BigramBackcopyConfig
from sinkbench.data.source import Arrays, HeldOut

START = 0
"""The id of <s>."""

_TABLE, _TRAIN, _VALIDATION, _PROBE = range(4)
"""What random numbers are for: the first part of every seed."""

HELD_OUT_SEQUENCES = 1 << 20
"""Held-out sequences there are; they are drawn when asked for."""


@dataclass(frozen=True)
class Table:
    """The language. Row and column i of ``bigram`` belong to token i + 1.

    Attributes:
        bigram: [v, v] float64 for v = vocab_size - 1, rows sum to 1.
        unigram: [v], its stationary distribution.
        is_trigger: [vocab_size] bool, by token id.
    """

    bigram: npt.NDArray[np.float64]
    unigram: npt.NDArray[np.float64]
    is_trigger: npt.NDArray[np.bool_]


def make_table(config: BigramBackcopyConfig) -> Table:
    """The language of ``config.seed``."""
    count = config.vocab_size - 1
    rng = np.random.Generator(np.random.PCG64([_TABLE, config.seed]))
    bigram = rng.dirichlet(np.full(count, config.concentration), size=count)
    # The stationary distribution p = p P with sum(p) = 1, as a least-squares system.
    system = np.vstack([bigram.T - np.eye(count), np.ones(count)])
    unigram = np.linalg.lstsq(system, np.append(np.zeros(count), 1.0), rcond=None)[0].clip(0)
    unigram /= unigram.sum()
    is_trigger = np.zeros(config.vocab_size, bool)
    is_trigger[1 + np.argsort(-unigram, kind="stable")[: config.num_triggers]] = True
    return Table(bigram, unigram, is_trigger)


class BigramBackcopy:
    """Sequences of the task; see ``sinkbench.data.source.SequenceSource``. ``trigger`` is true where
    the token at that position is a trigger, so that its successor is a copy.

    The held-out sequences depend on the table's seed alone: runs that differ in the recipe's seed are
    measured on the same ones.
    """

    domains: tuple[str, ...] = ("held_out",)
    tokenizer: Path | None = None

    def __init__(self, config: BigramBackcopyConfig, *, seq_length: int, seed: int) -> None:
        self.vocab_size = config.vocab_size
        self.seq_length = seq_length
        self.table = make_table(config)
        self._config = config
        self._seed = seed
        self._row_ends = _row_ends(self.table)
        identity = [config.model_dump_json(exclude={"transforms"}), seq_length, seed]
        self.fingerprint = hashlib.sha256(repr(identity).encode()).hexdigest()

    def sequences(self, start: int, count: int) -> Arrays:
        return self._draw(_TRAIN, self._seed, start, count, self.seq_length + 1)

    def sequence(self, index: int) -> Arrays:
        return {name: rows[0] for name, rows in self.sequences(index, 1).items()}

    def origin(self, index: int) -> str:
        return f"sequence {index} of the task"

    def validation(self, domain: str) -> HeldOut:
        assert domain in self.domains

        def read(start: int, count: int) -> Arrays:
            return self._draw(_VALIDATION, self._config.seed, start, count, self.seq_length + 1)

        return HeldOut(HELD_OUT_SEQUENCES, read)

    def probe(self, count: int, length: int) -> Arrays:
        """Sequences of their own, <s> first, as the task has it."""
        return self._draw(_PROBE, self._config.seed, 0, count, length)

    def _draw(self, purpose: int, seed: int, start: int, count: int, length: int) -> Arrays:
        """Sequences start .. start + count - 1 of a stream. Each takes ``length`` numbers of one random
        stream, so that any sequence is found without drawing those before it."""
        bits = np.random.PCG64([purpose, seed])
        bits.advance(start * length)
        uniform_ts = np.random.Generator(bits).random((count, length)).T
        # Kept so far from 1 that adding the row's number does not round up to the next row.
        uniform_ts = np.minimum(uniform_ts, 1 - 2.0**-32)
        tokens_ts = np.full((length, count), START)
        is_trigger = self.table.is_trigger
        for t in range(1, length):
            last = tokens_ts[t - 1]
            drawn = self._row_ends.searchsorted(last + uniform_ts[t], side="right") % self.vocab_size
            tokens_ts[t] = np.where(is_trigger[last], tokens_ts[t - 2], drawn)
        tokens = np.ascontiguousarray(tokens_ts.T)
        return {"tokens": tokens, "trigger": is_trigger[tokens]}


def _row_ends(table: Table) -> npt.NDArray[np.float64]:
    """[vocab_size * vocab_size]: for each token its number plus the cumulative probabilities of its
    successors. They increase throughout, so that one binary search for token + uniform number draws
    from the row of any token. The row of <s> is the distribution of x_1."""
    vocab_size = len(table.is_trigger)
    rows = np.zeros((vocab_size, vocab_size))
    first = np.where(table.is_trigger[1:], 0.0, table.unigram)
    rows[START, 1:] = first / first.sum()
    rows[1:, 1:] = table.bigram
    ends = np.minimum(np.cumsum(rows, axis=1), 1.0)
    ends[:, -1] = 1.0
    ends += np.arange(vocab_size)[:, None]
    return ends.reshape(-1)
