"""Open models of every family against float64 computed from what transformers itself returns."""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np
import pytest
import torch

from sinkbench.errors import DataError, PluginError
from sinkbench.measure.inputs import random_tokens
from sinkbench.measure.settings import Settings
from tests.largest_tensor import LargestTensor
from tests.unit.open_models import (
    FALCON_ALIBI,
    FAMILIES,
    GROUPED,
    HYBRID,
    LAYERS,
    ONE_KEY_HEAD,
    SIZES,
    VOCABULARY,
    opened,
    tiny_model,
)

pytest.importorskip("transformers")

from sinkbench.measure.hf import measure_open_model
from sinkbench.measure.hf_forwards import OpenForwards

LENGTH, COUNT = 12, 3
METRICS = (
    "{name: sink, k: [1, 2], total: [3]}",
    "norms",
    "{name: massive_activations, absolute: 1.0, relative: 4.0}",
    "outliers",
    "head_output",
)
ALL = {**FAMILIES, "llama/one kv head": ONE_KEY_HEAD}


def settings(**changes: Any) -> Settings:
    return Settings(**{"length": LENGTH, "count": COUNT, "metrics": METRICS, **changes})


def measured(model: Any, **changes: Any) -> dict[str, Any]:
    chosen = settings(**changes)
    (result,) = measure_open_model(opened(model), ["random"], chosen, lambda done, total: None)
    return result.metrics


def probe_tokens(model: Any) -> torch.Tensor:
    usable = opened(model).usable_tokens()
    return torch.as_tensor(random_tokens(usable, length=LENGTH, count=COUNT, seed=0))


class Truth:
    """What transformers returns of a model in float64: A [l, b, h, q, k], the residual stream after each
    layer [l, b, s, n], keys and values [l, b, g, s, d]."""

    def __init__(self, model: Any) -> None:
        from transformers import DynamicCache

        model = copy.deepcopy(model).double()
        model.set_experts_implementation("eager")  # the default has no float64
        last: list[torch.Tensor] = []
        modules = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == LAYERS]
        handle = modules[0][-1].register_forward_hook(
            lambda _, args, output: last.append(output[0] if isinstance(output, tuple) else output)
        )
        cache = DynamicCache()
        with torch.no_grad():
            returned = model(
                probe_tokens(model),
                past_key_values=cache,
                output_attentions=True,
                output_hidden_states=True,
            )
        handle.remove()
        self.weights = torch.stack(returned.attentions).numpy()
        self.hidden = torch.stack([*returned.hidden_states[1:-1], last[0]]).numpy()
        keys, values = ([getattr(layer, name) for layer in cache.layers] for name in ("keys", "values"))
        # Falcon's cache repeats keys and values for every head
        copies = keys[0].shape[1] // getattr(model.config, "num_kv_heads", keys[0].shape[1])
        self.key = torch.stack(keys)[:, :, ::copies].numpy()
        self.value = torch.stack(values)[:, :, ::copies].numpy()

    def alpha(self, proxy: bool) -> np.ndarray:
        """[l, b, h, k]"""
        weights = self.weights
        if proxy:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-8)
        alpha: np.ndarray = weights.sum(-2) / np.arange(LENGTH, 0, -1)
        return alpha


def check_sink(found: dict[str, Any], truth: Truth, eps: float) -> None:
    for kind in ("raw", "proxy"):
        alpha = truth.alpha(kind == "proxy")
        np.testing.assert_allclose(found[f"importance_{kind}"], alpha.mean(1), atol=2e-6)
        for k in (1, 2):
            expected = 100 * (alpha[..., k - 1] > eps).mean()
            assert found[f"sink_{k}_{kind}"] == pytest.approx(expected, abs=1e-4)
        total = 100 * (alpha[..., :3] > eps).sum(-1).mean()
        assert found[f"sink_total_3_{kind}"] == pytest.approx(total, abs=1e-4)
    assert "sink_slot" not in found
    assert found["row_sum"] == pytest.approx(truth.weights.sum(-1).mean(), abs=1e-6)


def check_norms(found: dict[str, Any], truth: Truth) -> None:
    for name, vectors in (("hidden", truth.hidden), ("key", truth.key), ("value", truth.value)):
        norm = np.sqrt((vectors**2).sum(-1))
        np.testing.assert_allclose(found[f"{name}_norm_tokens"], norm.mean(1), rtol=1e-5)
        np.testing.assert_allclose(found[f"{name}_norm_rest"], norm[..., 1:].mean(-1).mean(1), rtol=1e-5)
    ratio = norm[..., 0] / norm[..., 1:].mean(-1)
    assert found["value_drain"] == pytest.approx(ratio.mean(), rel=1e-5)


def check_activations(found: dict[str, Any], truth: Truth) -> None:
    size = np.abs(truth.hidden)
    median = np.median(size.reshape(*size.shape[:2], -1), axis=-1)
    massive = (size > 1.0) & (size >= 4.0 * median[..., None, None])
    dimensions = [sorted({int(n) for n in np.nonzero(layer)[2]}) for layer in massive]
    assert found["massive_dimensions"] == dimensions
    positions = [sorted({int(s) + 1 for s in np.nonzero(layer)[1]}) for layer in massive]
    assert found["massive_positions"] == positions
    assert found["massive_activations"] == pytest.approx(100 * massive.any((2, 3)).mean())
    flat = truth.hidden.reshape(*size.shape[:2], -1)
    centred = flat - flat.mean(-1, keepdims=True)
    kurtosis = (centred**4).mean(-1) / (flat.std(-1, ddof=1) ** 4 + 1e-6)
    assert found["kurtosis"] == pytest.approx(kurtosis.mean(), rel=1e-4)
    assert found["max_infinity_norm"] == pytest.approx(np.abs(flat).max(-1).mean(1).max(), rel=1e-5)


def check_head_output(found: dict[str, Any], truth: Truth) -> None:
    heads = truth.weights.shape[2]
    value = truth.value.repeat(heads // truth.value.shape[2], axis=2)
    norm = np.sqrt(((truth.weights @ value) ** 2).sum(-1))
    assert found["head_output_norm"] == pytest.approx(norm.mean(), rel=1e-5)
    np.testing.assert_allclose(found["head_output_norm_first_heads"], norm[..., 0].mean(1), rtol=1e-5)


@pytest.mark.parametrize("family", list(ALL))
def test_metrics_equal_those_of_what_transformers_returns(family: str) -> None:
    model = tiny_model(family.split("/")[0], ALL[family])
    truth = Truth(model)
    eps = float(np.median(truth.alpha(proxy=False)[..., 0]))
    sink = f"{{name: sink, k: [1, 2], eps: [{eps}], total: [3]}}"
    found = measured(model, metrics=(sink, *METRICS[1:]))
    check_sink(found, truth, eps)
    assert (found["row_sum"] < 0.99) is (family == "gpt_oss"), "its learned logit is in the sum of its rows"
    check_norms(found, truth)
    check_activations(found, truth)
    check_head_output(found, truth)
    assert 0 < found["sink_1_raw"] < 100, "the case must tell heads with a sink from those without"


def numbers(value: Any) -> list[float]:
    return [n for item in value for n in numbers(item)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("family", [*ALL, "falcon/alibi"])
def test_streaming_equals_whole_and_batches_do_not_matter(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = FALCON_ALIBI if family == "falcon/alibi" else ALL[family]
    model = tiny_model(family.split("/")[0], sizes)
    metrics = (*METRICS, "qk_split", "sink_cut", "{name: streaming_perplexity, cache: 6, first: 2}")
    whole = measured(model, metrics=metrics, attention="whole", batch_size=3)
    for module in ("sinkbench.api", "sinkbench.measure.hf_call"):
        monkeypatch.setattr(f"{module}.BLOCK_ELEMENTS", 5 * LENGTH * 4)  # blocks of a few queries
    streamed = measured(model, metrics=metrics, attention="streaming", batch_size=2)
    assert whole.keys() == streamed.keys()
    for name, value in whole.items():
        assert numbers(streamed[name]) == pytest.approx(numbers(value), rel=1e-5, abs=1e-5), name


def test_long_sequences_never_have_their_whole_weights_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from sinkbench.measure.hf_call import AttentionCall

    length, held = 2048, []
    rows = AttentionCall.rows

    def recorded(call: AttentionCall, start: int, end: int) -> torch.Tensor:
        block = rows(call, start, end)
        held.append(block.numel())
        return block

    monkeypatch.setattr(AttentionCall, "rows", recorded)
    for module in ("sinkbench.api", "sinkbench.measure.hf_call"):
        monkeypatch.setattr(f"{module}.BLOCK_ELEMENTS", 2**20)
    model = tiny_model("gemma2", {**FAMILIES["gemma2"], "max_position_embeddings": length})
    found = measured(model, length=length, count=1, metrics=())
    assert max(held) <= 2**20
    assert sum(held) >= length * length * 4 * LAYERS, "every row was seen"
    assert found["row_sum"] == pytest.approx(1, abs=1e-5)
    assert np.shape(found["importance_raw"]) == (LAYERS, 4, 64)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_oss", "falcon", "falcon/alibi", "bloom"])
def test_no_tensor_of_a_long_sequence_has_queries_times_keys(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = 256
    for module in ("sinkbench.api", "sinkbench.measure.hf_call"):
        monkeypatch.setattr(f"{module}.BLOCK_ELEMENTS", 2**14)
    sizes = FALCON_ALIBI if family == "falcon/alibi" else FAMILIES[family]
    if family != "bloom":
        sizes = {**sizes, "max_position_embeddings": length}
    model = tiny_model(family.split("/")[0], sizes)
    with LargestTensor() as largest:
        measured(model, length=length, count=1, metrics=(), attention="streaming")
    assert 2**13 < largest.elements < length**2


def test_alibi_of_falcon_is_added_once() -> None:
    """As transformers' sdpa attention does; its eager attention adds it twice."""
    from sinkbench.measure.hf_forwards import OpenForwards

    model, fused = (tiny_model("falcon", FALCON_ALIBI, attention) for attention in ("eager", "sdpa"))
    tokens = probe_tokens(model)
    losses = OpenForwards(model, tokens, batch_size=8, streaming=False).losses()
    with torch.no_grad():
        logits = fused(tokens).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_restricted_attention_equals_a_mask_given_to_transformers(family: str) -> None:
    from sinkbench.measure.hf_forwards import OpenForwards

    model = tiny_model(family, {**FAMILIES[family], "sliding_window": LENGTH})
    tokens = probe_tokens(model)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]
    allowed = (distance >= 0) & ((distance < 3) | (torch.arange(LENGTH) < 2)[None, :])
    mask = torch.zeros(COUNT, 1, LENGTH, LENGTH).masked_fill(~allowed, torch.finfo(torch.float32).min)
    kinds = {"full_attention": mask, "sliding_attention": mask}
    with torch.no_grad():
        logits = model(tokens, attention_mask=kinds if family in ("gemma2", "gpt_oss") else mask).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    for streaming in (False, True):
        forwards = OpenForwards(model, tokens, batch_size=2, streaming=streaming)
        found = forwards.losses(visible=lambda query, key: (query - key < 3) | (key < 2))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_linear_maps_are_changed_and_restored() -> None:
    from sinkbench.measure.hf_forwards import OpenForwards

    model = tiny_model("llama", FAMILIES["llama"])
    tokens = probe_tokens(model)
    forwards = OpenForwards(model, tokens, batch_size=8, streaming=False)
    before = forwards.losses()
    halved = forwards.losses(linear_weight=lambda w: w / 2, linear_input=lambda x: x * 2)
    torch.testing.assert_close(halved, before, rtol=1e-4, atol=1e-5)
    other = copy.deepcopy(model)
    for name, module in other.model.layers.named_modules():
        if name.endswith("_proj"):
            module.weight.data.mul_(0.5)
    expected = OpenForwards(other, tokens, batch_size=8, streaming=False).losses()
    torch.testing.assert_close(forwards.losses(linear_weight=lambda w: w / 2), expected)
    torch.testing.assert_close(forwards.losses(), before)


def test_inputs_of_linear_maps_are_whole_sequences() -> None:
    """OPT's feed-forward layers see positions of all sequences in one dimension."""
    from sinkbench.measure.hf_forwards import OpenForwards

    model = tiny_model("opt", FAMILIES["opt"])
    forwards = OpenForwards(model, probe_tokens(model), batch_size=2, streaming=False)
    shapes = set()

    def seen(x: torch.Tensor) -> torch.Tensor:
        shapes.add(x.shape[:-1])
        return x

    assert torch.equal(forwards.losses(linear_input=seen), forwards.losses())
    assert {shape[1:] for shape in shapes} == {(LENGTH,)}


def test_experts_in_one_tensor_cannot_be_quantised() -> None:
    with pytest.raises(DataError, match=r"holds experts in one tensor, .*; leave w8a8 out"):
        measured(tiny_model("mixtral", FAMILIES["mixtral"]), metrics=("w8a8",))


def test_convolutions_beside_attention_stay_as_they_are() -> None:
    assert "perplexity_change_w8a8" in measured(tiny_model("lfm2", HYBRID), metrics=("w8a8",))


def test_layers_without_attention_are_left_out_and_counted() -> None:
    model = tiny_model("lfm2", HYBRID)
    (result,) = measure_open_model(opened(model), ["random"], settings(), lambda done, total: None)
    assert result.layers_without_attention == 2
    with torch.no_grad():
        attentions = model(probe_tokens(model), output_attentions=True, use_cache=False).attentions
    alpha = [a for a in attentions if a is not None][-1].sum(-2) / torch.arange(LENGTH, 0, -1)
    np.testing.assert_allclose(result.metrics["importance_raw"], alpha.mean(0)[None], atol=2e-6)


def test_models_that_cannot_be_measured_say_so() -> None:
    mamba = tiny_model("mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2})
    mamba.config.num_attention_heads = 1
    with pytest.raises(DataError, match="no attention of it goes through transformers' attention interface"):
        measured(mamba)
    bert = tiny_model("bert", SIZES)
    with pytest.raises(DataError, match="not causal"):
        measured(bert)
    llama = tiny_model("llama", FAMILIES["llama"])
    with pytest.raises(DataError, match="64 positions, fewer than 65; lower --length"):
        measured(llama, length=65)
    with pytest.raises(PluginError, match=r"did you mean sink\?"):
        measured(llama, metrics=("sinks",))
    with pytest.raises(PluginError, match=r"data\.source indexed has no trigger tokens"):
        measured(llama, metrics=("trigger",))


@pytest.mark.parametrize("family", ["mamba", "mamba2", "rwkv"])
def test_models_without_attention_heads_say_so(family: str) -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    if family == "mamba2":
        sizes |= {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}
    model = tiny_model(family, sizes)
    with pytest.raises(DataError, match="no attention was found in its layers"):
        measured(model)


@pytest.mark.parametrize(
    ("family", "sizes", "name"),
    [
        (
            "gpt_neo",
            {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], **SIZES},
            "GPTNeoForCausalLM",
        ),
        ("mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4}, "MptForCausalLM"),
        ("xglm", {**SIZES, "d_model": 32, "num_layers": 2, "attention_heads": 4}, "XGLMForCausalLM"),
        ("doge", GROUPED, "DogeForCausalLM"),
    ],
)
def test_families_that_work_on_their_mask_say_so(family: str, sizes: dict[str, Any], name: str) -> None:
    model = tiny_model(family, sizes)
    problem = r"its forward pass fails .*; give --attention whole"
    if not model._supports_attention_backend:  # then whole weights cannot be had either
        problem = "no attention of it goes through transformers' attention interface"
        with pytest.raises(DataError, match=problem):
            measured(model, attention="whole")
    with pytest.raises(DataError, match=f"{name}: {problem}") as info:
        measured(model, attention="streaming")
    assert info.value.__cause__ is not None
    assert "\n" not in str(info.value)


def test_a_mask_that_the_model_changed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    made = modeling_llama.create_causal_mask
    monkeypatch.setattr(modeling_llama, "create_causal_mask", lambda **arguments: made(**arguments) + 1)
    llama = tiny_model("llama", FAMILIES["llama"])
    with pytest.raises(DataError, match=r"LlamaAttention: works on its mask, .*; give --attention whole"):
        measured(llama, attention="streaming")


FAULTS: list[tuple[BaseException, bool]] = [
    (IndexError("of the model\nand more"), True),
    (RuntimeError(), True),
    (KeyboardInterrupt(), False),
    (MemoryError(), False),
    (torch.OutOfMemoryError("CUDA out of memory"), False),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), False),
]


@pytest.mark.parametrize("metric", ["sink", "sink_cut"])
@pytest.mark.parametrize(("fault", "told"), FAULTS)
def test_only_what_the_models_code_raises_is_told_in_its_name(
    fault: BaseException, told: bool, metric: str
) -> None:
    llama = tiny_model("llama", FAMILIES["llama"])
    passes = []

    def fail(*_: Any) -> None:
        passes.append(1)
        if len(passes) == (1 if metric == "sink" else 2):
            raise fault

    llama.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(DataError if told else type(fault)) as info:
        measured(llama, metrics=(metric,), attention="whole")
    if told:
        first = str(fault).split("\n")[0] or type(fault).__name__
        assert isinstance(info.value, DataError)
        assert info.value.problem == f"its forward pass fails ({type(fault).__name__}: {first})"
        assert info.value.remedy == "measure another model"
        assert info.value.__cause__ is fault
    else:
        assert info.value is fault


def test_what_a_metric_raises_is_not_told_in_the_models_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def observe(self: Any, capture: Any) -> None:
        raise IndexError("of the metric")

    monkeypatch.setattr("sinkbench.measure.observations.Observations.add", observe)
    with pytest.raises(IndexError, match="of the metric"):
        measured(tiny_model("llama", FAMILIES["llama"]))
    tokens = torch.ones(1, LENGTH, dtype=torch.int64)
    forwards = OpenForwards(tiny_model("llama", FAMILIES["llama"]), tokens, batch_size=1, streaming=False)

    def fail(*_: Any) -> Any:
        raise IndexError("of the metric")

    for change in ("visible", "linear_weight", "linear_input"):
        with pytest.raises(IndexError, match="of the metric"):
            forwards.losses(**{change: fail})


def test_masks_that_cannot_be_changed_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some families of transformers 4 make them."""
    llama, falcon = (tiny_model(family, FAMILIES[family]) for family in ("llama", "falcon"))
    made = torch.ones(LENGTH, LENGTH).tril().log()[None, None]
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda **_: made)
    assert "sink_1_raw" in measured(llama, attention="whole")
    for changes in ({"attention": "streaming"}, {"metrics": ("sink_cut",)}):
        with pytest.raises(DataError, match="LlamaAttention: makes a mask of its own; install"):
            measured(llama, **changes)
    monkeypatch.setattr("sinkbench.measure.hf_fused.transformers.__version__", "4.57.6")
    with pytest.raises(DataError, match=r"FalconAttention: cannot be read with transformers 4\.57\.6"):
        measured(falcon)


@pytest.mark.parametrize("attention", ["whole", "streaming"])
def test_bos_is_the_first_token(attention: Literal["whole", "streaming"]) -> None:
    model = tiny_model("llama", FAMILIES["llama"])
    seen = []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    (result,) = measure_open_model(
        opened(model), ["repeat"], settings(bos=True, attention=attention), lambda done, total: None
    )
    handle.remove()
    assert result.bos
    assert result.length == LENGTH
    assert (seen[0][:, 0] == 1).all()
    assert (seen[0][:, 1:] == seen[0][:, 1:2]).all()


def test_special_tokens_may_be_lists() -> None:
    """As of LLaMA 3 Instruct."""
    model = tiny_model("llama", FAMILIES["llama"])
    # past the check of types, which configurations with code of their own lack
    vars(model.config).update(bos_token_id=[1, 4], eos_token_id=[2, 8, 9])
    usable = opened(model).usable_tokens()
    assert sorted(set(range(VOCABULARY)) - set(usable)) == [0, 1, 2, 4, 8, 9]
    assert opened(model).bos() == 1
    vars(model.config).update(bos_token_id=[])
    with pytest.raises(DataError, match="no beginning-of-sequence token; leave out --bos"):
        opened(model).bos()
