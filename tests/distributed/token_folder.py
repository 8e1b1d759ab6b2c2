"""A prepared folder of random tokens, for recipes with an indexed source."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.unit.data_folder import write_folder

VOCAB_SIZE = 300
"""Not a multiple of 64, so that the model's tables are padded."""


def write_random_text(folder: Path) -> Path:
    """Documents of 70 to 300 tokens, of which few are frequent, as in a text."""
    rng = np.random.default_rng(0)

    def documents(count: int) -> list[list[int]]:
        lengths = rng.integers(70, 300, count)
        return [np.minimum(rng.zipf(1.3, n), VOCAB_SIZE - 1).tolist() for n in lengths]

    return write_folder(folder, documents(100), documents(30), vocab_size=VOCAB_SIZE)
