"""The tables that sweeps and measurements print."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from sinkbench.measure.results import OF_A_RUN, Result
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

MEASUREMENTS = "the files of --json and --csv"
"""Where all that was measured is."""

FILE_WIDTH = 200
"""Of a table that goes to a file or a pipe, which would otherwise lose the columns beyond 80 characters."""
NAME_WIDTH = 16
"""Names are never folded below this."""
TITLE_WIDTH = 10
"""Nor the titles of added columns below this."""

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


@dataclass(frozen=True)
class Fitted:
    """A table that adds as many columns for scalars of other packages' metrics as there is room for, and
    names the others below.

    Attributes:
        place: where all numbers are.
        no_metrics: keys of the rows that are no metric's.
    """

    known: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    place: str
    no_metrics: Container[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for most in range(columns.MOST_ADDED, -1, -1):
            others = columns.added(self.known, self.rows, self.no_metrics, most=most)
            note = others.note(self.place)
            made = table(self.known, self.rows, added=others.columns, note=note, room=options.max_width)
            if most == 0 or narrowest(made) <= options.max_width:
                yield made
                return


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Fitted:
    """Runs side by side; percentages are 0-100, attention weights as they are.

    Args:
        rows: one mapping a run, as in its summary.json, with any of the keys label, attention, loss,
            sink_1_raw, sink_1_proxy, first_token_attention_trigger, first_token_attention_nontrigger and
            value_drain, and the scalars of metrics that are not sinkbench's own. A column without any
            value is left out.
    """
    domains = {key for row in rows for key in row if key.startswith("loss/")}
    return Fitted(COLUMNS, rows, "summary.json", OF_A_RUN | domains)


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


def measurement_table(results: Sequence[Result], published: Published) -> Fitted:
    """Measured models and runs, a row for each kind of inputs; see ``measurement_row``."""
    rows = [measurement_row(result, published) for result in results]
    return Fitted(MEASURED, rows, MEASUREMENTS)


def table(
    known: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    *,
    added: Sequence[Column] = (),
    note: str = "",
    room: int | None = None,
) -> Table:
    """Rows under those of the columns for which any row has a value.

    Args:
        added: columns after the known ones.
        note: a line below.
        room: width that is available; default: rich finds out, which may cut off the last columns.
    """
    made = Table(caption=Text(note) if note else None, caption_justify="left")
    shown = columns.with_values((*known, *added), rows)
    for column in shown:
        # Names fold only after the long titles over numbers have wrapped; numbers stay whole.
        cells = [cell_len(column.cell(row)) for row in rows]
        width = max(cells) if column.numeric else min(NAME_WIDTH, max(cells))
        if column in added:
            width = max(width, min(TITLE_WIDTH, cell_len(column.title)))
        made.add_column(
            Text(column.title),  # the key of another package's metric is no markup either
            justify="right" if column.numeric else "left",
            min_width=width,
            overflow="fold",
        )
    if room is not None:
        _squeeze(made, [max(cell_len(t) for t in texts) for texts in _texts(shown, rows)], room)
    for row in rows:
        made.add_row(*(Text(column.cell(row)) for column in shown))  # Text: a label is no markup
    return made


def roomy_console() -> Console:
    """The standard output; as a file or pipe it has room for a table."""
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    return console


def narrowest(made: Table) -> int:
    """The width below which a table loses columns."""
    return sum(column.min_width or 0 for column in made.columns) + _frame(made)


def _frame(made: Table) -> int:
    """Borders, and a space on either side of each cell."""
    return 1 + 3 * len(made.columns)


def _texts(shown: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    return [[column.title, *(column.cell(row) for row in rows)] for column in shown]


def _squeeze(made: Table, widths: list[int], room: int) -> None:
    """Narrows the widest columns until a table fits. Rich would narrow some below their least width, take
    that back, and cut off the last columns for it.

    Args:
        widths: of the columns, without folds.
    """
    least = [column.min_width or 0 for column in made.columns]
    words = [max(map(cell_len, str(column.header).split()), default=0) for column in made.columns]
    whole = [max(pair) for pair in zip(least, words, strict=True)]
    for floor in (whole, least):  # a title folds between its words first
        while sum(widths) + _frame(made) > room and widths != (reached := [*map(min, widths, floor)]):
            widest = max(range(len(widths)), key=lambda i: (widths[i] > reached[i], widths[i]))
            widths[widest] -= 1
    for column, width in zip(made.columns, widths, strict=True):
        column.width = width
