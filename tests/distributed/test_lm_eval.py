"""lm-eval on an export, by its own command. It may be of another environment: SINKBENCH_LM_EVAL names it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sinkbench.export import from_hf, to_hf
from sinkbench.testing import RunDistributed
from tests.distributed.converted import save_open_model, texts, write_jsonl
from tests.distributed.runs import SHORT, train

pytest.importorskip("transformers")
COMMAND = os.environ.get("SINKBENCH_LM_EVAL") or shutil.which("lm_eval", path=Path(sys.executable).parent)
pytestmark = pytest.mark.skipif(
    COMMAND is None, reason="lm_eval is not installed, nor named by SINKBENCH_LM_EVAL"
)

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "lm_eval"


@pytest.fixture(scope="module")
def export(run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with unnormalised sigmoid attention, trained a little on the sentences of the tasks."""
    root = tmp_path_factory.mktemp("lm_eval")
    from_hf.convert(str(save_open_model("llama", root / "open")), root / "checkpoint")
    text = write_jsonl(root / "text.jsonl", [{"text": text} for text in texts(200)])
    recipe = (
        str(root / "checkpoint" / "recipe.yaml"),
        *SHORT,
        "model.attention={name: sigmoid, normalize: false}",
        f"data.prepare={{inputs: ['{text}'], holdout: 0.2, cache: '{root / 'cache'}'}}",
        "train={steps: 60, device: cpu}",
        "optim={lr: 3e-3, warmup_steps: 1}",
        "measure.every=0",
        "validation.every=0",
    )
    run = train(run_distributed, root / "runs", recipe)
    assert to_hf.convert(run.folder, root / "export") == "SinkbenchForCausalLM"
    return root / "export"


def test_the_tasks_of_the_examples(export: Path, tmp_path: Path) -> None:
    found = evaluate(export, tmp_path)
    assert found["sinkbench_endings"]["acc,none"] == likelier_endings(export)
    assert found["sinkbench_endings"]["acc,none"] > 0.5
    assert 0 <= found["sinkbench_copies"]["exact_match,none"] <= 1


def evaluate(export: Path, folder: Path) -> dict[str, Any]:
    assert COMMAND is not None
    arguments = ["--model", "hf", "--model_args", f"pretrained={export},trust_remote_code=True,dtype=float32"]
    arguments += ["--tasks", "sinkbench_endings,sinkbench_copies", "--include_path", str(EXAMPLES)]
    arguments += ["--device", "cpu", "--batch_size", "4", "--output_path", str(folder / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(
        [COMMAND, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (folder / "out").rglob("results_*.json")
    results: dict[str, Any] = json.loads(written.read_text())["results"]
    return results


def likelier_endings(export: Path) -> float:
    """The accuracy, worked out here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(export)
    right = []
    for line in (EXAMPLES / "endings.jsonl").read_text().splitlines():
        record = json.loads(line)
        scores = []
        for ending in record["endings"]:
            length = len(tokenizer(record["prompt"]).input_ids)
            tokens = torch.tensor([tokenizer(f"{record['prompt']} {ending}").input_ids])
            with torch.no_grad():
                log_p = model(tokens).logits.log_softmax(-1)[0, :-1]
            scores.append(log_p.gather(1, tokens[0, 1:, None])[length - 1 :].sum())
        right.append(bool(scores[record["answer"]] == max(scores)))
    return sum(right) / len(right)
