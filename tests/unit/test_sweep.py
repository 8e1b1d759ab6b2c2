"""Sweeps: what is planned, run, skipped and gathered. A small script stands in for training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from sinkbench import cli, recipe, sweep
from sinkbench.sweep import SweepRun
from tests.unit.conftest import Write

Capture = pytest.CaptureFixture[str]

TRAINER = """\
import json, os, pathlib, sys, time, yaml
folder = pathlib.Path(sys.argv[1]).parent
(folder / "manifest.json").write_text("{}")
with open("events.txt", "a") as events:
    events.write(f"{folder.name} {os.environ['OMP_NUM_THREADS']}\\n")
print("said by", folder.name)
print("complained of by", folder.name, file=sys.stderr)
if folder.name == "bad":
    sys.exit(2)
if folder.name == "interrupted":
    (folder / "stopped.json").write_text("{}")
    sys.exit(1)  # of torchrun, whose ranks ended with 75
if folder.name == "slow":
    pathlib.Path("slow.pid").write_text(str(os.getpid()))
    time.sleep(60)
summary = {"attention": "?", "loss": 2.5, "sink_1_raw": 97.0, "sink_1_proxy": 96.0, "value_drain": None}
summary["step"] = yaml.safe_load(pathlib.Path(sys.argv[1]).read_text())["train"]["steps"]
(folder / "summary.json").write_text(json.dumps(summary))
"""

SWEEP = """\
extends: small
sweep:
  - {label: plain, model.attention: softmax}
  - {label: bad, model.attention: softmax_off_by_one}
  - {model.attention: {name: sigmoid, normalize: false}}
"""
LAST = "attention=sigmoid,normalize=false"


@pytest.mark.parametrize(
    ("visible", "jobs", "processes", "places"),
    [
        ("4,5,6,7", 4, 1, ["4", "5", "6", "7"]),
        ("4,5,6,7", 2, 2, ["4,5", "6,7"]),
        ("4,5", 3, 1, ["4", "5", "4"]),
        ("4,5,6", 2, 2, ["4,5", "6,4"]),
        ("4", 2, 2, ["4", "4"]),
        ("4,5", 1, 2, [None]),
        ("", 2, 1, [None, None]),
    ],
)
def test_jobs_have_cards_of_their_own(
    visible: str, jobs: int, processes: int, places: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    of_place = sweep.Jobs(jobs, processes)._cards_of
    assert [of_place(place).get("CUDA_VISIBLE_DEVICES") for place in range(jobs)] == places


@pytest.fixture
def stand_in(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are made by the script above."""
    script = write("trainer.py", TRAINER)

    def command(item: SweepRun, processes: int) -> list[str]:
        return [sys.executable, str(script), str(item.folder / "recipe.yaml")]

    monkeypatch.setattr(sweep, "command", command)
    monkeypatch.setattr(sweep, "POLL_S", 0.01)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    write("s.yaml", SWEEP)


def events() -> list[str]:
    path = Path("events.txt")
    return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []


def call(*arguments: str) -> int:
    return cli.main(["sweep", *arguments])


def test_plan_writes_recipes_and_prints_commands(write: Write, capsys: Capture) -> None:
    write("s.yaml", SWEEP)
    assert call("s", "seed=5", "--plan") == 0
    folders = [Path("runs/small") / label for label in ("plain", "bad", LAST)]
    assert [line.split()[1:] for line in capsys.readouterr().out.splitlines()] == [
        ["-m", "sinkbench.pretrain", f"{folder}/recipe.yaml"] for folder in folders
    ]
    assert sorted(Path("runs").rglob("*.*")) == sorted(folder / "recipe.yaml" for folder in folders)
    config = recipe.to_config(recipe.require_single(recipe.load(folders[2] / "recipe.yaml")))
    assert (config.label, config.seed, config.output_dir) == (LAST, 5, "runs")
    assert config.model.attention.params == {"normalize": False}


def test_a_plan_may_be_written_again_with_other_values(write: Write) -> None:
    write("s.yaml", SWEEP)
    assert call("s", "--plan") == 0
    assert call("s", "seed=6", "--plan") == 0
    assert recipe.load("runs/small/plain/recipe.yaml").values["seed"] == 6


@pytest.mark.parametrize(
    ("processes", "launcher"),
    [(1, ["-m"]), (4, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", "-m"])],
)
def test_command(write: Write, processes: int, launcher: Sequence[str]) -> None:
    write("s.yaml", SWEEP)
    first = sweep.plan(recipe.load("s"))[0]
    assert sweep.command(first, processes) == [
        *(sys.executable, *launcher, "sinkbench.pretrain", "runs/small/plain/recipe.yaml")
    ]


@pytest.mark.usefixtures("stand_in")
def test_a_run_that_fails_does_not_stop_the_others(capsys: Capture) -> None:
    assert call("s") == 1
    assert events() == ["plain", "bad", LAST]
    shown = capsys.readouterr()
    assert "1 of 3 runs failed: bad (exit code 2)" in shown.err
    rows = json.loads(Path("runs/small/summary.json").read_text())
    assert [(row["label"], row["attention"], row["loss"], row["sink_1_raw"]) for row in rows] == [
        ("plain", "plain", 2.5, 97.0),
        (LAST, "sigmoid", 2.5, 97.0),
    ]
    table = [line.split() for line in shown.out.splitlines()]
    assert ["│", "plain", "│", "plain", "│", "2.5000", "│", "97.0", "│", "96.0", "│"] in table


@pytest.mark.usefixtures("stand_in")
def test_labels_of_one_attention_have_a_column_of_their_own(write: Write, capsys: Capture) -> None:
    write("t.yaml", "extends: small\nsweep: [{label: low, optim.lr: 1e-3}, {label: b, optim.lr: 1e-2}]\n")
    assert call("t") == 0
    table = [line.split()[:5] for line in capsys.readouterr().out.splitlines()]
    assert ["┃", "run", "┃", "attention", "┃"] in table
    assert ["│", "low", "│", "softmax", "│"] in table


@pytest.mark.usefixtures("stand_in")
def test_the_table_has_the_scalars_of_other_metrics(write: Write, capsys: Capture) -> None:
    write(
        "trainer.py",
        TRAINER.replace('"loss": 2.5,', '"loss": 2.5, "row_sum": 1.0, "head_entropy": 0.612345,'),
    )
    call("s")
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[1][-4:] == ["proxy", "┃", "head_entropy", "┃"]
    assert ["plain", "│", "2.5000", "│", "97.0", "│", "96.0", "│", "0.6123", "│"] in [
        row[-10:] for row in table
    ]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_that_was_stopped_did_not_fail(write: Write, capsys: Capture, jobs: str) -> None:
    write("t.yaml", "extends: small\nsweep: [{label: interrupted, seed: 1}, {label: plain, seed: 2}]\n")
    assert call("t", "--jobs", jobs) == 75
    err = capsys.readouterr().err
    assert "1 of 2 runs were stopped: interrupted; the same command goes on with them" in err
    assert "failed" not in err
    assert [row["label"] for row in json.loads(Path("runs/small/summary.json").read_text())] == ["plain"]


@pytest.mark.usefixtures("stand_in")
def test_a_second_call_runs_only_what_did_not_finish(capsys: Capture) -> None:
    call("s")
    assert call("s", "log.every=1") == 1  # logging may change
    assert events() == ["plain", "bad", LAST, "bad"]
    assert "runs/small/plain: already finished" in capsys.readouterr().err


@pytest.mark.usefixtures("stand_in")
def test_runs_go_on_to_more_steps(capsys: Capture) -> None:
    call("s")
    assert call("s", "train.steps=300") == 1  # the schedule is constant
    assert events() == 2 * ["plain", "bad", LAST]
    assert "already finished" not in capsys.readouterr().err
    assert [row["step"] for row in json.loads(Path("runs/small/summary.json").read_text())] == [300, 300]


@pytest.mark.usefixtures("stand_in")
def test_a_folder_of_another_recipe_is_refused_before_anything_runs(capsys: Capture) -> None:
    call("s")
    before = recipe.load("runs/small/bad/recipe.yaml").values
    capsys.readouterr()
    assert call("s", "seed=6") == 2
    assert capsys.readouterr().err == (
        "runs/small/plain: it holds a run of another recipe (seed 1234 -> 6); "
        "set another name, or allow the change: 'checkpoint.allow_change=[seed]'\n"
    )
    assert recipe.load("runs/small/bad/recipe.yaml").values == before
    assert len(events()) == 3


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("arguments", "threads"),
    [([], 4), (["--jobs", "2"], 2), (["--jobs", "2", "--nproc-per-node", "2"], 1), (["--jobs", "8"], 1)],
)
def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch, arguments: list[str], threads: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    call("s", *arguments)
    lines = Path("events.txt").read_text().splitlines()
    assert {line.split()[1] for line in lines} == {str(threads)}


@pytest.mark.usefixtures("stand_in")
def test_the_users_threads_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    call("s")
    assert Path("events.txt").read_text().split()[1] == "3"


@pytest.mark.usefixtures("stand_in")
def test_jobs_run_at_the_same_time_and_keep_their_output(capfd: Capture) -> None:
    assert call("s", "--jobs", "3") == 1
    assert sorted(events()) == sorted(["plain", "bad", LAST])
    assert Path("runs/small/bad/log.txt").read_text() in (
        "said by bad\ncomplained of by bad\n",
        "complained of by bad\nsaid by bad\n",
    )
    shown = capfd.readouterr()
    assert "complained" not in shown.err
    assert "bad: failed with exit code 2, see runs/small/bad/log.txt" in shown.err.replace("\n", " ")
    assert "plain: finished" in shown.err


@pytest.mark.usefixtures("stand_in")
def test_a_single_job_speaks_to_the_terminal(capfd: Capture) -> None:
    call("s")
    assert "complained of by bad" in capfd.readouterr().err


DRIVER = """\
import sys
from sinkbench import cli, sweep
sweep.command = lambda item, n: [sys.executable, "trainer.py", str(item.folder / "recipe.yaml")]
sys.exit(cli.main(["sweep", "t", "--jobs", "2"]))
"""


def _default_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ending_a_sweep_ends_its_runs(write: Write, number: signal.Signals, code: int) -> None:
    write("trainer.py", TRAINER)
    write("driver.py", DRIVER)
    write("t.yaml", "extends: small\nsweep: [{label: slow, seed: 1}, {label: later, seed: 2}]\n")
    process = subprocess.Popen(
        [sys.executable, "driver.py"],
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background hands down an ignored SIGINT.
        preexec_fn=_default_sigint,
    )
    pid = Path("slow.pid")
    deadline = time.monotonic() + 120
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child = psutil.Process(int(pid.read_text()))
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in error
    assert not child.is_running()
    assert not Path("runs/small/summary.json").exists()


def test_a_damaged_summary_is_an_error(write: Write, capsys: Capture) -> None:
    write("s.yaml", SWEEP)
    for label in ("plain", "bad", LAST):
        write(f"runs/small/{label}/summary.json", "{")
    assert call("s") == 2
    assert "runs/small/plain/summary.json: is damaged" in capsys.readouterr().err


def test_the_newest_complete_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert sweep._last_line(path) == {}
    path.write_text('{"step": 1}\n{"step": 2')
    assert sweep._last_line(path) == {"step": 1}
    path.write_text("x" * 5000 + '\n{"step": 3}\n')
    assert sweep._last_line(path) == {"step": 3}
    path.write_text('{"step": "' + "x" * 5000 + '"}\n')
    assert sweep._last_line(path) == {}
