"""Forward passes of a transformers model, as it is or changed, for metrics that ask for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sinkbench.errors import DataError, SinkbenchError
from sinkbench.measure.changed_linears import Change, change
from sinkbench.measure.hf_attention import NOT_WATCHED, is_watched, watching
from sinkbench.measure.hf_call import Visible, Watch
from sinkbench.measure.hf_capture import decoder_layers
from sinkbench.measure.hf_place import first_line
from sinkbench.measure.next_token import first_query, most_sequences, next_token_losses

LINEAR = ("Linear", "Conv1D", "FalconLinear")
"""Classes of linear maps; GPT-2's Conv1D is one with a transposed weight."""


Function = TypeVar("Function", bound=Callable[..., Any])


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
        self.first_query = first_query(getattr(model.config, "bidirectional_prefix", 0))
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
            DataError: linear maps are to be changed, and some of the model's cannot be; or the model fails.
        """
        of_metric: list[Exception] = []
        visible = visible and noting(visible, of_metric)
        linear_weight = linear_weight and noting(linear_weight, of_metric)
        batches = self.tokens_bs.split(self.batch_size)
        linear_input = linear_input and noting(_by_sequence(linear_input, batches), of_metric)
        watch = Watch(streaming=self.streaming, visible=visible, keep=False)
        with ExitStack() as stack:
            stack.enter_context(watching(self.model, watch))
            if linear_weight or linear_input:
                stack.enter_context(changed_linears(self.model, linear_weight, linear_input))
            return torch.cat([self._losses(tokens, of_metric) for tokens in batches])

    def _losses(self, tokens_bs: Tensor, of_metric: list[Exception]) -> Tensor:
        tokens_bs = tokens_bs.to(self.model.device)
        with faults_in_one_line(self.model, streaming=self.streaming, others=of_metric):
            logits_bsv = self.model(input_ids=tokens_bs, use_cache=False).logits
        return next_token_losses(logits_bsv[:, :-1], tokens_bs)


@contextmanager
def faults_in_one_line(model: Any, *, streaming: bool, others: Collection[Exception] = ()) -> Iterator[None]:
    """Around a forward pass: what the model's code raises becomes one line, for families differ without end.

    Args:
        streaming: the pass never holds whole attention weights.
        others: errors that were raised within the pass, but not by the model.

    Raises:
        DataError: the model's code failed.
    """
    try:
        yield
    except (SinkbenchError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # torch has no class of its own for a host without memory
        if any(error is other for other in others) or "DefaultCPUAllocator" in str(error):
            raise
        if streaming and not is_watched(model):
            raise DataError(type(model).__name__, *NOT_WATCHED) from error
        problem = f"its forward pass fails ({type(error).__name__}: {first_line(error)})"
        remedy = "measure another model"
        if streaming:
            # most often code of the family that works on the mask, which streaming does not build
            remedy = f"give --attention whole, or {remedy}"
        raise DataError(type(model).__name__, problem, remedy) from error


def noting(function: Function, faults: list[Exception]) -> Function:
    """The function, which adds what it raises to ``faults``: a metric's, called within a model's pass."""

    @functools.wraps(function)
    def noted(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            faults.append(error)
            raise

    return noted  # type: ignore[return-value]


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
        elif isinstance(module, nn.Conv1d):  # of a hybrid's other layers
            continue
        elif any(p.dim() > 2 for p in module.parameters(recurse=False)):
            problem = f"{name} holds experts in one tensor, whose maps cannot be changed"
            raise DataError(type(model).__name__, problem, "leave w8a8 out of --metrics")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_sequence(change_input: Change, batches: Sequence[Tensor]) -> Change:
    """Some layers, as OPT's, join a batch's sequences and positions for a while; a change gets them apart."""
    length = batches[0].shape[1]
    counts = {batch.numel() for batch in batches}

    def changed(x: Tensor) -> Tensor:
        if x.dim() != 2 or len(x) not in counts:
            return change_input(x)
        return change_input(x.unflatten(0, (-1, length))).flatten(0, 1)

    return changed
