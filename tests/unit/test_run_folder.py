"""The folder of a run: one run at a time, one recipe, metrics cut back to where training resumes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sinkbench import recipe
from sinkbench.config import Config
from sinkbench.errors import HostError, RecipeError
from sinkbench.run_folder import RunFolder, folder_of
from tests.unit.conftest import Write

Make = Callable[..., Config]


@pytest.fixture
def make(write: Write) -> Make:
    """``make(*overrides)``: the configuration of small.yaml."""

    def make(*overrides: str) -> Config:
        return recipe.to_config(recipe.load("small.yaml", overrides))

    return make


def begun(config: Config, start: int = 0) -> RunFolder:
    folder = RunFolder(config)
    folder.begin(start, {"versions": {}})
    return folder


def test_place(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert folder_of(make()) == Path("runs/small")
    assert folder_of(make("label=lr=1", "output_dir=/x")) == Path("/x/small/lr=1")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folder_of(make("output_dir=~/runs")) == tmp_path / "runs" / "small"


def test_files(make: Make) -> None:
    config = make("seed=3", "model.attention={name: sigmoid, normalize: false}")
    folder = begun(config)
    folder.log(1, "train", {"loss": 2.5})
    folder.log(1, "probe", {"sink_1_raw": 0.0})
    folder.log(2, "train", {"loss": 2.25})
    assert folder.latest_events() == {
        "train": {"step": 2, "event": "train", "loss": 2.25},
        "probe": {"step": 1, "event": "probe", "sink_1_raw": 0.0},
    }
    folder.close()
    assert recipe.to_config(recipe.load(folder.path / "recipe.yaml")) == config
    assert json.loads((folder.path / "manifest.json").read_text()) == {"versions": {}}


def test_resumed_run_drops_what_comes_after_its_checkpoint(make: Make) -> None:
    folder = begun(make())
    for step in range(1, 8):
        folder.log(step, "train", {"loss": 1.0 / step})
    folder.log(7, "probe", {"sink_1_raw": 10.0})
    folder.close()
    metrics = folder.path / "metrics.jsonl"
    kept = metrics.read_text().splitlines(keepends=True)[:4]
    metrics.write_text(metrics.read_text() + '{"step": 8, "eve')

    resumed = begun(make(), start=4)
    assert metrics.read_text() == "".join(kept)
    resumed.log(5, "train", {"loss": 0.5})
    resumed.close()
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4, 5]


def test_half_a_line_of_a_kept_step_is_dropped(make: Make) -> None:
    folder = begun(make())
    folder.log(1, "train", {"loss": 1.0})
    folder.close()
    metrics = folder.path / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole + whole.rstrip("\n"))
    begun(make(), start=1).close()
    assert metrics.read_text() == whole


def test_one_run_at_a_time(make: Make) -> None:
    first = begun(make())
    with pytest.raises(HostError, match=r"^runs/small: another run is writing here; wait for it, or set"):
        RunFolder(make())
    RunFolder(make("name=other")).close()
    first.close()
    RunFolder(make()).close()


@pytest.mark.parametrize(
    "override",
    [
        "parallel.pipeline=2",
        "log={every: 3, tensorboard: true}",
        "checkpoint.every=7",
        "train.micro_batch_size=2",
        "train.recompute=full",
        "output_dir=runs/../runs",
    ],
)
def test_resumed_run_may_change(make: Make, override: str) -> None:
    begun(make()).close()
    folder = begun(make(override))
    folder.close()
    assert recipe.to_config(recipe.load(folder.path / "recipe.yaml")) == make(override)


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["optim.lr=1e-3"], "optim.lr 0.0004 -> 0.001"),
        (["train.global_batch_size=4"], "train.global_batch_size 8 -> 4"),
        (
            ["model.attention={name: sigmoid, normalize: false}"],
            "model.attention.name 'softmax' -> 'sigmoid', ",
        ),
        (["seed=2", "model.num_layers=3", "optim.eps=1e-6", "optim.lr=1", "train.steps=300"], " and 2 more"),
    ],
)
def test_another_recipe_is_refused(make: Make, overrides: list[str], changes: str) -> None:
    begun(make()).close()
    before = (Path("runs/small/recipe.yaml")).read_bytes()
    with pytest.raises(RecipeError) as error:
        RunFolder(make(*overrides))
    line = str(error.value)
    assert line.startswith("runs/small: it holds a run of another recipe (")
    assert changes in line
    assert line.endswith("); set another name, or delete the folder")
    assert (Path("runs/small/recipe.yaml")).read_bytes() == before


def test_unwritable(make: Make) -> None:
    Path("file").touch()
    with pytest.raises(
        HostError, match=r"^file/small: cannot be written \(Not a directory\); set output_dir"
    ):
        RunFolder(make("output_dir=file"))
