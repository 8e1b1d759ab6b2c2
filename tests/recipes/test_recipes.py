"""Every shipped recipe at the size of the budget cpu_minute: all its runs train; one resumes, is measured."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sinkbench import plugins, recipe
from sinkbench.config import PrepareConfig, TokenizerConfig
from sinkbench.data.prepare import prepare_cached
from sinkbench.recipe import Recipe
from sinkbench.testing import RunDistributed
from tests.recipes.shipped import NAMES, load

STEPS = 3
CORES = 2
INPUTS = ["python:help"]
VOCABULARY = 600


def shrink(run: Recipe, folder: Path, cache: Path) -> Recipe:
    """Three steps of a run on little data."""
    values = run.values
    values["output_dir"] = str(folder)
    values["model"] |= {"num_layers": 2, "hidden_size": 64, "seq_length": 32}
    if values["data"]["source"] == "indexed":
        prepare = {"inputs": INPUTS, "tokenizer": {"train_vocab_size": VOCABULARY}}
        values["data"]["prepare"] = {**prepare, "holdout": 0.1, "cache": str(cache)}
    values["optim"]["warmup_steps"] = 1
    values["train"] |= {"steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2}
    values["validation"] = {"every": STEPS, "sequences": 3}
    values["checkpoint"] = {"every": 1, "keep_last": STEPS}
    values["measure"] |= {"every": STEPS, "count": 5, "length": 16}
    values["log"] = {"every": 1, "progress": False}
    return run


def rank_runs(rank: int, world_size: int, name: str, folder: Path, cache: Path) -> dict[str, Any]:
    """Summaries of the recipe's runs by label, that of a resumed run, and what measuring it finds."""
    from sinkbench.measure.runs import find_checkpoint, measure_run
    from sinkbench.measure.settings import Settings
    from sinkbench.run_folder import folder_of
    from sinkbench.trainer import train

    index = plugins.discover()
    summaries: dict[str, Any] = {}
    for run in recipe.expand(load(name)):
        config = recipe.to_config(shrink(run, folder, cache))
        resolved = plugins.resolve(config, index, run.provenance)
        summaries[config.label or ""] = train(config, resolved)
    where = folder_of(config)
    shutil.rmtree(where / "checkpoints" / f"step_{STEPS}")
    resumed = train(config, resolved)
    found = find_checkpoint(where, None)
    measured = measure_run(str(where), found, "natural", Settings(device="cpu"))
    return {"runs": summaries, "resumed": resumed, "measured": measured.metrics, "step": found.step}


@pytest.fixture(scope="module")
def results(
    run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Any]]]:
    """What ``rank_runs`` found by recipe, a recipe on each core at a time."""
    folder = tmp_path_factory.mktemp("recipes")
    cache = folder / "cache"
    config = PrepareConfig(
        inputs=INPUTS, tokenizer=TokenizerConfig(train_vocab_size=VOCABULARY), holdout=0.1, cache=str(cache)
    )
    prepare_cached(config, progress=False)
    with ThreadPoolExecutor(CORES) as pool:

        def start(number: int, name: str) -> Future[Any]:
            return pool.submit(run_distributed, 1, rank_runs, name, folder / str(number), cache)

        yield {name: start(number, name) for number, name in enumerate(NAMES)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_recipe(results: dict[str, Future[Any]], name: str) -> None:
    [found] = results[name].result()
    labels = [run.values.get("label", "") for run in recipe.expand(load(name))]
    assert list(found["runs"]) == labels
    for summary in found["runs"].values():
        assert summary["step"] == STEPS
        assert math.isfinite(summary["loss"])
        assert 0 <= summary["sink_1_raw"] <= 100
    last = found["runs"][labels[-1]]
    same = [key for key in last if key not in ("tokens_per_second", "mfu")]
    assert {key: found["resumed"][key] for key in same} == {key: last[key] for key in same}
    assert found["step"] == STEPS
    assert found["measured"]["sink_1_raw"] == last["sink_1_raw"]
