"""Models with random weights for many recipes: written under two layouts, exported, measured, and looked at
from a process that has transformers alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from sinkbench import plugins, recipe, recipe_yaml
from sinkbench.api import LayerCapture, Observation
from sinkbench.config import BigramBackcopyConfig, Config, MeasureConfig
from sinkbench.export import from_hf
from sinkbench.export.stored import LAYERS, StoredTensors
from sinkbench.testing import RunDistributed
from tests.distributed.exports import check_exports, disturb, logits_of, probe_tokens, save

if TYPE_CHECKING:
    from sinkbench.megatron.parallel import Layout

CORES = 2
MOST = 12
"""Models of a part."""
LIMIT_S = 600.0
VOCABULARY = 600
"""Of models with a tokenizer; not a multiple of 64, so that the tables are padded."""

METRICS = ("{name: sink, k: [1, 2], total: [3], eps: [0.1]}", "norms")
COUNT, LENGTH = 6, 16
"""Sequences that the sink is measured on, and their tokens."""

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class How:
    """Attributes:
    tokenizer: of models that are not of the synthetic task.
    shard_bytes: of the exports' files.
    """

    tokenizer: Path | None = None
    shard_bytes: int = 10**9


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A model that was written, exported, and looked at.

    Attributes:
        checkpoint: written by one process.
        export: of it.
        elsewhere: export of a checkpoint of the same weights that was written under another layout.
        found: what ``export_checks.py`` says of the export.
        of_export: metrics that ``sinkbench measure`` finds for the export.
        of_run: metrics of the model in training on the same tokens, under the other layout.
    """

    checkpoint: Path
    export: Path
    elsewhere: Path
    found: dict[str, Any]
    of_export: dict[str, Any]
    of_run: dict[str, Any]


def export_and_check(
    run_distributed: RunDistributed, configs: Mapping[str, Config], root: Path, how: How
) -> dict[str, Exported]:
    """Writes and exports a model with random weights for each recipe, by name, and looks at the exports from
    a process that has transformers alone. A part of them on each core at a time."""
    names = list(configs)
    count = CORES * -(-len(names) // (CORES * MOST))
    with ThreadPoolExecutor(CORES) as pool:
        futures = []
        for number in range(count):
            part = {name: configs[name] for name in names[number::count]}
            futures.append(pool.submit(_export_part, run_distributed, part, root / str(number), how))
        found: dict[str, Exported] = {}
        for future in futures:
            found |= future.result()
    return found


def _export_part(
    run_distributed: RunDistributed, configs: Mapping[str, Config], root: Path, how: How
) -> dict[str, Exported]:
    one, other = root / "one_process", root / "other_layout"
    run_distributed(1, rank_writes, configs, one, timeout=LIMIT_S)
    (opened,) = run_distributed(1, rank_exports, list(configs), one, how, root / "cache", timeout=LIMIT_S)
    tokens = {name: tokens for name, (tokens, _) in opened.items()}
    measured, *_ = run_distributed(4, rank_writes_again, configs, one, other, tokens, timeout=LIMIT_S)
    run_distributed(1, rank_converts, list(configs), other, how, timeout=LIMIT_S)
    found = check_exports([one / name / "model" / name for name in configs], root / "cache")
    return {
        name: Exported(
            checkpoint=one / name / "step_0",
            export=one / name / "model" / name,
            elsewhere=other / name / "model" / name,
            found=found[str(one / name / "model" / name)],
            of_export=opened[name][1],
            of_run=measured[name],
        )
        for name in configs
    }


def rank_writes(rank: int, world_size: int, configs: Mapping[str, Config], root: Path) -> None:
    """For each recipe a checkpoint ROOT/NAME/step_0 of random weights, and in expected.pt the logits
    [b, s, v] of ``probe_tokens`` and the layers' attention weights by the reference."""
    from sinkbench.measure.probe import Probe
    from sinkbench.megatron.single import SingleModel

    for name, config in configs.items():
        with _stages(config) as (stages, layout):
            disturb(stages[0])
            kept = Kept()
            Probe({"kept": kept}, {"tokens": probe_tokens().numpy()}, SingleModel(stages, layout)).run()
            slots = [layer["slot"] for layer in kept.layers if "slot" in layer]
            expected = {
                "tokens": probe_tokens(),
                "logits": logits_of(stages[0]),
                "attentions": [layer["weights"] for layer in kept.layers],
                "slots": slots or None,
            }
            save(config, stages, layout, root / name)
            torch.save(expected, root / name / "expected.pt")


class Kept:
    """A metric that keeps the attention weights of all layers."""

    def __init__(self) -> None:
        self.layers: list[Observation] = []

    def observe(self, capture: LayerCapture) -> Observation:
        slot = {} if capture.slot_bhq is None else {"slot": capture.slot_bhq}
        return {"weights": capture.weights_bhqk, **slot}

    def result(self, layers: Sequence[Observation]) -> dict[str, float | list[Any]]:
        self.layers = list(layers)
        return {}


def rank_exports(
    rank: int, world_size: int, names: Sequence[str], root: Path, how: How, cache: Path
) -> dict[str, tuple[Tokens, dict[str, Any]]]:
    """Exports each checkpoint to ROOT/NAME/model/NAME and measures the export. By name the random tokens
    [COUNT, LENGTH] and the metrics."""
    os.environ |= {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    rank_converts(rank, world_size, names, root, how)
    from sinkbench.measure.hf import measure_open_model
    from sinkbench.measure.hf_load import open_model
    from sinkbench.measure.hf_place import Trust, find_place
    from sinkbench.measure.inputs import random_tokens
    from sinkbench.measure.settings import Settings

    settings = Settings(inputs=("random",), length=LENGTH, count=COUNT, metrics=METRICS)
    trust = Trust(code=True)
    found = {}
    for name in names:
        place = find_place(str(root / name / "model" / name), trust)
        opened = open_model(place, device=torch.device("cpu"), dtype="float32", trust=trust)
        (result,) = measure_open_model(opened, settings.inputs, settings, lambda done, total: None)
        tokens = random_tokens(opened.usable_tokens(), length=LENGTH, count=COUNT, seed=0)
        found[name] = tokens, result.metrics
    return found


def rank_converts(rank: int, world_size: int, names: Sequence[str], root: Path, how: How) -> None:
    """Exports each checkpoint to ROOT/NAME/model/NAME: transformers caches source by the last name."""
    from sinkbench.export import to_hf

    for name in names:
        config = recipe.to_config(recipe.load(root / name / "step_0" / "recipe.yaml"))
        synthetic = isinstance(config.data, BigramBackcopyConfig)
        export = root / name / "model" / name
        to_hf.convert(
            root / name / "step_0",
            export,
            tokenizer=None if synthetic else how.tokenizer,
            shard_bytes=how.shard_bytes,
        )
        if (root / name / "expected.pt").exists():
            (root / name / "expected.pt").rename(export / "expected.pt")


def rank_writes_again(
    rank: int,
    world_size: int,
    configs: Mapping[str, Config],
    source: Path,
    target: Path,
    tokens: Mapping[str, Tokens],
) -> dict[str, dict[str, Any]]:
    """Writes each checkpoint again by four processes, TP = 2 where the heads divide and PP = 2, and measures
    the model of these. Metrics by name."""
    from sinkbench.measure.probe import Probe, build_metrics
    from sinkbench.megatron import state
    from sinkbench.model import build_context

    found = {}
    for name, config in configs.items():
        tensor = 1 if config.model.kv_heads % 2 else 2
        parallel = config.parallel.model_copy(update={"tensor": tensor, "pipeline": 2})
        split = config.model_copy(update={"parallel": parallel})
        with _stages(split) as (stages, layout):
            state.load_weights(stages, source / name / "step_0")
            engine = save(split, stages, layout, target / name)
            measured = _measuring(config)
            metrics = plugins.resolve_metrics(measured, plugins.discover())
            built = build_metrics(metrics, build_context(measured, VOCABULARY))
            found[name] = Probe(built, {"tokens": tokens[name]}, engine).run()
    return found


def _measuring(config: Config) -> Config:
    """The recipe with the metrics that are compared."""
    chosen = [recipe_yaml.parse(text, "METRICS")[0] for text in METRICS]
    measure = {"every": 1, "count": COUNT, "length": LENGTH, "metrics": chosen}
    return config.model_copy(update={"measure": MeasureConfig.model_validate(measure)})


@contextmanager
def _stages(config: Config) -> Iterator[tuple[list[Any], Layout]]:
    from sinkbench.megatron import parallel
    from sinkbench.model import build_stages, declare

    data = config.data
    vocabulary = data.vocab_size if isinstance(data, BigramBackcopyConfig) else VOCABULARY
    declared = declare(config, plugins.resolve(config, plugins.discover()), vocabulary)
    with parallel.running(config) as layout:
        yield build_stages(config, declared, layout), layout


def assert_same_metrics(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Every number of both, per layer and head too, within 1e-4."""
    assert found.keys() == expected.keys() >= {"sink_1_raw", "sink_1_proxy", "importance_raw"}
    for key, value in expected.items():

        def named(message: str, key: str = key) -> str:
            return f"{key}: {message}"

        pair = torch.tensor(found[key]), torch.tensor(value)
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4, equal_nan=True, msg=named)


def assert_computes_the_same(one: Exported) -> None:
    """Logits, attention weights, gradients and generated tokens, however it is loaded, cached and padded."""
    found = one.found
    assert found["scale"] > 0.1
    for key in ("logits", "padding", "cache", "checkpointing", "attentions"):
        assert found[key] < 1e-4, f"{key}: {found[key]}"
    assert found["slots"] is None or found["slots"] < 1e-4
    if found["sdpa"] is not None:
        assert found["sdpa"] < 1e-4
        assert found["sdpa_padding"] < 1e-4
    assert found["saved_again"] == 0
    assert found["generate"]
    assert found["loss"] < 1e-4


def assert_comes_back(one: Exported, folder: Path) -> None:
    """To a new folder, as the checkpoint that it is of, bit for bit."""
    from_hf.convert(str(one.export), folder)
    before, after = StoredTensors(one.checkpoint), StoredTensors(folder)
    assert before.tensors == after.tensors
    for tensor, stored in before.tensors.items():
        layers = range(stored.shape[0]) if tensor.startswith(LAYERS) else [None]
        assert all(torch.equal(before.read(tensor, i), after.read(tensor, i)) for i in layers), tensor


def assert_layout_does_not_matter(one: Exported) -> None:
    """The same files come of checkpoints that different processes wrote."""
    files, others = (sorted(folder.glob("*.safetensors")) for folder in (one.export, one.elsewhere))
    assert [path.name for path in files] == [path.name for path in others]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(files, others, strict=True))
