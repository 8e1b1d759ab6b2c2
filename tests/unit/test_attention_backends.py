"""Every variant through every backend that can compute it, against the eager reference in float64: outputs
and all gradients, of random inputs and of those that break kernels."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from sinkbench import plugins, recipe
from sinkbench.api import AttentionSpec, ParameterSpec, ScoreBias
from sinkbench.attention import flash_attn, flex, fused, linear, reference
from sinkbench.attention.backends import BACKENDS, Use, choose
from sinkbench.attention.reference import Problem
from sinkbench.errors import RecipeError
from sinkbench.model import declare
from tests.unit.attention_problem import converted

HEADS, HEAD_SIZE = 4, 16
RUN = {backend.name: backend.run for backend in BACKENDS}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Attributes:
    shift: added to all learned parameters of the attention: what starts at zero hides a missing gradient.
    """

    attention: str
    backends: tuple[str, ...]
    positional: str = "none"
    prefix: int = 0
    shift: float = 0.0


def softmax(attention: str = "softmax", **rest: Any) -> Variant:
    return Variant(attention=attention, backends=("eager", "sdpa", "flex", "triton"), **rest)


def similarity(attention: str, **rest: Any) -> Variant:
    return Variant(attention=attention, backends=("eager", "triton"), **rest)


def kernel(attention: str) -> Variant:
    return Variant(attention=attention, backends=("eager", "linear"))


VARIANTS = {
    "softmax": softmax(),
    "sink logit": softmax("{name: softmax, sink_logit: learned}"),
    "sink logit of 20": softmax("{name: softmax, sink_logit: learned}", shift=20.0),
    "off by one": softmax("softmax_off_by_one"),
    "key-value slot": softmax("{name: softmax, kv_bias: kv}"),
    "key-value slot of 20": softmax("{name: softmax, kv_bias: kv}", shift=20.0),
    "key slot": softmax("{name: softmax, kv_bias: k, value_norm: 2.0, kv_bias_shared: true}"),
    "value bias, scaled": softmax("{name: softmax, kv_bias: v, alpha: 0.5}"),
    "window": softmax("{name: softmax, window: 5}"),
    "window, sink logit": softmax("{name: softmax, window: 5, sink_logit: learned}"),
    "prefix": softmax(prefix=6),
    "prefix, window, slot": softmax("{name: softmax, window: 5, kv_bias: kv}", prefix=9),
    "prefix, sink logit": softmax("{name: softmax, sink_logit: learned}", prefix=6),
    "alibi": softmax(positional="alibi"),
    "alibi, window, off by one": softmax("{name: softmax_off_by_one, window: 7}", positional="alibi"),
    "t5": softmax(positional="{name: t5, buckets: 8, max_distance: 16, init_std: 1.0}"),
    "t5, prefix, slot of 20": softmax(
        "{name: softmax, kv_bias: kv}", positional="{name: t5, init_std: 1.0}", prefix=6, shift=20.0
    ),
    "sigmoid": similarity("{name: sigmoid, normalize: false}"),
    "sigmoid, normalised": similarity("sigmoid"),
    "sigmoid, learned bias": similarity("{name: sigmoid, normalize: false, bias: learned}"),
    "sigmoid, window": similarity("{name: sigmoid, window: 5}"),
    "elu": similarity("{name: elu, normalize: false}"),
    "elu, normalised": similarity("elu"),
    "kernel_identity": kernel("kernel_identity"),
    "kernel_identity, unnormalised": kernel("{name: kernel_identity, normalize: false}"),
    "kernel_elu": kernel("kernel_elu"),
    "kernel_elu, slot": kernel("{name: kernel_elu, kv_bias: kv}"),
    "kernel_mlp": kernel("kernel_mlp"),
    "kernel_mlp, unnormalised": kernel("{name: kernel_mlp, normalize: false}"),
}


@cache
def declared(attention: str, positional: str) -> tuple[AttentionSpec, ScoreBias | None]:
    sizes = f"head_size: {HEAD_SIZE}, num_attention_heads: {HEADS}, seq_length: 64"
    overrides = [f"model={{{sizes}}}", f"model.attention={attention}", f"model.positional={positional}"]
    config = recipe.to_config(recipe.load("demo.yaml", overrides))
    found = declare(config, plugins.resolve(config, plugins.discover()), 65)
    return found.attention, found.positional.score_bias


class Draw:
    """Random numbers of a case's own, rounded to its dtype."""

    def __init__(self, case: str, dtype: torch.dtype, device: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(case.encode()))
        self.dtype, self.device = dtype, device

    def __call__(self, *size: int) -> Tensor:
        x = torch.randn(size, generator=self.generator, dtype=torch.float64)
        return x.to(self.dtype).to(self.device)

    def parameter(self, spec: ParameterSpec, kv_heads: int, shift: float = 0.0) -> Tensor:
        sizes = {"heads": HEADS, "kv_heads": kv_heads, "head_size": HEAD_SIZE}
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        return (spec.mean + shift + (spec.std or 0.1) * self(*shape)).requires_grad_()


def make_problem(
    name: str,
    *,
    length: int = 37,
    kv_heads: int = HEADS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Problem:
    """Queries, keys and values are parts of one tensor, as a fused projection gives them."""
    variant = VARIANTS[name]
    spec, bias = declared(variant.attention, variant.positional)
    draw = Draw(f"{name} {length} {kv_heads}", dtype, device)
    mixed = draw(length, 2, HEADS + 2 * kv_heads, HEAD_SIZE)
    parts = mixed.split([HEADS, kv_heads, kv_heads], 2)
    if change is not None:
        parts = change(*parts)
    query, key, value = (x.detach().permute(1, 2, 0, 3).requires_grad_() for x in parts)
    position = torch.arange(length, device=device)
    return Problem(
        spec=spec,
        query_bhqd=query,
        key_bgkd=key,
        value_bgkd=value,
        position_q=position,
        position_k=position,
        aligned=True,
        scale=HEAD_SIZE**-0.5,
        heads=torch.arange(HEADS, device=device),
        parameters={n: draw.parameter(s, kv_heads, variant.shift) for n, s in spec.parameters.items()},
        position_bias=bias,
        position_parameters={
            n: draw.parameter(s, kv_heads) for n, s in (bias.parameters if bias else {}).items()
        },
        prefix=min(variant.prefix, length),
    )


def leaves(p: Problem) -> dict[str, Tensor]:
    named = {"query": p.query_bhqd, "key": p.key_bgkd, "value": p.value_bgkd}
    return {**named, **p.parameters, **{f"position {n}": x for n, x in p.position_parameters.items()}}


def in_float64(p: Problem) -> Problem:
    return converted(p, lambda x: x.detach().double().requires_grad_())


def results(p: Problem, run: Callable[[Problem], Tensor]) -> dict[str, Tensor]:
    """The output and the gradients of a function of it in which every element counts differently."""
    output = run(p)
    torch.manual_seed(1)
    direction = torch.randn(output.shape, dtype=torch.float64).to(output)
    inputs = leaves(p)
    grads = torch.autograd.grad(output, list(inputs.values()), direction, allow_unused=True)
    zeros = (torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs.values(), strict=True))
    return {"output": output.detach(), **dict(zip(inputs, zeros, strict=True))}


def compare(
    p: Problem,
    backend: str,
    tolerance: float,
    floor: float = 1e-6,
    truth: Callable[[Problem], Tensor] = reference.attend,
) -> None:
    """Relative errors of whole tensors, in which an element of the size of ``floor`` counts as nothing."""
    expected = results(in_float64(p), truth)
    for name, value in results(p, RUN[backend]).items():
        wanted = expected[name]
        assert value.isfinite().all(), name
        assert value.shape == wanted.shape
        error = float((value.double() - wanted).norm())
        allowed = tolerance * max(float(wanted.norm()), floor / tolerance * wanted.numel() ** 0.5)
        assert error <= allowed, f"{name}: {error / max(float(wanted.norm()), 1e-300):.1e}"


@pytest.fixture(autouse=True)
def _flex_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uncompiled, FlexAttention has a backward pass on a CPU too, which it refuses to users for its memory.
    It is traced for each shape, and a few of them only."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_attention, "_warn_once", lambda *_, **__: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pairs(*slow: str) -> list[Any]:
    """Variant and backend; those of slow backends are for the full suite."""
    return [
        pytest.param(name, backend, marks=[pytest.mark.full] if backend in slow else [])
        for name, variant in VARIANTS.items()
        for backend in variant.backends
    ]


def card_or_skip(backend: str) -> str:
    """The device for a backend here."""
    if torch.cuda.is_available():
        return "cuda"
    if backend == "triton":
        pytest.skip("needs a card; tests/unit/test_triton_elementwise.py runs it in the interpreter")
    return "cpu"


@pytest.mark.parametrize(("name", "backend"), pairs("flex"))
def test_random_inputs(name: str, backend: str) -> None:
    compare(make_problem(name, kv_heads=2, device=card_or_skip(backend)), backend, 1e-5)


def test_flex_as_a_sample() -> None:
    """Of what the full suite compares."""
    compare(make_problem("t5, prefix, slot of 20", kv_heads=2, device=card_or_skip("flex")), "flex", 1e-5)


@pytest.mark.parametrize(("name", "backend"), pairs("flex"))
def test_bf16(name: str, backend: str) -> None:
    """The eager form rounds scores themselves, and torch's masks the gradients of biases."""
    p = make_problem(name, dtype=torch.bfloat16, device=card_or_skip(backend))
    compare(p, backend, 2e-2 if backend in ("eager", "sdpa") else 1e-2, 1e-4)


@pytest.mark.full
@pytest.mark.parametrize("length", [1, 2, 130, 300])
@pytest.mark.parametrize(("name", "backend"), pairs())
def test_other_lengths(name: str, backend: str, length: int) -> None:
    compare(make_problem(name, length=length, kv_heads=1, device=card_or_skip(backend)), backend, 1e-5)


def all_equal(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones_like(query), torch.ones_like(key), value


def of_ten_thousands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of 2^14 and -2^14, exact in bf16."""
    sign = torch.where(key[..., :1] > 0, 1.0, -1.0).to(key)
    return torch.full_like(query, 64.0), 64.0 * sign.expand_as(key), value


def one_huge_key(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    key = key.clone()
    key[len(key) // 2] *= 2.0**10
    return query, key, value


def almost_nothing(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores about -30: rows of a sigmoid sum to less than the 1e-8 of their normaliser."""
    return 2.75 + 0.01 * query, -2.75 + 0.01 * key, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [all_equal, of_ten_thousands, one_huge_key, almost_nothing])
@pytest.mark.parametrize(("name", "backend"), pairs("flex"))
@pytest.mark.full
def test_scores_that_break_kernels(
    name: str, backend: str, change: Callable[..., Any], dtype: torch.dtype
) -> None:
    """What cancels to almost nothing is compared with the size of what cancels. In bf16 the products of huge
    keys are off by more than the differences of scores, so that they are only asked to stay finite."""
    p = make_problem(name, kv_heads=2, dtype=dtype, device=card_or_skip(backend), change=change)
    if dtype == torch.bfloat16 and change in (one_huge_key, almost_nothing):
        assert all(x.isfinite().all() for x in results(p, RUN[backend]).values())
        return
    tolerance, floor = {
        of_ten_thousands: (2e-3, 4e-3),  # of a log-sum-exp of 2^14 in float32
        almost_nothing: (1e-5, 3e-5),  # elu(s) + 1 = 0 from s = -17 on
    }.get(change, (1e-5, 1e-6))
    if dtype == torch.bfloat16:
        tolerance, floor = 3e-2, 1e-2
    compare(p, backend, tolerance, floor * float(max(x.detach().abs().max() for x in leaves(p).values())))


@pytest.mark.parametrize("length", [1, 5, 8, 21])
@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if "linear" in v.backends])
def test_linear_in_chunks(name: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "CHUNK", 4)
    compare(make_problem(name, length=length, kv_heads=2), "linear", 1e-5)
    compare(in_float64(make_problem(name, length=length, kv_heads=2)), "linear", 1e-12)


@pytest.mark.parametrize(
    ("length", "window", "prefix"),
    [
        (1, None, 0),
        (128, None, 0),
        (300, 100, 0),
        (513, 129, 0),
        (777, None, 400),
        (640, 300, 256),
        (130, 3, 130),
    ],
)
def test_blocks_of_the_mask(length: int, window: int | None, prefix: int) -> None:
    """As torch finds them, which looks at every pair."""
    device = torch.device("cpu")
    mask = flex.block_mask(length, window, prefix, device)
    assert mask.mask_mod is not None
    whole = flex_attention.create_mask(mask.mask_mod, 1, 1, length, length, "cpu")
    position = torch.arange(length)
    assert torch.equal(whole[0, 0], reference.allowed_qk(position, position, window, prefix))
    expected = flex_attention.create_block_mask(mask.mask_mod, None, None, length, length, "cpu", flex.BLOCK)
    for kind in ("kv", "full_kv", "q", "full_q"):
        assert blocks_of(mask, kind) == blocks_of(expected, kind)


def blocks_of(mask: flex_attention.BlockMask, kind: str, row: int = 0) -> list[list[int]]:
    counts, indices = getattr(mask, f"{kind}_num_blocks")[row, 0], getattr(mask, f"{kind}_indices")[row, 0]
    return [row[:count].tolist() for count, row in zip(counts, indices, strict=True)]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The graphs that are made of what would be compiled on a card."""
    graphs: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.code)
        return graph.forward

    monkeypatch.setattr(flex, "COMPILER", compiler)
    flex._compile.cache_clear()
    yield graphs
    flex._compile.cache_clear()


def attend_compiled(length: int) -> Tensor:
    x = torch.randn(1, HEADS, length, HEAD_SIZE)
    mask = flex.block_mask(length, None, 0, torch.device("cpu"))
    return flex.compiled(x, x, x, None, None, mask, 0.25, False)[0]


def test_flex_is_compiled_for_any_number_of_shapes(traced: list[str]) -> None:
    """Dynamo itself gives up on a function after a few, eight by default."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for length in (20, 21, 22, 23, 20, 21, 22, 23):
            attend_compiled(length)
    assert len(traced) == 4


def test_flex_never_falls_back_in_silence(traced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "COMPILED_SHAPES", 2)
    attend_compiled(20)
    attend_compiled(21)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        attend_compiled(22)


CARD = Use(device="cuda", head_size=64)


@pytest.mark.parametrize(
    ("name", "use", "chosen"),
    [
        ("softmax", CARD, "sdpa"),
        ("sink logit", CARD, "sdpa"),
        ("window, sink logit", CARD, "triton"),
        ("window, sink logit", replace(CARD, head_size=256), "sdpa"),
        ("window, sink logit", replace(CARD, device="cpu"), "sdpa"),
        ("softmax", replace(CARD, deterministic=True), "triton"),
        ("prefix, sink logit", replace(CARD, prefix=True), "sdpa"),
        ("prefix, window, slot", replace(CARD, prefix=True), "triton"),
        ("window", replace(CARD, half=False), "triton"),
        ("alibi", replace(CARD, position_bias=True), "triton"),
        ("alibi", replace(CARD, position_bias=True, head_size=72), "flex"),
        ("alibi", replace(CARD, position_bias=True, split_sequence=True), "sdpa"),
        ("t5", replace(CARD, position_bias=True, learned_bias=True, deterministic=True), "triton"),
        ("t5", replace(CARD, position_bias=True, learned_bias=True, head_size=72), "flex"),
        (
            "t5",
            replace(CARD, position_bias=True, learned_bias=True, head_size=72, deterministic=True),
            "sdpa",
        ),
        ("alibi", replace(CARD, position_bias=True, head_size=8), "sdpa"),
        ("alibi", replace(CARD, position_bias=True, device="cpu"), "sdpa"),
        ("kernel_mlp", CARD, "linear"),
        ("kernel_identity", replace(CARD, split_sequence=True), "eager"),
    ],
)
def test_choice(name: str, use: Use, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "is_installed", lambda: True)
    assert choose(declared(VARIANTS[name].attention, "none")[0], use, "auto").name == chosen


@pytest.mark.parametrize(
    ("name", "use", "chosen"),
    [
        ("softmax", CARD, "sdpa"),
        ("softmax", replace(CARD, replayed=True), "flash"),
        ("prefix, window, slot", replace(CARD, replayed=True), "flash"),
        ("softmax", replace(CARD, replayed=True, deterministic=True), "triton"),
        ("softmax", replace(CARD, replayed=True, head_size=256), "sdpa"),
        ("softmax", replace(CARD, replayed=True, half=False), "sdpa"),
        ("alibi", replace(CARD, replayed=True, position_bias=True), "triton"),
    ],
)
def test_choice_with_flash_attention_4(
    name: str, use: Use, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "is_installed", lambda: True)
    monkeypatch.setattr(flash_attn, "has_four", lambda: True)
    monkeypatch.setattr(flash_attn, "_kernel", lambda: object())
    assert choose(declared(VARIANTS[name].attention, "none")[0], use, "auto").name == chosen


@pytest.mark.parametrize(
    ("name", "use", "requested", "lacks"),
    [
        (
            "sigmoid",
            replace(CARD, split_sequence=True, head_size=8),
            "flex",
            "a sequence split by context parallelism or a similarity other than softmax or a head size of 8",
        ),
        ("softmax", replace(CARD, device="cpu"), "flex", "attention on a CPU, where it holds T x T scores"),
        (
            "sigmoid, window",
            replace(CARD, position_bias=True, prefix=True),
            "linear",
            "a position bias or a bidirectional prefix or weights that are no product of feature maps"
            " or a window",
        ),
    ],
)
def test_a_pinned_backend_lists_all_that_it_lacks(name: str, use: Use, requested: str, lacks: str) -> None:
    spec, _ = declared(VARIANTS[name].attention, "none")
    with pytest.raises(RecipeError) as caught:
        choose(spec, use, requested)
    problem = f"{requested} cannot compute {lacks}, which the attention needs here"
    assert str(caught.value) == f"model.backend: {problem}; write auto or eager"
