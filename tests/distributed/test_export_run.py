"""A run on text, exported: its card, its tokenizer, its data type, its shards; and what is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkbench import recipe
from sinkbench.config import TokenizerConfig
from sinkbench.data.documents import find_inputs
from sinkbench.data.prepare import Request, prepare
from sinkbench.data.tokenizer import load_tokenizer
from sinkbench.errors import DataError
from sinkbench.export import from_hf, to_hf
from sinkbench.export.model_files import ModelFiles
from sinkbench.export.safetensors_files import Entry, write_shards
from sinkbench.export.written import Weight, write_weights
from sinkbench.testing import RunDistributed
from tests.distributed.export_runs import assert_same_metrics
from tests.distributed.runs import SHORT, SWIGLU, Run, rank_trains

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
STEPS = 3


@pytest.fixture(scope="module")
def run(run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Sigmoid attention after three steps on this file."""
    root = tmp_path_factory.mktemp("run")
    corpus, data = root / "corpus", root / "data"
    corpus.mkdir()
    for number in range(12):
        (corpus / f"{number}.txt").write_text(f"{number}\n{CODE[number * 300 :]}", encoding="utf-8")
    prepare(
        Request(tuple(find_inputs([str(corpus)])), TokenizerConfig(train_vocab_size=400), holdout=0.3), data
    )
    overrides = [
        *SWIGLU,
        *SHORT,
        f"data={{source: indexed, train: {data}}}",
        "model.attention={name: sigmoid, normalize: false}",
        f"train={{steps: {STEPS}, global_batch_size: 4}}",
        f"measure={{every: {STEPS}, count: 4, length: 16, metrics: [sink, norms]}}",
        f"validation={{every: {STEPS}, sequences: 4}}",
        "optim.warmup_steps=1",
        f"output_dir={root / 'runs'}",
    ]
    run_distributed(1, rank_trains, overrides)
    return Run(root / "runs" / "short")


@pytest.fixture(scope="module")
def export(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "model"
    assert to_hf.convert(run.folder, out) == "SinkbenchForCausalLM"
    return out


def test_the_card_holds_recipe_data_loss_and_sink(run: Run, export: Path) -> None:
    card = (export / "README.md").read_text(encoding="utf-8")
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
        assert f"| {name} | {run.series(event, key)[STEPS]:.4g} |" in card
    written = recipe.to_config(recipe.load(export / "recipe.yaml"))
    assert written == recipe.to_config(recipe.load(run.folder / "recipe.yaml"))


def test_the_tokenizer_is_that_of_the_run(run: Run, export: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    ours = load_tokenizer(run.folder / "tokenizer")
    theirs = PreTrainedTokenizerFast.from_pretrained(export)
    for text, ids in zip(MIXED, ours.encode(MIXED), strict=True):
        assert theirs.encode(text, add_special_tokens=False) == ids.tolist(), text
        assert theirs.decode(ids.tolist()) == ours.decode(ids.tolist()), text
    assert theirs.eos_token_id == ours.eos_id
    assert len(theirs) == ours.vocab_size
    assert json.loads((export / "config.json").read_text())["eos_token_id"] == ours.eos_id


@pytest.fixture
def no_data(run: Run) -> Iterator[None]:
    """The prepared data is gone."""
    data = run.folder.parents[1] / "data"
    data.rename(data.with_name("elsewhere"))
    yield
    data.with_name("elsewhere").rename(data)


@pytest.mark.usefixtures("no_data")
def test_a_run_keeps_its_tokenizer(run: Run, export: Path, tmp_path: Path) -> None:
    to_hf.convert(run.folder, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (export / "tokenizer.json").read_bytes()


@pytest.mark.usefixtures("no_data")
def test_a_checkpoint_alone_needs_a_tokenizer(run: Run, export: Path, tmp_path: Path) -> None:
    alone = tmp_path / "somewhere" / "step"
    shutil.copytree(run.checkpoint(STEPS), alone)
    with pytest.raises(DataError) as caught:
        to_hf.convert(alone, tmp_path / "out")
    assert str(caught.value).startswith("tokenizer: the tokenizer of the run's data is gone (")
    assert str(caught.value).endswith("; put it back, or export with --tokenizer FILE")
    assert not (tmp_path / "out").exists()
    to_hf.convert(alone, tmp_path / "out", tokenizer=run.folder / "tokenizer" / "tokenizer.model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (export / name).read_bytes()


def test_a_tokenizer_larger_than_the_model_is_refused(run: Run, tmp_path: Path) -> None:
    from sinkbench.data.tokenizer import train_sentencepiece

    large = tmp_path / "large.model"
    train_sentencepiece([CODE], 500, large)
    with pytest.raises(DataError, match="has 500 tokens, the model has 448; give the tokenizer of the run's"):
        to_hf.convert(run.folder, tmp_path / "out", tokenizer=large)


def test_a_converted_checkpoint_carries_the_tokenizer(export: Path, tmp_path: Path) -> None:
    from_hf.convert(str(export), tmp_path / "back")
    to_hf.convert(tmp_path / "back", tmp_path / "again")
    for name in ("tokenizer.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (export / name).read_bytes()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_another_data_type_is_a_cast(
    run: Run, export: Path, tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    to_hf.convert(run.folder, tmp_path / "out", dtype=name)
    exact, cast = ModelFiles(export), ModelFiles(tmp_path / "out")
    assert exact.names == cast.names
    assert all(torch.equal(exact.read(n).to(dtype), cast.read(n)) for n in exact.names)
    assert cast.config == exact.config | {"torch_dtype": str(dtype).removeprefix("torch.")}


def test_shards_hold_what_one_file_holds(run: Run, export: Path, tmp_path: Path) -> None:
    limit = 40_000
    to_hf.convert(run.folder, tmp_path / "out", shard_bytes=limit)
    whole, split = ModelFiles(export), ModelFiles(tmp_path / "out")
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
    run_distributed: RunDistributed, run: Run, export: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(line for line in CODE.splitlines() if len(line) > 60))
    metrics = ["--metrics", "{name: sink, eps: [0.08, 0.5]}", "norms"]
    arguments = [str(run.folder), str(export), "--prompts", str(prompts), *metrics]
    ((of_run, of_export),) = run_distributed(1, rank_measures, arguments, tmp_path / "found.json")
    assert_same_metrics(of_export, of_run)
    arguments = [*arguments[1:], "--attention", "streaming"]
    ((streamed,),) = run_distributed(1, rank_measures, arguments, tmp_path / "streamed.json")
    assert_same_metrics(streamed, of_run)


def test_what_queries_see_of_an_export_is_restricted(
    run_distributed: RunDistributed, export: Path, tmp_path: Path
) -> None:
    windowed = tmp_path / "windowed"
    shutil.copytree(export, windowed)
    config = json.loads((windowed / "config.json").read_text())
    config["plugins"]["attention"]["params"]["window"] = 6
    (windowed / "config.json").write_text(json.dumps(config))
    metric = "{name: streaming_perplexity, cache: 6, first: 1}"
    arguments = [str(export), str(windowed), "--inputs", "random", "--metrics", metric]
    ((whole, window),) = run_distributed(1, rank_measures, arguments, tmp_path / "found.json")
    assert whole["perplexity_window"] == pytest.approx(window["perplexity_full"], rel=1e-5)
    assert whole["perplexity_window"] != pytest.approx(whole["perplexity_full"], rel=1e-5)


# --- memory -----------------------------------------------------------------------------------------

ROWS, COLUMNS, TABLES = 2**14, 2**8, 24
TABLE_BYTES = 4 * ROWS * COLUMNS


def rank_streams(rank: int, world_size: int, folder: Path) -> tuple[int, int]:
    """Growth of the peak memory, in bytes, by writing a checkpoint with a table in each of many layers, and
    by making shards of two tables of it."""
    from sinkbench.export.stored import StoredTensors

    shape = (ROWS, COLUMNS)
    table = "decoder.layers.table"
    (folder / "checkpoint").mkdir()
    (folder / "export").mkdir()
    weight = Weight(table, shape, torch.float32, TABLES, lambda layer: torch.ones(shape))
    writing = growth(lambda: write_weights(folder / "checkpoint", [weight]))
    stored = StoredTensors(folder / "checkpoint")
    entries = [Entry(f"{n}", shape, torch.float32, partial(stored.read, table, n)) for n in range(TABLES)]
    return writing, growth(lambda: write_shards(folder / "export", entries, 2 * TABLE_BYTES))


def growth(function: Callable[[], Any]) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    function()
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def test_a_few_layers_are_in_memory_at_a_time(run_distributed: RunDistributed, tmp_path: Path) -> None:
    ((writing, converting),) = run_distributed(1, rank_streams, tmp_path)
    assert len(list((tmp_path / "export").glob("*.safetensors"))) == TABLES // 2
    assert writing < 1.5 * 2 * TABLE_BYTES + 2**26
    assert converting < 1.5 * 2 * TABLE_BYTES + 2**26
    assert TABLES * TABLE_BYTES > 3 * (1.5 * 2 * TABLE_BYTES + 2**26)


# --- what is refused --------------------------------------------------------------------------------


def edit_json(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def cut(path: Path, size: int) -> None:
    with path.open("r+b") as stream:
        stream.truncate(size)


def edit_recipe(checkpoint: Path, old: str, new: str) -> None:
    path = checkpoint / "recipe.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def delete_files(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


def write(path: Path, text: str) -> None:
    path.write_text(text)


TO_HF: dict[str, tuple[Callable[[Path], None], str]] = {
    "not there": (lambda c: shutil.rmtree(c), "there is no such folder; give a run's folder or one of its"),
    "no checkpoint": (
        delete_files,
        "checkpoint.json is missing, so it is not a complete checkpoint; delete the folder to go on",
    ),
    "not a folder": (
        replace_by_file,
        "there is no such folder; give a run's folder or one of its checkpoints",
    ),
    "file missing": (lambda c: next(c.glob("*.distcp")).unlink(), ".distcp: is missing; copy it again, or"),
    "file cut short": (lambda c: cut(next(c.glob("*.distcp")), 99), ".distcp: has 99 bytes where"),
    "recipe missing": (lambda c: (c / "recipe.yaml").unlink(), "recipe.yaml: is missing; copy it again, or"),
}


@pytest.mark.parametrize("name", TO_HF)
def test_a_bad_checkpoint_is_one_line(
    name: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = TO_HF[name]
    checkpoint = tmp_path / "step_3"
    shutil.copytree(run.checkpoint(STEPS), checkpoint)
    shutil.copytree(run.folder / "tokenizer", checkpoint / "tokenizer")
    if name == "no checkpoint":
        shutil.rmtree(checkpoint / "tokenizer")
    spoil(checkpoint)
    refused(to_hf.main, [str(checkpoint), str(tmp_path / "made" / "out")], expected, tmp_path, capsys)


def test_an_unknown_plugin_is_one_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = tmp_path / "runs" / "short" / "checkpoints" / "step_3"
    shutil.copytree(run.checkpoint(STEPS), checkpoint)
    edit_recipe(checkpoint, "name: sigmoid", "name: sigmoids")
    info = checkpoint / "checkpoint.json"
    edit_info(info, checkpoint)
    expected = "there is no attention 'sigmoids'; did you mean sigmoid?"
    refused(to_hf.main, [str(checkpoint), str(tmp_path / "out")], expected, tmp_path, capsys)


def edit_info(info: Path, checkpoint: Path) -> None:
    """Writes the index of a checkpoint whose files were changed on purpose."""
    from sinkbench.checkpoint import write_info
    from sinkbench.checksums import FileSum, hash_file

    files = {
        path.name: FileSum(path.stat().st_size, hash_file(path))
        for path in checkpoint.iterdir()
        if path.is_file() and path != info
    }
    info.unlink()
    write_info(checkpoint, step=STEPS, layout={}, files=files)


FROM_HF: dict[str, tuple[Callable[[Path], None], str]] = {
    "not there": (lambda m: shutil.rmtree(m), "there is no such folder; name a folder of save_pretrained"),
    "no config": (lambda m: (m / "config.json").unlink(), "there is no config.json, so it is not a Hugging"),
    "config is no JSON": (lambda m: write(m / "config.json", "{"), "config.json: is not JSON ("),
    "another kind": (
        lambda m: edit_json(m / "config.json", model_type="mamba"),
        "config.json: model_type mamba is none that sinkbench can compute; choose a model of gpt2, gpt_neox",
    ),
    "no recipe": (
        lambda m: edit_json(m / "config.json", recipe=None),
        "config.json: has no recipe; copy the model again",
    ),
    "odd recipe": (
        lambda m: edit_json(m / "config.json", recipe=[1]),
        "config.json: is damaged (TypeError: ",
    ),
    "other sizes": (
        lambda m: edit_json(m / "config.json", head_dim=7),
        "of shape (64, 64) and (64, 64) and (64, 64), which config.json does not tell; copy the model again",
    ),
    "more layers": (
        lambda m: edit_json(m / "config.json", num_hidden_layers=5),
        "has no model.layers.4.",
    ),
    "no weights": (
        lambda m: (m / "model.safetensors").unlink(),
        "holds neither safetensors nor PyTorch weights; save the model there with save_pretrained",
    ),
    "cut short": (
        lambda m: cut(m / "model.safetensors", 9000),
        "model.safetensors: cannot be read (SafetensorError: ",
    ),
    "tokenizer is no JSON": (
        lambda m: write(m / "tokenizer.json", "{"),
        "tokenizer.json: is not a tokenizer.json (",
    ),
    "unknown plugin": (
        lambda m: write(
            m / "config.json", (m / "config.json").read_text().replace('"sigmoid"', '"sigmoids"')
        ),
        "there is no attention 'sigmoids'; did you mean sigmoid?",
    ),
}


@pytest.mark.parametrize("name", FROM_HF)
def test_a_bad_model_is_one_line(
    name: str, export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = FROM_HF[name]
    model = tmp_path / "model"
    shutil.copytree(export, model)
    spoil(model)
    refused(from_hf.main, [str(model), str(tmp_path / "made" / "out")], expected, tmp_path, capsys)


def test_an_odd_tensor_is_one_line(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(export, model)
    files = ModelFiles(export)
    tensors = {name: files.read(name) for name in files.names} | {"model.router": torch.zeros(2)}
    entries = [Entry(name, tuple(x.shape), x.dtype, partial(x.clone)) for name, x in tensors.items()]
    write_shards(model, entries, 10**9)
    expected = "model.router: is no tensor of an exported model; export the model again"
    refused(from_hf.main, [str(model), str(tmp_path / "out")], expected, tmp_path, capsys)


def test_an_export_has_the_length_of_its_recipe(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(export), str(tmp_path / "out"), "--seq-length", "32"]
    expected = "--seq-length: an export of sinkbench keeps that of its recipe; leave it out"
    refused(from_hf.main, arguments, expected, tmp_path, capsys)


@pytest.mark.parametrize("main", [to_hf.main, from_hf.main])
def test_a_folder_with_something_in_it_is_left_alone(
    main: Callable[[list[str]], int],
    run: Run,
    export: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    source = run.folder if main is to_hf.main else export
    assert main([str(source), str(out)]) == 2
    assert capsys.readouterr().err == f"{out}: is not empty; name a folder that is new or empty\n"
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize("main", [to_hf.main, from_hf.main])
def test_a_place_that_cannot_be_written_is_one_line(
    main: Callable[[list[str]], int],
    run: Run,
    export: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "out"
    source = run.folder if main is to_hf.main else export
    assert main([str(source), str(out)]) == 2
    expected = "cannot be written (Not a directory); choose a writable folder on a disk with room"
    assert capsys.readouterr().err == f"{out}: {expected}\n"


def test_a_full_disk_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(to_hf, "write_shards", no_room)
    expected = (
        "out: cannot be written (No space left on device); choose a writable folder on a disk with room"
    )
    refused(to_hf.main, [str(run.folder), str(tmp_path / "out")], expected, tmp_path, capsys)


def refused(
    main: Callable[[list[str]], int],
    arguments: list[str],
    expected: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It prints one line, and writes nothing."""
    before = sorted(path for path in folder.rglob("*") if path.is_file())
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == before
    assert not Path(arguments[1]).exists()
