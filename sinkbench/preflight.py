"""Checks of a run that need neither torch nor the data, so that what cannot start says so at once.

What is certain to fail is refused: a launcher's environment that makes no sense, a folder that cannot be
written, a checkpoint to start from that is not there, sizes that alone exceed the host's memory.
"""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

import psutil

from sinkbench import packages
from sinkbench.batching import data_parallel_size, micro_batch_size
from sinkbench.checkpoint import CheckpointStore, open_checkpoint
from sinkbench.config import MEGATRON_FIELDS, Config
from sinkbench.data import run_tokenizer
from sinkbench.errors import CheckpointError, HostError, RecipeError
from sinkbench.explain import all_keys, nearest, unknown_key
from sinkbench.flops import parameters, vocab_size
from sinkbench.run_folder import folder_of, refuse_other_recipe
from sinkbench.stopping import START_TIMEOUT

LEAST_BYTES = 6
"""Of a parameter that is trained: its weight in bf16 and its gradient in fp32."""
TOKEN_BYTES = 8
"""Of a token in a batch."""
ACTIVATION_BYTES = {"bf16": 2, "fp32": 4}
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
    _whole_number(START_TIMEOUT, 1)
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
    _check_address(os.environ["MASTER_ADDR"])


def _check_address(name: str) -> None:
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a host"
        problem = f"{name[:80]!r} cannot be resolved ({reason})"
        remedy = "give the name or address of the host of rank 0, or start with torchrun"
        raise HostError("MASTER_ADDR", problem, remedy) from error


def _whole_number(name: str, least: int) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10) or int(text) < least:
        raise HostError(name, f"{text[:40]!r} is not a whole number of at least {least}", _RESTART)
    return int(text)


def check_host(config: Config) -> None:
    """Checks the number of processes, the run's folder, what it starts from, the packages that it names and,
    for training on CPU, the memory.

    Raises:
        HostError: the folder cannot be written; the processes do not suit the layout; a package that the
            recipe names is absent; it does not fit into memory.
        RecipeError: the folder holds a run of another recipe; the batch does not divide; there is no card
            for graphs, no such field of megatron's, or no such key to allow changes of.
        DataError: the data are of another tokenizer than those that the run in the folder began with.
        CheckpointError: the checkpoint to start from is absent or damaged.
    """
    _check_megatron(config)
    _check_allowed_changes(config)
    _check_card(config)
    folder = folder_of(config)
    _check_writable(folder)
    start = config.checkpoint.start_from
    if start is not None and not CheckpointStore(folder / "checkpoints").steps():
        _check_start(Path(start).expanduser())
    data_size = data_parallel_size(config.parallel, int(os.environ.get("WORLD_SIZE", "1")))
    micro_batch = micro_batch_size(config, data_size)
    on_card = config.train.device != "cpu" and (config.train.device == "cuda" or _CUDA_DEVICE.exists())
    packages.check(config, on_card=on_card)
    if not on_card:
        _check_weights(config)
        _check_activations(config, micro_batch)
        _check_batch(config, config.train.global_batch_size // data_size)
    # At last: a mistake may be why the recipe is another.
    refuse_other_recipe(folder, config)
    run_tokenizer.refuse_other(config, folder)


def _check_start(folder: Path) -> None:
    if not folder.is_dir():
        remedy = "train the run that it is of, or name another folder checkpoints/step_N"
        raise CheckpointError("checkpoint.start_from", f"there is no checkpoint {folder}", remedy)
    open_checkpoint(folder)


def _check_megatron(config: Config) -> None:
    for name in sorted(config.model.megatron.keys() - MEGATRON_FIELDS):
        where = f"model.megatron.{name}"
        keys = {path.rpartition(".")[2]: path for path in all_keys(Config)}
        if name in keys:
            raise RecipeError(where, "a section of the recipe owns this field", f"set {keys[name]} instead")
        problem = "megatron-core has no such field, or it has no effect in sinkbench's models"
        raise RecipeError(where, problem, nearest(name, MEGATRON_FIELDS))


def _check_allowed_changes(config: Config) -> None:
    for key in config.checkpoint.allow_change:
        if remedy := unknown_key(key, Config):
            raise RecipeError("checkpoint.allow_change", f"{key} is no key of a recipe", remedy)


def _check_card(config: Config) -> None:
    if config.train.device != "cpu" and _has_driver():
        return
    if config.train.device == "cuda":
        raise HostError("train.device", "cuda is not available here", "write auto or cpu")
    if config.train.cuda_graph is True:
        raise RecipeError("train.cuda_graph", "is for CUDA cards", "set it to auto or false")


def _has_driver() -> bool:
    """Whether CUDA may be there; whether a card is, torch tells."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return _CUDA_DEVICE.exists()
    return True


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


def _check_weights(config: Config) -> None:
    vocabulary = vocab_size(config)
    count = parameters(config.model, vocabulary if vocabulary is not None else 1)
    share = count // (config.parallel.tensor * config.parallel.pipeline)
    sizes = f"num_layers {config.model.num_layers} and hidden_size {config.model.hidden_size}"
    what = f"{sizes} make {count:,} parameters, which"
    _check_memory("model", what, share * LEAST_BYTES, "lower its sizes, or use more hosts")


def _check_activations(config: Config, micro_batch: int) -> None:
    """The backward pass needs the input of every layer, or of one if the others are computed again. The
    logits are not counted: a fused loss never holds them all."""
    model, parallel = config.model, config.parallel
    recomputed = config.train.recompute == "full"
    layers = 1 if recomputed else model.num_layers // parallel.pipeline
    values = micro_batch * model.seq_length * model.hidden_size * layers
    share = values // (parallel.context * parallel.tensor)
    held = "one layer" if layers == 1 else f"{layers} layers"
    what = f"{model.seq_length}: {held} and a micro-batch of {micro_batch}, which"
    further = "raise parallel.context" if recomputed else "set train.recompute=full"
    remedy = f"lower it or train.micro_batch_size, or {further}"
    _check_memory("model.seq_length", what, share * ACTIVATION_BYTES[config.train.precision], remedy)


def _check_batch(config: Config, sequences: int) -> None:
    """A rank holds the tokens of a whole step."""
    length = config.model.seq_length
    what = f"{config.train.global_batch_size} sequences of {length} tokens"
    needed = sequences * length * TOKEN_BYTES
    _check_memory("train.global_batch_size", what, needed, "lower it, or use more hosts")


def _check_memory(where: str, what: str, needed: int, remedy: str) -> None:
    """
    Args:
        needed: bytes, of one rank.
    """
    on_host = needed * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    there = psutil.virtual_memory().total
    if on_host > there:
        problem = f"{what} need {on_host / 1e9:,.0f} GB of memory, and {there / 1e9:,.0f} GB are here"
        raise HostError(where, problem, remedy)
