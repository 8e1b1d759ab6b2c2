"""Open models with random weights, and what a checkpoint converted from one computes."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sinkbench import plugins, recipe
from sinkbench.measure.finished import Finished
from sinkbench.measure.settings import Settings
from sinkbench.measure.targets import measure_target
from tests.unit.open_models import FAMILIES, VOCABULARY, tiny_model

SENTENCES = ("the first token is a sink", "a head that has no work waits there", "its value is near zero")


def save_open_model(model_type: str, folder: Path) -> Path:
    """A tiny model of a family of transformers with a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tiny_model(model_type, FAMILIES[model_type]).save_pretrained(folder)
    space, line_end = "\u0120\u010a"  # as byte-level tokenizers write them
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokens = [*special, space, line_end, *",|<>", *string.digits, *string.ascii_lowercase]
    assert len(tokens) <= VOCABULARY
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def texts(count: int, seed: int = 0) -> list[str]:
    """Texts of three sentences each, in an order of their own."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(SENTENCES), size=(count, 3))
    return [f"{number} " + ", ".join(SENTENCES[i] for i in row) for number, row in enumerate(drawn)]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def rank_logits(rank: int, world_size: int, checkpoint: Path, tokens_bs: torch.Tensor) -> torch.Tensor:
    """Logits [b, s, v] of a converted checkpoint in one process."""
    from sinkbench.megatron import parallel, state
    from sinkbench.model import build_stages, declare

    config = recipe.to_config(recipe.load(checkpoint / "recipe.yaml", ["train.device=cpu"]))
    assert config.model.vocab_size is not None
    declared = declare(config, plugins.resolve(config, plugins.discover()), config.model.vocab_size)
    with parallel.running(config) as layout, torch.no_grad():
        (network,) = build_stages(config, declared, layout)
        state.load_weights([network], checkpoint)
        logits: torch.Tensor = network.logits(network.eval()({"tokens": tokens_bs}))
        return logits.transpose(0, 1).clone()


def rank_measures(
    rank: int, world_size: int, targets: Sequence[str], prompts: Path, metrics: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The metrics that ``sinkbench measure --prompts`` finds of each target, on 48 tokens of 20 prompts."""
    settings = Settings(prompts=prompts, length=48, count=20, device="cpu", metrics=tuple(metrics))
    kept = Finished(prompts.parent / "measured", again=True)
    results = (measure_target(target, settings, kept, lambda done, total: None) for target in targets)
    return [result.metrics for of_target in results for result in of_target]


def assert_same_metrics(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys() >= {"sink_1_raw", "importance_1_raw", "value_drain"}
    for name, value in ours.items():
        found, expected = (np.array(x, dtype=float) for x in (value, theirs[name]))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5, err_msg=name)
