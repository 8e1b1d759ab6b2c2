"""The columns of result tables, in the terminal and in the report."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ABSENT = "–"  # noqa: RUF001 (a dash, as typeset in tables)


@dataclass(frozen=True)
class Column:
    """One column: ``key`` of a row, its title, and how a value is written."""

    key: str
    title: str
    write: Callable[[Any], str] = str
    numeric: bool = True

    def cell(self, row: Mapping[str, Any]) -> str:
        """The row's value as text; a dash where it has none."""
        value = row.get(self.key)
        return ABSENT if value is None else self.write(value)


def _fixed(digits: int) -> Callable[[float], str]:
    return lambda value: f"{value:,.{digits}f}"


RUN = Column("label", "run", numeric=False)
ATTENTION = Column("attention", "attention", numeric=False)
STEP = Column("step", "step")
LOSS = Column("loss", "loss", _fixed(4))
VALIDATION = Column("validation_loss", "validation loss", _fixed(4))
SINK = (
    Column("sink_1_raw", "Sink_1 % raw", _fixed(1)),
    Column("sink_1_proxy", "Sink_1 % proxy", _fixed(1)),
)
ATTENTION_TO_FIRST = (
    Column("first_token_attention_trigger", "to first token from triggers", _fixed(3)),
    Column("first_token_attention_nontrigger", "to first token from others", _fixed(3)),
)
MODEL = Column("label", "model", numeric=False)
INPUTS = Column("inputs", "inputs", numeric=False)
PUBLISHED = Column("published", "published Sink_1 %", _fixed(2))
SLOT = Column("sink_slot", "Sink_* %", _fixed(1))
IMPORTANCE = Column("importance_1_raw", "importance of token 1", _fixed(3))
WITHOUT_ATTENTION = Column("layers_without_attention", "layers without attention")
FURTHER = (
    Column("massive_activations", "massive activations %", _fixed(1)),
    Column("massive_activation_top", "largest activation", _fixed(0)),
    Column("kurtosis", "kurtosis", _fixed(1)),
    Column("max_infinity_norm", "max inf. norm", _fixed(1)),
    Column("qk_cosine_first", "cosine to first key", _fixed(3)),
    Column("qk_cosine_rest", "cosine to others", _fixed(3)),
    Column("qk_norm_ratio", "QK norm ratio", _fixed(2)),
    Column("head_output_norm", "head output norm", _fixed(3)),
    Column("perplexity_full", "perplexity", _fixed(2)),
    Column("perplexity_window", "perplexity, window", _fixed(2)),
    Column("perplexity_streaming", "perplexity, first tokens kept", _fixed(2)),
    Column("loss_full", "loss", _fixed(3)),
    Column("loss_change_without_sink", "loss change without sink", _fixed(3)),
    Column("perplexity_exact", "perplexity, exact", _fixed(2)),
    Column("perplexity_change_w8a8", "perplexity change, W8A8", _fixed(2)),
)
"""Of metrics that are asked for by name."""
VALUE_DRAIN = Column("value_drain", "value drain", _fixed(3))
ROW_SUM = Column("row_sum", "row sum", _fixed(3))
ACTIVATION_RATIO = Column("activation_ratio", "activation ratio", _fixed(2))
TOKENS_PER_SECOND = Column("tokens_per_second", "tokens/s", _fixed(0))
MFU = Column("mfu", "MFU %", _fixed(1))


OWN_KEYS = re.compile(
    r"(sink|importance)_(\d+_raw|\d+_proxy|slot)(_eps.+)?|sink_total_\d+_(raw|proxy)(_eps.+)?|row_sum"
    r"|activation_ratio|key_norm_ratio|value_drain|first_token_attention_(non)?trigger"
    r"|massive_activation(s|_top|_median)|kurtosis|max_infinity_norm"
    r"|qk_(cosine_first|cosine_rest|norm_ratio)|head_output_norm(_ratio)?"
    r"|loss_(full|without_sink|change_without_sink)|perplexity_(full|window|streaming|exact|w8a8|change_w8a8)"
)
"""Scalars of sinkbench's own metrics, for which the tables have columns, or leave them out on purpose.
Results do not tell which metric they are of."""

MOST_ADDED = 6
"""Columns that a table has for scalars of other metrics: more make no line that can be read."""
MOST_NAMED = 24
"""Names of those that have none."""


@dataclass(frozen=True)
class Added:
    """What a table shows of the metrics of other packages: a column each, and the keys beyond these."""

    columns: tuple[Column, ...] = ()
    left_out: tuple[str, ...] = ()

    def note(self, place: str) -> str:
        """Says which keys are left out, and where they are; empty if none is."""
        if not self.left_out:
            return ""
        beyond = len(self.left_out) - MOST_NAMED
        more = f" and {beyond} more" if beyond > 0 else ""
        return f"Without a column, but in {place}: {', '.join(self.left_out[:MOST_NAMED])}{more}."


def added(
    known: Sequence[Column],
    rows: Iterable[Mapping[str, Any]],
    no_metrics: Container[str] = (),
    *,
    most: int = MOST_ADDED,
) -> Added:
    """The scalars of metrics that a table has no column for, in the order of their first rows.

    Args:
        known: the table's columns.
        rows: values by key, those of metrics among them.
        no_metrics: other keys of the rows.
        most: how many get a column.
    """
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if is_number(value))
    mine = {column.key for column in known}
    new = [k for k in keys if k not in mine and k not in no_metrics and not OWN_KEYS.fullmatch(k)]
    shown = tuple(Column(key, key, _significant) for key in new[:most])
    return Added(shown, tuple(new[most:]))


def is_number(value: Any) -> bool:
    """Whether a value of a file or a row is a scalar."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _significant(value: float) -> str:
    """A number of which nothing is known."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def with_values(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """Those columns for which any row has a value."""
    return [column for column in columns if any(row.get(column.key) is not None for row in rows)]
