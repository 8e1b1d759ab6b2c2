"""A run on text, exported: its card, its tokenizer, its data type, its shards, its sink."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkbench import recipe
from sinkbench.data.tokenizer import load_tokenizer
from sinkbench.errors import DataError
from sinkbench.export import from_hf, to_hf
from sinkbench.export.model_files import ModelFiles
from sinkbench.testing import RunDistributed
from tests.distributed.export_runs import assert_same_metrics
from tests.distributed.runs import Run
from tests.distributed.text_run import STEPS

pytest.importorskip("transformers")

CODE = Path(__file__).read_text(encoding="utf-8")
MIXED = [
    "def f(x):\n    return  x + 1234\n\n\n",
    "\tTabs,  two spaces , and Grüße \u4f60\u597d \U0001f600\U0001f469\u200d\U0001f680\r\n",
    " leading and trailing ",
    "a\u0301 e\u0301 \u00e9 \ufb01 \u2460 \u3000 \u00a0|",
    "\u2581 is what SentencePiece writes for a space",
    "0123456789 3.14159 1e-5 <0x0A> [MASK] {} \\n",
    "",
    CODE,
]


def test_the_card_holds_recipe_data_loss_and_sink(text_run: Run, text_export: Path) -> None:
    card = (text_export / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# short\n" in card
    assert "trust_remote_code=True" in card
    assert "| attention | sigmoid (normalize: False) |" in card
    assert "| data | data |" in card
    assert f"{STEPS} steps of 4 sequences" in card
    for event, key, name in (
        ("train", "loss", "train loss"),
        ("validation", "loss", "validation loss"),
        ("probe", "sink_1_raw", "sink_1_raw"),
        ("probe", "sink_1_proxy", "sink_1_proxy"),
    ):
        assert f"| {name} | {text_run.series(event, key)[STEPS]:.4g} |" in card
    written = recipe.to_config(recipe.load(text_export / "recipe.yaml"))
    assert written == recipe.to_config(recipe.load(text_run.folder / "recipe.yaml"))


def test_the_tokenizer_is_that_of_the_run(text_run: Run, text_export: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    ours = load_tokenizer(text_run.folder / "tokenizer")
    theirs = PreTrainedTokenizerFast.from_pretrained(text_export)
    for text, ids in zip(MIXED, ours.encode(MIXED), strict=True):
        assert theirs.encode(text, add_special_tokens=False) == ids.tolist(), text
        assert theirs.decode(ids.tolist()) == ours.decode(ids.tolist()), text
    assert theirs.eos_token_id == ours.eos_id
    assert len(theirs) == ours.vocab_size
    assert json.loads((text_export / "config.json").read_text())["eos_token_id"] == ours.eos_id


@pytest.fixture
def no_data(text_run: Run) -> Iterator[None]:
    """The prepared data is gone."""
    data = text_run.folder.parents[1] / "data"
    data.rename(data.with_name("elsewhere"))
    yield
    data.with_name("elsewhere").rename(data)


@pytest.mark.usefixtures("no_data")
def test_a_run_keeps_its_tokenizer(text_run: Run, text_export: Path, tmp_path: Path) -> None:
    to_hf.convert(text_run.folder, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (text_export / "tokenizer.json").read_bytes()


@pytest.mark.usefixtures("no_data")
def test_a_checkpoint_alone_needs_a_tokenizer(text_run: Run, text_export: Path, tmp_path: Path) -> None:
    alone = tmp_path / "somewhere" / "step"
    shutil.copytree(text_run.checkpoint(STEPS), alone)
    with pytest.raises(DataError) as caught:
        to_hf.convert(alone, tmp_path / "out")
    assert str(caught.value).startswith("tokenizer: the tokenizer of the run's data is gone (")
    assert str(caught.value).endswith("; put it back, or export with --tokenizer FILE")
    assert not (tmp_path / "out").exists()
    to_hf.convert(alone, tmp_path / "out", tokenizer=text_run.folder / "tokenizer" / "tokenizer.model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (text_export / name).read_bytes()


def test_a_tokenizer_larger_than_the_model_is_refused(text_run: Run, tmp_path: Path) -> None:
    from sinkbench.data.tokenizer import train_sentencepiece

    large = tmp_path / "large.model"
    train_sentencepiece([CODE], 500, large)
    with pytest.raises(DataError, match="has 500 tokens, the model has 448; give the tokenizer of the run's"):
        to_hf.convert(text_run.folder, tmp_path / "out", tokenizer=large)


def test_a_converted_checkpoint_carries_the_tokenizer(text_export: Path, tmp_path: Path) -> None:
    from_hf.convert(str(text_export), tmp_path / "back")
    to_hf.convert(tmp_path / "back", tmp_path / "again")
    for name in ("tokenizer.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (text_export / name).read_bytes()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_another_data_type_is_a_cast(
    text_run: Run, text_export: Path, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    to_hf.convert(text_run.folder, tmp_path / "out", dtype=name)
    exact, cast = ModelFiles(text_export), ModelFiles(tmp_path / "out")
    assert exact.names == cast.names
    assert all(torch.equal(exact.read(n).to(dtype), cast.read(n)) for n in exact.names)
    assert cast.config == exact.config | {"torch_dtype": str(dtype).removeprefix("torch.")}


def test_shards_hold_what_one_file_holds(text_run: Run, text_export: Path, tmp_path: Path) -> None:
    limit = 40_000
    to_hf.convert(text_run.folder, tmp_path / "out", shard_bytes=limit)
    whole, split = ModelFiles(text_export), ModelFiles(tmp_path / "out")
    assert set(whole.names) == set(split.names)
    assert all(torch.equal(whole.read(name), split.read(name)) for name in whole.names)
    shards = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(shards) > 3
    largest = max(whole.read(name).nbytes for name in whole.names)
    assert all(path.stat().st_size < max(limit, largest) + 10_000 for path in shards)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(whole.read(name).nbytes for name in whole.names)


def rank_measures(rank: int, world_size: int, arguments: list[str], out: Path) -> list[dict[str, Any]]:
    """The metrics of each target of ``sinkbench measure``."""
    os.environ |= {"HF_HOME": str(out.with_name("hub")), "HF_HUB_OFFLINE": "1"}
    from sinkbench.cli import main

    options = ["--allow-code", "--length", "16", "--count", "5", "--json", str(out), "--cache", f"{out}.d"]
    assert main(["measure", *arguments, *options]) == 0
    return [result["metrics"] for result in json.loads(out.read_text())["results"]]


def test_the_export_has_the_sink_of_the_run(
    run_distributed: RunDistributed, text_run: Run, text_export: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(line for line in CODE.splitlines() if len(line) > 60))
    metrics = ["--metrics", "{name: sink, eps: [0.08, 0.5]}", "norms"]
    arguments = [str(text_run.folder), str(text_export), "--prompts", str(prompts), *metrics]
    ((of_run, of_export),) = run_distributed(1, rank_measures, arguments, tmp_path / "found.json")
    assert_same_metrics(of_export, of_run)
    arguments = [*arguments[1:], "--attention", "streaming"]
    ((streamed,),) = run_distributed(1, rank_measures, arguments, tmp_path / "streamed.json")
    assert_same_metrics(streamed, of_run)


@pytest.mark.usefixtures("no_data")
def test_the_export_has_the_sink_of_the_run_on_random_tokens(
    run_distributed: RunDistributed, text_run: Run, text_export: Path, tmp_path: Path
) -> None:
    """No special token is among them, and the run's data are not asked for."""
    arguments = [str(text_run.folder), str(text_export), "--inputs", "random", "repeat"]
    arguments += ["--metrics", "{name: sink, eps: [0.08, 0.5]}"]
    ((*of_run, one, other),) = run_distributed(1, rank_measures, arguments, tmp_path / "found.json")
    for export, run in zip((one, other), of_run, strict=True):
        assert_same_metrics(export, run)


def test_what_queries_see_of_an_export_is_restricted(
    run_distributed: RunDistributed, text_export: Path, tmp_path: Path
) -> None:
    windowed = tmp_path / "windowed"
    shutil.copytree(text_export, windowed)
    config = json.loads((windowed / "config.json").read_text())
    config["plugins"]["attention"]["params"]["window"] = 6
    (windowed / "config.json").write_text(json.dumps(config))
    metric = "{name: streaming_perplexity, cache: 6, first: 1}"
    arguments = [str(text_export), str(windowed), "--inputs", "random", "--metrics", metric]
    ((whole, window),) = run_distributed(1, rank_measures, arguments, tmp_path / "found.json")
    assert whole["perplexity_window"] == pytest.approx(window["perplexity_full"], rel=1e-5)
    assert whole["perplexity_window"] != pytest.approx(whole["perplexity_full"], rel=1e-5)
