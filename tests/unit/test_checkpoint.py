"""The store of checkpoints: what it finds, checks, replaces and prunes. The state itself is replaced by
one small file; tests/distributed/test_resume.py saves and loads real ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sinkbench.checkpoint import CheckpointStore, open_checkpoint
from sinkbench.config import CheckpointConfig
from sinkbench.errors import CheckpointError
from sinkbench.testing import RunDistributed

LAYOUT = {"tensor": 1, "pipeline": 1}
ENGINE: Any = SimpleNamespace(layout=SimpleNamespace(is_main=True))


def write_state(engine: object, folder: Path) -> None:
    (folder / "shard").write_text("weights")


def save(store: CheckpointStore, step: int, keep: CheckpointConfig) -> Path:
    """Saves a checkpoint of a state of one file, on a rank."""
    from sinkbench.megatron import state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "save", write_state)
        patch.setattr(state, "layout_of", lambda engine: LAYOUT)
        return store.save(ENGINE, step, f"seed: {step}\n", keep)


def rank_saves(rank: int, world_size: int, folder: Path, keep: CheckpointConfig, steps: list[int]) -> None:
    for step in steps:
        save(CheckpointStore(folder), step, keep)


KEEP = {
    "default": (CheckpointConfig(), [80, 100]),
    "last": (CheckpointConfig(keep_last=1), [100]),
    "all": (CheckpointConfig(keep_last=9), [20, 40, 60, 80, 100]),
    "last and every 40": (CheckpointConfig(keep_last=1, keep_every=40), [40, 80, 100]),
    "two and every 30": (CheckpointConfig(keep_last=2, keep_every=30), [60, 80, 100]),
}
"""What is kept of five checkpoints."""


def rank_saves_five(rank: int, world_size: int, folder: Path) -> None:
    for name, (keep, _) in KEEP.items():
        rank_saves(rank, world_size, folder / name, keep, [20, 40, 60, 80, 100])


def test_old_checkpoints_are_pruned(run_distributed: RunDistributed, tmp_path: Path) -> None:
    """In the order of the steps, not of their names: 100 is newer than 80."""
    run_distributed(1, rank_saves_five, tmp_path)
    assert {name: CheckpointStore(tmp_path / name).steps() for name in KEEP} == {
        name: steps for name, (_, steps) in KEEP.items()
    }
    latest = CheckpointStore(tmp_path / "all").latest()
    assert latest is not None
    assert (latest.step, latest.layout) == (100, LAYOUT)
    assert latest.recipe.read_text() == "seed: 100\n"


@pytest.fixture(scope="module")
def saved(run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_distributed(1, rank_saves, folder, CheckpointConfig(), [4, 5])
    return folder


@pytest.fixture
def checkpoints(saved: Path, tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 4 and 5."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_same_step_again_replaces(run_distributed: RunDistributed, checkpoints: Path) -> None:
    (checkpoints / "step_5" / "checkpoint.json").unlink()
    (checkpoints / "step_5" / "of_before").touch()
    run_distributed(1, rank_saves, checkpoints, CheckpointConfig(), [5])
    assert open_checkpoint(checkpoints / "step_5").step == 5
    assert not (checkpoints / "step_5" / "of_before").exists()


def test_leftovers_are_no_checkpoints(run_distributed: RunDistributed, tmp_path: Path) -> None:
    """What a killed process left, of an earlier step or of this one, goes when the next is complete."""
    for step in (3, 5):
        (tmp_path / f".step_{step}.writing").mkdir()
        (tmp_path / f".step_{step}.writing" / "half").touch()
    assert CheckpointStore(tmp_path).steps() == []
    assert CheckpointStore(tmp_path).latest() is None
    run_distributed(1, rank_saves, tmp_path, CheckpointConfig(), [5])
    assert [path.name for path in tmp_path.iterdir()] == ["step_5"]
    assert not (tmp_path / "step_5" / "half").exists()


def rank_fails_to_save(rank: int, world_size: int, folder: Path) -> None:
    from sinkbench.megatron import state

    def fails(engine: object, folder: Path) -> None:
        write_state(engine, folder)
        raise OSError("disk full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "save", fails)
        with pytest.raises(OSError, match="disk full"):
            CheckpointStore(folder).save(ENGINE, 5, "", CheckpointConfig(keep_last=1))


def test_failed_save_leaves_the_checkpoints(run_distributed: RunDistributed, checkpoints: Path) -> None:
    run_distributed(1, rank_fails_to_save, checkpoints)
    assert CheckpointStore(checkpoints).steps() == [4, 5]
    assert open_checkpoint(checkpoints / "step_5").recipe.read_text() == "seed: 5\n"


def rank_saves_nowhere(rank: int, world_size: int, folder: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        save(CheckpointStore(folder), 5, CheckpointConfig())
    return str(error.value)


def test_unwritable_folder(run_distributed: RunDistributed, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (line,) = run_distributed(1, rank_saves_nowhere, tmp_path / "file")
    expected = "cannot be written (Not a directory); free the folder or the disk"
    assert line == f"{tmp_path}/file/.step_5.writing: {expected}"


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step_10", "step_9", "step_x", "step_7.old", "old_step_8"):
        (tmp_path / name).mkdir()
    assert CheckpointStore(tmp_path).steps() == [9, 10]
    assert CheckpointStore(tmp_path / "gone").steps() == []


def test_checkpoint_copied_elsewhere(checkpoints: Path, tmp_path: Path) -> None:
    """It holds all that is needed to open it, under any name."""
    copy = checkpoints.joinpath("step_5").rename(tmp_path / "best")
    assert open_checkpoint(copy).step == 5
    assert json.loads((copy / "checkpoint.json").read_text())["files"] == {"shard": 7}


def test_newest_is_not_passed_over_when_damaged(checkpoints: Path) -> None:
    """Going on from an earlier one is the user's decision."""
    (checkpoints / "step_5" / "shard").unlink()
    with pytest.raises(CheckpointError, match=r"step_5/shard: is missing; .* delete the folder to go on"):
        CheckpointStore(checkpoints).latest()
    shutil.rmtree(checkpoints / "step_5")
    latest = CheckpointStore(checkpoints).latest()
    assert latest is not None
    assert latest.step == 4
