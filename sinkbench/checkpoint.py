"""The checkpoints of a run: what is in a folder, whether it is as it was written, which ones are kept.

checkpoints/step_200/      megatron's distributed files, recipe.yaml, checkpoint.json (written last)

checkpoint.json has the size and SHA-256 of every other file, and of itself. While a checkpoint is written
it is called .step_200.writing. A checkpoint of the same step is called .step_200.replaced until the new one
has its place, and one that is deleted .step_200.deleting: whenever the process ends, what is called step_N
is whole. ``saving.py`` writes checkpoints; here nothing imports torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from sinkbench.checksums import FileSum, hash_file, sync_folder, write_hashed
from sinkbench.errors import CheckpointError
from sinkbench.failpoints import failpoint

T = TypeVar("T")

INFO = "checkpoint.json"
RECIPE = "recipe.yaml"
FORMAT = 2
READABLE = (1, FORMAT)
"""Format 1 had the sizes of the files alone."""
USE_EARLIER = "delete the folder to go on from an earlier checkpoint"
_STEP = re.compile(r"step_(\d+)$")
_LEFTOVER = re.compile(r"\.(step_\d+)\.(writing|replaced|deleting)$")
_THREADS = 8

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Attributes:
    layout: parallel sizes of the run that wrote it.
    files: of every file but checkpoint.json.
    """

    folder: Path
    step: int
    layout: dict[str, int]
    files: dict[str, FileSum]

    @property
    def recipe(self) -> Path:
        return self.folder / RECIPE

    @property
    def size(self) -> int:
        """Bytes of all files but checkpoint.json."""
        return sum(file.size for file in self.files.values())


class FormatError(CheckpointError):
    """A checkpoint that is not damaged, but of a format that this version does not read."""


def refuse_absent(target: Path) -> None:
    """
    Raises:
        CheckpointError: there is no such folder of a run or checkpoint.
    """
    if not target.is_dir():
        remedy = "give a run's folder or one of its checkpoints"
        raise CheckpointError(str(target), "there is no such folder", remedy)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads what a checkpoint says of itself.

    Raises:
        CheckpointError: the folder is no checkpoint, is incomplete, or a file does not have the size it was
            written with.
        FormatError: it is of another format.
    """
    if not folder.is_dir():
        raise CheckpointError(str(folder), "there is no such checkpoint", "name a folder checkpoints/step_N")
    path = folder / INFO
    try:
        checkpoint = _parse(folder, json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        if steps := CheckpointStore(folder / "checkpoints").steps():
            remedy = f"name one of its checkpoints, as {folder / 'checkpoints' / f'step_{steps[-1]}'}"
            raise CheckpointError(str(folder), "is a run, not a checkpoint", remedy) from None
        if (folder / "config.json").exists():
            remedy = "convert it with tools/convert_from_hf.py, and name the folder that it writes"
            raise CheckpointError(str(folder), "is a Hugging Face model, not a checkpoint", remedy) from None
        problem = f"{INFO} is missing, so it is not a complete checkpoint"
        raise CheckpointError(str(folder), problem, _instead(folder)) from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        problem = f"is damaged ({type(error).__name__}: {error})"
        raise CheckpointError(str(path), problem, _instead(folder)) from None
    for name, file in checkpoint.files.items():
        _check_size(folder / name, file)
    return checkpoint


def _instead(folder: Path) -> str:
    """The remedy for a folder that is no checkpoint; it may hold anything, unless it is named as ours are."""
    if _STEP.fullmatch(folder.name):
        return USE_EARLIER
    return "name a folder checkpoints/step_N, or one that convert_from_hf.py wrote"


def _parse(folder: Path, info: dict[str, Any]) -> Checkpoint:
    if info.get("sha256", _sum_of(info)) != _sum_of(info):
        raise ValueError("its checksum is another")
    if info["format"] not in READABLE:
        problem = f"it has format {info['format']}, this version reads {' and '.join(map(str, READABLE))}"
        raise FormatError(str(folder), problem, "use a matching sinkbench")
    if info["format"] == 1:
        files = {str(name): FileSum(int(size), None) for name, size in info["files"].items()}
        files[RECIPE] = FileSum(-1, None)  # its size was not written down
    else:
        files = {name: FileSum(file["size"], file["sha256"]) for name, file in info["files"].items()}
    if wrong := next((name for name in files if Path(name).name != name), None):
        raise ValueError(f"{wrong} is no file of the folder")
    return Checkpoint(folder=folder, step=int(info["step"]), layout=dict(info["layout"]), files=files)


def _check_size(path: Path, file: FileSum) -> None:
    remedy = f"copy it again, or {USE_EARLIER}"
    try:
        if not path.is_file():
            raise CheckpointError(str(path), "is missing", remedy)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror})", remedy) from error
    if file.size not in (size, -1):
        raise CheckpointError(str(path), f"has {size} bytes where {INFO} says {file.size}", remedy)


def verify_files(checkpoint: Checkpoint, names: Collection[str] | None = None) -> None:
    """Reads files of a checkpoint, by default all, and compares them with their checksums. Those of
    format 1 have none and pass.

    Raises:
        CheckpointError: a file is not what was written.
    """
    chosen = [name for name in checkpoint.files if names is None or name in names]
    with ThreadPoolExecutor(_THREADS) as threads:
        for problem in threads.map(lambda name: _difference(checkpoint, name), chosen):
            if problem is not None:
                raise problem


def _difference(checkpoint: Checkpoint, name: str) -> CheckpointError | None:
    path, expected = checkpoint.folder / name, checkpoint.files[name].sha256
    remedy = f"copy it again, or {USE_EARLIER}"
    try:
        if expected is not None and hash_file(path) != expected:
            return CheckpointError(
                str(path), f"is not what was written (SHA-256 differs from {INFO})", remedy
            )
    except OSError as error:
        return CheckpointError(str(path), f"cannot be read ({error.strerror or error})", remedy)
    return None


def write_info(folder: Path, *, step: int, layout: Mapping[str, int], files: Mapping[str, FileSum]) -> None:
    """Writes checkpoint.json, which makes the folder a checkpoint.

    Raises:
        OSError: it cannot be written.
    """
    listed = {name: {"size": files[name].size, "sha256": files[name].sha256} for name in sorted(files)}
    info = {"format": FORMAT, "step": step, "layout": dict(layout), "files": listed}
    text = json.dumps(info | {"sha256": _sum_of(info)}, indent=2) + "\n"
    write_hashed(folder / INFO, text.encode())


def _sum_of(info: Mapping[str, Any]) -> str:
    """SHA-256 of what checkpoint.json says but for this sum."""
    summed = {key: value for key, value in info.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(summed, sort_keys=True).encode()).hexdigest()


def checked(function: Callable[[], T]) -> T | CheckpointError:
    """What a function returns, or the error that it raises."""
    try:
        return function()
    except CheckpointError as error:
        return error


def newest_of(
    steps: Sequence[int],
    examine: Callable[[int], Checkpoint | CheckpointError],
    report: Callable[[str], object],
) -> Checkpoint | None:
    """The newest checkpoint that is good.

    Args:
        steps: oldest first.
        examine: a step's checkpoint, or what is wrong with it.
        report: is told in a line of each that is newer and damaged.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        CheckpointError: there are some, and none is good.
        FormatError: the newest good one is of a format that this version does not read.
    """
    damaged: list[CheckpointError] = []
    for step in reversed(steps):
        examined = examine(step)
        if isinstance(examined, FormatError):
            raise examined  # the user's to decide: it may be better than those before it
        if isinstance(examined, Checkpoint):
            for damage in damaged:
                report(f"{damage.where}: {damage.problem}; step {step} is used")
            return examined
        damaged.append(examined)
    if damaged:
        newest = damaged[0]
        remedy = "copy it again from elsewhere, or delete the folder checkpoints to start anew"
        raise CheckpointError(newest.where, f"{newest.problem}, and no earlier checkpoint is good", remedy)
    return None


class CheckpointStore:
    """The folder ``checkpoints`` of a run. One process changes it; any may read it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Steps of the checkpoints there, oldest first."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def newest_good(self) -> Checkpoint | None:
        """The newest checkpoint of which every file is as it was written, see ``newest_of``. Newer ones are
        reported in a line each."""
        return newest_of(self.steps(), lambda step: checked(lambda: self._verified(step)), _log.warning)

    def _verified(self, step: int) -> Checkpoint:
        checkpoint = self.open(step)
        verify_files(checkpoint)
        return checkpoint

    def open(self, step: int) -> Checkpoint:
        """See ``open_checkpoint``; the checkpoint must be of the step its folder is named for."""
        checkpoint = open_checkpoint(self.folder / f"step_{step}")
        if checkpoint.step != step:
            problem = f"says that it is of step {checkpoint.step}"
            raise CheckpointError(str(checkpoint.folder / INFO), problem, "rename the folder")
        return checkpoint

    def recover(self) -> None:
        """Tidies up after a process that was ended while it changed the folder: a checkpoint that was moved
        away for a new one which is not there comes back, anything else that is half done goes.

        Raises:
            OSError: the folder cannot be changed.
        """
        if not self.folder.is_dir():
            return
        for path in sorted(self.folder.iterdir()):
            match = _LEFTOVER.fullmatch(path.name)
            if match and match[2] == "replaced" and not (self.folder / match[1]).exists():
                path.rename(self.folder / match[1])
            elif match:
                shutil.rmtree(path)

    def begin(self, step: int) -> Path:
        """The empty folder to write a checkpoint to.

        Raises:
            OSError: it cannot be made.
        """
        self.recover()
        temporary = self.folder / f".step_{step}.writing"
        temporary.mkdir(parents=True)
        failpoint("save.folder")
        return temporary

    def commit(self, temporary: Path, step: int) -> None:
        """Gives a complete folder its name. A checkpoint of the same step is there until then, if under
        another name at the last moment, and comes back if the new one cannot take its place.

        Raises:
            OSError: the folder cannot be changed.
        """
        target, replaced = self.folder / f"step_{step}", self.folder / f".step_{step}.replaced"
        sync_folder(temporary)
        failpoint("save.rename")
        replaces = target.exists()
        if replaces:
            target.rename(replaced)
        try:
            failpoint("save.replace")
            temporary.rename(target)
        except OSError:
            if replaces:
                replaced.rename(target)
            raise
        sync_folder(self.folder)
        if replaces:
            shutil.rmtree(replaced)
        failpoint("save.done")

    def superseded(self, keep_last: int, keep_every: int, *, verify: bool = False) -> list[int]:
        """The steps that may go: older than the newest good checkpoint, neither among the last good ones to
        keep nor a multiple of ``keep_every`` (0: none).

        Args:
            verify: the newest good one must also agree with its checksums.
        """
        steps = self.steps()
        good = [step for step in steps if self._is_good(step, verify=False)]
        while verify and good and not self._is_good(good[-1], verify=True):
            del good[-1]
        if not good:
            return []
        kept = {step for step in steps if keep_every and step % keep_every == 0} | {*good[-keep_last:]}
        return [step for step in steps if step < good[-1] and step not in kept]

    def _is_good(self, step: int, *, verify: bool) -> bool:
        try:
            checkpoint = self.open(step)
            if verify:
                verify_files(checkpoint)
        except CheckpointError:
            return False
        return True

    def delete(self, step: int) -> None:
        """Deletes a checkpoint, which at no moment is there in part.

        Raises:
            OSError: it cannot be deleted.
        """
        deleting = self.folder / f".step_{step}.deleting"
        os.rename(self.folder / f"step_{step}", deleting)
        failpoint("prune.delete")
        shutil.rmtree(deleting)
