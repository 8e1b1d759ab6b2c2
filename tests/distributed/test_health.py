"""Losses and gradients that are not finite, and losses that jump: skipped alike everywhere, then named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sinkbench.config import TrainConfig
from sinkbench.errors import DivergedError
from sinkbench.health import MEMORY, Health
from sinkbench.testing import RunDistributed
from tests.distributed.runs import LAYOUTS, SWIGLU, Run, prepare

if TYPE_CHECKING:
    from sinkbench.megatron.training import StepResult

RECIPE = (*SWIGLU, "measure.every=0", "validation.every=0")
BAD_STEPS = (8, 9)
ROW = 1
"""Of the first micro-batch of the first data-parallel rank."""


def poisoned(layer_number: int, bad_steps: Sequence[int], *, backward: bool) -> Any:
    """Engine.train_step, but the feed-forward block of a layer gives, or is given back, a number that is not
    finite for one sequence in some steps, and in forward passes until the next step."""
    from sinkbench.megatron.training import Engine

    original, step = Engine.train_step, 0
    hooked: list[Any] = []

    def bad(engine: Any) -> bool:
        return step in bad_steps and engine.layout.data_rank == 0

    def spoil(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, ROW] = torch.inf
        return x

    def hook(self: Any) -> Any:
        def forward(module: Any, inputs: Any, output: Any) -> Any:
            hidden, bias = output
            if bad(self) and not backward:
                return spoil(hidden), bias
            if backward and hidden.requires_grad:
                hidden.register_hook(lambda gradient: spoil(gradient) if bad(self) else gradient)
            return hidden, bias

        return forward

    def train_step(self: Any, micro_batches: Any, **arguments: Any) -> StepResult:
        nonlocal step
        step += 1
        if not hooked:
            layers = [layer for stage in self.networks for layer in stage.decoder.layers]
            hooked.extend(
                layer.mlp.register_forward_hook(hook(self))
                for layer in layers
                if layer.layer_number == layer_number
            )
            hooked.append(None)
        before = _copy(self)
        result = original(self, micro_batches, **arguments)
        same = all(torch.equal(a, b) for a, b in zip(before, _copy(self), strict=True))
        assert same is not result.updated, f"step {step}"
        assert result.updated is (step not in bad_steps), f"step {step}"
        return result

    return train_step


def _copy(engine: Any) -> list[torch.Tensor]:
    """Parameters and optimizer state of this rank."""
    parameters = [p.detach().clone() for stage in engine.networks for p in stage.parameters()]
    states = [
        value.clone()
        for part in engine.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for value in state.values()
    ]
    return parameters + (states if states else [])


def rank_meets_trouble(
    rank: int, world_size: int, arguments: Sequence[str], layer: int, backward: bool
) -> str:
    """What the run ends with; "" if it comes to its end."""
    from sinkbench.megatron.training import Engine
    from sinkbench.trainer import train

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_step", poisoned(layer, BAD_STEPS, backward=backward))
        try:
            train(*prepare(arguments))
        except DivergedError as error:
            return str(error)
    return ""


LAYOUT_MARKS = [
    pytest.param("pipeline"),
    pytest.param("", marks=pytest.mark.full),
    pytest.param("data", marks=pytest.mark.full),
    pytest.param("context", marks=pytest.mark.full),
    pytest.param("sequence", marks=pytest.mark.full),
    pytest.param("interleaved", marks=pytest.mark.full),
    pytest.param("tensor pipeline", marks=pytest.mark.full),
]


def call(
    run_distributed: RunDistributed, folder: Path, layout: str, *more: str, backward: bool = False
) -> list[str]:
    processes, overrides = LAYOUTS[layout] if layout else (1, ())
    arguments = [*RECIPE, *overrides, *more, f"output_dir={folder}"]
    said: list[str] = run_distributed(processes, rank_meets_trouble, arguments, 3, backward)
    return said


@pytest.mark.parametrize("layout", LAYOUT_MARKS)
def test_steps_are_skipped_then_training_goes_on(
    run_distributed: RunDistributed, tmp_path: Path, layout: str
) -> None:
    assert set(call(run_distributed, tmp_path, layout)) == {""}
    run = Run(tmp_path / "short")
    assert run.series("skipped", "loss") == dict.fromkeys(BAD_STEPS)
    losses = run.series("train", "loss")
    assert sorted(losses) == [step for step in range(1, 21) if step not in BAD_STEPS]
    assert losses[20] < losses[7]


FUSED = "train.fused=[loss,layer,optimizer]"


def test_the_fused_update_leaves_all_as_it_was_too(run_distributed: RunDistributed, tmp_path: Path) -> None:
    assert call(run_distributed, tmp_path, "", FUSED) == [""]
    assert Run(tmp_path / "short").series("skipped", "loss") == dict.fromkeys(BAD_STEPS)


@pytest.mark.full
@pytest.mark.parametrize("backward", [False, True])
def test_layers_with_compiled_parts_are_named_too(
    run_distributed: RunDistributed, tmp_path: Path, backward: bool
) -> None:
    overrides = (FUSED, "train.max_skipped_steps=1")
    (said,) = call(run_distributed, tmp_path, "", *overrides, backward=backward)
    assert f"first in {'the gradients of layer 3' if backward else 'layer 3 mlp'}, " in said


@pytest.mark.parametrize("layout", LAYOUT_MARKS)
@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.full)])
def test_too_many_end_the_run_and_name_layer_and_sequence(
    run_distributed: RunDistributed, tmp_path: Path, layout: str, backward: bool
) -> None:
    said = call(run_distributed, tmp_path, layout, "train.max_skipped_steps=1", backward=backward)
    assert len(set(said)) == 1
    if backward:
        assert said[0].startswith(
            "step 9: the gradient is not finite, for 2 steps running, first in the gradients of layer 3, "
        )
    else:
        assert said[0].startswith(
            "step 9: the loss is not finite, for 2 steps running, first in layer 3 mlp, with sequence 65 "
            "(sequence 65 of the task)"
        )
        assert said[0].endswith("; look at these sequences, lower optim.lr, or raise train.max_skipped_steps")
        assert not any(f" {other} (" in said[0] for other in (64, 66, 67))


def health(**values: Any) -> Health:
    return Health(TrainConfig(steps=1, global_batch_size=1, **values))


def result(loss: float, *, updated: bool = True) -> StepResult:
    from sinkbench.megatron import host

    host.prepare()
    from sinkbench.megatron.training import StepResult

    return StepResult(loss=loss, tokens=1, grad_norm=1.0, updated=updated, stop=False)


def warm(watched: Health, losses: int = MEMORY) -> None:
    for number in range(losses):
        assert watched.after(result(2.0 + 0.1 * (number % 2))) is None


def test_a_spike_is_logged_and_trained_on() -> None:
    watched = health()
    warm(watched)
    assert watched.acceptable(torch.tensor(4.0))
    trouble = watched.after(result(4.0))
    assert trouble is not None
    assert (trouble.event, trouble.stop) == ("spike", False)
    assert trouble.what == "the loss jumped to 4 (mean 2.05, deviation 0.05)"
    assert watched.after(result(2.1)) is None


def test_no_loss_is_a_spike_at_first() -> None:
    watched = health(on_spike="stop")
    warm(watched, MEMORY - 1)
    assert watched.acceptable(torch.tensor(1000.0))


def test_a_second_spike_is_one_too() -> None:
    watched = health()
    warm(watched)
    assert watched.after(result(1e6)) is not None
    assert watched.after(result(1e6)) is not None


@pytest.mark.parametrize(("policy", "stops"), [("skip", False), ("stop", True)])
def test_a_spike_is_skipped_or_stops(policy: str, stops: bool) -> None:
    watched = health(on_spike=policy)
    warm(watched)
    assert not watched.acceptable(torch.tensor(4.0))
    trouble = watched.after(result(4.0, updated=False))
    assert trouble is not None
    assert (trouble.event, trouble.stop) == ("skipped", stops)


def test_statistics_go_on_where_they_were() -> None:
    watched, resumed = health(), health()
    warm(watched)
    resumed.load_state_dict(watched.state_dict())
    assert resumed.statistics == watched.statistics
    assert resumed.after(result(4.0)) == watched.after(result(4.0))
