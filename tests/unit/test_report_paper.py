"""The paper's numbers beside ours: each belongs to a run that a recipe makes; directions agree or not."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from sinkbench import cli, recipe
from sinkbench.errors import DataError
from sinkbench.recipe import Recipe
from sinkbench.recipe_files import list_recipes, shipped_root
from sinkbench.report import table
from sinkbench.report.paper import COLUMNS, paper_table, read_results
from sinkbench.report.runs import read_runs
from tests.unit.run_folder import make_run


def paper_runs() -> dict[tuple[str, str], Recipe]:
    """Every run of recipes/paper by name and label."""
    root = shipped_root()
    assert root is not None
    names = [name for name in list_recipes(root) if name.startswith("paper/")]
    expanded = [run for name in names for run in recipe.expand(recipe.load(f"sinkbench:{name}"))]
    return {(run.values["name"], run.values.get("label", "")): run for run in expanded}


def test_every_number_belongs_to_a_run() -> None:
    known = paper_runs().keys()
    named = {(name, label) for name, group in read_results().items() for label in group.runs}
    assert named <= known
    assert len(named) == 70
    assert {name for name, _ in known} - {name for name, _ in named} == {
        *("domain_weights", "instruction_tuning", "off_by_one", "schedule", "window")
    }


def test_the_papers_default() -> None:
    assert read_results()["default"].runs[""] == {"sink_1_raw": 18.18, "loss": 3.73}


def test_a_raw_rate_is_one_that_the_rows_allow() -> None:
    """No weight of rows that sum to alpha exceeds alpha."""
    configs = {key: recipe.to_config(run) for key, run in paper_runs().items()}
    for name, group in read_results().items():
        for label, numbers in group.runs.items():
            config = configs[name, label]
            if config.model.attention.params.get("alpha", 1) <= config.measure.eps:
                assert not any(metric.endswith("_raw") for metric in numbers), (name, label)


def run_of(tmp_path: Path, name: str, label: str | None, sink: float, loss: float) -> Path:
    path = make_run(tmp_path / name / (label or "run"), sink=sink, probes=False)
    values = yaml.safe_load((path / "recipe.yaml").read_text()) | {"name": name, "label": label}
    (path / "recipe.yaml").write_text(yaml.safe_dump(values))
    numbers = {"sink_1_raw": sink, "sink_1_proxy": sink, "loss": 9.0, "loss/pile_cc": loss}
    (path / "summary.json").write_text(json.dumps(numbers))
    return path


def printed(paths: list[Path]) -> list[str]:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(paper_table(read_runs(paths), read_results()))
    return [" ".join(line.replace("│", " ").split()) for line in console.export_text().splitlines()]


def test_directions_against_the_default_run(tmp_path: Path) -> None:
    runs = [
        run_of(tmp_path, "default", None, 30.0, 4.0),
        run_of(tmp_path, "weight_decay", "weight_decay=0.5", 50.0, 4.2),
        run_of(tmp_path, "weight_decay", "weight_decay=2", 33.0, 3.9),
        run_of(tmp_path, "ffn", "ffn=geglu", 30.5, 4.005),
        run_of(tmp_path, "schedule", "cosine", 20.0, 3.8),
        run_of(tmp_path, "similarity", "sigmoid", 1.0, 3.9),
        run_of(tmp_path, "softmax_scale", "alpha=0.2", 12.0, 4.0),
    ]
    lines = printed(runs)
    for line in (
        "default sink_1_raw 18.18 30.00 – 3.73 4.000 –",  # noqa: RUF001
        "weight decay weight_decay=0.5 sink_1_raw 41.08 50.00 higher, agrees 3.80 4.200 higher, agrees",
        "weight decay weight_decay=2 sink_1_raw 6.13 33.00 higher, paper lower "
        "4.23 3.900 lower, paper higher",
        "schedule cosine sink_1_raw – 20.00 lower – 3.800 lower",  # noqa: RUF001
        "feed-forward block ffn=geglu sink_1_raw 17.86 30.50 same, agrees 3.73 4.005 same, agrees",
        "similarity sigmoid sink_1_proxy 0.44 1.00 lower, agrees 3.70 3.900 lower, agrees",
        "softmax scale alpha=0.2 sink_1_proxy 9.41 12.00 lower, agrees 3.72 4.000 same, agrees",
        "similarity elu_normalized sink_1_raw diverged – – – – –",  # noqa: RUF001
        "feed-forward block ffn=relu sink_1_raw 16.90 – – 3.82 – –",  # noqa: RUF001
    ):
        assert line in lines


def test_the_larger_models_are_compared_with_each_other(tmp_path: Path) -> None:
    runs = [
        run_of(tmp_path, "default", None, 10.0, 4.0),
        run_of(tmp_path, "scale_up", "softmax", 45.0, 3.0),
        run_of(tmp_path, "scale_up", "sigmoid", 20.0, 3.2),
    ]
    assert "1B parameters sigmoid sink_1_proxy 2.46 20.00 lower, agrees 3.10 3.200 higher, agrees" in printed(
        runs
    )


def change(path: Path, values: dict[str, Any]) -> Path:
    """Sets values in a run's recipe, as dotted keys."""
    recipe = yaml.safe_load((path / "recipe.yaml").read_text())
    for key, value in values.items():
        section, name = key.split(".")
        recipe.setdefault(section, {})[name] = value
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize(
    ("values", "others"),
    [
        ({"model.num_layers": 10}, "layers"),
        ({"model.hidden_size": 768, "model.seq_length": 64}, "hidden size, length"),
        ({"data.source": "indexed", "data.train": "data/mine"}, "data"),
        ({"train.global_batch_size": 2}, "number of sequences"),
    ],
)
def test_runs_of_other_budgets_are_not_compared(tmp_path: Path, values: dict[str, Any], others: str) -> None:
    runs = [
        run_of(tmp_path, "default", None, 30.0, 4.0),
        change(run_of(tmp_path, "weight_decay", "weight_decay=0.5", 50.0, 4.2), values),
    ]
    row = f"weight_decay=0.5 sink_1_raw 41.08 50.00 not compared: other {others} 3.80 4.200"
    assert f"weight decay {row}" in printed(runs)


def test_runs_are_compared_in_the_budgets_that_their_recipes_vary(tmp_path: Path) -> None:
    size = "train.global_batch_size"
    runs = [
        change(run_of(tmp_path, "default", None, 30.0, 4.0), {size: 16}),
        change(run_of(tmp_path, "batch_size", "0.5M", 50.0, 4.2), {size: 8}),
        change(run_of(tmp_path, "batch_size", "2M", 50.0, 4.2), {size: 16}),
    ]
    lines = printed(runs)
    assert any(" 0.5M " in line and " 50.00 higher" in line for line in lines)
    assert any(" 2M " in line and " 50.00 not compared: other number of" in line for line in lines)


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    """And has no other loss than that on Pile-CC."""
    run = run_of(tmp_path, "weight_decay", "weight_decay=2", 33.0, 3.9)
    (run / "summary.json").unlink()
    lines = (run / "metrics.jsonl").read_text().replace("loss/web", "loss/pile_cc").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= 120]
    (run / "metrics.jsonl").write_text("".join(kept))
    validated = [line for text in kept if (line := json.loads(text))["event"] == "validation"]
    loss = f"{validated[-1]['loss/pile_cc']:.3f}"
    row = f"weight decay weight_decay=2 step 120 of 200 sink_1_raw 6.13 4.23 {loss}"
    assert row in printed([run])


def test_two_runs_of_one_name_and_label_are_an_error(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / folder, "weight_decay", "weight_decay=2", 33.0, 3.9) for folder in "ab"]
    message = f"{runs[0]} and {runs[1]}: are both weight_decay/weight_decay=2; give one of them"
    with pytest.raises(DataError, match=re.escape(message)):
        printed(runs)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--paper"]) == 0
    assert "18.18" in capsys.readouterr().out
    assert cli.main(["report"]) == 2
    assert capsys.readouterr().err == "sinkbench report: no run is named; give the folders of runs\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_no_column_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    if terminal:
        monkeypatch.setattr(table, "Console", lambda: Console(force_terminal=True, width=80, no_color=True))
    runs = [
        run_of(tmp_path, "default", None, 30.0, 4.0),
        run_of(tmp_path, "weight_decay", "weight_decay=2", 33.0, 3.9),
    ]
    assert cli.main(["report", "--paper", *map(str, runs), "-o", str(tmp_path / "report.html")]) == 0
    assert capsys.readouterr().out.splitlines()[0].count("┳") + 1 == len(COLUMNS)
