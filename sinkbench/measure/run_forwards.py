"""Forward passes of a run's model, as it is or changed, for metrics that ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sinkbench.attention import reference
from sinkbench.attention.reference import Problem
from sinkbench.errors import DataError
from sinkbench.measure.changed_linears import Change, change
from sinkbench.measure.next_token import first_query, most_sequences, next_token_losses

LINEAR = ("ColumnParallelLinear", "RowParallelLinear")
"""Classes of linear maps within the layers."""

Visible = Callable[[Tensor, Tensor], Tensor]


class RunForwards:
    """sinkbench.api.Forwards of a run's model in one process. The loss is the cross entropy of the next
    token, whatever loss the run was trained with.

    Args:
        network: the whole model.
        tokens_bs: the probe sequences, on the model's device.
        vocab_size: of the logits.
        prefix: of the loss plugin: the first so many positions see one another.
    """

    def __init__(self, network: Any, tokens_bs: Tensor, vocab_size: int, prefix: int = 0) -> None:
        self.network = network
        self.tokens_bs = tokens_bs
        self.vocab_size = vocab_size
        self.first_query = first_query(prefix)

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
        with ExitStack() as stack:
            if visible is not None:
                stack.enter_context(restricted(self.network, visible))
            if linear_weight or linear_input:
                stack.enter_context(changed_linears(self.network, linear_weight, linear_input))
            size = most_sequences(self.length, self.vocab_size)
            losses = [self._losses(tokens_bs) for tokens_bs in self.tokens_bs.split(size)]
        return torch.cat(losses)

    def _losses(self, tokens_bs: Tensor) -> Tensor:
        hidden_sbn: Tensor = self.network({"tokens": tokens_bs})[self.network.leading :]
        return next_token_losses(self.network.logits(hidden_sbn[:-1]).transpose(0, 1), tokens_bs)


@contextmanager
def restricted(network: Any, visible: Visible) -> Iterator[None]:
    """Within the block, queries see no more than ``visible`` lets them, by the plain-torch reference: no
    kernel knows such a rule. A sink token, in front of the tokens, stays visible."""
    leading: int = network.leading

    def seen(query: Tensor, key: Tensor) -> Tensor:
        return (key < leading) | visible(query - leading, key - leading)

    def attend(problem: Problem) -> Tensor:
        return reference.attend(replace(problem, visible=seen))

    cores = [layer.attention.core for layer in network.decoder.layers]
    before = [core.parts for core in cores]
    for core in cores:
        core.parts = replace(core.parts, backend=replace(core.parts.backend, run=attend))
    try:
        yield
    finally:
        for core, parts in zip(cores, before, strict=True):
            core.parts = parts


@contextmanager
def changed_linears(network: Any, weight: Change | None, inputs: Change | None) -> Iterator[None]:
    """Within the block, every linear map within the layers uses a changed weight and input [b, s, n].

    Raises:
        DataError: heads are summed before their projection, where their sum cannot be changed.
    """
    change_sbn: Change | None = None
    if inputs is not None:
        batch_first = inputs

        def change_sbn(x_sbn: Tensor) -> Tensor:
            return batch_first(x_sbn.transpose(0, 1)).transpose(0, 1)

    handles = []
    for name, module in network.decoder.named_modules():
        if type(module).__name__ == "SummedProjection":
            remedy = "measure a run whose attention concatenates its heads"
            raise DataError(name, "sums heads before it projects them", remedy)
        if type(module).__name__ in LINEAR:
            handles += change(module, weight, change_sbn)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
