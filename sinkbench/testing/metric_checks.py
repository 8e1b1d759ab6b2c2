"""Checks of metrics on made-up layers.

Shapes: b sequence of the batch, s position, h head, q query position, k key position, n hidden size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sinkbench.api import BuildContext, LayerCapture, Observation
from sinkbench.testing.session import Check, Failed, Session, Skipped, compare
from sinkbench.testing.subject import batch

METRIC = frozenset({"metric"})
ROWS = 4


class MadeUpForwards:
    """Stands for a model of which a metric asks losses: the fewer keys are visible, the higher they are."""

    length = 16
    first_query = 0

    def losses(
        self,
        *,
        visible: Callable[[Tensor, Tensor], Tensor] | None = None,
        linear_weight: Callable[[Tensor], Tensor] | None = None,
        linear_input: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        position = torch.arange(self.length)
        seen = position[:, None] >= position
        if visible is not None:
            seen = seen & visible(position[:, None], position[None])
        rows = 1.0 + torch.arange(ROWS)[:, None] / ROWS
        return rows / seen.sum(-1).clamp(min=1)[None, 1:]


def _captures(context: BuildContext) -> list[LayerCapture]:
    """Two layers of random causal attention."""
    generator = torch.Generator().manual_seed(0)
    length = context.seq_length

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    found = []
    for layer in (1, 2):
        masked = torch.ones(length, length, dtype=torch.bool).triu(1)
        score = draw(ROWS, context.num_heads, length, length).masked_fill(masked, -math.inf)
        weights = score.softmax(-1)
        found.append(
            LayerCapture(
                layer=layer,
                weight_rows=partial(_rows, weights),
                query_bhsd=draw(ROWS, context.num_heads, length, context.head_size),
                key_bhsd=draw(ROWS, context.num_kv_heads, length, context.head_size),
                value_bhsd=draw(ROWS, context.num_kv_heads, length, context.head_size),
                input_bsn=draw(ROWS, length, context.hidden_size),
                output_bsn=draw(ROWS, length, context.hidden_size),
                batch=batch(ROWS, length),
            )
        )
    return found


def _rows(weights: Tensor, start: int, end: int) -> Tensor:
    return weights[:, :, start:end]


def _row(capture: LayerCapture, row: int) -> LayerCapture:
    """The same layer on one sequence of the batch."""
    one = slice(row, row + 1)
    return LayerCapture(
        layer=capture.layer,
        weight_rows=lambda start, end: capture.weight_rows(start, end)[one],
        query_bhsd=capture.query_bhsd[one],
        key_bhsd=capture.key_bhsd[one],
        value_bhsd=capture.value_bhsd[one],
        input_bsn=capture.input_bsn[one],
        output_bsn=capture.output_bsn[one],
        batch={name: x[one] for name, x in capture.batch.items()},
    )


def _observed(session: Session) -> tuple[Any, list[LayerCapture], list[Observation]]:
    metric = session.build()
    if not hasattr(metric, "observe"):
        raise Skipped("it makes forward passes of its own and observes no layers")
    captures = _captures(session.declared.context)
    return metric, captures, [metric.observe(capture) for capture in captures]


def shapes(session: Session) -> str:
    _, _, layers = _observed(session)
    for name, x in layers[0].items():
        if not isinstance(x, Tensor) or x.shape[:1] != (ROWS,):
            what = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise Failed(
                f"observation {name} of {ROWS} sequences is {what}: its first dimension is the sequence"
            )
    return ", ".join(f"{name} {list(x.shape)}" for name, x in layers[0].items())


def batch_invariance(session: Session) -> str:
    metric, captures, layers = _observed(session)
    alone = metric.observe(_row(captures[0], 2))
    for name, x in layers[0].items():
        compare(f"observation {name} of a sequence alone, beside others,", alone[name], x[2:3])
    return "a sequence alone gives the same as beside others"


def determinism(session: Session) -> str:
    metric, captures, layers = _observed(session)
    again = metric.observe(captures[0])
    for name, x in layers[0].items():
        compare(f"observation {name} made again", again[name], x, relative=0, absolute=0)
    if json.dumps(metric.result(layers)) != json.dumps(session.build().result(layers)):
        raise Failed("a metric built again gives another result for the same observations")
    return "observed and built again, the same"


def result(session: Session) -> str:
    metric = session.build()
    if hasattr(metric, "observe"):
        _, captures, _ = _observed(session)
        found = metric.result([metric.observe(capture) for capture in captures])
    else:
        found = metric.measure(MadeUpForwards())
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise Failed(f"the result is {type(found).__name__}, not a dict of floats and nested lists")
    for name, value in found.items():
        _check_number(name, value)
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} [...]"
        for name, value in found.items()
    )


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, list):
        for item in value:
            _check_number(name, item)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise Failed(f"result {name} holds a {type(value).__name__}")


def _checks(*named: tuple[str, Callable[[Session], str], str]) -> Sequence[Check]:
    return [Check(name=name, kinds=METRIC, run=run, usually=usually) for name, run, usually in named]


CHECKS = tuple(
    _checks(
        ("shapes", shapes, "observe reduces layers, heads or positions, never the sequences of the batch"),
        ("batch invariance", batch_invariance, "a mean over the batch: take it in result"),
        ("determinism", determinism, "random numbers, or state that a call changes: metrics are stateless"),
        ("result", result, "a tensor instead of a float: end in .item() or .tolist()"),
    )
)
