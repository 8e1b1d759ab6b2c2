"""Checks of losses and data transforms: what they make of a batch.

Shapes: b sequence of the batch, s position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from sinkbench.api import Batch, DataTransform, LossSpec
from sinkbench.testing.session import Check, Failed, Session, compare
from sinkbench.testing.subject import VOCABULARY, batch

LOSS = frozenset({"loss"})
TRANSFORM = frozenset({"data_transform"})
ROWS = 4


def _transform(session: Session) -> Callable[[Batch], Batch]:
    return cast("LossSpec | DataTransform", session.build()).transform


def _given(session: Session) -> Batch:
    return batch(ROWS, session.config.model.seq_length + 1)


def loss_shapes(session: Session) -> str:
    given = _given(session)
    made = _transform(session)(dict(given))
    expected = (ROWS, session.config.model.seq_length)
    for name, dtype in (("tokens", torch.int64), ("targets", torch.int64), ("weights", torch.float32)):
        if name not in made:
            raise Failed(f"the batch has no {name}")
        _check_entry(name, made[name], expected, dtype)
    _check_range("tokens", made["tokens"])
    _check_range("targets", made["targets"])
    weights = made["weights"]
    if not weights.isfinite().all() or (weights < 0).any():
        raise Failed(f"weights go from {weights.min():.4g} to {weights.max():.4g}")
    if not (weights > 0).any():
        raise Failed("no token has a weight above 0")
    return f"{100 * (weights > 0).float().mean():.0f} % of the tokens count"


def transform_shapes(session: Session) -> str:
    given = _given(session)
    made = _transform(session)(dict(given))
    for name, before in given.items():
        if name not in made:
            raise Failed(f"the batch has no {name} any more")
        _check_entry(name, made[name], tuple(before.shape), before.dtype)
    _check_range("tokens", made["tokens"])
    changed = (made["tokens"] != given["tokens"]).float().mean()
    return f"{100 * changed:.0f} % of the tokens changed"


def _check_entry(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(x.shape) != shape or x.dtype != dtype:
        raise Failed(f"{name} is {x.dtype} {list(x.shape)} instead of {dtype} {list(shape)}")


def _check_range(name: str, x: Tensor) -> None:
    if x.min() < 0 or x.max() >= VOCABULARY:
        raise Failed(f"{name} go from {int(x.min())} to {int(x.max())}, of a vocabulary of {VOCABULARY}")


def determinism(session: Session) -> str:
    given = _given(session)
    kept = {name: x.clone() for name, x in given.items()}
    transform = _transform(session)
    first, again = transform(dict(given)), transform(dict(given))
    rebuilt = _transform(session)(dict(given))
    for name in kept:
        compare(f"{name} of the batch that was given", given[name], kept[name], relative=0, absolute=0)
    for name in first:
        compare(f"{name} of the same batch again", again[name], first[name], relative=0, absolute=0)
        compare(f"{name} of a plugin built again", rebuilt[name], first[name], relative=0, absolute=0)
    return "the same batch gives the same, and is left as it was"


def batch_invariance(session: Session) -> str:
    given, transform = _given(session), _transform(session)
    whole = transform(dict(given))
    alone = transform({name: x[2:3] for name, x in given.items()})
    for name, x in alone.items():
        compare(f"{name} of a sequence alone, beside others,", x, whole[name][2:3], relative=0, absolute=0)
    return "a sequence alone gives the same as beside others"


def causality(session: Session) -> str:
    given, transform = _given(session), _transform(session)
    at = session.config.model.seq_length // 2
    other = {**given, "tokens": given["tokens"].clone()}
    other["tokens"][:, at:] = (other["tokens"][:, at:] + 1) % VOCABULARY
    before, after = transform(dict(given))["tokens"], transform(other)["tokens"]
    return compare(
        f"tokens before position {at}, after a change of those from there on,",
        after[:, :at],
        before[:, :at],
        relative=0,
        absolute=0,
    )


def _common(kinds: frozenset[str]) -> tuple[Check, ...]:
    return (
        Check(
            name="determinism",
            kinds=kinds,
            run=determinism,
            usually="random numbers (seed them by the sequence's tokens), or a change of the given batch in "
            "place",
        ),
        Check(
            name="batch invariance",
            kinds=kinds,
            run=batch_invariance,
            usually="something computed over the batch: work row by row",
        ),
    )


CHECKS = (
    Check(
        name="shapes",
        kinds=LOSS,
        run=loss_shapes,
        usually="of seq_length + 1 tokens all but the last are inputs and all but the first are targets",
    ),
    *_common(LOSS),
    Check(
        name="causality",
        kinds=LOSS,
        run=causality,
        usually="inputs that show the model tokens that it has yet to predict",
    ),
    Check(
        name="shapes",
        kinds=TRANSFORM,
        run=transform_shapes,
        usually="every entry of the batch keeps its shape and dtype, and tokens stay in the vocabulary",
    ),
    *_common(TRANSFORM),
)
