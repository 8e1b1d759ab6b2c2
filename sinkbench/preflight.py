"""Checks of a run that need neither torch nor the data, so that what cannot start says so at once.

What is certain to fail is refused: a launcher's environment that makes no sense, a folder that cannot be
written, a model whose weights and gradients alone exceed the host's memory.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from sinkbench.config import Config
from sinkbench.errors import HostError
from sinkbench.flops import parameters, vocab_size
from sinkbench.run_folder import folder_of, refuse_other_recipe

LEAST_BYTES = 6
"""Of a parameter that is trained: its weight in bf16 and its gradient in fp32."""
_RESTART = "start with torchrun, or unset it"
_LARGEST_PORT = 2**16 - 1
_CUDA_DEVICE = Path("/dev/nvidiactl")


def check_launcher() -> None:
    """Checks the variables that torchrun, or whatever starts the processes, sets.

    Raises:
        HostError: one of them is wrong, or they contradict one another.
    """
    world_size = _whole_number("WORLD_SIZE", 1)
    rank = _whole_number("RANK", 0)
    _whole_number("LOCAL_WORLD_SIZE", 1)
    _whole_number("LOCAL_RANK", 0)
    port = _whole_number("MASTER_PORT", 0)
    if port is not None and port > _LARGEST_PORT:
        raise HostError("MASTER_PORT", f"{port} is no port", f"give one up to {_LARGEST_PORT}")
    if rank is None:
        if world_size not in (None, 1):
            raise HostError("WORLD_SIZE", f"it is {world_size}, but RANK is not set", _RESTART)
        return
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise HostError("RANK", f"it is {rank}, but {' and '.join(missing)} is not set", _RESTART)
    if world_size is not None and rank >= world_size:
        raise HostError("RANK", f"{rank} is not below WORLD_SIZE {world_size}", _RESTART)


def _whole_number(name: str, least: int) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or int(text) < least:
        raise HostError(name, f"{text[:40]!r} is not a whole number of at least {least}", _RESTART)
    return int(text)


def check_host(config: Config) -> None:
    """Checks the run's folder and, for training on CPU, the memory.

    Raises:
        HostError: the folder cannot be written; the model does not fit into memory.
        RecipeError: the folder holds a run of another recipe.
    """
    folder = folder_of(config)
    _check_writable(folder)
    refuse_other_recipe(folder, config)
    if config.train.device == "cpu" or (config.train.device == "auto" and not _CUDA_DEVICE.exists()):
        _check_memory(config)


def _check_writable(folder: Path) -> None:
    """Nothing is made: the nearest folder above that exists must allow it."""
    remedy = "set output_dir to a folder you may write to"
    try:
        nearest = next(path for path in (folder, *folder.absolute().parents) if _exists(path))
    except OSError as error:
        raise HostError(str(folder), f"cannot be written ({error.strerror})", remedy) from error
    if not nearest.is_dir():
        raise HostError(str(folder), "cannot be written (Not a directory)", remedy)
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise HostError(str(folder), f"cannot be written ({nearest} may not be written to)", remedy)


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _check_memory(config: Config) -> None:
    vocabulary = vocab_size(config)
    count = parameters(config.model, vocabulary if vocabulary is not None else 1)
    share = count // (config.parallel.tensor * config.parallel.pipeline)
    needed = share * LEAST_BYTES * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    there = psutil.virtual_memory().total
    if needed > there:
        sizes = f"num_layers {config.model.num_layers} and hidden_size {config.model.hidden_size}"
        problem = f"{sizes} make {count:,} parameters, which need {needed / 1e9:,.0f} GB of memory, "
        problem += f"and {there / 1e9:,.0f} GB are here"
        raise HostError("model", problem, "lower its sizes, or use more hosts")
