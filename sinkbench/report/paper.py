"""Runs of the paper's recipes beside what the paper reports, recipes/paper/results.yaml."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.table import Table

from sinkbench import recipe
from sinkbench.errors import DataError
from sinkbench.recipe_files import RESULTS, list_recipes, shipped_root
from sinkbench.recipe_layers import flatten
from sinkbench.report.columns import Column
from sinkbench.report.runs import VALIDATION, Run
from sinkbench.report.table import table

Number: TypeAlias = float | tuple[float, float]
"""A number, or the ends of a range."""

Key: TypeAlias = tuple[str, str]
"""Name and label of a run; "" without label."""

LOSS, PILE_CC = "loss", "loss/pile_cc"
FIRST_SINK = "sink_1_raw"
SAME_SINK, SAME_LOSS = 1.0, 0.01
"""Differences to the default run up to which a sink rate, in percent, or a loss is called the same."""

ROUNDED = 0.01
"""By so much a budget's rounding may change the proportion of two runs."""

_CLOSE = {LOSS: SAME_LOSS}


class Group(BaseModel):
    """The runs of one recipe.

    Attributes:
        factor: what they vary.
        against: label of the run of this group that the others are compared with, rather than the default.
        runs: label -> metric -> what the paper reports; nothing for a run that diverged.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    factor: str
    against: str | None = None
    runs: dict[str, dict[str, Number]]


DEFAULT = "default"
"""Name of the default run's recipe."""


@dataclass(frozen=True)
class Numbers:
    """What the paper and we have of one run, by metric."""

    paper: Mapping[str, Number] = field(default_factory=dict)
    ours: Mapping[str, Number] = field(default_factory=dict)


def read_results() -> dict[str, Group]:
    """The paper's numbers by name of the recipe.

    Raises:
        DataError: the file is absent or damaged.
    """
    root = shipped_root()
    path = (root or Path("recipes")) / "paper" / RESULTS
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return {name: Group.model_validate(group) for name, group in values.items()}
    except (OSError, yaml.YAMLError, ValidationError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(str(path), f"cannot be read ({reason})", "install sinkbench again") from error


def paper_table(runs: Sequence[Run], results: dict[str, Group], room: int | None = None) -> Table:
    """Every result of the paper, with our number where a run was given, and whether both differ from the
    default run in the same direction. Runs of other budgets are not compared.

    Args:
        room: width that is available.

    Raises:
        DataError: two runs have the same name and label.
    """
    made = _by_key(runs)
    ours = {key: _measured(run) for key, run in made.items()}
    planned = _planned() if runs else {}
    unreported = {name: Group(factor=name, runs={}) for name, _ in ours if name not in results}
    rows: list[dict[str, Any]] = []
    for name, group in (results | unreported).items():
        base_key = (name, group.against) if group.against else (DEFAULT, "")
        base = Numbers(results[base_key[0]].runs[base_key[1]], ours.get(base_key, {}))
        labels = [*group.runs, *(label for n, label in ours if n == name and label not in group.runs)]
        for label in labels:
            numbers = Numbers(group.runs.get(label, {}), ours.get((name, label), {}))
            diverged = label in group.runs and not group.runs[label]
            key = name, label
            others: list[str] = []
            if key in made and base_key in made:
                plans = planned.get(key, planned[base_key]), planned[base_key]
                others = _others(_budget_of(made[key]), _budget_of(made[base_key]), *plans)
            of_run = _rows(
                group.factor, label, numbers, None if key == base_key or others else base, diverged
            )
            if others:
                of_run[0]["direction"] = f"not compared: other {', '.join(others)}"
            if key in made and not made[key].complete:
                of_run[0]["run"] = f"{label} step {made[key].row()['step']}".strip()
            rows += of_run
    return table(COLUMNS, rows, room=room)


def _by_key(runs: Sequence[Run]) -> dict[Key, Run]:
    made: dict[Key, Run] = {}
    for run in runs:
        key = run.recipe["name"], run.recipe.get("label") or ""
        if key in made:
            where = f"{made[key].path} and {run.path}"
            raise DataError(where, f"are both {'/'.join(filter(None, key))}", "give one of them")
        made[key] = run
    return made


@dataclass(frozen=True)
class Budget:
    """What runs must have in common to be compared.

    Attributes:
        fixed: what is the same in both runs, unless their recipes vary it, by its name in a table.
        sequences: number that is trained on; of two runs in the proportion of their recipes.
    """

    fixed: Mapping[str, Any]
    sequences: int


def _budget(values: Mapping[str, Any], steps: int) -> Budget:
    flat = dict(flatten(dict(values)))
    fixed = {
        "layers": flat.get("model.num_layers"),
        "hidden size": flat.get("model.hidden_size"),
        "length": flat.get("model.seq_length"),
        "data": [flat.get(f"data.{key}") for key in ("source", "train", "prepare.inputs")],
    }
    return Budget(fixed, steps * flat.get("train.global_batch_size", 1))


def _budget_of(run: Run) -> Budget:
    return _budget(run.recipe, run.reached)


def _planned() -> dict[Key, Budget]:
    """The budgets of the shipped recipes."""
    root = shipped_root()
    names = [name for name in list_recipes(root) if name.startswith("paper/")] if root else []
    every = (run for name in names for run in recipe.expand(recipe.load(f"sinkbench:{name}")))
    return {
        (run.values["name"], run.values.get("label", "")): _budget(run.values, run.values["train"]["steps"])
        for run in every
    }


def _others(ours: Budget, base: Budget, planned: Budget, planned_base: Budget) -> list[str]:
    """In what a run differs from the one that it is compared with, beyond what its recipe varies."""
    names = [
        name
        for name, value in ours.fixed.items()
        if value != base.fixed[name] and planned.fixed[name] == planned_base.fixed[name]
    ]
    ratio = ours.sequences * planned_base.sequences, base.sequences * planned.sequences
    return names if math.isclose(*ratio, rel_tol=ROUNDED) else [*names, "number of sequences"]


def _measured(run: Run) -> dict[str, Number]:
    """A run's numbers; the loss is that on Pile-CC alone where a run is validated on it."""
    row = run.row()
    validated = run.last(VALIDATION, PILE_CC) is not None
    loss = row.get(PILE_CC, None if validated else row.get(LOSS))
    return {key: value for key, value in (row | {LOSS: loss}).items() if isinstance(value, float)}


def _rows(
    factor: str, label: str, numbers: Numbers, base: Numbers | None, diverged: bool
) -> list[dict[str, Any]]:
    """One row for each metric that the paper reports; the first tells the losses too."""
    metrics = [metric for metric in numbers.paper if metric != LOSS] or [FIRST_SINK]
    rows: list[dict[str, Any]] = []
    for metric in metrics:
        row = {
            "factor": factor,
            "run": label,
            "metric": metric,
            "paper": "diverged" if diverged else _write(numbers.paper.get(metric), 2),
            "ours": _write(numbers.ours.get(metric), 2),
            "direction": _agreement(metric, numbers, base),
        }
        if not rows:
            row["paper_loss"] = _write(numbers.paper.get(LOSS), 2)
            row["our_loss"] = _write(numbers.ours.get(LOSS), 3)
            row["loss_direction"] = _agreement(LOSS, numbers, base)
        rows.append(row)
    return rows


def _agreement(metric: str, numbers: Numbers, base: Numbers | None) -> str | None:
    """Our direction against the default run and whether it is the paper's, if that has one; None without
    our numbers. The slot and later tokens are compared with the default's first token."""
    if base is None:
        return None
    paper = _direction(numbers.paper.get(metric), _of_base(base.paper, metric), metric)
    ours = _direction(numbers.ours.get(metric), _of_base(base.ours, metric), metric)
    if ours is None:
        return None
    words = {-1: "lower", 0: "same", 1: "higher"}
    if paper is None:
        return words[ours]
    return f"{words[ours]}, agrees" if paper == ours else f"{words[ours]}, paper {words[paper]}"


def _of_base(base: Mapping[str, Number], metric: str) -> Number | None:
    return base.get(metric, base.get(FIRST_SINK) if metric.startswith("sink_") else None)


def _direction(value: Number | None, base: Number | None, metric: str) -> int | None:
    if value is None or base is None:
        return None
    difference = _middle(value) - _middle(base)
    if math.isnan(difference):
        return None
    return 0 if abs(difference) <= _CLOSE.get(metric, SAME_SINK) else int(math.copysign(1, difference))


def _middle(value: Number) -> float:
    return sum(value) / 2 if isinstance(value, tuple) else value


def _write(value: Number | None, digits: int) -> str | None:
    if value is None:
        return None
    ends = value if isinstance(value, tuple) else (value,)
    return " to ".join(f"{end:.{digits}f}" for end in ends)


COLUMNS = (
    Column("factor", "factor", numeric=False),
    Column("run", "run", numeric=False),
    Column("metric", "metric", numeric=False),
    Column("paper", "paper"),
    Column("ours", "ours"),
    Column("direction", "direction, ours", numeric=False),
    Column("paper_loss", "loss, paper"),
    Column("our_loss", "loss, ours"),
    Column("loss_direction", "direction of loss, ours", numeric=False),
)
