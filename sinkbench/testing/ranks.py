"""What the ranks that ``check_plugin`` starts do with the tiny model. All return plain values or tensors.

Shapes: b sequence, s position, n hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkbench import recipe
from sinkbench.api import Batch, LayerCapture, Metric, Observation
from sinkbench.checkpoint import CheckpointStore
from sinkbench.config import Config
from sinkbench.model import Declarations, build_stages
from sinkbench.saving import Saver, load
from sinkbench.testing.subject import Subject, batch, tokens

if TYPE_CHECKING:
    from sinkbench.megatron.training import Engine

STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Share:
    """The gradient of a parameter on one rank.

    Attributes:
        name: in the whole model.
        dim: along which the parameter is split over tensor-parallel ranks, or None.
        gated: it holds the halves of a gated projection, each of them split.
    """

    name: str
    gradient: Tensor
    dim: int | None
    gated: bool


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A few steps of training on one rank.

    Attributes:
        losses, norms: of each step; norms are those of the whole gradient.
        gradients: of the first step.
        idle: names of parameters whose gradient is zero in every step.
        probe: what the metrics found afterwards.
    """

    losses: list[float]
    norms: list[float]
    gradients: list[Share] = field(default_factory=list)
    idle: set[str] = field(default_factory=set)
    probe: dict[str, Any] = field(default_factory=dict)


class WatchedAttention:
    """A metric of the plugin's attention itself: any wrong row, head or position changes it."""

    def observe(self, capture: LayerCapture) -> Observation:
        weights = capture.weights_bhqk
        future = torch.ones(weights.shape[-2:], dtype=torch.bool).triu(1)
        seen = {
            "rows": weights.sum(-1),
            "first": weights[..., 0],
            "future": weights.masked_fill(~future, 0).abs().amax((-2, -1)),
        }
        return seen if capture.slot_bhq is None else {**seen, "slot": capture.slot_bhq}

    def result(self, layers: Sequence[Observation]) -> dict[str, float | list[Any]]:
        return {f"watched_{key}": [layer[key].tolist() for layer in layers] for key in layers[0]}


@contextmanager
def engine_of(
    subject: Subject, *overrides: str
) -> Iterator[tuple[Engine, Config, Declarations, dict[str, Metric]]]:
    """The tiny model on this layout with its optimizer, and the recipe's metrics."""
    from sinkbench.measure.probe import build_metrics
    from sinkbench.megatron import parallel
    from sinkbench.megatron.training import Engine

    config, resolved, declared = subject.declare(*overrides)
    metrics = build_metrics(resolved.metrics, declared.context)
    with parallel.running(config) as layout:
        yield Engine(config, build_stages(config, declared, layout), layout), config, declared, metrics


def micro_batches(config: Config, declared: Declarations, step: int) -> list[Batch]:
    """The batch of a step as a trainer would hand it to the model."""
    whole = batch(config.train.global_batch_size, config.model.seq_length + 1, seed=step)
    size = config.train.micro_batch_size or config.train.global_batch_size
    parts = [
        {name: rows[i : i + size] for name, rows in whole.items()}
        for i in range(0, config.train.global_batch_size, size)
    ]
    for change in declared.transforms:
        parts = [change.transform(part) for part in parts]
    return [declared.loss.transform(part) for part in parts]


def rank_trains(
    rank: int, world_size: int, subject: Subject, overrides: Sequence[str], change: float = 0.0
) -> Trained:
    """Trains a few steps, then probes.

    Args:
        change: relative size of a random change of all weights before.
    """
    from sinkbench.measure.probe import Probe

    with engine_of(subject, *overrides) as (engine, config, declared, metrics):
        if change:
            _change(engine, change)
        losses, norms, gradients = [], [], []
        for step in range(STEPS):
            result = engine.train_step(micro_batches(config, declared, step))
            losses.append(result.loss)
            norms.append(result.grad_norm)
            gradients.append(_gradients(engine, config))
        watched = {**metrics, "watched": WatchedAttention()}
        sequences = {name: x.numpy() for name, x in batch(4, config.measure.length, seed=99).items()}
        probe = Probe(watched, sequences, engine, declared.transforms).run()
        idle = [{share.name for share in step if not share.gradient.any()} for step in gradients]
        return Trained(
            losses=losses, norms=norms, gradients=gradients[0], idle=set.intersection(*idle), probe=probe
        )


@torch.no_grad()
def _change(engine: Engine, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for network in engine.networks:
        for parameter in network.parameters():
            parameter *= 1 + size * torch.randn(parameter.shape, generator=generator)
    engine.optimizer.reload_model_params()


def _gradients(engine: Engine, config: Config) -> list[Share]:
    """Gradients of this rank's parameters after a step. Over several data- or context-parallel ranks each
    holds a part only, so that there are none to compare."""
    from sinkbench.megatron.initialise import global_name

    if engine.layout.groups.dp_cp.size() > 1:
        return []
    found = []
    for network in engine.networks:
        first = network.decoder.layers[0].layer_number
        for local_name, parameter in network.named_parameters():
            name = global_name(local_name, first)
            split = getattr(parameter, "tensor_model_parallel", False)
            found.append(
                Share(
                    name=name,
                    gradient=parameter.main_grad.detach().clone(),
                    dim=getattr(parameter, "partition_dim", 0) if split else None,
                    gated=name.endswith("mlp.linear_fc1.weight") and config.model.ffn.endswith("glu"),
                )
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """Hidden states [b, s, n] before the output projection, of one process.

    Attributes:
        whole: of a batch.
        again: of the same batch, at once after it.
        alone: of the batch's second sequence alone.
        changed: of the batch with another token at position ``at`` of every sequence.
    """

    whole: Tensor
    again: Tensor
    alone: Tensor
    changed: Tensor
    at: int


def rank_inspects(rank: int, world_size: int, subject: Subject) -> Inspected:
    """Runs the whole model on a batch, and on changes of it."""
    with engine_of(subject) as (engine, config, declared, _):
        length, (network,) = config.model.seq_length, engine.networks
        network.eval()
        whole = tokens(3, length)
        at = max(length // 2, declared.loss.bidirectional_prefix)
        changed = whole.clone()
        changed[:, at:] = (changed[:, at:] + 1) % 64

        @torch.no_grad()
        def hidden(rows: Tensor) -> Tensor:
            states: Tensor = network({"tokens": rows})[network.leading :]
            return states.transpose(0, 1).clone()

        return Inspected(
            whole=hidden(whole),
            again=hidden(whole),
            alone=hidden(whole[1:2]),
            changed=hidden(changed),
            at=at,
        )


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """Attributes:
    straight, resumed: losses of the steps after the checkpoint, without and with a restart.
    different: names of weights that the restarted model has other values of.
    """

    straight: list[float]
    resumed: list[float]
    different: list[str]


def rank_resumes(rank: int, world_size: int, subject: Subject, folder: Path) -> Resumed:
    """Saves after a step and goes on; then starts anew from other weights, loads and goes on."""

    def go_on(engine: Engine, batches: list[list[Batch]]) -> list[float]:
        return [engine.train_step(batch).loss for batch in batches]

    store = CheckpointStore(folder)
    with engine_of(subject) as (engine, config, declared, _):
        # The other seed is for the weights alone: a transform may draw by it.
        first, *later = [micro_batches(config, declared, step) for step in range(3)]
        engine.train_step(first)
        saver = Saver(store, engine.layout, config.checkpoint)
        saver.save(engine, 1, recipe.dump(config))
        saver.finish()
        (network,) = engine.networks
        weights = {name: p.detach().clone() for name, p in network.named_parameters()}
        straight = go_on(engine, later)
    with engine_of(subject, "seed=4321") as (engine, *_):
        load(engine, store.open(1))
        (network,) = engine.networks
        now = dict(network.named_parameters())
        different = [name for name, weight in weights.items() if not torch.equal(weight, now[name])]
        resumed = go_on(engine, later)
    return Resumed(straight=straight, resumed=resumed, different=different)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Attributes:
    logits: of the exported model; expected: of ours; both float32 [b, s, v].
    """

    class_name: str
    logits: Tensor
    expected: Tensor


def rank_exports(rank: int, world_size: int, subject: Subject, checkpoint: Path, out: Path) -> Exported:
    """Exports a checkpoint, and loads it as a user of transformers would."""
    import os

    os.environ |= {"HF_HOME": str(out.with_name("hf_home")), "HF_HUB_OFFLINE": "1"}
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from sinkbench.export import to_hf
    from sinkbench.megatron import state

    logging.disable_progress_bar()
    rows = tokens(2, 12)
    with engine_of(subject) as (engine, _, _, _), torch.no_grad():
        (network,) = engine.networks
        network.eval()
        state.load_weights(engine.networks, checkpoint)
        hidden = network({"tokens": rows})[network.leading :]
        expected = network.logits(hidden).transpose(0, 1).float().clone()
    class_name = to_hf.convert(checkpoint, out)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, attn_implementation="eager")
    logits = model.eval()(rows).logits.detach().float()
    return Exported(class_name=class_name, logits=logits, expected=expected)
