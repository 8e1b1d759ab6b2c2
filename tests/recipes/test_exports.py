"""Every run of every shipped recipe at the size of the budget cpu_minute: to Hugging Face and back."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from sinkbench import recipe
from sinkbench.config import Config
from sinkbench.data.python_text import reference_documents
from sinkbench.data.tokenizer import train_sentencepiece
from sinkbench.recipe import Recipe
from sinkbench.testing import RunDistributed
from tests.distributed.export_runs import (
    VOCABULARY,
    Exported,
    How,
    assert_comes_back,
    assert_computes_the_same,
    assert_layout_does_not_matter,
    assert_same_metrics,
    export_and_check,
)
from tests.recipes.shipped import NAMES, load

pytest.importorskip("transformers")
pytestmark = pytest.mark.timeout(3600)  # the first test of a set exports and checks all of it

SIZES = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
UNSEEN = ("init", "init_std", "backend")
"""What an export knows nothing of, in the recipe's section on the model."""
CAUSAL = ("causal_lm", "response_lm")
"""Losses that leave attention as it is."""


def shrink(run: Recipe) -> Config:
    """Two small layers. Neither the data nor the training is ever seen by an export."""
    values = run.values
    values["model"] |= {"num_layers": 2, "hidden_size": 64, "seq_length": 48}
    if values["data"]["source"] == "indexed":
        kept = {key: values["data"][key] for key in ("transforms",) if key in values["data"]}
        values["data"] = {"source": "indexed", "train": "unread", **kept}
    values["optim"]["warmup_steps"] = 0
    values["train"] |= {"steps": 1, "global_batch_size": 4, "micro_batch_size": None}
    values["measure"] = {"every": 0}
    values["validation"] = {"every": 0}
    values["log"] = {"progress": False}
    return recipe.to_config(run)


def architecture(config: Config) -> str:
    """Equal for runs whose exports differ in nothing but sizes and weights."""
    model = {
        key: value
        for key, value in config.model.model_dump(mode="json").items()
        if key not in (*UNSEEN, *SIZES)
    }
    loss = None if config.loss.name in CAUSAL else config.loss.model_dump(mode="json")
    return json.dumps([model, loss], sort_keys=True)


def stem(recipe_name: str) -> str:
    return recipe_name.removesuffix(".yaml").replace("/", "_")


def runs() -> dict[str, Config]:
    """By recipe and label, as a name of a Python package may be."""
    found = {}
    for recipe_name in NAMES:
        for run in recipe.expand(load(recipe_name)):
            label = run.values.get("label") or "run"
            found[f"{stem(recipe_name)}-{label}".replace(".", "_")] = shrink(run)
    return found


RUNS = runs()


def quick() -> set[str]:
    """Of each folder of recipes the last run whose architecture no folder before has had; the others are
    checked by the full tests."""
    seen: set[str] = set()
    chosen = set()
    for _, names in itertools.groupby(NAMES, lambda name: str(Path(name).parent)):
        stems = tuple(f"{stem(name)}-" for name in names)
        new = [name for name in RUNS if name.startswith(stems) and architecture(RUNS[name]) not in seen]
        if new:
            chosen.add(new[-1])
            seen |= {architecture(RUNS[name]) for name in new}
    return chosen


QUICK = quick()
EACH = [pytest.param(name, marks=() if name in QUICK else pytest.mark.full, id=name) for name in RUNS]

Get = Callable[[str], Exported]


@pytest.fixture(scope="module")
def exported(run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Get]:
    """``exported(name)``: all quick runs are made together, and so are the others."""
    root = tmp_path_factory.mktemp("exports")
    tokenizer = root / "tokenizer.model"
    texts = (text for _, text in reference_documents())
    train_sentencepiece(itertools.islice(texts, 100), VOCABULARY, tokenizer)
    how = How(tokenizer=tokenizer)
    kept: dict[bool, Future[dict[str, Exported]]] = {}
    with ThreadPoolExecutor(1) as pool:

        def exported(name: str) -> Exported:
            is_quick = name in QUICK
            if is_quick not in kept:
                chosen = {other: config for other, config in RUNS.items() if (other in QUICK) == is_quick}
                folder = root / ("quick" if is_quick else "others")
                kept[is_quick] = pool.submit(export_and_check, run_distributed, chosen, folder, how)
            return kept[is_quick].result()[name]

        yield exported


@pytest.mark.parametrize("name", EACH)
def test_export_computes_the_same(name: str, exported: Get) -> None:
    one = exported(name)
    assert one.found["class"] == expected_class(RUNS[name])
    assert (one.found["sdpa"] is not None) == is_softmax(RUNS[name])
    assert_computes_the_same(one)


def is_softmax(config: Config) -> bool:
    """Whether torch's fused kernels compute the attention."""
    return config.model.attention.name in ("softmax", "softmax_off_by_one")


def expected_class(config: Config) -> str:
    model, options = config.model, config.model.attention.params.keys()
    llama = (
        model.attention.name == "softmax"
        and options <= {"window"}
        and (model.ffn, model.positional.name, model.normalization.name) == ("swiglu", "rope", "rmsnorm")
        and "location" not in model.normalization.params
        and config.loss.name in CAUSAL
    )
    if not llama:
        return "SinkbenchForCausalLM"
    return "MistralForCausalLM" if "window" in options else "LlamaForCausalLM"


@pytest.mark.parametrize("name", EACH)
def test_sink_of_the_export_is_that_of_the_run(name: str, exported: Get) -> None:
    one = exported(name)
    assert_same_metrics(one.of_export, one.of_run)


@pytest.mark.parametrize("name", EACH)
def test_back_to_a_checkpoint_is_bitwise(name: str, exported: Get, tmp_path: Path) -> None:
    assert_comes_back(exported(name), tmp_path / "back")


@pytest.mark.parametrize("name", EACH)
def test_layout_of_the_checkpoint_does_not_matter(name: str, exported: Get) -> None:
    assert_layout_does_not_matter(exported(name))
