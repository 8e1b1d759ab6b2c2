"""Training on sequences of several documents, each of which is seen as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from sinkbench.api import Batch, LossSpec
from sinkbench.data.source import open_source
from sinkbench.errors import RecipeError
from sinkbench.testing import RunDistributed
from sinkbench.trainer import Trainer
from tests.distributed.runs import LAYOUTS, SHORT, Run, prepare, train
from tests.unit.data_folder import write_folder

VOCAB_SIZE = 300
MODEL = (
    "text.yaml",
    *SHORT,
    "train.steps=6",
    "model={num_layers: 4, hidden_size: 64, num_attention_heads: 2, seq_length: 64}",
    "model={ffn: swiglu, ffn_hidden_size: 96}",
    "measure={every: 6, count: 8, length: 16}",
    "validation={every: 6, sequences: 10}",
    "data.prepare=null",
)
MASKED = (*MODEL, "data.document_mask=true")
QUICK = ("tensor pipeline", "context")

Trained = Callable[[str, tuple[str, ...]], Run]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of 1 to 90 tokens, so that some sequences hold many and some lie within one."""
    rng = np.random.default_rng(0)

    def documents(count: int) -> list[list[int]]:
        lengths = rng.integers(0, 90, count)
        return [np.minimum(rng.zipf(1.3, n), VOCAB_SIZE - 1).tolist() for n in lengths]

    folder = tmp_path_factory.mktemp("data") / "text"
    return f"data.train={write_folder(folder, documents(200), documents(50), vocab_size=VOCAB_SIZE)}"


@pytest.fixture(scope="module")
def trained(run_distributed: RunDistributed, data: str, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    kept: dict[tuple[str, tuple[str, ...]], Run] = {}

    def trained(layout: str, overrides: tuple[str, ...]) -> Run:
        if (layout, overrides) not in kept:
            folder = tmp_path_factory.mktemp("run")
            kept[layout, overrides] = train(run_distributed, folder, (*MASKED, data, *overrides), layout)
        return kept[layout, overrides]

    return trained


def assert_same(found: Run, expected: Run) -> None:
    for event, key in (("train", "loss"), ("train", "grad_norm"), ("validation", "loss")):
        assert found.series(event, key) == pytest.approx(expected.series(event, key), rel=1e-4)
    for name, value in expected.measured(6).items():
        np.testing.assert_allclose(found.measured(6)[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    "layout", [pytest.param(name, marks=() if name in QUICK else pytest.mark.full) for name in LAYOUTS]
)
def test_layout_changes_nothing(trained: Trained, layout: str) -> None:
    assert_same(trained(layout, ()), trained("", ()))


@pytest.mark.full
@pytest.mark.parametrize("attention", ["sigmoid", "kernel_elu", "{name: softmax, window: 9, kv_bias: kv}"])
@pytest.mark.parametrize("layout", ["tensor pipeline", "context"])
def test_layout_changes_nothing_of_other_attentions(trained: Trained, attention: str, layout: str) -> None:
    chosen = (f"model.attention={attention}",)
    assert_same(trained(layout, chosen), trained("", chosen))


@pytest.mark.full
@pytest.mark.parametrize("recompute", ["attention", "full"])
def test_recomputed(trained: Trained, recompute: str) -> None:
    assert_same(trained("", (f"train.recompute={recompute}",)), trained("", ()))


def rank_compares(
    rank: int, world_size: int, arguments: Sequence[str]
) -> tuple[Batch, dict[str, Tensor], list[Tensor]]:
    """The token losses of two sequences, with and without the mask, and of each of their documents alone."""
    from sinkbench.megatron import parallel
    from sinkbench.model import build_stages, declare

    config, resolved = prepare(arguments)
    source = open_source(config)
    declared = declare(config, resolved, source.vocab_size)
    arrays = source.sequences(0, 2)
    whole = {name: torch.from_numpy(rows) for name, rows in arrays.items()}
    batch = declared.loss.transform(whole)
    batch["document_start"] = batch["document_start"][:, :-1]
    with parallel.running(config) as layout, torch.no_grad():
        (network,) = build_stages(config, declared, layout)
        network.eval()
        plain = {name: rows for name, rows in batch.items() if name != "document_start"}
        losses = {"masked": network(batch), "plain": network(plain)}
        alone = []
        for row, start in enumerate(batch["document_start"]):
            begins = [*start.unique().tolist(), len(start)]
            parts = [
                network({name: rows[row : row + 1, first:end] for name, rows in plain.items()})
                for first, end in pairwise(begins)
            ]
            alone.append(torch.cat(parts, 1)[0])
    return batch, losses, alone


def test_documents_are_as_they_are_alone(run_distributed: RunDistributed, data: str) -> None:
    """Rotary positions are relative, so that the losses of a document do not depend on its place."""
    ((batch, losses, alone),) = run_distributed(1, rank_compares, (*MASKED, data))
    assert len(batch["document_start"].unique()) > 3
    torch.testing.assert_close(losses["masked"], torch.stack(alone), rtol=1e-4, atol=1e-5)
    assert (losses["masked"] - losses["plain"]).abs().max() > 1e-3


def test_no_plugin_can_lose_the_mask() -> None:
    def transform(batch: Batch) -> Batch:
        tokens = batch["tokens"]
        return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": tokens[:, 1:].float()}

    trainer = SimpleNamespace(
        layout=SimpleNamespace(device=torch.device("cpu")),
        config=SimpleNamespace(model=SimpleNamespace(seq_length=4)),
        declared=SimpleNamespace(transforms=(), loss=LossSpec(transform=transform)),
    )
    start = torch.tensor([[0, 0, 2, 2, 4]], dtype=torch.int32)
    tokens = torch.arange(5)[None]
    ready = Trainer._ready(cast(Any, trainer), {"tokens": tokens, "document_start": start})
    assert ready["document_start"].tolist() == [[0, 0, 2, 2]]
    assert "document_start" not in Trainer._ready(cast(Any, trainer), {"tokens": tokens})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("loss={name: prefix_lm, prefix: 5}",),
            "with a prefix of 5 positions that see one another",
        ),
        (
            ("model.attention={name: softmax, sink_token: true}",),
            "with a sink token in front of the sequence",
        ),
        (("model.attention=kernel_elu", "model.backend=linear"), "linear cannot compute a document mask"),
    ],
)
def test_what_is_refused(overrides: tuple[str, ...], message: str, data: str) -> None:
    from sinkbench.model import declare

    config, resolved = prepare((*MASKED, data, *overrides))
    with pytest.raises(RecipeError) as caught:
        declare(config, resolved, VOCAB_SIZE)
    assert message in str(caught.value)


def test_a_task_without_documents_has_no_mask(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.document_mask: unknown key"):
        prepare(("demo.yaml", "data.document_mask=true"))
