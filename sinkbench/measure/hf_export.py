"""Watches the attention of a model that sinkbench exported with the source of its plugins: it computes by its
own copy of ``sinkbench.attention.reference``, which is asked for the weights.

Shapes: b sequence, h head, g kv head, s position, q query, k key, d head size.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkbench.api import BLOCK_ELEMENTS
from sinkbench.attention.reference import of_tokens

if TYPE_CHECKING:
    from sinkbench.measure.hf_call import Watch

MODEL_TYPE = "sinkbench"
"""Of config.json."""


def is_export(model: Any) -> bool:
    """Whether a model brings the declaration that it was trained with."""
    return bool(model.config.model_type == MODEL_TYPE)


@dataclass(frozen=True, kw_only=True)
class ExportedCall:
    """The attention of one layer on one batch, the sink token left out as it is of a run's measurements.

    Attributes:
        problem: a Problem of the model's copy of the reference.
        leading: positions before the first token: 1 with a sink token.
        whole: the weights of all queries, if they are kept, and those of the extra slot, if there is one.
    """

    problem: Any
    leading: int
    whole: tuple[Tensor, Tensor | None] | None = None

    @property
    def query_bhsd(self) -> Tensor:
        query: Tensor = self.problem.query_bhqd
        return query[:, :, self.leading :]

    @property
    def key_bgsd(self) -> Tensor:
        key: Tensor = self.problem.key_bgkd
        return key[:, :, self.leading :]

    @property
    def value_bgsd(self) -> Tensor:
        value: Tensor = self.problem.value_bgkd
        return value[:, :, self.leading :]

    def rows(self, start: int, end: int) -> Tensor:
        """Weights of the queries start .. end - 1, float32 [b, h, q, k]."""
        return self._weights(start, end)[0]

    def slot(self) -> Tensor | None:
        """What the sink token and the extra slot take of every row together, [b, h, q]."""
        if not self.leading and self.problem.spec.extra_slot is None:
            return None
        batch, heads, length, _ = self.query_bhsd.shape
        step = max(1, BLOCK_ELEMENTS // (batch * heads * length))
        parts = [self._weights(start, min(start + step, length))[1] for start in range(0, length, step)]
        return torch.cat(parts, -1)

    def _weights(self, start: int, end: int) -> tuple[Tensor, Any]:
        at = slice(start + self.leading, end + self.leading)
        if self.whole is not None:
            rows, slot = self.whole
            return of_tokens(rows[:, :, at], None if slot is None else slot[:, :, at], self.leading)
        problem = replace(
            self.problem,
            query_bhqd=self.problem.query_bhqd[:, :, at],
            position_q=self.problem.position_q[at],
            aligned=False,
        )
        return of_tokens(*weights(problem), self.leading)


def weights(problem: Any) -> tuple[Tensor, Tensor | None]:
    """By the model's own copy of the reference, in float32."""
    found: tuple[Tensor, Tensor | None] = _reference(problem).weights(problem.in_float32())
    return found


def _reference(problem: Any) -> Any:
    return sys.modules[type(problem).__module__]


@contextmanager
def watching_export(model: Any, watch: Watch) -> Iterator[None]:
    """Within the block, the attention of an exported model follows ``watch``."""
    attentions = [layer.self_attn for layer in model.model.layers]
    leading = int(model.model.sink_token is not None)

    def attend(problem: Any) -> Tensor:
        visible = watch.visible
        if visible is not None:
            problem = replace(
                problem,
                visible=lambda query, key: (key < leading) | visible(query - leading, key - leading),
            )
        if watch.keep:
            whole = None if watch.streaming else weights(problem)
            watch.calls.append(ExportedCall(problem=problem, leading=leading, whole=whole))
        output: Tensor = _reference(problem).attend(problem)
        return output

    for attention in attentions:
        attention.attend = attend
    try:
        yield
    finally:
        for attention in attentions:
            del attention.attend
