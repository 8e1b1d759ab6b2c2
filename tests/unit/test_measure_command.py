"""``sinkbench measure`` on open models: what it writes, that it resumes, and what it refuses."""

from __future__ import annotations

import csv
import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkbench.cli import main
from sinkbench.measure.results import Result, Results, read
from tests.unit.open_models import FAMILIES, VOCABULARY, tiny_model

pytest.importorskip("transformers")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama", FAMILIES["llama"]).save_pretrained(path)
    letters = ["<pad>", "<s>", "</s>", "<unk>", *string.ascii_letters, *" .,"]
    words = {letter: number for number, letter in enumerate(letters[:VOCABULARY])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(path)
    return path


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command on few short sequences, with a cache of the test's own."""

    def call(*arguments: str | Path, defaults: bool = True) -> tuple[int, str, str]:
        sizes = ["--length", "12", "--count", "3"] if defaults else []
        code = main(
            ["measure", *map(str, arguments), *sizes, "--cache", str(tmp_path / "cache"), "--device", "cpu"]
        )
        return code, *capsys.readouterr()

    return call


def test_it_writes_json_csv_and_a_page(folder: Path, run: Run, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "html")}
    code, out, _ = run(
        folder,
        *("--inputs", "natural", "random", "repeat", "--json", files["json"]),
        *("--csv", files["csv"], "--report", files["html"]),
    )
    assert code == 0
    assert "Sink_1" in out
    assert "value drain" in out, "a table in a pipe keeps its last columns"
    results = read(files["json"], Results).results
    assert [(r.inputs, r.length, r.count, r.bos) for r in results] == [
        (kind, 12, 3, False) for kind in ("natural", "random", "repeat")
    ]
    assert results[0].texts is not None
    assert results[0].texts.startswith("documentation of Python 3.")
    assert results[2].metrics["row_sum"] == pytest.approx(1)
    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    alpha: Any = results[1].metrics["importance_raw"]
    (cell,) = [
        row["value"]
        for row in rows
        if (row["inputs"], row["metric"], row["layer"], row["head"], row["position"])
        == ("random", "importance_raw", "2", "3", "4")
    ]
    assert float(cell) == pytest.approx(alpha[1][2][3], rel=1e-8)
    page = files["html"].read_text()
    assert page.count("<figure>") >= 6
    assert "3 sequences of 12 tokens, without BOS, float32" in page


def test_prompts_and_bos_are_recorded(folder: Path, run: Run, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the quick brown fox jumps\n" * 2)
    out = tmp_path / "out.json"
    assert run(folder, "--prompts", prompts, "--bos", "--length", "9", "--json", out, defaults=False)[0] == 0
    (result,) = read(out, Results).results
    assert (result.bos, result.length, result.count, result.texts) == (True, 9, 2, "prompts.txt")


def test_finished_results_are_not_measured_again(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sinkbench.measure import hf_load

    opened: list[str] = []
    original = hf_load.open_model

    def counted(place: Any, **rest: Any) -> Any:
        opened.append(place.target)
        return original(place, **rest)

    monkeypatch.setattr(hf_load, "open_model", counted)
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    run(folder, "--inputs", "random", "--json", first)
    run(folder, "--inputs", "random", "--json", second)
    assert len(opened) == 1
    assert first.read_text() == second.read_text()
    run(folder, "--inputs", "random", "repeat")
    assert len(opened) == 2, "only what is missing is measured"
    run(folder, "--inputs", "random", "--seed", "1")
    run(folder, "--inputs", "random", "--again")
    assert len(opened) == 4
    for file in (tmp_path / "cache").glob("*.json"):
        file.write_text("{")
    assert run(folder, "--inputs", "random")[0] == 0
    assert len(opened) == 5, "a damaged file is measured again"


def test_a_list_skips_what_cannot_be_had(folder: Path, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(
        f"source: A paper\ninputs: [random]\nmodels:\n"
        f"- {{name: Gone, target: {tmp_path / 'gone'}}}\n"
        f"- {{name: Tiny, target: {folder}, published: {{random: 12.34}}}}\n"
    )
    code, out, _ = run(path)
    assert code == 0
    assert "12.34" in out
    assert "Tiny" in out
    assert "published: A paper" in out
    assert "skipped Gone: is neither a folder, a .gguf file nor a name on the hub" in " ".join(out.split())


def test_damaged_checkpoints_are_left_out_of_all(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sinkbench.checkpoint import CheckpointStore
    from tests.unit.checkpoint_folder import save

    folder, out = tmp_path / "runs" / "mine", tmp_path / "out.json"
    store = CheckpointStore(folder / "checkpoints")
    for number in (10, 20, 30):
        save(store, number)
    (folder / "checkpoints" / "step_20" / "shard").write_bytes(b"weighty")

    def measure_run(target: str, checkpoint: Any, inputs: str, settings: Any) -> Result:
        return Result(
            target=target, inputs=inputs, length=12, count=3, bos=False, step=checkpoint.step, metrics={}
        )

    monkeypatch.setattr("sinkbench.measure.runs.measure_run", measure_run)
    code, printed, err = run(folder, "--step", "all", "--json", out)
    assert code == 2
    assert err == "sinkbench measure: checkpoints left out of --step all: 20; see the reasons above\n"
    (line,) = [line for line in printed.splitlines() if line.startswith("skipped ")]
    assert "mine, step 20: " in line
    results = read(out, Results)
    assert [result.step for result in results.results] == [10, 30]
    ((step, reason),) = [(one.step, one.reason) for one in results.skipped]
    assert step == 20
    assert reason in line
    assert "shard: is not what was written" in reason
    (folder / "checkpoints" / "step_20" / "shard").write_bytes(b"weights")
    assert run(folder, "--step", "all", "--json", out)[0] == 0
    assert not read(out, Results).skipped


def test_the_papers_list_is_whole() -> None:
    from sinkbench import recipe_files
    from sinkbench.measure.model_list import read_model_list

    models = read_model_list(recipe_files.find("measure/paper_models.yaml")).models
    assert len(models) == 30
    assert len({model.target for model in models}) == 30
    assert {model.name: model.published for model in models}["GPT-2 XL"] == {
        "natural": 77.00,
        "random": 70.29,
        "repeat": 62.28,
    }


def damaged(name: str, folder: Path, tmp_path: Path) -> Path:
    """A copy of the model that is wrong in one way."""
    import shutil

    path = tmp_path / name
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    weights = path / "model.safetensors"
    if name == "pickled":
        weights.unlink()
        torch.save({}, path / "pytorch_model.bin")
    elif name == "no-weights":
        weights.unlink()
    elif name == "no-config":
        (path / "config.json").unlink()
    elif name == "cut-config":
        (path / "config.json").write_text('{"model_type"')
    elif name == "cut-weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif name == "no-tokenizer":
        for file in path.glob("tokenizer*"):
            file.unlink()
    elif name == "missing-weights":
        config["num_hidden_layers"] = 3
    elif name == "own-code":
        config |= {"model_type": "house_made", "auto_map": {"AutoModelForCausalLM": "model.House"}}
        (path / "model.py").write_text("raise SystemExit('code ran')")
    elif name == "unknown":
        config["model_type"] = "house_made"
    elif name == "encoder-decoder":
        config["is_encoder_decoder"] = True
    if name not in ("no-config", "cut-config"):
        (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pickled", "its weights are pickled (pytorch_model.bin), and unpickling can run code; convert"),
        ("no-weights", "it holds no weights; copy the model's .safetensors files too"),
        ("no-config", "it holds no config.json, so no model, nor a run or checkpoint"),
        ("cut-config", "config.json: is damaged (JSONDecodeError"),
        ("cut-weights", "transformers cannot read it (SafetensorError"),
        ("no-tokenizer", "its tokenizer cannot be read"),
        ("missing-weights", "of its weights are missing (model.layers.2."),
        ("own-code", "model type house_made comes with code of its own, which is not run by default; read"),
        ("unknown", "transformers cannot read it (ValueError"),
        ("encoder-decoder", "is an encoder-decoder; give a decoder-only"),
    ],
)
def test_models_that_are_wrong_are_one_line(
    folder: Path, run: Run, tmp_path: Path, name: str, message: str
) -> None:
    code, out, err = run(damaged(name, folder, tmp_path))
    assert code == 2
    assert not out
    assert message in err
    assert err.count("\n") == 1


def test_pickled_weights_are_read_when_allowed(folder: Path, run: Run, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file

    path = tmp_path / "pickled"
    shutil.copytree(folder, path)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    assert run(path, "--allow-pickle", "--inputs", "random", "--json", a)[0] == 0
    assert run(folder, "--inputs", "random", "--json", b)[0] == 0
    assert read(a, Results).results[0].metrics == read(b, Results).results[0].metrics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--prompts", "p.txt", "--inputs", "random"],
            "--prompts: is natural text; measure --inputs natural",
        ),
        (["--step", "3"], "--step: is of a run's checkpoint; leave it out"),
        (["--step", "all"], "is no run with checkpoints; leave out --step all"),
        (["--metrics", "{name: sink, k: [99]}"], "metrics[0].k"),
        (["--metrics", "{k: v}"], "--metrics {k: v}: is no metric; write a name"),
        (["--metrics", "{name: streaming_perplexity, cache: 12}"], "must exceed first (4) and be below"),
        (["--length", "1"], "norms compares the first token with the others"),
        (["--count", "0"], "'0' is not a whole number above 0"),
        (["--inputs", "noise"], "invalid choice: 'noise'"),
    ],
)
def test_wrong_options_are_one_line(folder: Path, run: Run, arguments: list[str], message: str) -> None:
    sizes = "--length" not in arguments and "--count" not in arguments
    code, _, err = run(folder, *arguments, defaults=sizes)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("target", ["nothing here", "absent/folder/deep", "absent.gguf"])
def test_targets_that_are_nothing_are_one_line(run: Run, target: str) -> None:
    code, _, err = run(target)
    assert code == 2
    assert err.startswith(target)
    assert err.count("\n") == 1


def test_a_name_on_the_hub_offline_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, _, err = run("someone/model")
    assert code == 2
    assert err == (
        "someone/model: the hub cannot be reached, and the model is not in its cache here; "
        "go online, or give the folder of a model\n"
    )


def test_a_missing_package_is_one_line(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinkbench.measure.hf_load.find_spec", lambda name: None)
    code, _, err = run(folder)
    assert code == 2
    assert err == (
        "sinkbench measure: measuring open models needs transformers, not installed here; "
        "pip install 'sinkbench[hf]'\n"
    )


def test_a_model_too_large_for_memory_is_one_line(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    code, _, err = run(folder)
    assert code == 2
    assert "its weights take 0 GB in float32, 0 GB are free; give --dtype bfloat16" in err
