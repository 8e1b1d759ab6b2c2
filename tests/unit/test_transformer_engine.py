"""Transformer Engine and NVIDIA Apex where a recipe names them: attention through a stand-in, whose norms a
model gets, and one line where they are absent or cannot do it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sinkbench import manifest, packages, plugins, recipe
from sinkbench.api import NormalizationSpec
from sinkbench.attention import backends, transformer_engine
from sinkbench.config import Config
from sinkbench.errors import HostError, RecipeError, SinkbenchError
from sinkbench.megatron import norms
from sinkbench.model import declare
from tests import transformer_engine as stand_in
from tests.unit.test_attention_backends import CARD, VARIANTS, compare, declared, make_problem

ABLE = ["softmax", "sink logit of 20", "off by one", "value bias, scaled", "window", "window, sink logit"]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = SimpleNamespace(DotProductAttention=stand_in.DotProductAttention)
    monkeypatch.setattr(transformer_engine, "_module", lambda: module)
    transformer_engine._attention.cache_clear()
    yield
    transformer_engine._attention.cache_clear()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("name", ABLE)
def test_attention(name: str, kv_heads: int) -> None:
    compare(make_problem(name, kv_heads=kv_heads), "te", 1e-5)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "use", "lacks"),
    [
        ("softmax", CARD, ""),
        ("window, sink logit", CARD, ""),
        ("softmax", replace(CARD, deterministic=True), ""),
        ("sigmoid", CARD, "a similarity other than softmax"),
        ("key-value slot", replace(CARD, half=False), "an extra slot or float32 inputs"),
        ("softmax", replace(CARD, head_size=12), "a head size of 12"),
        ("softmax", replace(CARD, prefix=True, documents=True), "a bidirectional prefix or a document mask"),
        ("alibi", replace(CARD, position_bias=True), "a position bias"),
        (
            "softmax",
            replace(CARD, device="cpu", split_sequence=True),
            "attention on a CPU or a sequence split",
        ),
    ],
)
def test_it_is_taken_where_it_is_asked_for_and_can(name: str, use: backends.Use, lacks: str) -> None:
    spec, _ = declared(VARIANTS[name].attention, "none")
    assert backends.choose(spec, use, "auto").name != "te"
    if not lacks:
        assert backends.choose(spec, use, "te").name == "te"
        return
    with pytest.raises(RecipeError, match=f"^model.backend: te cannot compute {lacks}"):
        backends.choose(spec, use, "te")


def test_a_sink_before_there_was_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(DotProductAttention=lambda heads, size: None)
    monkeypatch.setattr(transformer_engine, "_module", lambda: module)
    spec, _ = declared("softmax_off_by_one", "none")
    with pytest.raises(RecipeError, match=r"te cannot compute a sink logit before Transformer Engine 2\.8"):
        backends.choose(spec, CARD, "te")


@pytest.mark.usefixtures("installed")
def test_no_kernel_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("No dot product attention backend is available for the provided inputs.")

    monkeypatch.setattr(stand_in.DotProductAttention, "forward", refuse)
    with pytest.raises(RecipeError, match=r"^model\.backend: te has no fused kernel .*; write auto$"):
        transformer_engine.run(make_problem("softmax"))


def test_absent() -> None:
    spec, _ = declared("softmax", "none")
    if transformer_engine._module() is not None:
        pytest.skip("it is here")
    with pytest.raises(RecipeError, match="te cannot compute a softmax without the package transformer_eng"):
        backends.choose(spec, CARD, "te")


def config_of(*overrides: str) -> Config:
    return recipe.to_config(recipe.load("default_60m", ["data={source: bigram_backcopy}", *overrides]))


@pytest.mark.parametrize(
    ("override", "present", "line"),
    [
        (
            "model.linears=te",
            "",
            "te is transformer_engine, which is not installed; install it, or write local",
        ),
        (
            "model.backend=te",
            "",
            "te is transformer_engine, which is not installed; install it, or write auto",
        ),
        ("model.norms=apex", "", "apex is NVIDIA Apex, which is not installed; install it, or write local"),
        (
            "model.norms=apex",
            "apex amp_C",
            "apex is NVIDIA Apex, which was built without fused_layer_norm_cuda; build it with ...",
        ),
        # Of another project by that name.
        (
            "optim.implementation=apex",
            "apex",
            "apex is NVIDIA Apex, which is not installed; install it, or ...",
        ),
    ],
)
def test_what_a_recipe_names_must_be_here(
    override: str, present: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(override)
    monkeypatch.setattr(packages, "find_spec", lambda name: name if name in present.split() else None)
    with pytest.raises(HostError) as caught:
        packages.check(config, on_card=True)
    expected = f"{override.split('=')[0]}: {line.removesuffix('...')}"
    assert str(caught.value).startswith(expected)
    monkeypatch.setattr(packages, "find_spec", lambda name: name)
    packages.check(config, on_card=True)
    with pytest.raises(HostError, match="which needs a CUDA card; write "):
        packages.check(config, on_card=False)


def test_float32_is_not_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: name)
    with pytest.raises(HostError, match=r"^model\.linears: te computes products of float32 in TF32"):
        packages.check(config_of("model.linears=te", "train.precision=fp32"), on_card=True)
    packages.check(config_of("model.norms=te", "train.precision=fp32"), on_card=True)


def test_a_recipe_that_names_none_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    packages.check(config_of(), on_card=False)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("model.linears=te",), ""),
        (("model.backend=te",), ""),
        (("model={linears: te, seq_length: 2048}", "train.fp8=blockwise"), ""),
        ((), "train.fp8 is for Transformer Engine's linear maps in bf16"),
        (
            ("model.linears=te", "train.precision=fp32"),
            "train.fp8 is for Transformer Engine's linear maps in",
        ),
        (("model={backend: te, linears: local}",), "train.fp8 is for Transformer Engine's linear maps in"),
        (
            ("model={linears: te, seq_length: 1000}", "measure.length=8"),
            "multiples of 16 .* model.seq_length is 1000",
        ),
        (("model={linears: te, ffn_hidden_size: 1540}",), "multiples of 16 .* model.ffn_hidden_size is 1540"),
        (
            ("model={linears: te, seq_length: 64}", "train.fp8=blockwise"),
            "multiples of 128 .* model.seq_length is 64",
        ),
    ],
)
def test_fp8_is_for_what_can_compute_in_it(overrides: Sequence[str], problem: str) -> None:
    values = ("train.fp8=tensorwise", *overrides)
    if not problem:
        assert config_of(*values).model.linear_maps == "te"
        return
    with pytest.raises(SinkbenchError, match=problem):
        config_of(*values)


def test_a_sink_token_does_not_go_with_fp8() -> None:
    config = config_of(
        "model={linears: te, attention: {name: softmax, sink_token: true}}", "train.fp8=tensorwise"
    )
    with pytest.raises(RecipeError, match=r"a sink token .* fp8 cannot take; remove train\.fp8"):
        declare(config, plugins.resolve(config, plugins.discover()), 65)


class Scaled(torch.nn.RMSNorm): ...


def spec_of(norm: torch.nn.Module) -> NormalizationSpec:
    return NormalizationSpec(norm=lambda size: norm)


def test_whose_norms_a_model_gets() -> None:
    theirs = [torch.nn.RMSNorm(8, eps=1e-5), torch.nn.LayerNorm(8)]
    own = [Scaled(8, eps=1e-5), torch.nn.LayerNorm(8, bias=False), torch.nn.RMSNorm(8), torch.nn.Identity()]
    for norm in theirs:
        assert norms.choose(None, "te", spec_of(norm), 8) == "te"
        assert norms.choose("apex", "auto", spec_of(norm), 8) == "apex"
        assert norms.choose("local", "te", spec_of(norm), 8) == "local"
    for norm in own:
        assert norms.choose(None, "te", spec_of(norm), 8) == "local"
        with pytest.raises(RecipeError, match=r"^model\.norms: te has torch's RMSNorm and LayerNorm with a"):
            norms.choose("te", "auto", spec_of(norm), 8)
    assert norms.choose(None, "auto", spec_of(theirs[0]), 8) == "local"


def test_apex_norms_have_the_plugin_s_values(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(FusedRMSNorm=torch.nn.RMSNorm, FusedLayerNorm=torch.nn.LayerNorm)
    monkeypatch.setitem(sys.modules, "apex", SimpleNamespace(normalization=found))
    for norm in (torch.nn.RMSNorm(8, eps=0.5), torch.nn.LayerNorm(8, eps=0.5)):
        torch.nn.init.normal_(norm.weight)
        made = norms.made(norm, "apex")
        assert made is not norm
        x = torch.randn(3, 8)
        torch.testing.assert_close(made(x), norm(x))


def test_the_log_names_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_version", {"transformer-engine": "2.11.0", "apex": "0.1"}.get)
    monkeypatch.setattr(packages, "is_installed", lambda package: True)

    def words(*overrides: str) -> str:
        config = config_of("model.attention=sigmoid", *overrides)
        return manifest.in_words(declare(config, plugins.resolve(config, plugins.discover()), 65))

    attention = "attention by the eager backend"
    assert words() == attention
    assert words("model.norms=apex") == f"{attention}, norms by apex; apex 0.1"
    found = words("model={linears: te, norms: te}", "train.fp8=tensorwise", "optim.implementation=apex")
    assert found == (
        f"{attention}, linears by te, norms by te, optimizer by apex, products in fp8 (tensorwise); "
        "apex 0.1, transformer-engine 2.11.0"
    )


def test_measurement_and_export_need_none_of_them() -> None:
    model = config_of("model={backend: te, norms: apex}").model.portable()
    assert (model.backend, model.linear_maps, model.norms) == ("auto", "local", "local")
