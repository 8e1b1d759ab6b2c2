"""Runs that are stopped and go on: in the same layout as if nothing had happened, in another one too."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.reliability import whole_tensors
from sinkbench.config import FUSIONS
from sinkbench.failpoints import VARIABLE
from sinkbench.testing import RankFailure, RunDistributed
from tests.distributed.runs import DEMO, LAYOUTS, SWIGLU, Run, prepare, train
from tests.distributed.token_folder import VOCAB_SIZE, write_random_text
from tests.unit.data_folder import write_folder

RECIPE = (
    *SWIGLU,
    "train.steps=30",
    "checkpoint={every: 10, keep_last: 3}",
    "validation.every=10",
    "measure.every=10",
)
DROPOUT = "model.megatron={hidden_dropout: 0.1}"
STOPPED = 10
"""Step of the checkpoint that runs go on from."""

Whole = Callable[[str], Run]


@pytest.fixture(scope="module")
def whole(run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """``whole(layout)``: an uninterrupted run of 30 steps."""
    kept: dict[str, Run] = {}

    def whole(layout: str) -> Run:
        if layout not in kept:
            kept[layout] = train(run_distributed, tmp_path_factory.mktemp("whole"), RECIPE, layout)
        return kept[layout]

    return whole


def stopped(run: Run, output_dir: Path) -> None:
    """A copy of a run as a crash leaves it: checkpoints up to step 10 and one half-written, lines of
    later steps, half a line."""
    folder = output_dir / run.folder.name
    shutil.copytree(run.folder, folder)
    for path in (folder / "checkpoints").iterdir():
        if path.name != f"step_{STOPPED}":
            shutil.rmtree(path)
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / ".step_20.writing").mkdir()
    (folder / "checkpoints" / ".step_20.writing" / "common.pt").write_bytes(b"half")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    late = [line for line in lines if json.loads(line)["step"] <= STOPPED + 7]
    (folder / "metrics.jsonl").write_text("".join(late) + late[-1][:20])


def without_speed(run: Run) -> list[dict[str, Any]]:
    """What metrics.jsonl says, times aside."""
    times = {"tokens_per_second", "mfu", "seconds"}
    return [{k: v for k, v in line.items() if k not in times} for line in run.lines()]


def assert_identical(resumed: Run, expected: Run) -> None:
    assert without_speed(resumed) == without_speed(expected)
    assert resumed.measured(30) == expected.measured(30)
    tensors, wanted = whole_tensors(resumed.checkpoint(30)), whole_tensors(expected.checkpoint(30))
    assert tensors.keys() == wanted.keys()
    assert any("exp_avg" in name for name in wanted)
    different = [name for name, tensor in wanted.items() if not torch.equal(tensors[name], tensor)]
    assert different == []


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=() if layout in ("", "tensor") else pytest.mark.full)
        for layout in ("", *LAYOUTS)
    ],
)
def test_same_layout_goes_on_bit_for_bit(
    run_distributed: RunDistributed, whole: Whole, tmp_path: Path, layout: str
) -> None:
    stopped(whole(layout), tmp_path)
    resumed = train(run_distributed, tmp_path, RECIPE, layout)
    assert_identical(resumed, whole(layout))
    kept = {path.name for path in (resumed.folder / "checkpoints").iterdir()}
    assert kept == {"step_10", "step_20", "step_30"}


CHANGES = [
    ("", "tensor"),
    ("tensor pipeline", ""),
    ("data", "pipeline"),
    ("context", "tensor"),
    ("pipeline", "interleaved"),
    ("tensor", "data"),
    ("interleaved", "sequence"),
    ("", "tensor pipeline"),
    ("sequence", "context"),
]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(*change, marks=() if number < 2 else pytest.mark.full)
        for number, change in enumerate(CHANGES)
    ],
)
def test_other_layout_goes_on(
    run_distributed: RunDistributed, whole: Whole, tmp_path: Path, before: str, after: str
) -> None:
    stopped(whole(before), tmp_path)
    resumed = train(run_distributed, tmp_path, RECIPE, after)
    losses, expected = resumed.series("train", "loss"), whole(before).series("train", "loss")
    assert losses[STOPPED + 1] == pytest.approx(expected[STOPPED + 1], rel=1e-6)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert resumed.series("train", "lr") == whole(before).series("train", "lr")
    norms, expected = resumed.series("train", "grad_norm"), whole(before).series("train", "grad_norm")
    assert norms[STOPPED + 1] == pytest.approx(expected[STOPPED + 1], rel=1e-5)
    assert resumed.series("probe", "importance_1_raw") == pytest.approx(
        whole(before).series("probe", "importance_1_raw"), abs=1e-5
    )


@pytest.mark.parametrize(
    ("layout", "fused"),
    [
        ("", "loss,gradients,optimizer"),  # without what is compiled
        pytest.param("", "", marks=pytest.mark.full),
        pytest.param("tensor", "", marks=pytest.mark.full),
        *(
            pytest.param(layout, ",".join(FUSIONS), marks=pytest.mark.full)
            for layout in ("", "data", "sequence", "tensor pipeline")
        ),
    ],
)
def test_random_states_go_on(
    run_distributed: RunDistributed, tmp_path: Path, layout: str, fused: str
) -> None:
    """Dropout after the checkpoint draws what it would have drawn, and fused parts give the same curve."""
    recipe = (*RECIPE, DROPOUT, f"train.fused=[{fused}]")
    expected = train(run_distributed, tmp_path / "whole", recipe, layout)
    stopped(expected, tmp_path / "stopped")
    assert_identical(train(run_distributed, tmp_path / "stopped", recipe, layout), expected)


def rank_fails_and_goes_on(rank: int, world_size: int, arguments: list[str]) -> None:
    """A failure in step 13, then the same command in the same process."""
    from sinkbench.megatron.training import Engine
    from sinkbench.trainer import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_step", failing_step(Engine.train_step, 13))
        with pytest.raises(RuntimeError, match="step 13"):
            train(*prepare(arguments))
    train(*prepare(arguments))


def failing_step(step: Callable[..., Any], at: int) -> Callable[..., Any]:
    done = 0

    def train_step(self: Any, micro_batches: Any, **options: Any) -> Any:
        nonlocal done
        done += 1
        if done == at:
            raise RuntimeError(f"step {done}")
        return step(self, micro_batches, **options)

    return train_step


def test_failure_then_the_same_command(run_distributed: RunDistributed, whole: Whole, tmp_path: Path) -> None:
    run_distributed(1, rank_fails_and_goes_on, [*RECIPE, f"output_dir={tmp_path}"])
    assert_identical(Run(tmp_path / "short"), whole(""))


def rank_is_killed(rank: int, world_size: int, arguments: list[str]) -> None:
    """One rank vanishes while checkpoint 20 is written: nothing of it can be cleaned up."""
    from sinkbench.trainer import train

    os.environ[VARIABLE] = "save.fsync@1:3"  # of two shards in each save
    train(*prepare(arguments))


def test_rank_killed_while_saving(run_distributed: RunDistributed, whole: Whole, tmp_path: Path) -> None:
    arguments = [*RECIPE, *LAYOUTS["tensor"][1], f"output_dir={tmp_path}"]
    with pytest.raises(RankFailure, match="exit code -9"):
        run_distributed(2, rank_is_killed, arguments)
    checkpoints = tmp_path / "short" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step_10", ".step_20.writing"}
    assert_identical(train(run_distributed, tmp_path, RECIPE, "tensor"), whole("tensor"))


def test_other_data_under_the_same_path_are_refused(run_distributed: RunDistributed, tmp_path: Path) -> None:
    text = write_random_text(tmp_path / "text")
    recipe = (
        *DEMO,
        "optim.warmup_steps=1",
        f"data={{source: indexed, train: {text}}}",
        "measure={every: 0, metrics: [sink]}",
    )
    run = train(run_distributed, tmp_path, (*recipe, "train.steps=2"))
    began = json.loads((run.folder / "manifest.json").read_text())["data"]
    shutil.rmtree(text)
    write_folder(text, [[*range(1, 250)]] * 40, [[*range(1, 250)]] * 20, vocab_size=VOCAB_SIZE)
    with pytest.raises(RankFailure, match=r"data: these are not the data that the run in .*short began"):
        train(run_distributed, tmp_path, (*recipe, "train.steps=3"), "data")
    assert json.loads((run.folder / "manifest.json").read_text())["data"] == began
    train(run_distributed, tmp_path, (*recipe, "train.steps=3", "checkpoint.allow_change=[data]"), "data")
    now = json.loads((run.folder / "manifest.json").read_text())["data"]
    assert now != began
    train(run_distributed, tmp_path, (*recipe, "train.steps=4"), "tensor")
    assert list(run.series("train", "loss")) == [1, 2, 3, 4]


def test_finished_run_stays_as_it_is(run_distributed: RunDistributed, whole: Whole, tmp_path: Path) -> None:
    shutil.copytree(whole("").folder, tmp_path / "short")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json*")}
    train(run_distributed, tmp_path, RECIPE)
    kept = {path for path in before if path.name != "manifest.json"}  # it says how it was started last
    assert {path: path.read_bytes() for path in kept} == {path: before[path] for path in kept}
