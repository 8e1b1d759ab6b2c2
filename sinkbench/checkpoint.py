"""The checkpoints of a run: written whole or not at all, found, checked and pruned.

checkpoints/step_200/      megatron's distributed files, recipe.yaml, checkpoint.json (written last)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sinkbench.config import CheckpointConfig
from sinkbench.errors import CheckpointError
from sinkbench.files import write_atomically

if TYPE_CHECKING:
    from sinkbench.megatron.training import Engine

INFO = "checkpoint.json"
RECIPE = "recipe.yaml"
FORMAT = 1
USE_EARLIER = "delete the folder to go on from an earlier checkpoint"
_STEP = re.compile(r"step_(\d+)$")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Attributes:
    layout: parallel sizes of the run that wrote it.
    """

    folder: Path
    step: int
    layout: dict[str, int]

    @property
    def recipe(self) -> Path:
        return self.folder / RECIPE


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads what a checkpoint says of itself.

    Raises:
        CheckpointError: the folder is no checkpoint, is incomplete, of another format, or a file does not
            have the size it was written with.
    """
    if not folder.is_dir():
        raise CheckpointError(str(folder), "there is no such checkpoint", "name a folder checkpoints/step_N")
    path = folder / INFO
    try:
        info = json.loads(path.read_text())
        if info["format"] != FORMAT:
            problem = f"it has format {info['format']}, this version reads {FORMAT}"
            raise CheckpointError(str(folder), problem, "use a matching sinkbench")
        sizes = {str(name): int(size) for name, size in info["files"].items()}
        checkpoint = Checkpoint(folder=folder, step=int(info["step"]), layout=dict(info["layout"]))
    except FileNotFoundError:
        problem = f"{INFO} is missing, so it is not a complete checkpoint"
        raise CheckpointError(str(folder), problem, USE_EARLIER) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"is damaged ({type(error).__name__}: {error})"
        raise CheckpointError(str(path), problem, USE_EARLIER) from None
    _check_files(folder, sizes)
    return checkpoint


def _check_files(folder: Path, sizes: dict[str, int]) -> None:
    for name in (*sizes, RECIPE):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(str(path), "is missing", f"copy it again, or {USE_EARLIER}")
        size = path.stat().st_size
        if size != sizes.get(name, size):
            problem = f"has {size} bytes where {INFO} says {sizes[name]}"
            raise CheckpointError(str(path), problem, f"copy it again, or {USE_EARLIER}")


class CheckpointStore:
    """The folder ``checkpoints`` of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Steps of the checkpoints there, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> Checkpoint | None:
        steps = self.steps()
        return self.open(steps[-1]) if steps else None

    def open(self, step: int) -> Checkpoint:
        return open_checkpoint(self.folder / f"step_{step}")

    def save(self, engine: Engine, step: int, recipe: str, keep: CheckpointConfig) -> Path:
        """All ranks call it. A checkpoint of the same step is replaced; older ones are pruned once the
        new one is complete.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        import torch.distributed as dist

        from sinkbench.megatron import state

        target = self.folder / f"step_{step}"
        temporary = self.folder / f".step_{step}.writing"
        if engine.layout.is_main:
            _fresh_folder(temporary)
        dist.barrier()
        state.save(engine, temporary)
        dist.barrier()
        if engine.layout.is_main:
            sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
            write_atomically(temporary / RECIPE, recipe)
            info = {"format": FORMAT, "step": step, "layout": state.layout_of(engine), "files": sizes}
            write_atomically(temporary / INFO, json.dumps(info, indent=2) + "\n")
            _flush(temporary)
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)
            self._prune(keep)
        dist.barrier()
        return target

    def load(self, engine: Engine, checkpoint: Checkpoint) -> None:
        """Restores model, optimizer, schedule and, under the same layout, random states. All ranks
        call it."""
        from sinkbench.megatron import state

        same = checkpoint.layout == state.layout_of(engine)
        state.load(engine, checkpoint.folder, same_layout=same)

    def _prune(self, keep: CheckpointConfig) -> None:
        for leftover in self.folder.glob(".step_*.writing"):
            shutil.rmtree(leftover)
        for step in self.steps()[: -keep.keep_last]:
            if not (keep.keep_every and step % keep.keep_every == 0):
                shutil.rmtree(self.folder / f"step_{step}")


def _fresh_folder(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            str(folder), f"cannot be written ({error.strerror or error})", "free the folder or the disk"
        ) from error


def _flush(folder: Path) -> None:
    """The files reach the disk before the rename makes them a checkpoint."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
