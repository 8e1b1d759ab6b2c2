"""``sinkbench checkpoint``: what it prints, how it ends, and what it leaves."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sinkbench import cli
from sinkbench.checkpoint import CheckpointStore
from tests.unit.checkpoint_folder import save

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of four steps, whose recipe keeps the last three."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    for step in (10, 20, 30, 40):
        save(store, step)
    recipe = "extends: demo.yaml\nlabel: null\nsweep: null\ncheckpoint: {keep_last: 3}\n"
    (tmp_path / "run" / "recipe.yaml").write_text(recipe)
    return tmp_path / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def call(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    code = cli.main(["checkpoint", *map(str, arguments)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def steps(run: Path) -> list[int]:
    return CheckpointStore(run / "checkpoints").steps()


def test_list(run: Path, capsys: Capture) -> None:
    code, out, err = call(capsys, "list", run)
    lines = [line.split() for line in out.splitlines()]
    assert (code, err, lines[0]) == (0, "", ["CHECKPOINT", "SIZE", "WRITTEN", "LAYOUT", "STATE"])
    assert [(line[0], line[1:3], line[-1]) for line in lines[1:]] == [
        (f"step_{step}", ["16", "B"], "complete") for step in (10, 20, 30, 40)
    ]


def test_list_compares_sizes_and_verify_content(run: Path, capsys: Capture) -> None:
    flip(run / "checkpoints" / "step_20" / "shard")
    (run / "checkpoints" / "step_30" / "shard").write_text("short")
    code, out, err = call(capsys, "list", run)
    assert code == 2
    assert [line.split()[-1] for line in out.splitlines()[1:]] == [
        "complete",
        "complete",
        "DAMAGED",
        "complete",
    ]
    assert err.startswith(f"{run}/checkpoints/step_30/shard: has 5 bytes where checkpoint.json says 7; ")
    assert err.count("\n") == 1
    code, out, err = call(capsys, "verify", run, "--json")
    found = json.loads(out)["checkpoints"]
    assert (code, [row["state"] for row in found]) == (2, ["verified", "damaged", "damaged", "verified"])
    assert found[1]["problem"] in err
    assert "step_20/shard: is not what was written" in found[1]["problem"]


def test_verify_one_checkpoint(run: Path, capsys: Capture) -> None:
    folder = run / "checkpoints" / "step_20"
    assert call(capsys, "verify", folder)[0] == 0
    flip(folder / "recipe.yaml")
    code, _, err = call(capsys, "verify", folder)
    assert (code, err.count("\n")) == (2, 1)
    folder.rename(run / "copied")
    assert call(capsys, "verify", run / "copied")[0] == 2


def test_prune_as_the_recipe_or_the_options_say(run: Path, capsys: Capture) -> None:
    assert call(capsys, "prune", run, "--dry-run") == (
        0,
        "would delete step_10; kept step_20, step_30, step_40\n",
        "",
    )
    assert steps(run) == [10, 20, 30, 40]
    code, out, _ = call(capsys, "prune", run, "--keep-last", 1, "--keep-every", 20, "--json")
    assert (code, json.loads(out)) == (0, {"deleted": [10, 30], "kept": [20, 40], "dry_run": False})
    assert steps(run) == [20, 40]


def test_prune_never_takes_the_newest_good_one(run: Path, capsys: Capture) -> None:
    """Also where only its content shows that a newer one is damaged."""
    flip(run / "checkpoints" / "step_40" / "shard")
    assert call(capsys, "prune", run, "--keep-last", 1)[0] == 0
    assert steps(run) == [30, 40]


def test_a_live_run_is_not_pruned(run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinkbench.run_folder.LOCK_WAIT_S", 0.0)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = call(capsys, "prune", run)
    assert (code, err) == (2, f"{run}: a run is writing here; wait for it, or stop it\n")
    assert steps(run) == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["list", "gone"], "gone: is no run with checkpoints; give the folder of a run"),
        (["prune", "run", "--keep-last", "0"], "--keep-last: 0 is below 1; keep at least one"),
        (["prune", "run", "--keep-every", "-1"], "--keep-every: -1 is below 0; give 0 for none, or more"),
        (["verify", "step_3"], "step_3: there is no such checkpoint; name a folder checkpoints/step_N"),
    ],
)
def test_errors(
    run: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    monkeypatch.chdir(run.parent)
    code, _, err = call(capsys, *arguments)
    assert (code, err) == (2, f"{line}\n")


def test_nothing_heavy_is_imported(run: Path) -> None:
    script = "import sys; from sinkbench import cli; cli.main(sys.argv[1:]); print(*sys.modules)"
    command = [sys.executable, "-c", script, "checkpoint", "verify", str(run)]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "numpy", "pydantic"}.isdisjoint(modules)
