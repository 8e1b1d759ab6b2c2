"""Measures a run of ours at one of its checkpoints, in one process whatever layout trained it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sinkbench import plugins, recipe
from sinkbench.checkpoint import (
    INFO,
    Checkpoint,
    CheckpointStore,
    open_checkpoint,
    refuse_absent,
    verify_files,
)
from sinkbench.config import Config, ParallelConfig
from sinkbench.data.run_tokenizer import find_kept, find_tokenizer
from sinkbench.data.source import Arrays, open_source
from sinkbench.data.tokenizer import Tokenizer
from sinkbench.errors import CheckpointError, DataError
from sinkbench.measure.inputs import (
    Encode,
    Inputs,
    from_prompts,
    random_tokens,
    repeated_tokens,
    usable_tokens,
)
from sinkbench.measure.observations import merged
from sinkbench.measure.probe import Probe
from sinkbench.measure.results import Result
from sinkbench.measure.run_forwards import RunForwards
from sinkbench.measure.settings import Settings
from sinkbench.model import build_stages, declare
from sinkbench.plugins import build


def find_checkpoint(target: Path, step: int | None) -> Checkpoint:
    """The checkpoint that a target names: itself, or a run's of a step (default: its newest good one, where
    damaged ones after it are reported in a line each). All of its files are as they were written.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    refuse_absent(target)
    store = CheckpointStore(target / "checkpoints")
    if (target / INFO).exists() or target.name.startswith("step_"):
        found = open_checkpoint(target)
    elif step is not None:
        found = store.open(step)
    else:
        newest = store.newest_good()
        if newest is None:
            remedy = "train it first, or name another folder"
            raise CheckpointError(str(target), "it holds no checkpoint", remedy)
        return newest
    verify_files(found)
    return found


def measure_run(target: str, checkpoint: Checkpoint, inputs: Inputs, settings: Settings) -> Result:
    """Runs metrics on a checkpoint.

    Args:
        target: a run's folder or a checkpoint's, as the user wrote it.
        inputs: natural takes held-out sequences of the run's own data, or prompts of the settings.
        settings: what they leave open is as in the recipe.

    Raises:
        CheckpointError, RecipeError, PluginError, DataError: as the parts say.
    """
    if settings.bos:
        remedy = "leave it out: a run is trained without one"
        raise DataError(f"{target}: --bos", "is for open models", remedy)
    config = _for_one_process(checkpoint.recipe, settings)
    resolved = plugins.resolve(config, plugins.discover(), provided={plugins.FORWARD_PASSES})
    vocab_size, sequences = _inputs(config, checkpoint.folder, inputs, settings)
    declared = declare(config, resolved, vocab_size)
    from sinkbench.megatron import parallel

    with parallel.running(config) as layout:
        from sinkbench.megatron import state
        from sinkbench.megatron.single import SingleModel

        networks = build_stages(config, declared, layout)
        state.load_weights(networks, checkpoint.folder)
        metrics: dict[str, Any] = {c.plugin.name: build(c, declared.context) for c in resolved.metrics}
        observing = {name: metric for name, metric in metrics.items() if hasattr(metric, "observe")}
        probe = Probe(observing, sequences, SingleModel(networks, layout), declared.transforms)
        found = probe.by_metric() if observing else {}
        prefix = declared.loss.bidirectional_prefix
        forwards = RunForwards(networks[0], probe.tokens_bs, declared.context.vocab_size, prefix)
        for name, metric in metrics.items():
            if hasattr(metric, "measure"):
                found[name] = found.get(name, {}) | metric.measure(forwards)
    return Result(
        target=target,
        inputs=inputs,
        length=sequences["tokens"].shape[1],
        count=len(sequences["tokens"]),
        bos=False,
        step=checkpoint.step,
        texts=settings.prompts.name if settings.prompts is not None and inputs == "natural" else None,
        seed=settings.seed,
        metrics=merged(found),
    )


def _inputs(config: Config, checkpoint: Path, inputs: Inputs, settings: Settings) -> tuple[int, Arrays]:
    """The size of the vocabulary of the run's data, and the probe sequences. The data are needed for held-out
    sequences alone: for others the tokenizer is enough that the run keeps."""
    length, count = config.measure.length, config.measure.count
    if inputs == "natural" and settings.prompts is None:
        source = open_source(config)
        return source.vocab_size, source.probe(count, length)
    tokenizer = find_kept(checkpoint)
    vocab_size = tokenizer.vocab_size if tokenizer else open_source(_without_probes(config)).vocab_size
    if inputs == "natural" and settings.prompts is not None:
        encode = _encoder(tokenizer or find_tokenizer(config, checkpoint))
        tokens = from_prompts(settings.prompts, encode, length=length, count=settings.count)
        return vocab_size, {"tokens": tokens}
    draw = random_tokens if inputs == "random" else repeated_tokens
    usable = usable_tokens(vocab_size, tokenizer.special_ids if tokenizer else ())
    return vocab_size, {"tokens": draw(usable, length=length, count=count, seed=settings.seed)}


def _encoder(tokenizer: Tokenizer | None) -> Encode:
    if tokenizer is None:
        remedy = "leave it out: the run is measured on its own held-out data"
        raise DataError("--prompts", "the run's data are no text", remedy)
    return lambda text: tokenizer.encode([text])[0].tolist()


def _without_probes(config: Config) -> Config:
    """Of its own data a run may have held out too little, or nothing."""
    silent = {
        name: getattr(config, name).model_copy(update={"every": 0}) for name in ("measure", "validation")
    }
    return config.model_copy(update=silent)


def _for_one_process(path: Path, settings: Settings) -> Config:
    overrides = ["measure.every=1"]
    overrides += [f"measure.length={settings.length}"] if settings.length is not None else []
    overrides += [f"measure.count={settings.count}"] if settings.count is not None else []
    overrides += [f"measure.metrics=[{', '.join(settings.metrics)}]"] if settings.metrics else []
    config = recipe.to_config(recipe.load(path, overrides))
    forward = {"device": settings.device, "recompute": "none", "cuda_graph": False}
    train = config.train.model_copy(update=forward)
    here = {"parallel": ParallelConfig(), "train": train, "model": config.model.portable()}
    return config.model_copy(update=here)
