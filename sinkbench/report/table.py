"""The comparison table that a sweep prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

from sinkbench.report import columns

COLUMNS = (
    columns.RUN,
    columns.ATTENTION,
    columns.LOSS,
    *columns.SINK,
    *columns.ATTENTION_TO_FIRST,
    columns.VALUE_DRAIN,
)


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Runs side by side; percentages are 0-100, attention weights as they are.

    Args:
        rows: one mapping a run with any of the keys label, attention, loss, sink_1_raw,
            sink_1_proxy, first_token_attention_trigger, first_token_attention_nontrigger and
            value_drain. Other keys are ignored; a column without any value is left out.
    """
    table = Table()
    shown = columns.with_values(COLUMNS, rows)
    for column in shown:
        justify: Literal["left", "right"] = "right" if column.numeric else "left"
        # Names stay whole; the long titles over numbers wrap.
        table.add_column(column.title, justify=justify, no_wrap=not column.numeric)
    for row in rows:
        table.add_row(*(Text(column.cell(row)) for column in shown))  # Text: a label is no markup
    return table
