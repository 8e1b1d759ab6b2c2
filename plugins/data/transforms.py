"""Changes to token sequences (Gu et al. 2410.10781, data distribution). Positions count from 1, as the k
of Sink_k."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import NonNegativeInt, PositiveInt, model_validator

from sinkbench.api import Batch, BuildContext, DataTransform, Params, Plugin, PluginError, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from sinkbench.config import Config


class RandomTokensParams(Params):
    start: PositiveInt = 1
    """first position that gets a random token."""
    end: PositiveInt = 2
    """first position that does not."""
    on_probes: bool = False
    """change probe sequences too; the paper probes natural ones."""

    @model_validator(mode="after")
    def _check(self) -> RandomTokensParams:
        if self.end <= self.start:
            raise ValueError(f"end {self.end} is not above start {self.start}; raise end")
        return self


class FixedTokenParams(Params):
    position: PositiveInt = 1
    """the position that gets the token."""
    token: NonNegativeInt = 1
    """its id; 1 is the padding token of the paper's tokenizer."""
    on_probes: bool = True
    """change probe sequences too, as the paper does: the sink is at that token."""


def build_random_tokens(params: RandomTokensParams, context: BuildContext) -> DataTransform:
    """x_t ~ U(vocabulary) for t in [start, end). What a sequence gets follows from its tokens and the
    recipe's seed, so a sequence that is repeated gets the same, as in the paper's prepared files."""

    def transform(batch: Batch) -> Batch:
        from ._random import uniform_tokens

        tokens = batch["tokens"].clone()
        changed = slice(params.start - 1, params.end - 1)
        tokens[:, changed] = uniform_tokens(tokens, context.vocab_size, context.config.seed)[:, changed]
        return _with_tokens(batch, tokens)

    return DataTransform(transform=transform, on_probes=params.on_probes)


def build_fixed_token(params: FixedTokenParams, context: BuildContext) -> DataTransform:
    """x_position = token in every sequence."""
    if params.token >= context.vocab_size:
        problem = f"token {params.token} is outside the data's vocabulary of {context.vocab_size}"
        raise PluginError("data.transforms fixed_token", problem, "lower token")

    def transform(batch: Batch) -> Batch:
        tokens = batch["tokens"].clone()
        tokens[:, params.position - 1] = params.token
        return _with_tokens(batch, tokens)

    return DataTransform(transform=transform, on_probes=params.on_probes)


def _with_tokens(batch: Batch, tokens: Tensor) -> Batch:
    """Without the marks of trigger tokens, which were those of the tokens before."""
    return {name: x for name, x in batch.items() if name != "trigger"} | {"tokens": tokens}


def check_random_tokens(params: RandomTokensParams, config: Config) -> list[str]:
    return _beyond("end", params.end - 1, config, params.on_probes)


def check_fixed_token(params: FixedTokenParams, config: Config) -> list[str]:
    return _beyond("position", params.position, config, params.on_probes)


def _beyond(name: str, position: int, config: Config, on_probes: bool) -> list[str]:
    length = config.model.seq_length
    if on_probes and config.measure.every:
        length = min(length, config.measure.length)
    if position <= length:
        return []
    return [f"{name} reaches position {position} of sequences of {length}; lower it"]


@hookimpl
def sinkbench_data_transform() -> list[Plugin]:
    return [
        Plugin(
            name="random_tokens",
            summary="uniformly random tokens at positions [start, end)",
            params=RandomTokensParams,
            build=build_random_tokens,
            check=check_random_tokens,
        ),
        Plugin(
            name="fixed_token",
            summary="one fixed token at a position of every sequence",
            params=FixedTokenParams,
            build=build_fixed_token,
            check=check_fixed_token,
        ),
    ]
