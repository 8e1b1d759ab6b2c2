"""``sinkbench measure`` on open models: what it writes, that it resumes, and what it refuses."""

from __future__ import annotations

import csv
import functools
import importlib
import json
import re
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkbench.cli import main
from sinkbench.measure.results import Result, Results, read
from tests.unit.conftest import SMALL, Install
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


ENTROPY = """\
import torch
from sinkbench.api import Params, Plugin, hookimpl

class FirstHead:
    def observe(self, capture):
        return {"entropy": torch.special.entr(capture.weights_bhqk[:, 0]).sum(-1).mean(-1)}

    def result(self, layers):
        entropy_lb = torch.stack([layer["entropy"] for layer in layers])
        return {"first_head_entropy": entropy_lb.mean().item(), "entropy_layers": entropy_lb.mean(1).tolist()}

class Drain(FirstHead):
    def result(self, layers):
        return {"value_drain": 1.0}

class Loss:
    def measure(self, model):
        return {"value_drain": model.losses().mean().item()}

@hookimpl
def sinkbench_metric():
    return [
        Plugin(name="first_head_entropy", summary="", build=lambda params, context: FirstHead()),
        Plugin(name="other_drain", summary="", build=lambda params, context: Drain()),
        Plugin(name="forward_drain", summary="", build=lambda params, context: Loss()),
    ]
"""


def test_a_scalar_of_another_packages_metric_has_a_column(
    folder: Path, run: Run, tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme", ENTROPY)
    monkeypatch.chdir(folder.parent)
    page, out = tmp_path / "out.html", tmp_path / "out.json"
    metrics = ("--metrics", "sink", "norms", "first_head_entropy", "outliers")
    code, printed, err = run(folder.name, "--inputs", "random", *metrics, "--report", page, "--json", out)
    assert code == 0, err
    (measured,) = read(out, Results).results
    value = measured.metrics["first_head_entropy"]
    assert isinstance(value, float)
    header, row = [re.split("[│┃]", line)[1:-1] for line in printed.splitlines() if re.search("[│┃]", line)]
    by_title = {title.strip(): cell.strip() for title, cell in zip(header, row, strict=True)}
    assert list(by_title) == [
        *("model", "inputs", "Sink_1 % raw", "Sink_1 % proxy", "importance of token 1"),
        *("activation ratio", "value drain", "kurtosis", "max inf. norm", "first_head_entropy"),
    ]
    assert by_title["first_head_entropy"] == f"{value:.4g}"
    assert '<th class="number">first_head_entropy</th></tr>' in page.read_text()
    assert f'<td class="number">{value:.4g}</td></tr>' in page.read_text()


@pytest.mark.parametrize("name", ["other_drain", "forward_drain"])
def test_metrics_whose_results_share_a_key_are_refused(
    folder: Path, run: Run, install: Install, name: str
) -> None:
    install("acme", ENTROPY)
    code, _, err = run(folder, "--inputs", "random", "--metrics", "norms", name)
    assert code == 2
    assert err == (
        f"metric {name}: its result 'value_drain' would overwrite that of the metric norms; "
        f"rename it in one of the two, or drop {name}\n"
    )
    assert run(folder, "--inputs", "random", "--metrics", name)[0] == 0


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


METRIC = """\
from sinkbench.api import Params, Plugin, hookimpl

class HouseParams(Params):
    times: float = 1.0

class House:
    def __init__(self, times):
        self.times = times

    def observe(self, capture):
        return {"one": capture.input_bsn.new_ones(capture.input_bsn.shape[:1])}

    def result(self, layers):
        return {"house": self.times * layers[0]["one"].mean().item()}

def build(params, context):
    return House(params.times)

@hookimpl
def sinkbench_metric():
    return [Plugin(name="house", summary="a constant", params=HouseParams, build=build)]
"""


def test_a_metric_that_was_edited_is_measured_again(
    folder: Path, run: Run, tmp_path: Path, install: Install
) -> None:
    def house() -> tuple[Any, str]:
        out = tmp_path / "out.json"
        code, _, err = run(folder, "--inputs", "random", "--metrics", "house", "--json", out)
        assert code == 0
        sys.modules.pop("house_metric_module")  # as for the next process
        return read(out, Results).results[0].metrics["house"], err

    install("house-metric", METRIC)
    file = tmp_path / "site" / "house-metric" / "house_metric_module.py"
    assert house() == (1.0, "")
    value, err = house()
    assert value == 1.0
    assert err == (
        f"sinkbench measure: 1 of the results taken from {tmp_path / 'cache'}, where they were kept; "
        "--again measures anew\n"
    )
    file.write_text(METRIC.replace("times: float = 1.0", "times: float = 2.5"))
    assert house() == (2.5, "")
    file.write_text(METRIC.replace("self.times *", "7 *"))
    assert house() == (7.0, "")
    assert "of the results taken from" in house()[1]


ATTENTION = """\
from sinkbench.api import AttentionSpec, Elementwise, Plugin, hookimpl

def build(params, context):
    return AttentionSpec(rule=Elementwise(function=lambda score: score.relu()))

@hookimpl
def sinkbench_attention():
    return [Plugin(name="house_attention", summary="relu", build=build)]
"""


def test_a_run_whose_attention_was_edited_is_measured_again(
    run: Run, tmp_path: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sinkbench.checkpoint import CheckpointStore
    from tests.unit.checkpoint_folder import save

    measured: list[str] = []

    def measure_run(target: str, checkpoint: Any, inputs: str, settings: Any) -> Result:
        measured.append(inputs)
        return Result(target=target, inputs=inputs, length=12, count=3, bos=False, metrics={})

    monkeypatch.setattr("sinkbench.measure.runs.measure_run", measure_run)
    install("house-attention", ATTENTION)
    recipe = SMALL.replace("ffn: none", "ffn: none, attention: house_attention")
    save(CheckpointStore(tmp_path / "runs" / "small" / "checkpoints"), 5, recipe=recipe)
    target = tmp_path / "runs" / "small"
    assert run(target, "--inputs", "random", "repeat")[2] == ""
    assert "2 of the results taken from" in run(target, "--inputs", "random", "repeat")[2]
    assert len(measured) == 2
    file = tmp_path / "site" / "house-attention" / "house_attention_module.py"
    file.write_text(ATTENTION.replace("score.relu()", "score.relu().square()"))
    assert run(target, "--inputs", "random", "repeat")[2] == ""
    assert len(measured) == 4
    assert run(target, "--inputs", "random", "--metrics", "norms")[2] == ""
    file.write_text("raise ImportError('not today')")
    sys.modules.pop("house_attention_module")
    assert run(target, "--inputs", "random")[2] == "", "what cannot be told is neither kept nor taken"
    assert len(measured) == 6


def test_a_plugin_is_told_by_its_version_parameters_and_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sinkbench.api import Params, Plugin
    from sinkbench.discovery import Package
    from sinkbench.measure.finished import key
    from sinkbench.plugins import Chosen

    package = tmp_path / "told_package"
    files = {
        "__init__.py": "",
        "plugin.py": "def build(params, context):\n    from .deep import kernel\n",
        "deep/__init__.py": "import told_package.helper\n",
        "deep/kernel.py": "import package_of_tomorrow\n",
        "helper.py": "",
        "other.py": "",
    }
    for name, text in files.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    build = importlib.import_module("told_package.plugin").build

    class Sized(Params):
        size: int = 1

    def named(version: str = "1.0", build: Any = build, **values: int) -> str:
        plugin = Plugin(name="told", summary="", build=build, params=Sized)
        where = Package(distribution="told", version=version, entry_point="a", module="told_package.plugin")
        return key([], [Chosen(path="told", plugin=plugin, params=Sized(**values), package=where)])

    first = named()
    assert named(size=1) == first, "a default that is written"
    assert named(build=functools.partial(build)) == first
    assert len({first, named(size=2), named("1.1"), named(build=len)}) == 4
    assert "told_package.deep" not in sys.modules
    for name in ("plugin.py", "deep/kernel.py", "helper.py"):
        before = named()
        (package / name).write_text(files[name] + "# edited\n")
        assert named() != before, name
    before = named()
    (package / "other.py").write_text("# edited\n")
    assert named() == before, "what the plugin does not import"
    for name in [name for name in sys.modules if name.startswith("told_package")]:
        del sys.modules[name]


def test_code_that_came_with_a_model_is_told(folder: Path, run: Run, tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "model"
    shutil.copytree(folder, path)
    code = path / "modeling.py"
    code.write_text("")
    arguments = (path, "--inputs", "random", "repeat", "--allow-code")
    assert run(*arguments)[2] == ""
    assert "2 of the results taken from" in run(*arguments)[2]
    code.write_text("# edited")
    assert run(*arguments)[2] == ""


def test_another_tokenizer_or_other_data_are_told(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from sinkbench.checkpoint import CheckpointStore
    from tests.unit.checkpoint_folder import save
    from tests.unit.data_folder import write_folder

    path = tmp_path / "model"
    shutil.copytree(folder, path)
    assert run(path)[2] == ""
    assert "1 of the results taken from" in run(path)[2]
    (path / "tokenizer_config.json").write_text((path / "tokenizer_config.json").read_text() + " ")
    assert run(path)[2] == ""

    def measure_run(target: str, checkpoint: Any, inputs: str, settings: Any) -> Result:
        return Result(target=target, inputs=inputs, length=12, count=3, bos=False, metrics={})

    monkeypatch.setattr("sinkbench.measure.runs.measure_run", measure_run)
    data, held_out = tmp_path / "data", tmp_path / "held_out"
    recipe = SMALL.replace("source: bigram_backcopy", f"source: indexed, train: {data}")
    assert recipe != SMALL
    validated = recipe.replace("source: indexed", f"source: indexed, validation: {{news: {held_out}}}")
    for changed, text in ((data, recipe), (held_out, validated)):
        mine = tmp_path / "runs" / changed.name
        write_folder(changed, [[1] * 300])
        save(CheckpointStore(mine / "checkpoints"), 5, recipe=text)
        assert run(mine)[2] == ""
        assert "1 of the results taken from" in run(mine)[2]
        shutil.rmtree(changed)
        write_folder(changed, [[2] * 400])
        assert run(mine)[2] == ""


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
    assert "skipped Gone: there is no such folder here; give a run" in " ".join(out.split())


def test_a_list_of_which_all_is_skipped_ends_with_2(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(f"source: A paper\nmodels: [{{name: Gone, target: {tmp_path / 'gone'}}}]\n")
    code, out, err = run(path)
    assert code == 2
    assert "skipped Gone: " in out
    assert err == "sinkbench measure: not measured: Gone; see the reasons above\n"


def test_one_bad_target_leaves_the_results_of_the_others(folder: Path, run: Run, tmp_path: Path) -> None:
    bad, out = damaged("cut-weights", folder, tmp_path), tmp_path / "out.json"
    code, printed, err = run(bad, folder, "--inputs", "random", "--json", out)
    assert code == 2
    assert err == f"sinkbench measure: not measured: {bad}; see the reasons above\n"
    assert f"skipped {bad}: " in printed
    results = read(out, Results)
    assert [result.target for result in results.results] == [str(folder)]
    assert [one.target for one in results.skipped] == [str(bad)]


def test_prompts_are_the_natural_text_among_other_inputs(folder: Path, run: Run, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("\n".join(["some words of text " * 20] * 4))
    assert run(folder, "--prompts", prompts, "--inputs", "random", "natural", "--json", out)[0] == 0
    assert [result.texts for result in read(out, Results).results] == [None, "prompts.txt"]
    code, _, err = run(folder, "--inputs", "random")
    assert code == 0
    assert "1 of the results taken from" in err  # prompts are no part of random tokens


@pytest.fixture
def measured_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a sweep of two runs, of which a third has not started; measuring them is cheap."""
    from sinkbench.checkpoint import CheckpointStore
    from tests.unit.checkpoint_folder import save

    def measure_run(target: str, checkpoint: Any, inputs: Any, settings: Any) -> Result:
        return Result(target=target, inputs=inputs, length=12, count=3, bos=False, step=10, metrics={})

    monkeypatch.setattr("sinkbench.measure.runs.measure_run", measure_run)
    sweep = tmp_path / "runs" / "sw"
    for name in ("a", "b", "c"):
        (sweep / name).mkdir(parents=True)
        (sweep / name / "recipe.yaml").write_text("name: sw\n")
    for name in ("a", "b"):
        (sweep / name / "metrics.jsonl").touch()
        save(CheckpointStore(sweep / name / "checkpoints"), 10)
    (sweep / "summary.json").write_text("[]")
    return sweep


def test_a_sweeps_folder_stands_for_its_runs(run: Run, measured_runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code, _, err = run(measured_runs, "--json", out)
    assert code == 0
    assert [Path(one.target).name for one in read(out, Results).results] == ["a", "b"]
    assert f"left out, not started: {measured_runs / 'c'}\n" in err
    code, _, err = run(measured_runs / "a", measured_runs / "summary.json")
    assert code == 2
    assert err.endswith(f"; give {measured_runs}, which stands for the runs in it\n")


def test_options_without_effect_on_runs_are_told(run: Run, measured_runs: Path) -> None:
    code, _, err = run(measured_runs / "a", "--dtype", "float16", "--batch-size", "1")
    assert code == 0
    note = f"--dtype, --batch-size: for open models only, without effect on {measured_runs / 'a'}"
    assert err == f"sinkbench measure: {note}\n"


def test_texts_that_are_not_the_same_are_told(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sinkbench.checkpoint import CheckpointStore
    from tests.unit.checkpoint_folder import save

    def measure_run(target: str, checkpoint: Any, inputs: str, settings: Any) -> Result:
        texts = settings.prompts.name if settings.prompts else None
        return Result(target=target, inputs=inputs, length=12, count=3, bos=False, texts=texts, metrics={})

    monkeypatch.setattr("sinkbench.measure.runs.measure_run", measure_run)
    mine, prompts = tmp_path / "runs" / "mine", tmp_path / "prompts.txt"
    save(CheckpointStore(mine / "checkpoints"), 10)
    prompts.write_text("\n".join(["some words of text " * 20] * 4))
    code, _, err = run(mine, folder, "--prompts", prompts)
    assert (code, err) == (0, "")
    code, _, err = run(mine, folder)
    assert code == 0
    assert "sinkbench measure: natural text is not the same for all: a run's own held-out data, " in err
    assert "; --prompts FILE gives all the same\n" in err


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
    elif name == "no-language-model":
        config["model_type"] = "vit"
    elif name == "missing-file":
        index = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        weights.rename(path / "model-1.safetensors")
    elif name == "other-width":
        config["hidden_size"] = 64
    elif name == "nan":
        from safetensors.torch import load_file, save_file

        tensors = {key: tensor * float("nan") for key, tensor in load_file(weights).items()}
        save_file(tensors, weights, {"format": "pt"})
    elif name == "small-vocabulary":
        from safetensors.torch import load_file, save_file

        tables = {"model.embed_tokens.weight", "lm_head.weight"}
        tensors = {key: t[:9].clone() if key in tables else t for key, t in load_file(weights).items()}
        save_file(tensors, weights, {"format": "pt"})
        config["vocab_size"] = 9
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
        ("missing-file", "1 of its files of weights are missing (model-2.safetensors); copy the model again"),
        ("other-width", "its lm_head.weight is not of shape [61, 64], which config.json tells; copy the"),
        ("nan", "its attention weights are not numbers; copy the model again, or give --dtype float32"),
        ("small-vocabulary", "its tokenizer gives token 5"),
        ("no-tokenizer", "its tokenizer cannot be read"),
        ("missing-weights", "of its weights are missing (model.layers.2."),
        ("own-code", "model type house_made comes with code of its own, which is not run by default; read"),
        ("unknown", "knows; install a newer transformers, or measure another model"),
        ("no-language-model", "model type vit is no causal language model; give a causal language model"),
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


def test_layers_beyond_those_of_the_configuration_are_told(
    folder: Path, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    path = tmp_path / "fewer"
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert run(path)[0] == 0
    told = "measured with 1 layers, as config.json says, though its weights hold more (model.layers.1.input"
    assert told in caplog.text


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
            "--prompts: is natural text; add natural to --inputs",
        ),
        (["--step", "3"], "--step: is of a run's checkpoint; leave it out"),
        (["--step", "all"], "is no run with checkpoints; leave out --step all"),
        (["--metrics", "{name: sink, k: [99]}"], "metrics[0].k"),
        (["--metrics", "{k: v}"], "--metrics {k: v}: is no metric; write a name"),
        (
            ["--metrics", "{name: sink, eps: [0.3]}", "norms", "{name: sink, eps: [0.01]}"],
            "--metrics {name: sink, eps: [0.01]}: the metric 'sink' is listed twice, and its results would",
        ),
        (["--metrics", "{name: streaming_perplexity, cache: 12}"], "must exceed first (4) and be below"),
        (["--length", "1"], "norms compares the first token with the others"),
        (["--count", "0"], "'0' is not a whole number above 0"),
        (["--seed", "-1"], "'-1' is not a whole number of at least 0"),
        (["--inputs", "noise"], "invalid choice: 'noise'"),
    ],
)
def test_wrong_options_are_one_line(folder: Path, run: Run, arguments: list[str], message: str) -> None:
    sizes = "--length" not in arguments and "--count" not in arguments
    code, _, err = run(folder, *arguments, defaults=sizes)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_metric_given_twice_is_refused_before_any_model_is_opened(run: Run) -> None:
    code, _, err = run("nothing here", "--metrics", "sink", "{name: sink, k: [2]}")
    assert code == 2
    assert "the metric 'sink' is listed twice" in err


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
        "someone/model: there is no such folder here, the hub cannot be reached, and its cache here has no "
        "such model; go online, or give the folder of a model\n"
    )
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "someone" / "models")
    code, _, err = run("someone/model")
    assert code == 2
    assert err.endswith("has no such model; did you mean someone/models? Or go online\n")


def write_config(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("runs/smal", "here, and what is in runs is not asked of the hub; did you mean runs/small?"),
        ("runs/other", "here, and what is in runs is not asked of the hub; give a run, a checkpoint"),
        ("./runs/smal", "here; did you mean runs/small?"),
        ("rusn/small/checkpoints", "here; did you mean runs/small/checkpoints?"),
        ("rusn/small/nothing", "here; did you mean runs?"),
        ("empty/other", "here, and what is in empty is not asked of the hub; give a run, a checkpoint"),
        ("/nowhere/at/all", "here; give a run, a checkpoint, a model's folder or its name on the hub"),
        ("~/no such model", "here; give a run, a checkpoint, a model's folder or its name on the hub"),
        ("some/where/deep", "here; give a run, a checkpoint, a model's folder or its name on the hub"),
        ("runs/small/checkpoints/step_9", "here; did you mean runs/small/checkpoints/step_90?"),
    ],
)
def test_what_is_meant_as_a_folder_is_not_asked_of_the_hub(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, message: str
) -> None:
    def fetch(name: str, trust: Any) -> Path:
        raise AssertionError(f"{name} was asked of the hub")

    monkeypatch.setattr("sinkbench.measure.hf_place._fetch", fetch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "small" / "checkpoints" / "step_90").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for step in ([], ["--step", "all"]):
        code, out, err = run(target, *step)
        assert code == 2
        assert not out
        assert err.startswith(f"{target}: there is no such folder {message}")
        assert err.count("\n") == 1


@pytest.mark.parametrize("target", ["openai/gpt2", "gpt2", "models/other"])
def test_what_may_be_on_the_hub_is_asked_of_it(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, target: str
) -> None:
    asked: set[str] = set()

    def fetch(name: str, trust: Any) -> Path:
        asked.add(name)
        return folder

    monkeypatch.setattr("sinkbench.measure.hf_place._fetch", fetch)
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "models" / "mine")
    assert run(target, "--inputs", "random")[0] == 0
    assert asked == {target}


def test_a_file_that_is_absent_has_its_neighbours_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "tiny.Q4.gguf").write_text("")
    code, _, err = run(tmp_path / "tiny.Q5.gguf")
    assert code == 2
    assert err.endswith(f"there is no such file; did you mean {tmp_path / 'tiny.Q4.gguf'}?\n")


def test_a_target_that_is_absent_is_told_before_others_are_measured(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_model(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr("sinkbench.measure.hf_load.open_model", open_model)
    code, out, err = run(folder, folder.parent / "tinny", folder)
    assert code == 2
    assert not out
    assert "tinny: there is no such folder here; did you mean" in err


def test_a_missing_package_is_one_line(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sinkbench.measure.hf_place.find_spec", lambda name: None)
    code, _, err = run(folder)
    assert code == 2
    assert err == (
        "sinkbench measure: measuring open models needs transformers, not installed here; "
        "pip install 'sinkbench[hf]'\n"
    )


def test_only_the_weights_that_are_read_count(tmp_path: Path) -> None:
    from sinkbench.measure.hf_place import Place

    def weights() -> list[str]:
        return [path.name for path in Place(target="x", folder=tmp_path).weights]

    def write_index(name: str, *parts: str) -> None:
        weight_map = {str(number): part for number, part in enumerate(parts)}
        (tmp_path / name).write_text(json.dumps({"weight_map": weight_map}))

    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "a.bin", "b.bin"):
        (tmp_path / name).touch()
    assert len(weights()) == 5
    write_index("pytorch_model.bin.index.json", "b.bin", "a.bin", "a.bin")
    assert weights() == ["a.bin", "b.bin"]
    (tmp_path / "pytorch_model.bin").touch()
    assert weights() == ["pytorch_model.bin"]
    for name in ("consolidated.safetensors", "1.safetensors", "2.safetensors"):
        (tmp_path / name).touch()
    write_index("model.safetensors.index.json", "1.safetensors", "2.safetensors", "absent.safetensors")
    assert weights() == ["1.safetensors", "2.safetensors"]
    (tmp_path / "model.safetensors").touch()
    assert weights() == ["model.safetensors"]


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {"a": 1, "b": "c"}}', '{"weight_map": []}'])
def test_a_damaged_index_leaves_all_weights(tmp_path: Path, index: str) -> None:
    from sinkbench.measure.hf_place import Place

    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "model-1.safetensors").touch()
    assert Place(target="x", folder=tmp_path).weights == [tmp_path / "model-1.safetensors"]


def test_pickled_parts_of_a_safe_index_are_refused(folder: Path, run: Run, tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "mixed"
    shutil.copytree(folder, path)
    (path / "model.safetensors").rename(path / "a.safetensors")
    (path / "z.bin").touch()
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"a": "a.safetensors", "z": "z.bin"}})
    )
    code, _, err = run(path)
    assert code == 2
    assert "its weights are pickled (z.bin), and unpickling can run code" in err


def test_what_is_not_read_is_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    from sinkbench.measure.hf_place import Trust, find_place

    asked: dict[str, Any] = {}

    def fetch(name: str, **arguments: Any) -> str:
        asked.update(arguments)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    find_place("someone/model", Trust(pickle=True))
    read = ["config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin", "tokenizer.json"]
    unread = ["consolidated.safetensors", "original/consolidated.00.pth", "optimizer.pt", "training_args.bin"]
    kept = filter_repo_objects(
        [*read, *unread], allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(kept) == read


def test_a_model_too_large_for_memory_is_one_line(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    code, _, err = run(folder)
    assert code == 2
    assert "its weights take 0 GB in float32, 0 GB are free; give --dtype bfloat16" in err
