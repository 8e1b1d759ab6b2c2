"""Sizes of the kernels' blocks: fixed ones that were measured, or the fastest of a few, tuned once and kept.

They are tuned on a card at the first call of each kind, which takes seconds, and kept in ``tiles.json`` in
~/.cache/sinkbench or SINKBENCH_CACHE, by card, Triton version, source of the kernels and kind of call. The
fixed sizes are used under ``train.deterministic``, with SINKBENCH_AUTOTUNE=0, where the file cannot be
written, and in a CUDA graph's capture.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkbench.errors import HostError
from sinkbench.files import write_atomically

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tiles:
    """Queries and keys of a block, warps of a program, stages of its pipeline, and the most registers that a
    thread may have, so that more programs fit a multiprocessor; 0 is no limit."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        """As a kernel takes them."""
        sizes = {"BLOCK_Q": self.block_q, "BLOCK_K": self.block_k, "num_warps": self.num_warps}
        limit = {"maxnreg": self.registers} if self.registers else {}
        return sizes | {"num_stages": self.num_stages} | limit


FIXED = {
    "forward": {
        64: Tiles(128, 64, 4, 3),
        96: Tiles(128, 64, 4, 3),
        128: Tiles(64, 64, 4, 3),
        256: Tiles(64, 32, 4, 2),
    },
    "keys": {
        64: Tiles(64, 64, 4, 3),
        96: Tiles(64, 64, 4, 3),
        128: Tiles(64, 64, 4, 2),
        256: Tiles(32, 64, 8, 1),
    },
    "queries": {
        64: Tiles(64, 64, 4, 3),
        96: Tiles(64, 64, 4, 2),
        128: Tiles(128, 64, 8, 3),
        256: Tiles(64, 32, 8, 1),
    },
    "hopper forward": {128: Tiles(64, 64, 4, 2)},
    "hopper keys": {128: Tiles(64, 64, 4, 2)},
    "hopper queries": {96: Tiles(64, 64, 4, 2, 168), 128: Tiles(64, 64, 4, 2)},
    "linear": {128: Tiles(64, 128, 4, 2), 256: Tiles(64, 32, 4, 2)},
    "linear gradients": {128: Tiles(64, 128, 4, 2), 256: Tiles(64, 32, 4, 2)},
}
"""By kernel and largest head size, as measured for sigmoid on an H100 (benchmarks/attention.py); those of
kernel attention, which takes positions of a chunk and features at a time, by what the compiler spills. With
the limit of registers three programs fit where two did; functions of a similarity that need more are faster
without it, which is tuned."""

FIXED_WITH_SLOPE = {
    "forward": Tiles(64, 64, 4, 3),
    "keys": Tiles(64, 64, 4, 3),
    "queries": Tiles(64, 32, 4, 3),
    "hopper queries": Tiles(64, 64, 4, 2),
}
"""For head sizes up to 96, where scores fall with the distance; measured for softmax on an H100."""

FIXED_WITH_TABLE = {
    "forward": Tiles(64, 32, 4, 3),
    "keys": Tiles(64, 64, 4, 2),
    "queries": Tiles(64, 32, 4, 3),
    "hopper queries": Tiles(64, 64, 4, 2),
}
"""For head sizes up to 128, where a bias is read from a table; measured for softmax at 96 on an H100."""

FIXED_WITH_DOCUMENTS = {"forward": Tiles(64, 64, 4, 3), "hopper queries": Tiles(64, 64, 4, 2)}
"""For head sizes up to 128, where documents bound what is seen: in larger blocks of 4 warps the masks at both
ends of a row take more registers than there are. Chosen by what the compiler spills; not timed."""

FIXED_FLOAT32 = {128: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 8, 1)}
"""For all kernels, by largest head size. Products of float32 take no tensor cores but many registers: larger
blocks spill up to 20 KiB a thread."""

CANDIDATES = {
    "forward": (
        Tiles(128, 64, 4, 3),
        Tiles(128, 64, 8, 3),
        Tiles(128, 128, 8, 2),
        Tiles(64, 64, 4, 3),
        Tiles(64, 32, 4, 3),
    ),
    "keys": (
        Tiles(64, 64, 4, 3),
        Tiles(64, 64, 4, 2),
        Tiles(32, 64, 4, 3),
        Tiles(32, 64, 4, 2),
        Tiles(64, 128, 8, 2),
    ),
    "queries": (
        Tiles(64, 64, 4, 2),
        Tiles(64, 64, 4, 3),
        Tiles(64, 32, 4, 3),
        Tiles(128, 64, 8, 3),
        Tiles(128, 32, 8, 3),
    ),
    "hopper forward": (),
    "hopper keys": (Tiles(32, 64, 4, 2),),
    "hopper queries": (Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2, 168)),
    "linear": (Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 3), Tiles(128, 64, 8, 2), Tiles(128, 128, 8, 2)),
    "linear gradients": (
        Tiles(64, 64, 4, 2),
        Tiles(64, 32, 4, 3),
        Tiles(128, 64, 8, 2),
        Tiles(128, 128, 8, 2),
    ),
}
"""What is tried beside the fixed sizes, for head sizes up to 128: few, since each is compiled for seconds."""
LARGE_CANDIDATES = (Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 2), Tiles(64, 64, 8, 1), Tiles(32, 64, 4, 1))
"""For larger heads."""
FLOAT32_CANDIDATES = (Tiles(32, 16, 4, 1), Tiles(16, 16, 4, 1))

SMALLEST_BLOCK = 16
"""Of all sizes above."""

Launch = Callable[[Tiles], object]
_chosen: dict[tuple[Any, ...], Tiles] = {}


def fixed(
    kernel: str, head_size: int, dtype: torch.dtype, position: int = 0, documents: bool = False
) -> Tiles:
    """The sizes that are not tuned; ``position`` and ``documents`` as in the kernels."""
    if dtype != torch.float32 and position == 1 and head_size <= 96 and kernel in FIXED_WITH_SLOPE:
        return FIXED_WITH_SLOPE[kernel]
    if dtype != torch.float32 and position == 2 and head_size <= 128 and kernel in FIXED_WITH_TABLE:
        return FIXED_WITH_TABLE[kernel]
    if dtype != torch.float32 and documents and head_size <= 128 and kernel in FIXED_WITH_DOCUMENTS:
        return FIXED_WITH_DOCUMENTS[kernel]
    by_size = FIXED_FLOAT32 if dtype == torch.float32 else FIXED[kernel]
    return by_size[min(size for size in by_size if size >= head_size)]


def choose(
    kernel: str,
    query: Tensor,
    variant: Mapping[str, Any],
    launch: Launch,
    position: int = 0,
    documents: bool = False,
) -> Tiles:
    """The sizes for a kernel's call.

    Args:
        kernel: a name of ``FIXED``.
        query: [b, h, t, d].
        variant: what else the speed depends on.
        launch: runs the kernel; it may run several times.
        position: kind of the bias by distance, as in the kernels.
        documents: whether these bound what is seen.
    """
    length, head_size = query.shape[2:]
    default = fixed(kernel, head_size, query.dtype, position, documents)
    if not query.is_cuda or torch.are_deterministic_algorithms_enabled() or not _enabled():
        return default
    bucket = 1 << max(length - 1, 0).bit_length()
    name = (kernel, head_size, str(query.dtype), *variant.values(), bucket, query.device.index)
    if name in _chosen:
        return _chosen[name]
    if torch.cuda.is_current_stream_capturing():
        return default
    key = {
        "card": torch.cuda.get_device_name(query.device),
        "triton": _triton_version(),
        "source": source_hash(),
        "kernel": kernel,
        "head_size": head_size,
        "dtype": str(query.dtype),
        "length": bucket,
        **variant,
    }
    candidates = _candidates(kernel, head_size, query.dtype)
    _chosen[name] = tuned(key, default, candidates, partial(times, launch))
    return _chosen[name]


def tuned(
    key: Mapping[str, Any],
    default: Tiles,
    candidates: tuple[Tiles, ...],
    measure: Callable[[tuple[Tiles, ...]], Mapping[Tiles, float]],
) -> Tiles:
    """The kept sizes of a key, or the fastest, which are then kept.

    Args:
        measure: time of a call with each of them, infinite for one that the card cannot run.
    """
    path, name = cache_file(), json.dumps(dict(key), sort_keys=True)
    kept = load(path).get(name)
    if kept is not None:
        return kept
    tried = tuple(dict.fromkeys((default, *candidates)))
    _log.info(
        "tuning the blocks of the kernel %s of attention: %d sizes, once for this card", name, len(tried)
    )
    found = measure(tried)
    best = min(found, key=lambda sizes: found[sizes])
    if math.isinf(found[best]):
        return default
    try:
        # Read once more: other processes tune other keys meanwhile.
        entries = {one: asdict(sizes) for one, sizes in load(path).items()}
        write_atomically(path, json.dumps(entries | {name: asdict(best)}, indent=1, sort_keys=True) + "\n")
    except HostError as error:
        _log.warning("block sizes are not tuned: %s", error)
        return default
    _log.info("tuned %s: %s, %.2fx the fixed sizes", name, best, found[best] / found[default])
    return best


def load(path: Path) -> dict[str, Tiles]:
    """The kept sizes by key. What cannot be read or is not of ours is left out, with a line in the log."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning("%s is passed over: %s", path, error)
        return {}
    entries = held if isinstance(held, dict) else {"the file": held}
    found = {name: sizes for name, value in entries.items() if (sizes := _parsed(value)) is not None}
    if len(found) < len(entries):
        _log.warning("%s: %d entries are no block sizes and are passed over", path, len(entries) - len(found))
    return found


def _parsed(value: object) -> Tiles | None:
    if not isinstance(value, dict) or {"registers", *value} != Tiles.__dataclass_fields__.keys():
        return None
    if any(type(size) is not int for size in value.values()):
        return None
    sizes = Tiles(**value)
    allowed = (
        {sizes.block_q, sizes.block_k} <= {16, 32, 64, 128, 256},
        sizes.num_warps in (1, 2, 4, 8, 16),
        sizes.num_stages in range(1, 8),
        sizes.registers == 0 or sizes.registers in range(32, 256),
    )
    return sizes if all(allowed) else None


def cache_file() -> Path:
    """Where tuned sizes are kept."""
    return Path(os.environ.get("SINKBENCH_CACHE", "~/.cache/sinkbench")).expanduser() / "tiles.json"


def times(launch: Launch, tried: tuple[Tiles, ...]) -> dict[Tiles, float]:
    """Time of each on the card."""
    return {sizes: seconds(partial(launch, sizes)) for sizes in tried}


def seconds(run: Callable[[], object]) -> float:
    """Median time of a kernel on the card; infinite if it needs more than the card has."""
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    try:
        return float(do_bench(run, warmup=10, rep=40, return_mode="median")) / 1e3
    except (OutOfResources, PTXASError) as error:
        _log.debug("block sizes that do not fit: %s", error)
        return math.inf


def _candidates(kernel: str, head_size: int, dtype: torch.dtype) -> tuple[Tiles, ...]:
    if dtype == torch.float32:
        return FLOAT32_CANDIDATES
    return CANDIDATES[kernel] if head_size <= 128 else LARGE_CANDIDATES


def _enabled() -> bool:
    return os.environ.get("SINKBENCH_AUTOTUNE", "1") != "0"


@cache
def source_hash() -> str:
    """Of the kernels' files."""
    here = Path(__file__).parent
    kernels = sorted([*here.glob("triton_*.py"), *here.glob("hopper_*.py")])
    files = [here.parent / "triton_math.py", *kernels]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


@cache
def _triton_version() -> str:
    from importlib.metadata import version

    return version("triton")
