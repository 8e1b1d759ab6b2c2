"""What a model is trained to predict, and where."""

from __future__ import annotations

from sinkbench.api import Batch, BuildContext, LossSpec, Params, Plugin, hookimpl


def build_causal_lm(params: Params, context: BuildContext) -> LossSpec:
    import torch

    def transform(batch: Batch) -> Batch:
        tokens = batch["tokens"]
        targets = tokens[:, 1:].contiguous()
        weights = torch.ones_like(targets, dtype=torch.float32)
        return batch | {"tokens": tokens[:, :-1].contiguous(), "targets": targets, "weights": weights}

    return LossSpec(transform=transform)


@hookimpl
def sinkbench_loss() -> list[Plugin]:
    return [Plugin(name="causal_lm", summary="the next token at every position", build=build_causal_lm)]
