"""Plugins with one fault each, for what ``check_plugin`` says of it. Ranks import them from here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkbench.api import (
    AttentionSpec,
    Batch,
    BuildContext,
    DataTransform,
    Elementwise,
    LayerCapture,
    LossSpec,
    NormalizationSpec,
    Observation,
    ParameterSpec,
    Params,
    Plugin,
    PositionalSpec,
    Rows,
    ScoreBias,
    Softmax,
)


def plugin(build: Callable[[Params, BuildContext], object]) -> Plugin:
    return Plugin(name=build.__name__, summary="broken", build=build)


# --- attention ----------------------------------------------------------------------------------


def wrong_kind(params: Params, context: BuildContext) -> object:
    return LossSpec(transform=dict)


def divides_by_little(params: Params, context: BuildContext) -> AttentionSpec:
    """None of the faults: rows whose sum is near zero make much of rounding."""
    return AttentionSpec(rule=Elementwise(function=_squared, normalize=True))


def _squared(scores: Tensor) -> Tensor:
    return (scores.relu() * 2**0.5) ** 2


def sees_neighbours(params: Params, context: BuildContext) -> AttentionSpec:
    return AttentionSpec(rule=Elementwise(function=_softmax))


def _softmax(score: Tensor) -> Tensor:
    return score.softmax(-1)


def in_float32(params: Params, context: BuildContext) -> AttentionSpec:
    return AttentionSpec(rule=Elementwise(function=_float_sigmoid, normalize=True))


def _float_sigmoid(score: Tensor) -> Tensor:
    return score.float().sigmoid()


class _HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score: Tensor) -> Tensor:
        value = score.sigmoid()
        ctx.save_for_backward(value)
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (value,) = ctx.saved_tensors
        return 0.5 * gradients[0] * value * (1 - value)


def _half_gradient(score: Tensor) -> Tensor:
    value: Tensor = _HalfGradient.apply(score)  # type: ignore[no-untyped-call]
    return value


def wrong_gradient(params: Params, context: BuildContext) -> AttentionSpec:
    return AttentionSpec(rule=Elementwise(function=_half_gradient))


def _unmasked(score: Tensor, allowed: Tensor) -> Tensor:
    return score.softmax(-1)


def not_causal(params: Params, context: BuildContext) -> AttentionSpec:
    return AttentionSpec(rule=Rows(function=_unmasked))


def _masked_softmax(score: Tensor, allowed: Tensor) -> Tensor:
    return score.masked_fill(~allowed, float("-inf")).softmax(-1)


def _masked_by_itself(score: Tensor, allowed: Tensor) -> Tensor:
    causal = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
    return _masked_softmax(score, causal)


def blind_to_documents(params: Params, context: BuildContext) -> AttentionSpec:
    return AttentionSpec(rule=Rows(function=_masked_by_itself))


def _noisy(score: Tensor) -> Tensor:
    return score.sigmoid() + 0.01 * torch.rand_like(score)


def random(params: Params, context: BuildContext) -> AttentionSpec:
    return AttentionSpec(rule=Elementwise(function=_noisy))


def _over_the_batch(score: Tensor, allowed: Tensor) -> Tensor:
    return _masked_softmax(score / score.abs().amax((0, 1), keepdim=True), allowed)


def looks_at_the_batch(params: Params, context: BuildContext) -> AttentionSpec:
    return AttentionSpec(rule=Rows(function=_over_the_batch))


def _itself(score: Tensor) -> Tensor:
    return score


def negative_sums(params: Params, context: BuildContext) -> AttentionSpec:
    return AttentionSpec(rule=Elementwise(function=_itself, normalize=True))


def any_attention(params: Params, context: BuildContext) -> AttentionSpec:
    return AttentionSpec(rule=Softmax())


def _log(score: Tensor) -> Tensor:
    return score.log()


def not_finite(params: Params, context: BuildContext) -> AttentionSpec:
    return AttentionSpec(rule=Elementwise(function=_log))


def all_heads(params: Params, context: BuildContext) -> AttentionSpec:
    """A number of heads instead of the word "heads"."""
    bias = ParameterSpec(shape=(context.num_heads,), std=1.0)
    rule = Elementwise(function=_float_sigmoid)
    return AttentionSpec(rule=rule, score_bias="bias", parameters={"bias": bias})


def _by_number_of_heads(score: Tensor, allowed: Tensor) -> Tensor:
    return _masked_softmax(score * score.shape[1], allowed)


def counts_heads(params: Params, context: BuildContext) -> AttentionSpec:
    """The number of heads of a rank for that of the model."""
    return AttentionSpec(rule=Rows(function=_by_number_of_heads))


# --- norms and positions ------------------------------------------------------------------------


class _Norm(torch.nn.Module):
    """x / max|x| over some dimensions, to begin with."""

    made = 0

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size))
        _Norm.made += 1
        self.number = _Norm.made

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * self.normed(x)

    def normed(self, x: Tensor, dim: int = -1) -> Tensor:
        return x / (x.abs().mean(dim, keepdim=True) + 1e-3)


class _OverPositions(_Norm):
    def normed(self, x: Tensor, dim: int = 0) -> Tensor:
        return super().normed(x, dim)


class _OverBatch(_Norm):
    def normed(self, x: Tensor, dim: int = 1) -> Tensor:
        return super().normed(x, dim)


class _Upcast(_Norm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class _Noisy(_Norm):
    def normed(self, x: Tensor, dim: int = -1) -> Tensor:
        return super().normed(x, dim) + 0.01 * torch.rand_like(x)


class _Numbered(_Norm):
    def normed(self, x: Tensor, dim: int = -1) -> Tensor:
        return super().normed(x, dim) / self.number


class _Remembering(_Norm):
    """An average over the steps, outside of what a checkpoint holds."""

    average = 1.0

    def normed(self, x: Tensor, dim: int = -1) -> Tensor:
        if self.training:
            self.average = 0.5 * self.average + 0.5 * float(x.detach().abs().mean())
        return x / self.average


def over_positions(params: Params, context: BuildContext) -> NormalizationSpec:
    return NormalizationSpec(norm=_OverPositions)


def over_batch(params: Params, context: BuildContext) -> NormalizationSpec:
    return NormalizationSpec(norm=_OverBatch)


def upcast(params: Params, context: BuildContext) -> NormalizationSpec:
    return NormalizationSpec(norm=_Upcast)


def noisy_norm(params: Params, context: BuildContext) -> NormalizationSpec:
    return NormalizationSpec(norm=_Noisy)


def numbered(params: Params, context: BuildContext) -> NormalizationSpec:
    return NormalizationSpec(norm=_Numbered)


def remembering(params: Params, context: BuildContext) -> NormalizationSpec:
    return NormalizationSpec(norm=_Remembering)


class _Counting(torch.nn.Module):
    """Positions counted from the first that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(64, 32)

    def forward(self, position_s: Tensor) -> Tensor:
        added: Tensor = self.table(torch.arange(len(position_s), device=position_s.device))
        return added


def counting(params: Params, context: BuildContext) -> PositionalSpec:
    return PositionalSpec(embedding=_Counting)


def _for_all_heads(distance_qk: Tensor, heads: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    slopes = torch.arange(1, len(heads) + 1, device=distance_qk.device)
    return -slopes[:, None, None] * distance_qk.float()


def ignores_heads(params: Params, context: BuildContext) -> PositionalSpec:
    return PositionalSpec(score_bias=ScoreBias(function=_for_all_heads))


# --- losses, transforms, metrics ----------------------------------------------------------------


def _shown(batch: Batch) -> Batch:
    targets = batch["tokens"][:, 1:]
    return {"tokens": targets.flip(1), "targets": targets, "weights": torch.ones(targets.shape)}


def shows_targets(params: Params, context: BuildContext) -> LossSpec:
    return LossSpec(transform=_shown)


def _whole(batch: Batch) -> Batch:
    tokens = batch["tokens"]
    return {"tokens": tokens, "targets": tokens, "weights": torch.ones(tokens.shape)}


def one_too_long(params: Params, context: BuildContext) -> LossSpec:
    return LossSpec(transform=_whole)


def _in_place(batch: Batch) -> Batch:
    batch["tokens"][:, 0] = 5
    return batch


def changes_its_input(params: Params, context: BuildContext) -> DataTransform:
    return DataTransform(transform=_in_place)


def _neighbour(batch: Batch) -> Batch:
    return {**batch, "tokens": batch["tokens"].roll(1, 0)}


def mixes_sequences(params: Params, context: BuildContext) -> DataTransform:
    return DataTransform(transform=_neighbour)


@dataclass(frozen=True)
class _Mean:
    over_batch: bool

    def observe(self, capture: LayerCapture) -> Observation:
        first = capture.weights_bhqk[..., 0].mean((1, 2))
        return {"first": first.mean() if self.over_batch else first - first.mean()}

    def result(self, layers: Sequence[Observation]) -> dict[str, Any]:
        return {"first": torch.stack([layer["first"].mean() for layer in layers]).mean()}


def reduces_sequences(params: Params, context: BuildContext) -> _Mean:
    return _Mean(over_batch=True)


def gives_a_tensor(params: Params, context: BuildContext) -> _Mean:
    return _Mean(over_batch=False)
