"""Reads run folders: recipe.yaml, manifest.json, metrics.jsonl, summary.json, measure/step_N.json."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from sinkbench.config import PluginRef
from sinkbench.errors import DataError
from sinkbench.measure.results import StepMetrics, read
from sinkbench.report.columns import is_number

Line = Mapping[str, Any]
"""One line of metrics.jsonl: step, event, time, and numbers by name."""

TRAIN, VALIDATION, PROBE = "train", "validation", "probe"
RECIPE, METRICS, CHECKPOINTS = "recipe.yaml", "metrics.jsonl", "checkpoints"
DEEPEST = 3
"""So far below a folder lie its runs: runs/paper/SWEEP/LABEL below runs."""


class _Model(BaseModel):
    attention: PluginRef


class _Train(BaseModel):
    steps: int


class _Recipe(BaseModel):
    """The few values of a resolved recipe that a report must know; an old run's recipe need not
    be one that this version would train."""

    name: str
    label: str | None = None
    model: _Model
    train: _Train


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run folder holds.

    Attributes:
        label: names the run in tables and figures; unique among the runs of a report.
        attention: the attention plugin and its parameters, in one line.
        steps: how many the recipe asks for.
        recipe: the resolved recipe.
        manifest: versions, plugins, backends, layout.
        lines: event -> its lines in the order of steps.
        summary: the final numbers; None while the run is unfinished.
        measure: the newest probe's numbers by layer and head; None without probes.
    """

    path: Path
    label: str
    attention: str
    steps: int
    recipe: Mapping[str, Any]
    manifest: Mapping[str, Any]
    lines: Mapping[str, Sequence[Line]]
    summary: Mapping[str, Any] | None
    measure: StepMetrics | None

    def series(self, event: str, key: str) -> tuple[list[int], list[float]]:
        """Steps and values of a number, from the lines that have it."""
        pairs = [(line["step"], line[key]) for line in self.lines.get(event, ()) if is_number(line.get(key))]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def last(self, event: str, key: str) -> float | None:
        """The newest value of a number."""
        _, values = self.series(event, key)
        return values[-1] if values else None

    def median(self, event: str, key: str) -> float | None:
        """The median of a number."""
        _, values = self.series(event, key)
        return float(np.median(values)) if values else None

    def array(self, key: str, ndim: int) -> NDArray[np.float64] | None:
        """A nested list of the newest probe, None where it was not measured.

        Raises:
            DataError: it has other dimensions.
        """
        if self.measure is None or key not in self.measure.metrics:
            return None
        where = f"{self.path}, measure of step {self.measure.step}"
        try:
            array = np.asarray(self.measure.metrics[key], dtype=np.float64)
        except ValueError as error:
            raise DataError(where, f"{key} has lists of unequal length", "measure the run again") from error
        if array.ndim != ndim or not array.size:
            raise DataError(
                where, f"{key} has shape {array.shape}, not {ndim} dimensions", "measure the run again"
            )
        return array

    def row(self) -> dict[str, Any]:
        """The run as a row of a table: numbers of validation and probe, of its last step or, as long as it is
        under way, the newest; then those of the summary but for its speeds, which are of the last steps
        alone. A run without summary has the loss that it would hold: the held-out one where there is one."""
        validated, probed = self._newest(VALIDATION), self._newest(PROBE)
        row: dict[str, Any] = {
            "loss": validated.get("loss", self.last(TRAIN, "loss")),
            "validation_loss": validated.get("loss"),
        }
        domains = {key: value for key, value in validated.items() if key.startswith("loss/")}
        for numbers in (domains, probed, self.summary or {}):
            row |= {key: value for key, value in numbers.items() if is_number(value)}
        row |= {key: self.median(TRAIN, key) for key in ("tokens_per_second", "mfu")}
        step = f"{self.reached:,}" if self.complete else f"{self.reached:,} of {self.steps:,}"
        return row | {"label": self.label, "attention": self.attention, "step": step}

    @property
    def reached(self) -> int:
        """The newest step."""
        return max((line["step"] for lines in self.lines.values() for line in lines), default=0)

    @property
    def complete(self) -> bool:
        return self.reached == self.steps

    def _newest(self, event: str) -> Line:
        """The last line; empty if there is none, or if the run has ended after it."""
        lines = self.lines.get(event, ())
        return lines[-1] if lines and (not self.complete or lines[-1]["step"] == self.reached) else {}


def find_runs(paths: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """The run folders that paths name; a path is one, a sweep's folder of them, or a folder of sweeps.

    Returns:
        Those to report, and those of a sweep that have not started.

    Raises:
        DataError: a path is no folder, or holds no run.
    """
    started: list[Path] = []
    waiting: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise DataError(str(path), "is not a folder", "give a run folder, or a sweep's folder of runs")
        found = [path] if (path / RECIPE).is_file() else []
        recipes = (recipe for depth in range(1, DEEPEST + 1) for recipe in path.glob("*/" * depth + RECIPE))
        below = (recipe.relative_to(path).parent for recipe in recipes)
        for child in sorted(path / folder for folder in below if CHECKPOINTS not in folder.parts):
            (found if (child / METRICS).is_file() else waiting).append(child)
        if not found:
            problem = "no run in it has started" if waiting else f"has no {RECIPE}, nor have its folders"
            raise DataError(str(path), problem, "give a folder that a training run wrote")
        started += found
    return list(dict.fromkeys(started)), list(dict.fromkeys(waiting))


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders, with a label of its own for each: the recipe's label or name, and the path
    where several have the same.

    Raises:
        DataError: a file is missing or damaged.
    """
    runs = [read_run(path) for path in paths]
    count = Counter(run.label for run in runs)
    return [run if count[run.label] == 1 else replace(run, label=str(run.path)) for run in runs]


def read_run(path: Path) -> Run:
    """Read one run folder.

    Raises:
        DataError: a file is missing or damaged. Summary and measurements may be missing.
    """
    recipe, known = _read_recipe(path / RECIPE)
    summary = path / "summary.json"
    return Run(
        path=path,
        label=known.label or known.name,
        attention=_one_line(known.model.attention),
        steps=known.train.steps,
        recipe=recipe,
        manifest=_read_json(path / "manifest.json"),
        lines=_read_lines(path / METRICS),
        summary=_read_json(summary) if summary.exists() else None,
        measure=_read_measure(path / "measure"),
    )


def written(value: Any) -> str:
    """A recipe's value as a person would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        problem = f"cannot be read ({error.strerror or error})"
        raise DataError(str(path), problem, "give a folder that a training run wrote") from error
    except UnicodeDecodeError as error:
        raise DataError(str(path), "is not UTF-8 text", "restore the file, or leave the run out") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_text(path))
    except json.JSONDecodeError as error:
        problem = f"is damaged at line {error.lineno} ({error.msg})"
        raise DataError(str(path), problem, "restore the file, or leave the run out") from error
    if not isinstance(value, dict):
        raise DataError(str(path), "holds no JSON object", "restore the file, or leave the run out")
    return value


def _read_recipe(path: Path) -> tuple[dict[str, Any], _Recipe]:
    try:
        recipe = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        problem = f"is damaged ({getattr(error, 'problem', None) or 'not YAML'})"
        raise DataError(str(path), problem, "restore the file, or leave the run out") from error
    try:
        return recipe, _Recipe.model_validate(recipe)
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"is not a recipe ({'.'.join(str(key) for key in first['loc'])}: {first['msg']})"
        raise DataError(str(path), problem, "give the resolved recipe of a run") from error


def _one_line(plugin: PluginRef) -> str:
    parameters = ", ".join(f"{key}: {written(value)}" for key, value in plugin.params.items())
    return f"{plugin.name} ({parameters})" if parameters else plugin.name


def _read_lines(path: Path) -> dict[str, list[Line]]:
    """Lines by event. A step that was run again after a resume counts in its newest form; a last
    line without its end is being written."""
    latest: dict[str, dict[int, Line]] = {}
    text = _text(path)
    for number, raw in enumerate(text.split("\n")[:-1], start=1):
        try:
            line = json.loads(raw)
            latest.setdefault(line["event"], {})[int(line["step"])] = line
        except (ValueError, KeyError, TypeError) as error:
            problem = "is not a JSON object with step and event"
            raise DataError(f"{path}:{number}", problem, "delete the line, or leave the run out") from error
    return {event: [steps[step] for step in sorted(steps)] for event, steps in latest.items()}


def _read_measure(folder: Path) -> StepMetrics | None:
    numbered = {
        int(match[1]): path
        for path in folder.glob("step_*.json")
        if (match := re.fullmatch(r"step_(\d+)\.json", path.name))
    }
    return read(numbered[max(numbered)], StepMetrics) if numbered else None
