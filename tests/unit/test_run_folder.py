"""The folder of a run: one run at a time, one recipe, metrics cut back to where training resumes."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sinkbench import recipe, run_folder
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


def test_numbers_that_are_not_finite_are_null(make: Make) -> None:
    folder = begun(make())
    folder.log(1, "validation", {"loss": math.nan, "loss/web": math.inf, "all": [1.0, -math.inf]})
    folder.close()
    line = '{"step": 1, "event": "validation", "loss": null, "loss/web": null, "all": [1.0, null]}\n'
    assert (folder.path / "metrics.jsonl").read_text() == line
    run_folder.write_json(folder.path / "summary.json", {"runs": ({"loss": math.nan},)})
    assert json.loads((folder.path / "summary.json").read_text()) == {"runs": [{"loss": None}]}


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


def test_damaged_lines_are_left_out_and_reported(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = begun(make())
    for step in (1, 2, 3):
        folder.log(step, "train", {"loss": 1.0})
    folder.close()
    metrics = folder.path / "metrics.jsonl"
    first, second, third = metrics.read_text().splitlines(keepends=True)
    damage = '{"step": 2, "eve\n[]\n\0\0\n'
    metrics.write_text(first + damage + second + third)
    resumed = begun(make(), start=2)
    resumed.close()
    assert metrics.read_text() == first + second
    assert resumed.latest_events()["train"]["step"] == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"runs/small/metrics.jsonl: line {number} is damaged and left out" for number in (2, 3, 4)
    ]


def test_a_run_that_starts_anew_keeps_no_line(make: Make) -> None:
    """That of step 0 is written again."""
    folder = begun(make())
    folder.log(0, "probe", {"sink_1_raw": 0.0})
    folder.close()
    begun(make()).close()
    assert (folder.path / "metrics.jsonl").read_text() == ""


def test_what_no_longer_holds_is_removed(make: Make) -> None:
    folder = begun(make())
    folder.stopped(8, "SIGTERM")
    assert json.loads((folder.path / "stopped.json").read_text()) == {"step": 8, "reason": "SIGTERM"}
    folder.close()
    (folder.path / "summary.json").write_text("{}")
    (folder.path / "measure").mkdir()
    for name in ("step_4.json", "step_8.json", "step_12.json", "other.json"):
        (folder.path / "measure" / name).touch()
    begun(make(), start=8).close()
    assert sorted(path.name for path in (folder.path / "measure").iterdir()) == [
        "other.json",
        "step_4.json",
        "step_8.json",
    ]
    assert not (folder.path / "stopped.json").exists()
    assert not (folder.path / "summary.json").exists()


def test_no_run_starts_beside_a_rank_of_an_earlier_one(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "RANKS_WAIT_S", 0.0)
    first = begun(make())
    ranks = [run_folder.join(first.path) for _ in range(2)]
    first.close()  # as if its process had been killed
    with pytest.raises(HostError, match=r"^runs/small: a rank of an earlier run is still there; end it, or"):
        RunFolder(make())
    ranks.pop().close()
    with pytest.raises(HostError, match="a rank of an earlier run"):
        RunFolder(make())
    ranks.pop().close()
    RunFolder(make()).close()


def test_a_run_waits_for_one_that_is_about_to_end(make: Make) -> None:
    first = begun(make())
    threading.Timer(0.3, first.close).start()
    RunFolder(make()).close()


def test_a_file_system_without_locks_is_reported(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    begun(make()).close()
    assert "runs/small: its file system has no locks; start no other run there" in caplog.text


def test_one_run_at_a_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "LOCK_WAIT_S", 0.0)
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
        "model={backend: te, linears: te, norms: apex}",
        "optim.implementation=apex",
        "output_dir=runs/../runs",
        "measure={every: 3, eps: 0.2}",
        "validation.every=3",
        "train={max_minutes: 5, on_spike: skip, max_skipped_steps: 0}",
        "train.steps=1000",  # the schedule is constant
    ],
)
def test_resumed_run_may_change(make: Make, override: str) -> None:
    begun(make()).close()
    folder = begun(make(override))
    folder.close()
    assert recipe.to_config(recipe.load(folder.path / "recipe.yaml")) == make(override)


MANY = ["seed=2", "model.num_layers=3", "model.ffn_hidden_size=99", "train.deterministic=true"]
MANY += ["optim.betas=[0.5, 0.5]", "optim.clip_grad=0"]


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        (["optim.lr=1e-3"], "optim.lr 0.0004 -> 0.001"),
        (["train.global_batch_size=4"], "train.global_batch_size 8 -> 4"),
        (
            ["model.attention={name: sigmoid, normalize: false}"],
            "model.attention.name 'softmax' -> 'sigmoid', ",
        ),
        (["train.steps=150"], "train.steps 200 -> 150"),
        (["seed=2", "optim.lr=1"], "(optim.lr 0.0004 -> 1.0, seed 1234 -> 2); "),
        ([*(f"optim.{key}=1e-6" for key in ("eps", "lr", "weight_decay")), *MANY], " and 1 more)"),
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
    assert "); set another name" in line
    assert ("checkpoint.allow_change=[" in line) is ("global_batch_size" not in line)
    assert (Path("runs/small/recipe.yaml")).read_bytes() == before


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_a_longer_schedule_must_be_allowed(make: Make, schedule: str) -> None:
    begun(make(f"optim.schedule={schedule}")).close()
    longer = f"optim.schedule={schedule}", "train.steps=1000"
    with pytest.raises(
        RecipeError, match=r"train.steps \d+ -> 1000\); set another name, or allow the change: "
    ):
        RunFolder(make(*longer))
    begun(make(*longer, "checkpoint.allow_change=[train.steps]")).close()


def test_named_sections_may_change(make: Make) -> None:
    begun(make()).close()
    with pytest.raises(RecipeError, match=r"\(seed 1234 -> 2\); set another name, or allow"):
        RunFolder(make("optim={lr: 1e-3, eps: 1e-6}", "seed=2", "checkpoint.allow_change=[optim]"))
    begun(make("optim={lr: 1e-3, eps: 1e-6}", "seed=2", "checkpoint.allow_change=[optim, seed]")).close()


def of_plugin(*, source: str = "1", package: str = "mine", **defaults: object) -> dict[str, Any]:
    plugin = {"name": "cosine", "package": package, "sources": {"cosine": source}, "defaults": defaults}
    return {"plugins": {"model.attention": plugin, "measure.metrics[0]": plugin}}


def test_another_default_of_a_plugin_is_refused(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    folder = RunFolder(make())
    folder.refuse_other_defaults(of_plugin(power=2.0))
    folder.begin(0, of_plugin(power=2.0, scale=1.0))
    folder.refuse_other_defaults(of_plugin(power=2.0, new=3))
    with pytest.raises(RecipeError) as caught:
        folder.refuse_other_defaults(of_plugin(power=3.0))
    folder.close()
    key = "model.attention.power"
    assert str(caught.value) == (
        f"{key}: its default was 2.0 when the run in runs/small began, and is 3.0; "
        f"set another name, or go on with {key}=2.0 'checkpoint.allow_change=[{key}]'"
    )
    folder = RunFolder(make(f"checkpoint.allow_change=[{key}]"))
    folder.refuse_other_defaults(of_plugin(power=3.0))
    assert not caplog.records
    folder.refuse_other_defaults(of_plugin(power=3.0, source="2"))
    folder.close()
    warning = "model.attention: the source of cosine has changed since this run began"
    assert [record.getMessage() for record in caplog.records] == [warning]


def test_other_data_under_the_same_path_are_refused(make: Make) -> None:
    data = "data={source: indexed, train: [text]}"
    folder = RunFolder(make(data))
    folder.refuse_other_data({"data": "1"})
    folder.begin(0, {"plugins": {}})
    folder.refuse_other_data({"data": "1"})  # of a version that kept none
    folder.begin(0, {"data": "1"})
    folder.refuse_other_data({"data": "1"})
    with pytest.raises(RecipeError) as caught:
        folder.refuse_other_data({"data": "2"})
    folder.close()
    assert str(caught.value) == (
        "data: these are not the data that the run in runs/small began with; "
        "put those back, set another name, or go on with 'checkpoint.allow_change=[data]'"
    )
    for key in ("data", "data.train", "seed"):
        folder = RunFolder(make(data, f"checkpoint.allow_change=[optim, {key}]"))
        folder.refuse_other_data({"data": "2"})
        folder.close()
    folder = RunFolder(make(data, "checkpoint.allow_change=[optim]"))
    with pytest.raises(RecipeError):
        folder.refuse_other_data({"data": "2"})
    folder.close()


def test_a_default_that_is_not_finite_is_the_same_when_a_run_goes_on(make: Make) -> None:
    folder = RunFolder(make())
    folder.begin(0, of_plugin(limit=math.inf))
    folder.refuse_other_defaults(of_plugin(limit=math.inf))
    with pytest.raises(RecipeError, match="its default was"):
        folder.refuse_other_defaults(of_plugin(limit=1.0))
    folder.close()


@pytest.mark.parametrize("key", ["train", "train.global_batch_size", "model", "model.seq_length"])
def test_what_the_data_position_counts_in_may_not_change(make: Make, key: str) -> None:
    begun(make()).close()
    with pytest.raises(RecipeError, match=r"^checkpoint.allow_change: .* cannot change within a run"):
        RunFolder(make(f"checkpoint.allow_change=[{key}]"))


def test_unwritable(make: Make) -> None:
    Path("file").touch()
    with pytest.raises(
        HostError, match=r"^file/small: cannot be written \(Not a directory\); set output_dir"
    ):
        RunFolder(make("output_dir=file"))
