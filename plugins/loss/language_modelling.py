"""What a model is trained to predict, and where: next tokens, all of them or some."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import PositiveInt

from sinkbench.api import Batch, BuildContext, LossSpec, Params, Plugin, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from sinkbench.config import Config


class PrefixParams(Params):
    prefix: PositiveInt
    """p: the first so many tokens see one another and are not predicted."""


def next_tokens(batch: Batch, predicted: Tensor) -> Batch:
    """Inputs, targets, and the weights of a loss on the tokens that are to be predicted, bool [b, s+1]."""
    tokens = batch["tokens"]
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return batch | {"tokens": inputs, "targets": targets, "weights": predicted[:, 1:].float()}


def build_causal_lm(params: Params, context: BuildContext) -> LossSpec:
    """-sum_t log p(x_t | x_1 .. x_{t-1})."""

    def transform(batch: Batch) -> Batch:
        return next_tokens(batch, batch["tokens"] >= 0)

    return LossSpec(transform=transform)


def build_prefix_lm(params: PrefixParams, context: BuildContext) -> LossSpec:
    """-sum_{t>p} log p(x_t | x_1 .. x_{t-1}), where x_1 .. x_p see one another (Gu et al. 2410.10781)."""

    def transform(batch: Batch) -> Batch:
        predicted = batch["tokens"] >= 0
        predicted[:, : params.prefix] = False
        return next_tokens(batch, predicted)

    return LossSpec(transform=transform, bidirectional_prefix=params.prefix)


def check_prefix_lm(params: PrefixParams, config: Config) -> list[str]:
    length = config.model.seq_length
    if params.prefix <= length:
        return []
    return [f"prefix {params.prefix} leaves no token of model.seq_length {length} to predict; lower it"]


def build_response_lm(params: Params, context: BuildContext) -> LossSpec:
    """-sum_t m_t log p(x_t | x_1 .. x_{t-1}) with m_t = 1 for tokens of responses and the EOS that ends
    them, 0 for those of prompts, as the prepared chat data says."""

    def transform(batch: Batch) -> Batch:
        return next_tokens(batch, batch["loss_mask"])

    return LossSpec(transform=transform, needs=frozenset({"loss_mask"}))


def check_response_lm(params: Params, config: Config) -> list[str]:
    if config.data.source == "indexed":
        return []
    return [f"data.source {config.data.source} has no responses; use indexed data prepared from dialogues"]


@hookimpl
def sinkbench_loss() -> list[Plugin]:
    return [
        Plugin(name="causal_lm", summary="the next token at every position", build=build_causal_lm),
        Plugin(
            name="prefix_lm",
            summary="the next token after a prefix that sees itself",
            params=PrefixParams,
            build=build_prefix_lm,
            check=check_prefix_lm,
        ),
        Plugin(
            name="response_lm",
            summary="the next token of responses, for instruction tuning",
            build=build_response_lm,
            check=check_response_lm,
        ),
    ]
