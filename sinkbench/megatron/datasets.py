"""Token files in megatron's IndexedDataset format, and megatron's rule for blends.

megatron is imported when a function runs, because it takes seconds: the worker processes of
``sinkbench data prepare`` do without it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from sinkbench.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
"""magic, version, code of the type, number of sequences, number of document boundaries."""
_DTYPES: dict[int, np.dtype[np.integer[Any]]] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}


def _indexed_dataset() -> ModuleType:
    from sinkbench.megatron import host

    host.prepare()
    from megatron.core.datasets import indexed_dataset

    module: ModuleType = indexed_dataset
    return module


class TokenWriter:
    """Writes ``PREFIX.bin`` and, when closed, ``PREFIX.idx``.

    Args:
        prefix: path without the extension.
        dtype: of the stored ids, uint16 or int32.
        masked: also write ``PREFIX.mask``, a byte for each token.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike, *, masked: bool = False) -> None:
        # Open as long as the writer is, as megatron's builder is; close() closes both.
        self._mask = Path(f"{prefix}.mask").open("wb") if masked else None  # noqa: SIM115
        self._index = f"{prefix}.idx"
        self._builder: Any = _indexed_dataset().IndexedDatasetBuilder(
            f"{prefix}.bin", dtype=np.dtype(dtype).type
        )

    def add(self, document: npt.NDArray[np.integer[Any]], mask: npt.NDArray[np.bool_] | None = None) -> None:
        self._builder.add_document(document, [len(document)])
        if self._mask is not None:
            assert mask is not None
            self._mask.write(mask.tobytes())

    def close(self) -> None:
        if self._mask is not None:
            self._mask.close()
        self._builder.finalize(self._index)


@dataclass(frozen=True)
class TokenFile:
    """An open IndexedDataset.

    Attributes:
        tokens: all ids, one document after the other, mapped from disk.
        lengths: tokens of each document.
    """

    tokens: npt.NDArray[np.integer[Any]]
    lengths: npt.NDArray[np.int32]


def open_tokens(prefix: Path) -> TokenFile:
    """Maps ``PREFIX.bin`` and reads ``PREFIX.idx``.

    Raises:
        DataError: a file is missing, damaged, or they do not belong together.
    """
    index_path, data_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        dtype, lengths = _read_index(index_path.read_bytes())
        size = data_path.stat().st_size
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
        raise DataError(str(error.filename), problem, "prepare the folder again") from error
    except ValueError as error:
        raise DataError(str(index_path), f"is damaged ({error})", "prepare the folder again") from error
    expected = int(lengths.sum(dtype=np.int64)) * dtype.itemsize
    if size != expected:
        problem = f"has {size} bytes where {index_path.name} says {expected}"
        raise DataError(str(data_path), problem, "copy both files again, or prepare the folder again")
    return TokenFile(np.memmap(data_path, dtype=dtype, mode="r"), lengths)


def _read_index(data: bytes) -> tuple[np.dtype[np.integer[Any]], npt.NDArray[np.int32]]:
    """The type of the ids and the length of each sequence: what megatron's ``_IndexWriter`` writes.

    Read here, because megatron's reader asserts where the file is wrong and then fails again when the
    half-made object is deleted.
    """
    if len(data) < _HEADER.size:
        raise ValueError("the header is cut off")
    magic, version, code, sequences, documents = _HEADER.unpack_from(data)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise ValueError("not the header of an IndexedDataset of int32 or uint16")
    # For each sequence a length (int32) and a byte offset (int64), for each document a sequence (int64).
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if len(data) != expected:
        raise ValueError(f"{len(data)} bytes where the header says {expected}")
    return _DTYPES[code], np.frombuffer(data, np.int32, sequences, _HEADER.size)


def blend_table(
    weights: npt.NDArray[np.float64], size: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """megatron's blending rule: each sample goes to the dataset that lags its weight the most.

    Args:
        weights: one per dataset; they sum to 1.
        size: samples to assign.

    Returns:
        The dataset of each sample, and how many earlier samples that dataset has had.
    """
    _indexed_dataset()
    from megatron.core.datasets import helpers

    dataset = np.zeros(size, np.int16)
    rank = np.zeros(size, np.int64)
    helpers.build_blending_indices(dataset, rank, weights, len(weights), size, False)
    return dataset, rank
