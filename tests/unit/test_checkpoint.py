"""The folder of checkpoints: what is found, checked, replaced and pruned. The state itself is one small file;
tests/distributed/test_saving.py saves and loads real ones."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from sinkbench.checkpoint import RECIPE, CheckpointStore, open_checkpoint, verify_files, write_info
from sinkbench.checksums import write_hashed
from sinkbench.errors import CheckpointError, HostError
from sinkbench.failpoints import VARIABLE, failpoint
from tests.unit.checkpoint_folder import LAYOUT, save


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Checkpoints of steps 4 and 5."""
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (4, 5):
        save(store, step)
    return store


def names(store: CheckpointStore) -> set[str]:
    return {path.name for path in store.folder.iterdir()}


def set_format_1(folder: Path) -> None:
    """Rewrites checkpoint.json as it was before there were checksums."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name == "shard"}
    info = {"format": 1, "step": 5, "layout": LAYOUT, "files": sizes}
    (folder / "checkpoint.json").write_text(json.dumps(info, indent=2) + "\n")


def test_what_was_written_is_found(store: CheckpointStore) -> None:
    latest = store.newest_good()
    assert latest is not None
    assert (latest.step, latest.layout, latest.size) == (5, LAYOUT, len("weights") + len("seed: 5\n"))
    assert latest.recipe.read_text() == "seed: 5\n"
    verify_files(latest)


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(2, 0, [80, 100]), (1, 0, [100]), (9, 0, [20, 40, 60, 80, 100]), (1, 40, [40, 80, 100])],
)
def test_old_checkpoints_are_superseded(
    tmp_path: Path, keep_last: int, keep_every: int, kept: list[int]
) -> None:
    """In the order of the steps, not of their names: 100 is newer than 80."""
    store = CheckpointStore(tmp_path)
    for step in (20, 40, 60, 80, 100):
        save(store, step)
    for step in store.superseded(keep_last, keep_every):
        store.delete(step)
    assert store.steps() == kept


def test_newest_good_one_is_never_superseded(store: CheckpointStore) -> None:
    """A damaged one does not count as one to keep, and a newer damaged one is left for a look at it."""
    save(store, 6)
    (store.folder / "step_6" / "shard").unlink()
    assert store.superseded(1, 0) == [4]
    (store.folder / "step_5" / "shard").write_text("weighty")
    assert store.superseded(1, 0) == [4]
    assert store.superseded(1, 0, verify=True) == []
    for step in (4, 5):
        (store.folder / f"step_{step}" / "shard").unlink()
    assert store.superseded(1, 0) == []


def test_same_step_again_replaces(store: CheckpointStore) -> None:
    (store.folder / "step_5" / "of_before").touch()
    save(store, 5, "other weights")
    verify_files(store.open(5))
    assert (store.folder / "step_5" / "shard").read_text() == "other weights"
    assert names(store) == {"step_4", "step_5"}
    assert not (store.folder / "step_5" / "of_before").exists()


def test_the_replaced_one_comes_back(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the new one cannot take its place, and after the end of the process between the two renames."""
    monkeypatch.setenv(VARIABLE, "save.replace:1+:enospc")
    with pytest.raises(OSError, match="No space left"):
        save(store, 5, "new")
    assert (store.folder / "step_5" / "shard").read_text() == "weights"
    monkeypatch.delenv(VARIABLE)
    (store.folder / "step_5").rename(store.folder / ".step_5.replaced")
    store.recover()
    assert names(store) == {"step_4", "step_5"}
    assert (store.folder / "step_5" / "shard").read_text() == "weights"


def test_leftovers_are_no_checkpoints(store: CheckpointStore) -> None:
    """What an ended process left of a save, of a replacement that had its place, and of a deletion."""
    for name in (".step_3.writing", ".step_5.replaced", ".step_2.deleting"):
        (store.folder / name).mkdir()
        (store.folder / name / "half").touch()
    assert store.steps() == [4, 5]
    store.recover()
    assert names(store) == {"step_4", "step_5"}
    CheckpointStore(store.folder / "gone").recover()


def test_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step_10", "step_9", "step_x", "step_7.old", "old_step_8"):
        (tmp_path / name).mkdir()
    assert CheckpointStore(tmp_path).steps() == [9, 10]
    assert CheckpointStore(tmp_path / "gone").steps() == []


def test_checkpoint_copied_elsewhere(store: CheckpointStore, tmp_path: Path) -> None:
    """It holds all that is needed to open it, under any name; but in a run, not under another step's."""
    copy = Path(shutil.copytree(store.folder / "step_5", tmp_path / "best"))
    verify_files(open_checkpoint(copy))
    copy.rename(store.folder / "step_7")
    with pytest.raises(CheckpointError, match=r"step_7/checkpoint.json: says that it is of step 5"):
        store.open(7)


def test_format_1_stays_readable(store: CheckpointStore) -> None:
    folder = store.folder / "step_5"
    set_format_1(folder)
    checkpoint = store.open(5)
    assert (checkpoint.step, checkpoint.layout) == (5, LAYOUT)
    verify_files(checkpoint)
    (folder / "shard").write_text("short")
    with pytest.raises(CheckpointError, match=r"has 5 bytes where checkpoint.json says 7"):
        store.open(5)
    (folder / "shard").write_text("weights")
    (folder / RECIPE).unlink()
    with pytest.raises(CheckpointError, match=r"recipe.yaml: is missing"):
        store.open(5)


def test_checksums_know_a_flipped_bit(store: CheckpointStore) -> None:
    shard = store.folder / "step_5" / "shard"
    shard.write_text("weightz")
    checkpoint = store.open(5)
    verify_files(checkpoint, [RECIPE])
    with pytest.raises(CheckpointError, match=r"step_5/shard: is not what was written"):
        verify_files(checkpoint)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"step_5/shard: cannot be read \(No such file"):
        verify_files(checkpoint)


def test_no_file_outside_the_folder_is_listed(tmp_path: Path) -> None:
    outside = write_hashed(tmp_path / "outside", b"secret")
    (tmp_path / "step_5").mkdir()
    write_info(tmp_path / "step_5", step=5, layout=LAYOUT, files={"../outside": outside})
    with pytest.raises(CheckpointError, match=r"\.\./outside is no file of the folder"):
        open_checkpoint(tmp_path / "step_5")


@pytest.mark.parametrize("at", ["save.folder", "save.rename", "prune.delete"])
def test_a_full_disk_leaves_the_checkpoints(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def save_and_prune() -> None:
        save(store, 6)
        store.delete(4)

    monkeypatch.setenv(VARIABLE, f"{at}:1+:enospc")
    with pytest.raises(OSError, match="No space left"):
        save_and_prune()
    verify_files(store.open(5))
    monkeypatch.delenv(VARIABLE)
    save(store, 6)
    assert store.steps()[-2:] == [5, 6]
    assert not any(name.startswith(".") for name in os.listdir(store.folder))


@pytest.mark.parametrize("value", ["save.typo", "save.shard:x", "save.shard:1:explode"])
def test_a_failpoint_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(VARIABLE, value)
    monkeypatch.setattr("sinkbench.failpoints._reached", Counter())
    with pytest.raises(HostError, match=f"^{VARIABLE}: "):
        failpoint("save.shard")


def test_failpoints_count_and_know_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinkbench.failpoints._reached", Counter())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(VARIABLE, "save.shard@0:1+:enospc")
    failpoint("save.shard")
    monkeypatch.setenv(VARIABLE, "save.shard@1:2:enospc")
    failpoint("save.info")
    failpoint("save.shard")
    with pytest.raises(OSError, match="No space left"):
        failpoint("save.shard")
    failpoint("save.shard")


def test_what_is_no_checkpoint_of_ours_is_not_to_be_deleted(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is missing, so .*; name a folder checkpoints/step_N, or"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    told = "is a Hugging Face model, not a checkpoint; convert it with tools/convert_from_hf.py"
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(tmp_path)
