"""Forward passes of a transformers model, as it is or changed, for metrics that ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from sinkbench.errors import DataError
from sinkbench.measure.changed_linears import Change, change
from sinkbench.measure.hf_attention import watching
from sinkbench.measure.hf_call import Visible, Watch
from sinkbench.measure.hf_capture import decoder_layers
from sinkbench.measure.next_token import most_sequences, next_token_losses

LINEAR = ("Linear", "Conv1D", "FalconLinear")
"""Classes of linear maps; GPT-2's Conv1D is one with a transposed weight."""


class OpenForwards:
    """sinkbench.api.Forwards of a transformers model.

    Args:
        model: loaded with eager attention.
        tokens_bs: the probe sequences, on the CPU.
        batch_size: sequences per forward pass, at most.
        streaming: never hold a layer's whole attention weights.
    """

    def __init__(self, model: Any, tokens_bs: Tensor, *, batch_size: int, streaming: bool) -> None:
        self.model = model
        self.tokens_bs = tokens_bs
        self.streaming = streaming
        vocabulary = model.config.get_text_config().vocab_size
        self.batch_size = min(batch_size, most_sequences(tokens_bs.shape[1], vocabulary))

    @property
    def length(self) -> int:
        return self.tokens_bs.shape[1]

    @torch.no_grad()
    def losses(
        self,
        *,
        visible: Visible | None = None,
        linear_weight: Change | None = None,
        linear_input: Change | None = None,
    ) -> Tensor:
        """See sinkbench.api.Forwards.

        Raises:
            DataError: linear maps are to be changed, and some of the model's cannot be.
        """
        watch = Watch(streaming=self.streaming, visible=visible, keep=False)
        with ExitStack() as stack:
            stack.enter_context(watching(self.model, watch))
            if linear_weight or linear_input:
                stack.enter_context(changed_linears(self.model, linear_weight, linear_input))
            return torch.cat([self._losses(tokens) for tokens in self.tokens_bs.split(self.batch_size)])

    def _losses(self, tokens_bs: Tensor) -> Tensor:
        tokens_bs = tokens_bs.to(self.model.device)
        return next_token_losses(self.model(input_ids=tokens_bs, use_cache=False).logits[:, :-1], tokens_bs)


@contextmanager
def changed_linears(model: Any, weight: Change | None, inputs: Change | None) -> Iterator[None]:
    """Within the block, every linear map within the layers uses a changed weight and input.

    Raises:
        DataError: the layers hold other matrices, such as experts in one tensor.
    """
    handles = []
    for name, module in decoder_layers(model).named_modules():
        if type(module).__name__ in LINEAR:
            handles += change(module, weight, inputs)
        elif any(p.dim() > 2 for p in module.parameters(recurse=False)):
            raise DataError(
                type(model).__name__, f"{name} holds experts in one tensor", "measure a model without experts"
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
