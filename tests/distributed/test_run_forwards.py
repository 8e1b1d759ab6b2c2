"""Metrics that need forward passes of their own, of a run and not of its export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sinkbench.data.source import open_source
from sinkbench.testing import RunDistributed
from tests.distributed.runs import prepare, train
from tests.unit.test_model import TINY

WINDOW = 5
MODELS = {
    "softmax": "model.attention={name: softmax, window: %s}",
    "sigmoid with a sink token": "model.attention={name: sigmoid, sink_token: true, window: %s}",
}
METRICS = ("'{name: streaming_perplexity, cache: 6, first: 2}'", "sink_cut", "w8a8", "sink")


def losses(
    arguments: Sequence[str], checkpoint: Path, ask: Callable[[Any, Tensor], list[Tensor]]
) -> list[Tensor]:
    """What the checkpoint's model gives, built by a recipe."""
    from sinkbench.measure.run_forwards import RunForwards
    from sinkbench.megatron import parallel, state
    from sinkbench.model import build_stages, declare

    config, resolved = prepare(arguments)
    source = open_source(config)
    declared = declare(config, resolved, source.vocab_size)
    tokens = torch.from_numpy(source.probe(6, 16)["tokens"])
    with parallel.running(config) as layout, torch.no_grad():
        (network,) = build_stages(config, declared, layout)
        state.load_weights([network], checkpoint)
        network.eval()
        return ask(RunForwards(network, tokens, 1, declared.loss.bidirectional_prefix), network)


def rank_compares(
    rank: int, world_size: int, whole: Sequence[str], windowed: Sequence[str], checkpoint: Path
) -> dict[str, list[Tensor]]:
    def restricted(forwards: Any, network: Any) -> list[Tensor]:
        leading = network.leading
        near = forwards.losses(visible=lambda query, key: query - key < WINDOW)
        again = forwards.losses()
        same = forwards.losses(linear_weight=lambda w: 1.0 * w, linear_input=lambda x: 1.0 * x)
        halved = forwards.losses(linear_weight=lambda w: 0.5 * w)
        shapes = set()

        def kept(x: Tensor) -> Tensor:
            shapes.add(tuple(x.shape[:2]))
            return x

        forwards.losses(linear_input=kept)
        assert shapes == {(6, 16 + leading)}, "inputs are by sequence, then position"
        for name, parameter in network.decoder.named_parameters():
            if name.endswith("weight") and "linear" in name:
                parameter.mul_(0.5)
        return [near, again, same, halved, forwards.losses()]

    return {
        "changed": losses(whole, checkpoint, restricted),
        "windowed": losses(windowed, checkpoint, lambda forwards, _: [forwards.losses()]),
        "plain": losses(whole, checkpoint, lambda forwards, _: [forwards.losses()]),
    }


def rank_measures(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    from sinkbench.measure.runs import find_checkpoint, measure_run
    from sinkbench.measure.settings import Settings

    metrics = tuple(metric.strip("'") for metric in METRICS)
    settings = Settings(device="cpu", metrics=metrics)
    return measure_run(str(folder), find_checkpoint(folder, None), "natural", settings).metrics


@pytest.mark.parametrize(
    "name", ["softmax", pytest.param("sigmoid with a sink token", marks=pytest.mark.full)]
)
def test_forward_passes_of_a_run(run_distributed: RunDistributed, tmp_path: Path, name: str) -> None:
    whole, windowed = ((*TINY, MODELS[name] % window) for window in ("null", WINDOW))
    run = train(run_distributed, tmp_path, whole)
    (found,) = run_distributed(1, rank_compares, whole, windowed, run.checkpoint(12))
    near, again, same, halved, by_hand = found["changed"]
    (plain,) = found["plain"]
    assert plain.shape == (6, 15)
    if "token" not in name:  # which a restriction leaves visible, and a window does not
        torch.testing.assert_close(near, found["windowed"][0])
    assert (near - plain).abs().max() > 1e-3
    for unchanged in (again, same):
        torch.testing.assert_close(unchanged, plain)
    torch.testing.assert_close(halved, by_hand)
    assert (halved - plain).abs().max() > 1e-3

    (metrics,) = run_distributed(1, rank_measures, run.folder)
    assert {"sink_1_raw", "perplexity_streaming", "loss_change_without_sink", "perplexity_w8a8"} <= set(
        metrics
    )
    assert metrics["perplexity_exact"] == pytest.approx(plain.mean().exp().item(), rel=1e-5)


def rank_forwards_with_prefix(
    rank: int, world_size: int, arguments: Sequence[str], checkpoint: Path, export: Path
) -> list[Any]:
    """Losses of the run and of its export, and the first queries that count."""
    from sinkbench.export import to_hf
    from sinkbench.measure.hf_forwards import OpenForwards
    from sinkbench.measure.hf_load import open_model
    from sinkbench.measure.hf_place import Trust, find_place

    to_hf.convert(checkpoint, export)
    trust = Trust(code=True)
    place = find_place(str(export), trust)
    opened = open_model(place, device=torch.device("cpu"), dtype="float32", trust=trust)

    def ask(forwards: Any, _: Any) -> list[Any]:
        of_export = OpenForwards(opened.model, forwards.tokens_bs, batch_size=6, streaming=False)
        return [forwards.losses(), of_export.losses(), forwards.first_query, of_export.first_query]

    return losses(arguments, checkpoint, ask)


def test_tokens_that_queries_see_do_not_count(run_distributed: RunDistributed, tmp_path: Path) -> None:
    """Those of a prefix that sees itself: no query before them predicts them."""
    pytest.importorskip("transformers")
    arguments = (*TINY, "loss={name: prefix_lm, prefix: 5}")
    run = train(run_distributed, tmp_path, arguments)
    (found,) = run_distributed(1, rank_forwards_with_prefix, arguments, run.checkpoint(12), tmp_path / "out")
    of_run, of_export, *first = found
    assert first == [4, 4]
    torch.testing.assert_close(of_run, of_export)
    (metrics,) = run_distributed(1, rank_measures, run.folder)
    assert metrics["perplexity_exact"] == pytest.approx(of_run[:, 4:].mean().exp().item(), rel=1e-5)
    assert metrics["loss_full"] == pytest.approx(of_run[:, 4:].mean().item(), rel=1e-5)
