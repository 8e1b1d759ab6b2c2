"""What the layers of a transformers model do on a batch: one layer's attention in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkbench.api import Batch, LayerCapture
from sinkbench.errors import DataError
from sinkbench.measure.hf_attention import watching
from sinkbench.measure.hf_call import AttentionCall, Watch
from sinkbench.measure.hf_export import ExportedCall

KeySums = Callable[[int, float], tuple[Tensor, Tensor, Tensor]]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a decoder-only model, those without attention among them.

    Raises:
        DataError: the model is not built that way.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise DataError(
        type(model).__name__, f"has no list of its {count} layers", "measure a decoder-only language model"
    )


class LayerWatcher:
    """Hands over each layer of a model as it runs.

    Args:
        model: loaded with eager attention.
        streaming: never hold a layer's whole attention weights.
        receive: called with each layer that has attention.

    Attributes:
        with_attention: numbers of the layers, from 1, whose attention was seen.
    """

    def __init__(
        self, model: PreTrainedModel, *, streaming: bool, receive: Callable[[LayerCapture], None]
    ) -> None:
        self.model = model
        self.watch = Watch(streaming=streaming)
        self.receive = receive
        self.with_attention: set[int] = set()
        self.batch: Batch = {}
        self._input: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Watches every forward pass within the block; ``batch`` is set before each."""
        with ExitStack() as stack:
            stack.enter_context(watching(self.model, self.watch))
            for number, layer in enumerate(decoder_layers(self.model), start=1):
                before = layer.register_forward_pre_hook(self._before, with_kwargs=True)
                after = layer.register_forward_hook(self._after(number))
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.watch.calls.clear()
        self._input = args[0] if args else kwargs["hidden_states"]

    def _after(self, number: int) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            calls = self.watch.calls
            if not calls:
                return
            if len(calls) > 1:
                problem = f"attends {len(calls)} times in layer {number}"
                raise DataError(
                    type(self.model).__name__, problem, "measure a model with one attention a layer"
                )
            self.with_attention.add(number)
            output_bsn = output[0] if isinstance(output, tuple) else output
            self.receive(self._capture(number, calls.pop(), output_bsn))

        return hook

    def _capture(self, number: int, call: AttentionCall | ExportedCall, output_bsn: Tensor) -> LayerCapture:
        assert self._input is not None
        if output_bsn.dim() != 3:
            problem = f"its layers pass on {output_bsn.dim()} dimensions, not sequence, position and size"
            raise DataError(type(self.model).__name__, problem, "measure a model with one residual stream")
        first = call.leading
        return LayerCapture(
            layer=number,
            weight_rows=call.rows,
            slot_bhq=call.slot(),
            key_sums=key_sums(call),
            query_bhsd=call.query_bhsd.float(),
            key_bhsd=call.key_bgsd.float(),
            value_bhsd=call.value_bgsd.float(),
            input_bsn=self._input[:, first:].float(),
            output_bsn=output_bsn[:, first:].float(),
            batch=self.batch,
        )


def key_sums(call: AttentionCall | ExportedCall) -> KeySums | None:
    """As LayerCapture.key_sums: on a card, where the kernel can compute the attention."""
    sums = call.sums() if isinstance(call, AttentionCall) and call.query_bhsd.is_cuda else None
    if sums is None:
        return None

    def summed(count: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return (*sums.keys(count, eps), sums.row_bhq)

    return summed
