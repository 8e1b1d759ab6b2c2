"""Training goes on from open models: every family, under parallel layouts and other attentions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from sinkbench import recipe
from sinkbench.export import commands, from_hf
from sinkbench.testing import RunDistributed
from tests.distributed.converted import (
    SENTENCES,
    assert_same_metrics,
    rank_logits,
    rank_measures,
    save_open_model,
    texts,
    write_jsonl,
)
from tests.distributed.runs import SHORT, Run, train
from tests.unit.open_models import VOCABULARY

STEPS = 10
LAYOUTS = {
    "llama": "tensor pipeline",
    "gpt2": "tensor",
    "gpt_neox": "pipeline",
    "opt": "tensor",
    "mistral": "sequence",
    "qwen2": "pipeline",
}
"""Model family -> a layout of tests.distributed.runs."""
METRICS = ("{name: sink, eps: [0.08]}", "norms")
TUNING = "extends+=_base/instruction_tuning"
SIGMOID = "model.attention={name: sigmoid, normalize: true}"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    return {family: save_open_model(family, root / family) for family in LAYOUTS}


@pytest.fixture(scope="module")
def checkpoints(originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("converted")
    for family, original in originals.items():
        from_hf.convert(str(original), root / family)
    return {family: root / family for family in originals}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An override that prepares a small text."""
    folder = tmp_path_factory.mktemp("text")
    path = write_jsonl(folder / "text.jsonl", [{"text": text} for text in texts(200)])
    return prepared(path)


def prepared(path: Path) -> str:
    return f"data.prepare={{inputs: ['{path}'], holdout: 0.2, cache: '{path.parent / 'cache'}'}}"


def recipe_of(checkpoint: Path, *overrides: str) -> tuple[str, ...]:
    return (
        str(checkpoint / "recipe.yaml"),
        *SHORT,
        f"train={{steps: {STEPS}, device: cpu}}",
        f"measure.every={STEPS}",
        f"validation.every={STEPS}",
        "optim={lr: 3e-3, warmup_steps: 1}",
        *overrides,
    )


def losses(run: Run) -> list[float]:
    series = run.series("train", "loss")
    return [series[step] for step in range(1, STEPS + 1)]


def test_the_command_says_how_to_train(
    originals: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert commands.from_hf([str(originals["llama"]), str(out)]) == 0
    train_it, data_line = capsys.readouterr().out.splitlines()
    assert f"python -m sinkbench.pretrain {out}/recipe.yaml" in train_it
    assert data_line == "it trains on python:docs: set 'data.prepare.inputs=[TEXTS]'"
    config = recipe.to_config(recipe.load(out / "recipe.yaml", ["data.prepare.inputs=[mine.txt]"]))
    assert config.checkpoint.start_from == str(out)


@pytest.mark.parametrize("family", LAYOUTS)
def test_logits_are_those_of_transformers(
    family: str, originals: dict[str, Path], checkpoints: dict[str, Path], run_distributed: RunDistributed
) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(0, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(0))
    (ours,) = run_distributed(1, rank_logits, checkpoints[family], tokens)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(originals[family])(tokens).logits
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours[..., :VOCABULARY], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", LAYOUTS)
def test_training_goes_on(
    family: str, checkpoints: dict[str, Path], data: str, run_distributed: RunDistributed, tmp_path: Path
) -> None:
    """Under a parallel layout, which starts where one process does."""
    wanted = recipe_of(checkpoints[family], data)
    run = train(run_distributed, tmp_path, wanted, LAYOUTS[family])
    found = losses(run)
    assert found[-1] < found[0] - 0.5
    alone = train(run_distributed, tmp_path / "alone", [*wanted, "train.steps=1"])
    assert found[0] == pytest.approx(alone.series("train", "loss")[1], abs=1e-4)


@pytest.mark.parametrize("family", LAYOUTS)
def test_training_goes_on_under_another_attention(
    family: str, checkpoints: dict[str, Path], data: str, run_distributed: RunDistributed, tmp_path: Path
) -> None:
    run = train(run_distributed, tmp_path, recipe_of(checkpoints[family], data, SIGMOID))
    found = losses(run)
    assert found[-1] < found[0] - 0.5
    assert recipe.load(run.folder / "recipe.yaml").values["model"]["attention"]["name"] == "sigmoid"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(texts(30, seed=1)))
    return path


@pytest.mark.parametrize("family", LAYOUTS)
def test_sink_is_that_of_the_original(
    family: str,
    originals: dict[str, Path],
    checkpoints: dict[str, Path],
    prompts: Path,
    run_distributed: RunDistributed,
) -> None:
    targets = [str(originals[family]), str(checkpoints[family])]
    ((theirs, ours),) = run_distributed(1, rank_measures, targets, prompts, METRICS)
    assert_same_metrics(ours, theirs)
    assert ours["importance_1_raw"] > 0


def test_instruction_tuning(
    checkpoints: dict[str, Path], prompts: Path, run_distributed: RunDistributed, tmp_path: Path
) -> None:
    """From an open model to one that answers, with the sink before and after."""
    chat = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": SENTENCES[0]}]}
        for text in texts(40)
    ] + [{"prompt": text, "response": SENTENCES[0]} for text in texts(40, seed=2)]
    data = prepared(write_jsonl(tmp_path / "chat.jsonl", chat))
    start = checkpoints["llama"]
    tuned = train(run_distributed, tmp_path / "runs", recipe_of(start, TUNING, data), "data")
    assert recipe.load(tuned.folder / "recipe.yaml").values["loss"]["name"] == "response_lm"
    found = losses(tuned)
    assert found[-1] < found[0] - 1
    before, after = (tuned.measured(step) for step in (0, STEPS))
    assert before.keys() == after.keys() >= {"sink_1_raw", "importance_1_raw"}
    ((first, last),) = run_distributed(1, rank_measures, [str(start), str(tuned.folder)], prompts, METRICS)
    assert first["importance_1_raw"] != last["importance_1_raw"]
