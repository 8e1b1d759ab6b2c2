"""The tables that sweeps and measurements print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rich.table import Table
from rich.text import Text

from sinkbench.measure.results import Result
from sinkbench.report import columns
from sinkbench.report.columns import Column

COLUMNS = (
    columns.RUN,
    columns.ATTENTION,
    columns.LOSS,
    *columns.SINK,
    *columns.ATTENTION_TO_FIRST,
    columns.VALUE_DRAIN,
)

NAME_WIDTH = 16
"""Names are never folded below this."""

Published: TypeAlias = Mapping[str, Mapping[Any, float]]
"""Target -> kind of inputs -> Sink_1 in percent."""

MEASURED = (
    columns.MODEL,
    columns.INPUTS,
    columns.STEP,
    *columns.SINK,
    columns.PUBLISHED,
    columns.SLOT,
    columns.IMPORTANCE,
    *columns.ATTENTION_TO_FIRST,
    columns.ACTIVATION_RATIO,
    columns.VALUE_DRAIN,
    columns.WITHOUT_ATTENTION,
    *columns.FURTHER,
)


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Runs side by side; percentages are 0-100, attention weights as they are.

    Args:
        rows: one mapping a run with any of the keys label, attention, loss, sink_1_raw,
            sink_1_proxy, first_token_attention_trigger, first_token_attention_nontrigger and
            value_drain. Other keys are ignored; a column without any value is left out.
    """
    return table(COLUMNS, rows)


def measurement_row(result: Result, published: Published) -> dict[str, Any]:
    """A result as a row of a table."""
    return {
        **result.metrics,
        "label": result.target,
        "inputs": result.inputs,
        "step": result.step,
        "published": published.get(result.target, {}).get(result.inputs),
        "layers_without_attention": result.layers_without_attention or None,
    }


def measurement_table(results: Sequence[Result], published: Published) -> Table:
    """Measured models and runs, a row for each kind of inputs; see ``measurement_row``."""
    return table(MEASURED, [measurement_row(result, published) for result in results])


def table(known: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows under those of the known columns for which any row has a value."""
    made = Table()
    shown = columns.with_values(known, rows)
    for column in shown:
        # Names fold only after the long titles over numbers have wrapped; numbers stay whole.
        cells = [len(column.cell(row)) for row in rows]
        width = max(cells) if column.numeric else min(NAME_WIDTH, max(cells))
        made.add_column(
            column.title,
            justify="right" if column.numeric else "left",
            min_width=width,
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(Text(column.cell(row)) for column in shown))  # Text: a label is no markup
    return made
