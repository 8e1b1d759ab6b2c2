"""Where numbers stop being finite: the first layer, and the sequences, of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sinkbench.api import Batch
from sinkbench.megatron.training import Engine


@dataclass(frozen=True, order=True, kw_only=True)
class Place:
    """A module of the whole model. Places are in the order of the forward pass.

    Attributes:
        layer: 0 for the embedding, one more than the last layer for what follows it.
        index: within the layer.
    """

    layer: int
    index: int
    name: str


@dataclass(frozen=True, kw_only=True)
class Overflow:
    """Attributes:
    what: the layer and module, or the layer's gradients.
    rows: sequences of the global batch it was seen in, by their place in it; empty: not known, or all.
    """

    what: str
    rows: tuple[int, ...]


def first_overflow(engine: Engine, micro_batches: Sequence[Batch]) -> Overflow:
    """Runs a batch forward once more, without dropout, and looks at every module's output; if all are finite,
    at the gradients that the last training step left. All ranks call it and get the same.

    Args:
        micro_batches: this rank's, as they were trained on.
    """
    watch = _Watch(engine, len(micro_batches[0]["tokens"]), len(micro_batches))
    # Compiled functions would not call the hooks of modules within them.
    with watch, torch.compiler.set_stance("force_eager"):
        engine.evaluate(micro_batches)
    seen: list[tuple[Place, int]] = _everywhere(watch.seen)
    if seen:
        place = min(place for place, _ in seen)
        rows = sorted({row for other, row in seen if other == place})
        return Overflow(what=place.name, rows=tuple(rows))
    layers: list[int] = _everywhere(_layers_without_finite_gradients(engine))
    if layers:
        # The backward pass comes from the end. Within a layer, parameters are in no such order.
        return Overflow(what=f"the gradients of {_layer_name(engine, max(layers))}", rows=())
    return Overflow(what="no module without dropout", rows=())


class _Watch:
    """Hooks on the modules of this rank's stages that keep each place whose output is not finite."""

    def __init__(self, engine: Engine, size: int, count: int) -> None:
        self.engine = engine
        self.size = size
        self.first_row = engine.layout.data_rank * size * count
        self.seen: list[tuple[Place, int]] = []
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for stage in self.engine.networks:
            progress = _Progress()
            self._handles.append(stage.register_forward_pre_hook(progress.begin))
            for name, module in stage.named_modules():
                self._handles.append(module.register_forward_hook(self._hook(stage, name, progress)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, stage: Any, name: str, progress: _Progress) -> Any:
        layer, text = _named(stage, name)

        def look(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            progress.modules += 1
            output = output[0] if isinstance(output, tuple) else output
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            place = Place(layer=layer, index=progress.modules, name=text)
            first = self.first_row + progress.earlier * self.size
            self.seen += [(place, first + row) for row in self._rows(~torch.isfinite(output))]

        return look

    def _rows(self, wrong: Tensor) -> list[int]:
        """Which sequences of a micro-batch have a wrong number. Within layers it is [s, b, ...]; the losses
        are [b, s]."""
        if not wrong.any():
            return []
        batch = 0 if wrong.ndim == 2 else 1
        if wrong.ndim < 2 or wrong.shape[batch] != self.size:
            return list(range(self.size))
        rows: list[int] = wrong.movedim(batch, 0).flatten(1).any(1).nonzero().flatten().tolist()
        return rows


class _Progress:
    """How far a stage is: micro-batches before this one, modules of this one that have finished."""

    def __init__(self) -> None:
        self.earlier = -1
        self.modules = 0

    def begin(self, *_: object) -> None:
        self.earlier += 1
        self.modules = 0


def _named(stage: Any, name: str) -> tuple[int, str]:
    """Layer and words for a module or parameter of a stage."""
    last: int = stage.config.num_layers + 1
    if name.startswith("decoder.layers."):
        number, _, rest = name.removeprefix("decoder.layers.").partition(".")
        layer: int = stage.decoder.layers[int(number)].layer_number
        return layer, f"layer {layer}" + (f" {rest}" if rest else "")
    if name.startswith("embedding"):
        return 0, name
    return (last, name) if name not in ("", "decoder") else (last + 1, "the loss")


def _layers_without_finite_gradients(engine: Engine) -> list[int]:
    return [
        _named(stage, name)[0]
        for stage in engine.networks
        for name, parameter in stage.named_parameters()
        if not torch.isfinite(parameter.main_grad).all()
    ]


def _layer_name(engine: Engine, layer: int) -> str:
    if layer == 0:
        return "the embedding"
    return f"layer {layer}" if layer <= engine.config.model.num_layers else "the output"


def _everywhere(local: list[Any]) -> list[Any]:
    """What all ranks found."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, local)
    return [item for part in found for item in part]
