"""Every kind of model, exported and loaded by a process that has transformers alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from sinkbench.testing import RunDistributed
from tests.distributed.export_runs import (
    Exported,
    How,
    assert_comes_back,
    assert_computes_the_same,
    assert_layout_does_not_matter,
    assert_same_metrics,
    export_and_check,
)
from tests.distributed.exports import LLAMA, SMALL
from tests.distributed.runs import prepare

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
    "sink_token_slot": (
        "SinkbenchForCausalLM",
        (LLAMA, "model={attention: {name: softmax, sink_token: true, kv_bias: kv}}"),
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


@pytest.fixture(scope="module")
def exported(
    run_distributed: RunDistributed, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Exported]:
    """Each case, exported as several small files and their index."""
    configs = {name: prepare([*SMALL, *overrides])[0] for name, (_, overrides) in CASES.items()}
    root = tmp_path_factory.mktemp("exports")
    return export_and_check(run_distributed, configs, root, How(shard_bytes=20_000))


@pytest.mark.parametrize("name", CASES)
def test_export_computes_the_same(name: str, exported: dict[str, Exported]) -> None:
    one = exported[name]
    assert one.found["class"] == CASES[name][0]
    assert len(list(one.export.glob("model-*.safetensors"))) > 1
    assert_computes_the_same(one)


@pytest.mark.parametrize("name", CASES)
def test_fused_softmax_is_offered_where_it_is_exact(name: str, exported: dict[str, Exported]) -> None:
    exact = name not in ("sigmoid", "kernel_alibi")
    assert (exported[name].found["sdpa"] is not None) == exact


@pytest.mark.parametrize("name", CASES)
def test_sink_of_the_export_is_that_of_the_run(name: str, exported: dict[str, Exported]) -> None:
    assert_same_metrics(exported[name].of_export, exported[name].of_run)


def test_rows_hold_the_sink_token_and_the_slot(exported: dict[str, Exported]) -> None:
    """Softmax's sum to 1, so that raw and proxy are the same."""
    for found in (exported["sink_token_slot"].of_run, exported["sink_token_slot"].of_export):
        assert found["row_sum"] == pytest.approx(1, abs=1e-5)
        assert found["importance_1_raw"] == pytest.approx(found["importance_1_proxy"], rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_back_to_a_checkpoint_is_bitwise(name: str, exported: dict[str, Exported], tmp_path: Path) -> None:
    assert_comes_back(exported[name], tmp_path / "back")


@pytest.mark.parametrize("name", CASES)
def test_layout_of_the_checkpoint_does_not_matter(name: str, exported: dict[str, Exported]) -> None:
    assert_layout_does_not_matter(exported[name])


def test_a_prefix_is_not_read_in_parts(exported: dict[str, Exported]) -> None:
    """What is cached would not have seen the rest."""
    short = {name: one.found["short"] for name, one in exported.items()}
    line = (
        "the cache holds 2 of the first 5 tokens, which see one another; give all 5 in one call, or set "
        "use_cache=False"
    )
    assert short.pop("sink_token_prefix") == [line, line]
    assert all(found == [None, None] for found in short.values())


def test_slot_and_sink_token_have_weights_of_their_own(exported: dict[str, Exported]) -> None:
    slots = {name: one.found["slot"] for name, one in exported.items()}
    assert {name for name, slot in slots.items() if slot is not None} == {
        "sink_token_prefix",
        "sink_token_slot",
        "slot_window_t5",
    }
    assert all(slot > 0 for slot in slots.values() if slot is not None)
