"""What must not change a run: how its batch is cut, what is computed again, where its weights lie."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks.reliability import whole_tensors
from sinkbench import flops
from sinkbench.api import Batch, BuildContext, LossSpec, Params, Plugin
from sinkbench.report import page
from sinkbench.report.columns import Added
from sinkbench.report.runs import read_run
from sinkbench.report.table import COLUMNS, comparison_table
from sinkbench.testing import RunDistributed
from tests.distributed.runs import LAYOUTS, SWIGLU, Run, prepare, train
from tests.distributed.test_layouts import MODELS
from tests.distributed.test_saving import ENGINE, an_engine, batch_of

BRIEF = ("train.steps=8", "measure.every=0")


def build_every_third(params: Params, context: BuildContext) -> LossSpec:
    """Of the even tokens, those at odd positions weigh 1, the others a half; odd tokens weigh nothing,
    nor do all of a sequence that begins with one of the first 30 tokens. So sequences, micro-batches
    and ranks have unequal numbers of tokens, some of them none."""

    def transform(batch: Batch) -> Batch:
        tokens = batch["tokens"]
        targets = tokens[:, 1:]
        weights = (targets % 2 == 0) * torch.tensor([1.0, 0.5]).repeat(targets.shape[1] // 2)
        weights = weights * (tokens[:, 1:2] > 30)
        return batch | {"tokens": tokens[:, :-1], "targets": targets, "weights": weights}

    return LossSpec(transform=transform, z_loss=1e-2)


def rank_trains_weighted(rank: int, world_size: int, arguments: Sequence[str]) -> None:
    from sinkbench.trainer import train

    config, resolved = prepare(arguments)
    plugin = Plugin(name="weighted", summary="", build=build_every_third)
    train(config, replace(resolved, loss=replace(resolved.loss, plugin=plugin)))


def train_weighted(run_distributed: RunDistributed, folder: Path, *overrides: str, processes: int = 1) -> Run:
    arguments = [*SWIGLU, *BRIEF, *overrides, f"output_dir={folder}"]
    run_distributed(processes, rank_trains_weighted, arguments)
    return Run(folder / "short")


@pytest.fixture(scope="module")
def weighted(run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of one process, its batch in one piece."""
    return train_weighted(run_distributed, tmp_path_factory.mktemp("weighted"))


def assert_same_losses(run: Run, expected: Run, relative: float) -> None:
    for event, key in (
        ("train", "loss"),
        ("train", "grad_norm"),
        ("validation", "loss"),
        ("train", "tokens"),
    ):
        assert run.series(event, key) == pytest.approx(expected.series(event, key), rel=relative)


@pytest.mark.parametrize("layout", ["sequence", "pipeline", "context", "data", "interleaved"])
def test_weighted_tokens_count_alike_under_every_layout(
    run_distributed: RunDistributed, weighted: Run, tmp_path: Path, layout: str
) -> None:
    processes, overrides = LAYOUTS[layout]
    run = train_weighted(run_distributed, tmp_path, *overrides, processes=processes)
    assert_same_losses(run, weighted, 1e-5)


@pytest.mark.parametrize("size", [1, 2])
def test_weighted_tokens_count_alike_in_every_micro_batch(
    run_distributed: RunDistributed, weighted: Run, tmp_path: Path, size: int
) -> None:
    run = train_weighted(run_distributed, tmp_path, f"train.micro_batch_size={size}")
    assert_same_losses(run, weighted, 1e-5)


def test_tokens_are_all_that_the_model_has_read(weighted: Run) -> None:
    assert weighted.series("train", "tokens") == {step: step * 8 * 64 for step in range(1, 9)}


def test_tables_of_a_run_add_no_column_for_what_is_no_metric(
    run_distributed: RunDistributed, tmp_path: Path
) -> None:
    train(run_distributed, tmp_path, (*SWIGLU, "label=fast", "train.steps=6"))
    folder = tmp_path / "short" / "fast"
    summary = Run(folder).summary()
    assert (summary["label"], summary["attention"]) == ("fast", "softmax")
    assert summary["sink_1_raw"] is not None
    console = Console(width=200)
    with console.capture() as capture:
        console.print(comparison_table([summary]))
    header = next(line for line in capture.get().splitlines() if "┃" in line)
    titles = {title.strip() for title in header.split("┃")[1:-1]}
    assert titles <= {column.title for column in COLUMNS}
    assert page._other_metrics([read_run(folder)]) == Added()


def test_the_summary_of_a_run_that_went_on_has_no_numbers_of_earlier_steps(
    run_distributed: RunDistributed, tmp_path: Path
) -> None:
    short = (*SWIGLU, "train.steps=6", "validation={every: 6, sequences: 8}", "measure={every: 6, count: 8}")
    first = train(run_distributed, tmp_path, short).summary()
    assert first["loss"] != first["train_loss"]
    longer = (*short, "train.steps=8", "validation.every=0", "measure.every=0")
    summary = train(run_distributed, tmp_path, longer).summary()
    assert summary["step"] == 8
    assert summary["loss"] == summary["train_loss"]
    gone = first.keys() - summary.keys()
    assert "sink_1_raw" in gone
    assert any(key.startswith("loss/") for key in gone)


@pytest.fixture(scope="module")
def with_dropout(run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Runs that keep all activations, by layout."""
    folder = tmp_path_factory.mktemp("dropout")
    return {
        layout: train(run_distributed, folder / f"dropout-{layout}", (*SWIGLU, *BRIEF, *DROPOUT), layout)
        for layout in ("", "sequence")
    }


DROPOUT = ("model.megatron={hidden_dropout: 0.1}", "train.micro_batch_size=4")


@pytest.mark.parametrize("layout", ["", "sequence"])
@pytest.mark.parametrize("what", ["attention", "full"])
def test_recomputed_activations_are_the_same(
    run_distributed: RunDistributed, with_dropout: dict[str, Run], tmp_path: Path, what: str, layout: str
) -> None:
    """Dropout draws again what it drew."""
    recipe = (*SWIGLU, *BRIEF, *DROPOUT, f"train.recompute={what}")
    assert_same_losses(train(run_distributed, tmp_path, recipe, layout), with_dropout[layout], 1e-6)


def test_dropout_has_an_effect(
    with_dropout: dict[str, Run], run_distributed: RunDistributed, tmp_path: Path
) -> None:
    without = train(run_distributed, tmp_path, (*SWIGLU, *BRIEF))
    loss = with_dropout[""].series("train", "loss")[1]
    assert loss != pytest.approx(without.series("train", "loss")[1], rel=1e-4)


@pytest.mark.parametrize("layout", ["", pytest.param("sequence", marks=pytest.mark.full)])
def test_bf16_stays_near_fp32(run_distributed: RunDistributed, tmp_path: Path, layout: str) -> None:
    fp32 = train(run_distributed, tmp_path / "fp32", SWIGLU, layout)
    bf16 = train(run_distributed, tmp_path / "bf16", (*SWIGLU, "train.precision=bf16"), layout)
    losses, expected = bf16.series("train", "loss"), fp32.series("train", "loss")
    assert losses == pytest.approx(expected, rel=1e-2)
    assert losses != pytest.approx(expected, rel=1e-6)
    assert bf16.measured(20)["importance_1_raw"] == pytest.approx(
        fp32.measured(20)["importance_1_raw"], rel=0.05
    )
    weights = {n: t for n, t in whole_tensors(bf16.checkpoint(20)).items() if not n.startswith("optimizer")}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


STANDING = ("train.steps=1", "optim={lr: 1e-30, weight_decay: 0, warmup_steps: 0}", *BRIEF[1:])
"""One step of 1e-30: its checkpoint holds the initial weights."""


@pytest.fixture(scope="module")
def initial(
    run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, torch.Tensor]]:
    """Initial weights of one process by model."""
    folder = tmp_path_factory.mktemp("initial")
    return {
        name: weights(train(run_distributed, folder / name, initial_recipe(name)))
        for name in ("mixed", "swiglu")
    }


def initial_recipe(model: str) -> tuple[str, ...]:
    bias = ("model.attention={name: sigmoid, bias: learned}",) if model == "mixed" else ()
    return (*MODELS[model], *bias, *STANDING)


def weights(run: Run) -> dict[str, torch.Tensor]:
    tensors = whole_tensors(run.checkpoint(1))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("optimizer")}


@pytest.mark.parametrize(
    ("model", "layout"),
    [*(("mixed", layout) for layout in LAYOUTS), ("swiglu", "tensor"), ("swiglu", "tensor pipeline")],
)
def test_initial_weights_do_not_depend_on_the_layout(
    run_distributed: RunDistributed,
    initial: dict[str, dict[str, torch.Tensor]],
    tmp_path: Path,
    model: str,
    layout: str,
) -> None:
    """The sharded names too: saving checks that each part of a tensor is written once."""
    found = weights(train(run_distributed, tmp_path, initial_recipe(model), layout))
    expected = initial[model]
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-25, msg=name)


def test_initial_weights_are_those_of_the_recipe(initial: dict[str, dict[str, torch.Tensor]]) -> None:
    config, _ = prepare(SWIGLU)
    tensors = initial["swiglu"]
    assert sum(tensor.numel() for tensor in tensors.values()) == flops.parameters(config.model, 65)
    spread = {name: tensor.std().item() for name, tensor in tensors.items()}
    n, ffn, layers = 64, 96, 4
    expected = {
        "embedding.word_embeddings.weight": (0.4 / n) ** 0.5,
        "decoder.layers.attention.linear_qkv.weight": (0.4 / n) ** 0.5,
        "decoder.layers.attention.linear_proj.weight": (0.4 / n) ** 0.5,
        "decoder.layers.mlp.linear_fc1.weight": (0.4 / n) ** 0.5,
        "decoder.layers.mlp.linear_fc2.weight": ffn**-0.5 / layers,
        "output_layer.weight": (0.4 / n) ** 0.5,
    }
    assert {name: spread[name] for name in expected} == pytest.approx(expected, rel=0.02)
    first, second = tensors["decoder.layers.attention.linear_qkv.weight"][:2]
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.05


def test_initial_weights_follow_the_seed(
    run_distributed: RunDistributed, initial: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    other = weights(train(run_distributed, tmp_path, (*initial_recipe("mixed"), "seed=2")))
    same = {name for name, tensor in initial["mixed"].items() if torch.allclose(other[name], tensor)}
    assert same == {name for name in other if "norm" in name or name.endswith("score_bias")}


def test_learned_bias_starts_at_minus_log_n(initial: dict[str, dict[str, torch.Tensor]]) -> None:
    bias = initial["mixed"]["decoder.layers.attention.core.score_bias"]
    torch.testing.assert_close(bias, torch.full((4, 4), -torch.tensor(64.0).log().item()))


def nothing(_: Any) -> None:
    """Comes between two steps."""


def disturb(engine: Any) -> None:
    """What a step must not see of what came before it."""
    engine.evaluate([batch_of(engine, 9)])
    (network,) = engine.networks
    assert not any(module.training for module in network.modules())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)


def rank_has_no_tokens(rank: int, world_size: int) -> None:
    with an_engine(ENGINE) as engine:
        engine.train_step([batch_of(engine, 1)])
        before = [p.detach().clone() for p in engine.networks[0].parameters()]
        batch = batch_of(engine, 2)
        batch["weights"] = torch.zeros_like(batch["weights"])
        result = engine.train_step([batch])
        assert (result.tokens, result.updated, math.isnan(result.loss)) == (0, False, True)
        assert all(map(torch.equal, engine.networks[0].parameters(), before))
        trouble = engine.health.after(result)
        assert trouble.what.startswith("no token has a weight above 0; no update")
        assert math.isnan(trouble.values["loss"])
        assert engine.health.statistics.count == 0
        loss, tokens = engine.evaluate([batch])
        assert math.isnan(loss)
        assert tokens == 0


def rank_has_z_loss(rank: int, world_size: int, fused: str) -> None:
    """It is trained on, and is no part of the validation loss."""
    with an_engine([*ENGINE, f"train.fused={fused}"]) as engine:
        (network,) = engine.networks
        batch = batch_of(engine, 1)
        loss, tokens = engine.evaluate([batch])
        network.loss = replace(network.loss, z_loss=1.0)
        assert engine.evaluate([batch]) == (loss, tokens)
        assert engine.train_step([batch]).loss > loss + 1


@pytest.mark.parametrize("fused", ["[]", "[loss]"])
def test_validation_is_without_z_loss(run_distributed: RunDistributed, fused: str) -> None:
    run_distributed(1, rank_has_z_loss, fused)


def test_a_step_without_weighted_tokens(run_distributed: RunDistributed) -> None:
    run_distributed(1, rank_has_no_tokens)


def rank_validates(rank: int, world_size: int) -> None:
    """A domain whose held-out sequences have no weighted token has no loss, instead of a perfect one."""
    from types import SimpleNamespace

    from sinkbench.trainer import Trainer

    logged: dict[str, float] = {}
    warned: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sinkbench.trainer").addHandler(handler)
    trainer: Any = SimpleNamespace(
        source=SimpleNamespace(domains=["code", "chat"]),
        engine=SimpleNamespace(evaluate={"code": (2.0, 10), "chat": (math.nan, 0)}.__getitem__),
        layout=SimpleNamespace(is_main=True),
        _held_out=lambda domain: domain,
        _log=lambda step, event, values: logged.update(values),
    )
    Trainer._validate(trainer, 1)
    assert logged == {"loss": 2.0, "loss/code": 2.0}
    assert warned == ["validation: no token held out of chat has a weight above 0"]


def test_validation_of_a_domain_without_weighted_tokens(run_distributed: RunDistributed) -> None:
    run_distributed(1, rank_validates)


def norms(between: Callable[[Any], None]) -> list[float]:
    found = []
    with an_engine([*ENGINE, "model.megatron={hidden_dropout: 0.1}"]) as engine:
        for number in range(3):
            between(engine)
            found.append(engine.train_step([batch_of(engine, number)]).grad_norm)
            assert all(module.training for module in engine.networks[0].modules())
    return found


def rank_orders(rank: int, world_size: int) -> None:
    order = []
    with an_engine(ENGINE) as engine, pytest.MonkeyPatch.context() as patch:
        for owner, name in ((engine._numbers, "send"), (engine.optimizer, "step_with_ready_grads")):
            usual = getattr(owner, name)

            def noted(*arguments: Any, usual: Any = usual, name: str = name) -> Any:
                order.append(name)
                return usual(*arguments)

            patch.setattr(owner, name, noted)
        engine.train_step([batch_of(engine, 0)])
    assert order == ["send", "step_with_ready_grads"]


def test_numbers_are_on_their_way_before_the_update(run_distributed: RunDistributed) -> None:
    run_distributed(1, rank_orders)


def rank_is_disturbed(rank: int, world_size: int) -> None:
    assert norms(disturb) == norms(nothing)


def test_a_step_begins_alike_after_anything(run_distributed: RunDistributed) -> None:
    run_distributed(1, rank_is_disturbed)
