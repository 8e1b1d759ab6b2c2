"""The files measurements are kept in."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sinkbench.errors import DataError, HostError
from sinkbench.measure.results import Result, Results, StepMetrics, read, write

RESULT = Result(
    target="runs/demo",
    inputs="natural",
    length=64,
    count=100,
    bos=False,
    metrics={"sink_1_raw": 18.18, "importance_raw": [[[0.5, 0.25]], [[1.0, 0.0]]]},
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "measure.json"
    write(path, Results(results=[RESULT]))
    assert read(path, Results) == Results(results=[RESULT])
    assert [p.name for p in path.parent.iterdir()] == ["measure.json"], "no temporary file is left"
    written = json.loads(path.read_text())["results"][0]
    assert {key: value for key, value in written.items() if value not in (None, 0) or key == "bos"} == {
        "target": "runs/demo",
        "inputs": "natural",
        "length": 64,
        "count": 100,
        "bos": False,
        "metrics": {"sink_1_raw": 18.18, "importance_raw": [[[0.5, 0.25]], [[1.0, 0.0]]]},
    }


def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "step_7.json"
    write(path, StepMetrics(step=7, metrics={"sink_1_raw": math.nan, "heads": [[math.inf, 1.0]]}))
    assert json.loads(path.read_text())["metrics"] == {"sink_1_raw": None, "heads": [[None, 1.0]]}
    metrics = read(path, StepMetrics).metrics
    assert math.isnan(metrics["sink_1_raw"])  # type: ignore[arg-type]
    assert math.isnan(metrics["heads"][0][0])  # type: ignore[index,arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Invalid JSON"),
        ('{"step": 1, "metrics": {}', "Invalid JSON"),
        ("[]", "object"),
        ('{"schema_version": 2, "step": 1, "metrics": {}}', "schema_version: Input should be 1"),
        ('{"step": -1, "metrics": {}}', "step: "),
        ('{"step": 1, "metrics": {"a": "x"}}', "metrics.a: "),
        ('{"step": 1, "metrics": {"a": [[1, "x"]]}}', "metrics.a"),
        ('{"step": 1, "metrics": {}, "more": 1}', "more: Extra"),
    ],
)
def test_damaged_files_are_one_line_errors(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "step_1.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read(path, StepMetrics)
    line = str(caught.value)
    assert line.startswith(f"{path}: is not a measurement of schema version 1")
    assert message in line
    assert "\n" not in line


def test_absent_file_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"step_1\.json: cannot be read \(No such file"):
        read(tmp_path / "step_1.json", StepMetrics)


def test_a_file_that_cannot_be_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    """A folder in its place: rename fails for every user, root included."""
    path = tmp_path / "measure.json"
    path.mkdir()
    (path / "kept").touch()
    with pytest.raises(HostError, match=r"measure\.json: cannot be written"):
        write(path, Results(results=[]))
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["kept", "measure.json"]
