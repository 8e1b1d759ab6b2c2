"""Measures a run of ours at one of its checkpoints, in one process whatever layout trained it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sinkbench import plugins, recipe
from sinkbench.checkpoint import INFO, Checkpoint, CheckpointStore, open_checkpoint
from sinkbench.config import Config, ParallelConfig
from sinkbench.data.source import open_source
from sinkbench.errors import CheckpointError
from sinkbench.measure.probe import Probe
from sinkbench.measure.results import Result
from sinkbench.model import build_stages, declare


def find_checkpoint(target: Path, step: int | None) -> Checkpoint:
    """The checkpoint that a target names: itself, or a run's checkpoint of a step (default: its last).

    Raises:
        CheckpointError: there is none.
    """
    if not target.is_dir():
        raise CheckpointError(
            str(target), "there is no such folder", "give a run's folder or one of its checkpoints"
        )
    if (target / INFO).exists() or target.name.startswith("step_"):
        return open_checkpoint(target)
    store = CheckpointStore(target / "checkpoints")
    if step is not None:
        return store.open(step)
    latest = store.latest()
    if latest is None:
        raise CheckpointError(str(target), "it holds no checkpoint", "train it first, or name another folder")
    return latest


def measure_run(
    target: str,
    *,
    step: int | None,
    length: int | None,
    count: int | None,
    metrics: Sequence[str],
    device: str,
) -> Result:
    """Runs metrics on a checkpoint, on held-out sequences of the run's own data.

    Args:
        target: a run's folder or a checkpoint's.
        step: of the checkpoint; default: the last.
        length: tokens of a probe sequence; default: the recipe's measure.length.
        count: probe sequences; default: the recipe's measure.count.
        metrics: names of metric plugins; default: the recipe's measure.metrics.
        device: "auto", "cpu" or "cuda".

    Raises:
        CheckpointError, RecipeError, PluginError, DataError: as the parts say.
    """
    checkpoint = find_checkpoint(Path(target), step)
    config = _for_one_process(checkpoint.recipe, length, count, metrics, device)
    resolved = plugins.resolve(config, plugins.discover())
    source = open_source(config)
    declared = declare(config, resolved, source.vocab_size)
    from sinkbench.megatron import parallel

    with parallel.running(config) as layout:
        from sinkbench.megatron import state
        from sinkbench.megatron.single import SingleModel

        networks = build_stages(config, declared, layout)
        state.load_weights(networks, checkpoint.folder)
        built: dict[str, Any] = {
            c.plugin.name: c.plugin.build(c.params, declared.context) for c in resolved.metrics
        }
        sequences = source.probe(config.measure.count, config.measure.length)
        probe = Probe(built, sequences, SingleModel(networks, layout), declared.transforms)
        measured = probe.run()
    return Result(
        target=target,
        inputs="natural",
        length=config.measure.length,
        count=config.measure.count,
        bos=False,
        metrics=measured,
    )


def _for_one_process(
    path: Path, length: int | None, count: int | None, metrics: Sequence[str], device: str
) -> Config:
    overrides = ["measure.every=1"]
    overrides += [f"measure.length={length}"] if length is not None else []
    overrides += [f"measure.count={count}"] if count is not None else []
    overrides += [f"measure.metrics=[{', '.join(metrics)}]"] if metrics else []
    config = recipe.to_config(recipe.load(path, overrides))
    train = config.train.model_copy(update={"device": device, "recompute": "none"})
    return config.model_copy(update={"parallel": ParallelConfig(), "train": train})
