"""Results as tidy CSV: one number a line."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

from sinkbench.measure.results import Result

COLUMNS = (
    "target",
    "inputs",
    "length",
    "count",
    "bos",
    "step",
    "metric",
    "layer",
    "head",
    "position",
    "value",
)


def to_csv(results: Sequence[Result]) -> str:
    """All numbers of the results. Layers, heads and positions count from 1; a number that is of none has
    those cells empty, as has the value of one that is not finite. In lists that are no measurements by
    head (massive_dimensions), ``head`` is the place in the list."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for r in results:
        about = (r.target, r.inputs, r.length, r.count, str(r.bos).lower(), "" if r.step is None else r.step)
        for metric, value in r.metrics.items():
            for place, number in _numbers(value):
                shown = "" if not math.isfinite(number) else f"{number:.9g}"
                writer.writerow([*about, metric, *_cells(metric, place), shown])
    return text.getvalue()


def _numbers(value: Any, place: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], float]]:
    if isinstance(value, list):
        for index, item in enumerate(value, start=1):
            yield from _numbers(item, (*place, index))
    else:
        yield place, float(value)


def _cells(metric: str, place: tuple[int, ...]) -> tuple[int | str, ...]:
    """Layer, head, position of a number; in a list that ends in _tokens the position is the last."""
    if metric.endswith("_tokens") and len(place) == 2:
        return (place[0], "", place[1])
    return (*place, *[""] * (3 - len(place)))
