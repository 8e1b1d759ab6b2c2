"""Every kind of model, exported and loaded by a process that has transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sinkbench.export import from_hf, to_hf
from sinkbench.export.stored import StoredTensors
from sinkbench.testing import RunDistributed
from tests.distributed.exports import LLAMA, SMALL, check_exports, probe_tokens, rank_writes

pytest.importorskip("transformers")
pytestmark = pytest.mark.timeout(900)  # the fixture exports and checks every case

CLASSIC = "model={linear_bias: all, normalization: layernorm, positional: learned, ffn_hidden_size: 48}"
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("LlamaForCausalLM", (LLAMA, "model.num_query_groups=2")),
    "llama_tied": ("LlamaForCausalLM", (LLAMA, "model={tie_embeddings: true, linear_bias: all}")),
    "mistral": ("MistralForCausalLM", (LLAMA, "model.attention={name: softmax, window: 7}")),
    "qwen2": ("Qwen2ForCausalLM", (LLAMA, "model={num_query_groups: 2, linear_bias: qkv}")),
    "gpt2": ("GPT2LMHeadModel", (CLASSIC, "model={ffn: gelu_tanh, tie_embeddings: true}")),
    "opt": ("OPTForCausalLM", (CLASSIC, "model={ffn: relu, tie_embeddings: true}")),
    "pythia": (
        "GPTNeoXForCausalLM",
        (CLASSIC, "model={ffn: gelu, parallel_residual: true, positional: {name: rope, fraction: 0.25}}"),
    ),
    "demo": ("SinkbenchForCausalLM", ()),
    "sigmoid": (
        "SinkbenchForCausalLM",
        (LLAMA, "model.attention={name: sigmoid, normalize: false, bias: learned}"),
    ),
    "sink_token_prefix": (
        "SinkbenchForCausalLM",
        (LLAMA, "model={attention: {name: softmax, sink_token: true}}", "loss={name: prefix_lm, prefix: 5}"),
    ),
    "slot_window_t5": (
        "SinkbenchForCausalLM",
        (
            LLAMA,
            "model={num_query_groups: 2, positional: t5}",
            "model.normalization={name: layernorm, location: sandwich}",
            "model.attention={name: softmax_off_by_one, window: 9, kv_bias: kv, combine: sum}",
        ),
    ),
    "kernel_alibi": (
        "SinkbenchForCausalLM",
        (
            LLAMA,
            "model={positional: alibi, normalization: {name: rmsnorm, location: post}, ffn: gelu}",
            "model.attention={name: kernel_mlp, kv_bias: v}",
        ),
    ),
}

IN_SHARDS = ("qwen2", "sigmoid")
"""Exported as many small files and their index."""


@pytest.fixture(scope="module")
def checked(
    run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """What the other process finds for each case, and each case's folders."""
    root = tmp_path_factory.mktemp("exports")
    exports = {name: root / "export" / f"{name}_model" for name in CASES}
    for name, (_, overrides) in CASES.items():
        run = root / name
        (logits,) = run_distributed(1, rank_writes, [*SMALL, *overrides], run, None)
        to_hf.convert(run / "step_0", exports[name], shard_bytes=20_000 if name in IN_SHARDS else 10**9)
        torch.save({"tokens": probe_tokens(), "logits": logits}, exports[name] / "expected.pt")
    found = check_exports(list(exports.values()), root / "cache")
    return {
        name: {**found[str(export)], "export": export, "run": root / name} for name, export in exports.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_export_computes_the_same(name: str, checked: dict[str, dict[str, Any]]) -> None:
    found = checked[name]
    assert found["class"] == CASES[name][0]
    assert found["scale"] > 0.1
    for key in ("logits", "padding", "cache", "checkpointing"):
        assert found[key] < 1e-4, f"{key}: {found[key]}"
    assert found["saved_again"] == 0
    assert found["generate"]
    assert (checked[name]["export"] / "model.safetensors.index.json").exists() == (name in IN_SHARDS)


@pytest.mark.parametrize("name", CASES)
def test_fused_softmax_is_offered_where_it_is_exact(name: str, checked: dict[str, dict[str, Any]]) -> None:
    exact = name not in ("sigmoid", "kernel_alibi")
    assert (checked[name]["sdpa"] is not None) == exact
    if exact:
        assert checked[name]["sdpa"] < 1e-4
        assert checked[name]["sdpa_padding"] < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_back_to_a_checkpoint_is_bitwise(
    name: str, checked: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    from_hf.convert(str(checked[name]["export"]), tmp_path / "back")
    before, after = StoredTensors(checked[name]["run"] / "step_0"), StoredTensors(tmp_path / "back")
    assert before.tensors == after.tensors
    for tensor, stored in before.tensors.items():
        layers = range(stored.shape[0]) if tensor.startswith("decoder.layers.") else [None]
        assert all(torch.equal(before.read(tensor, i), after.read(tensor, i)) for i in layers), tensor


@pytest.mark.parametrize("name", ["llama", "slot_window_t5"])
def test_layout_of_the_checkpoint_does_not_matter(
    name: str, checked: dict[str, dict[str, Any]], run_distributed: RunDistributed, tmp_path: Path
) -> None:
    start = checked[name]["run"] / "step_0"
    recipe = [*SMALL, *CASES[name][1], "parallel={tensor: 2, pipeline: 2}"]
    run_distributed(4, rank_writes, recipe, tmp_path / "run", start)
    to_hf.convert(tmp_path / "run" / "step_0", tmp_path / "export")
    weights = [f / "model.safetensors" for f in (checked[name]["export"], tmp_path / "export")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_slot_and_sink_token_have_weights_of_their_own(checked: dict[str, dict[str, Any]]) -> None:
    with_slot = {name for name, found in checked.items() if found["slot"] is not None}
    assert with_slot == {"sink_token_prefix", "slot_window_t5"}
    assert all(checked[name]["slot"] > 0 for name in with_slot)
