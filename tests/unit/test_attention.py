"""The attention reference against formulas written out row by row in float64, and its other ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from sinkbench import plugins, recipe
from sinkbench.api import AttentionSpec, Elementwise, ExtraSlot, ParameterSpec, ScoreBias, Softmax
from sinkbench.attention import backends, reference, sdpa
from sinkbench.attention.backends import Use
from sinkbench.attention.reference import Problem
from sinkbench.errors import RecipeError
from sinkbench.model import declare

BATCH, LENGTH, HEADS, HEAD_SIZE = 2, 9, 4, 6
SCALE = 0.7
ON_CPU = Use(device="cpu", head_size=HEAD_SIZE)

Row = Callable[[Tensor], Tensor]
"""Scores of the keys a query sees -> their weights, float64."""


def softmax(score: Tensor) -> Tensor:
    return score.exp() / score.exp().sum()


def off_by_one(score: Tensor) -> Tensor:
    return score.exp() / (1 + score.exp().sum())


def sigmoid(score: Tensor) -> Tensor:
    return 1 / (1 + (-score).exp())


def normalized_sigmoid(score: Tensor) -> Tensor:
    return sigmoid(score) / (sigmoid(score).sum() + 1e-8)


def absolute(score: Tensor) -> Tensor:
    total = score.sum().abs()
    return score / total if total > 1 else score


@cache
def declared(attention: str) -> AttentionSpec:
    """What a plugin declares for the demo recipe, of sequences of 64 tokens."""
    config = recipe.to_config(recipe.load("demo.yaml", [f"model.attention={attention}"]))
    return declare(config, plugins.resolve(config, plugins.discover()), 65).attention


VARIANTS: dict[str, tuple[Callable[[], AttentionSpec], Row, float]] = {
    "softmax": (lambda: declared("softmax"), softmax, 0.0),
    "off by one": (lambda: declared("softmax_off_by_one"), off_by_one, 0.0),
    "sigmoid normalized": (lambda: declared("{name: sigmoid, normalize: true}"), normalized_sigmoid, 0.0),
    "sigmoid unnormalized": (lambda: declared("{name: sigmoid, normalize: false}"), sigmoid, 0.0),
    "sigmoid with -log n": (
        lambda: declared("{name: sigmoid, normalize: false, bias: fixed}"),
        sigmoid,
        -4.1588830833596715,  # -log 64
    ),
    "absolute sum": (
        lambda: AttentionSpec(rule=Elementwise(function=lambda s: s, normalize="abs")),
        absolute,
        0.0,
    ),
}
"""What declares it, its formula, the bias on every score."""


def make_problem(
    spec: AttentionSpec, *, kv_heads: int = HEADS, dtype: torch.dtype = torch.float32
) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def tensor(heads: int) -> Tensor:
        x = torch.randn(BATCH, heads, LENGTH, HEAD_SIZE, generator=generator, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    position = torch.arange(LENGTH)
    return Problem(
        spec=spec,
        query_bhqd=tensor(HEADS),
        key_bgkd=tensor(kv_heads),
        value_bgkd=tensor(kv_heads),
        position_q=position,
        position_k=position,
        aligned=True,
        scale=SCALE,
        heads=torch.arange(HEADS),
    )


def tensors(problem: Problem) -> list[Tensor]:
    return [problem.query_bhqd, problem.key_bgkd, problem.value_bgkd]


def by_rows(problem: Problem, row: Row, bias_h: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Weights, output, and copies of the inputs that these follow from, in float64."""
    inputs = [x.detach().double().requires_grad_() for x in tensors(problem)]
    query, key, value = inputs
    window = problem.spec.window or LENGTH
    weights, outputs = [], []
    for b in range(BATCH):
        for h in range(HEADS):
            g = h * key.shape[1] // HEADS
            for i in range(LENGTH):
                first = max(0, i - window + 1)
                score = SCALE * (key[b, g, first : i + 1] @ query[b, h, i]) + bias_h[h]
                weight = torch.cat([score.new_zeros(first), row(score), score.new_zeros(LENGTH - i - 1)])
                weights.append(weight)
                outputs.append(weight @ value[b, g])
    shape = (BATCH, HEADS, LENGTH, -1)
    return torch.stack(weights).view(shape), torch.stack(outputs).view(shape), inputs


def assert_close(actual: Tensor | None, expected: Tensor | None, tolerance: float = 1e-5) -> None:
    assert actual is not None
    assert expected is not None
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a function of the output in which every element counts differently."""
    factor = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return list(torch.autograd.grad((factor * output).sum(), inputs))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kv_heads", [HEADS, 2, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_formula(variant: str, kv_heads: int, window: int | None) -> None:
    make, row, bias = VARIANTS[variant]
    problem = make_problem(replace(make(), window=window), kv_heads=kv_heads)
    expected_weights, expected, inputs = by_rows(problem, row, torch.full((HEADS,), bias))
    weights, slot = reference.weights(problem)
    output = reference.attend(problem)
    assert slot is None
    assert_close(weights, expected_weights)
    assert_close(output, expected)
    for actual, wanted in zip(gradients(output, tensors(problem)), gradients(expected, inputs), strict=True):
        assert_close(actual, wanted)


LEARNED = torch.tensor([-1.5, 0.0, 0.5, 2.0])


def test_learned_score_bias() -> None:
    spec = declared("{name: sigmoid, normalize: false, bias: learned, bias_init: -1.0}")
    (name,) = spec.parameters
    assert spec.parameters[name] == ParameterSpec(shape=("heads",), mean=-1.0)
    parameter = LEARNED.clone().requires_grad_()
    problem = replace(make_problem(spec), parameters={name: parameter})
    bias = LEARNED.double().requires_grad_()
    _, expected, _ = by_rows(problem, sigmoid, bias)
    output = reference.attend(problem)
    assert_close(output, expected)
    assert_close(gradients(output, [parameter])[0], gradients(expected, [bias])[0])


def test_learned_sink_logit() -> None:
    """A head's sink is one more score, whose weight goes nowhere."""
    spec = AttentionSpec(rule=Softmax(sink_logit="s"), parameters={"s": ParameterSpec(shape=("heads",))})
    parameter = LEARNED.clone().requires_grad_()
    problem = replace(make_problem(spec), parameters={"s": parameter})
    sink = LEARNED.double().requires_grad_()
    plain, _, inputs = by_rows(problem, lambda score: score.exp(), torch.zeros(HEADS))
    weights = plain / (plain.sum(-1, keepdim=True) + sink.exp()[:, None, None])
    output = reference.attend(problem)
    expected = weights @ inputs[2]
    assert_close(output, expected)
    assert_close(gradients(output, [parameter])[0], gradients(expected, [sink])[0])


def test_large_scores_stay_finite() -> None:
    for make, *_ in VARIANTS.values():
        problem = replace(make_problem(make()), scale=1e4)
        output = reference.attend(problem)
        assert all(bool(x.isfinite().all()) for x in [output, *gradients(output, tensors(problem))])


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_of_queries_equal_the_whole(variant: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows at a time leave a last block of one."""
    problem = make_problem(replace(VARIANTS[variant][0](), window=5), kv_heads=2, dtype=torch.float64)
    whole = reference.attend(problem)
    expected = gradients(whole, tensors(problem))
    blocks: list[int] = []
    block = reference._attend_block

    def counted(p: Problem, query_bhqd: Tensor, position_q: Tensor) -> Tensor:
        blocks.append(query_bhqd.shape[2])
        return block(p, query_bhqd, position_q)

    monkeypatch.setattr(reference, "_attend_block", counted)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", rows * BATCH * HEADS * LENGTH)
    output = reference.attend(problem)
    assert sum(blocks) == LENGTH
    assert max(blocks) == rows
    assert_close(output, whole, 1e-12)
    for actual, wanted in zip(gradients(output, tensors(problem)), expected, strict=True):
        assert_close(actual, wanted, 1e-12)


def slopes(distance: Tensor, heads: Tensor, parameters: object) -> Tensor:
    return -0.1 * (heads + 1)[:, None, None] * distance.float()


SDPA_PROBLEMS: dict[str, Callable[[Problem], Problem]] = {
    "causal": lambda p: p,
    "window": lambda p: replace(p, spec=replace(p.spec, window=3)),
    "prefix": lambda p: replace(p, prefix=4),
    "position bias": lambda p: replace(p, position_bias=ScoreBias(function=slopes)),
    "position bias and window": lambda p: replace(
        p, position_bias=ScoreBias(function=slopes), spec=replace(p.spec, window=4)
    ),
    "score bias": lambda p: replace(p, spec=replace(p.spec, score_bias=2.0)),
    "some queries": lambda p: replace(
        p,
        query_bhqd=p.query_bhqd[:, :, [1, 2, 7]].detach().requires_grad_(),
        position_q=p.position_q[[1, 2, 7]],
        aligned=False,
    ),
}


PER_KV_HEAD = ParameterSpec(shape=("kv_heads", "head_size"), std=1.0)
SHARED = ParameterSpec(shape=("head_size",), std=1.0)
PER_HEAD = ParameterSpec(shape=("heads",), mean=1.0, std=1.0)
SOFTMAX_SPECS: dict[str, AttentionSpec] = {
    "plain": AttentionSpec(rule=Softmax()),
    "scaled": AttentionSpec(
        rule=Softmax(),
        output_scale=0.3,
        output_bias="bias",
        parameters={"bias": ParameterSpec(shape=("heads", "head_size"), std=1.0)},
    ),
    "off by one": AttentionSpec(rule=Softmax(sink_logit=0.0)),
    "sink logit and biased scores": AttentionSpec(
        rule=Softmax(sink_logit="logit"), score_bias="bias", parameters={"logit": PER_HEAD, "bias": PER_HEAD}
    ),
    "slot": AttentionSpec(
        rule=Softmax(),
        extra_slot=ExtraSlot(key="key", value="value"),
        parameters={"key": PER_KV_HEAD, "value": PER_KV_HEAD},
    ),
    "shared slot of value zero, and a sink logit": AttentionSpec(
        rule=Softmax(sink_logit="logit"),
        extra_slot=ExtraSlot(key="key"),
        parameters={"key": SHARED, "logit": PER_HEAD},
    ),
    "slot of a fixed value": AttentionSpec(
        rule=Softmax(),
        extra_slot=ExtraSlot(key="key", value=(2.0,) * HEAD_SIZE),
        parameters={"key": PER_KV_HEAD},
    ),
}


def with_parameters(problem: Problem) -> Problem:
    """Random values of the declared parameters."""
    sizes = {"heads": HEADS, "kv_heads": problem.key_bgkd.shape[1], "head_size": HEAD_SIZE}
    generator = torch.Generator().manual_seed(1)
    values = {}
    for name, declaration in problem.spec.parameters.items():
        shape = [sizes[size] if isinstance(size, str) else size for size in declaration.shape]
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = (declaration.mean + declaration.std * x).to(problem.query_bhqd.dtype)
        values[name] = x.requires_grad_()
    return replace(problem, parameters=values)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("name", SDPA_PROBLEMS)
@pytest.mark.parametrize("variant", SOFTMAX_SPECS)
def test_sdpa_equals_eager(variant: str, name: str, kv_heads: int) -> None:
    whole = with_parameters(make_problem(SOFTMAX_SPECS[variant], kv_heads=kv_heads, dtype=torch.float64))
    problem = SDPA_PROBLEMS[name](whole)
    chosen = backends.choose(problem.spec, ON_CPU, "auto")
    assert chosen.name == "sdpa"
    output, expected = chosen.run(problem), reference.attend(problem)
    assert_close(output, expected, 1e-10)
    replaced = {"bias"} if problem.spec.score_bias == 2.0 and problem.spec.output_bias is None else set()
    used = [value for key, value in problem.parameters.items() if key not in replaced]
    inputs = [*tensors(problem), *used]
    for actual, wanted in zip(gradients(output, inputs), gradients(expected, inputs), strict=True):
        assert_close(actual, wanted, 1e-9)


@pytest.mark.parametrize("variant", ["sink logit and biased scores", "slot"])
def test_sdpa_in_bf16(variant: str) -> None:
    problem = with_parameters(make_problem(SOFTMAX_SPECS[variant], kv_heads=2, dtype=torch.bfloat16))
    inputs = [*tensors(problem), *problem.parameters.values()]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = replace(
        problem,
        query_bhqd=wide[0],
        key_bgkd=wide[1],
        value_bgkd=wide[2],
        parameters=dict(zip(problem.parameters, wide[3:], strict=True)),
    )
    output, expected = sdpa.run(problem), reference.attend(exact)
    found = [output, *gradients(output, inputs)]
    for actual, wanted in zip(found, [expected, *gradients(expected, wide)], strict=True):
        assert actual is not None
        assert wanted is not None
        assert (actual.double() - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e4])
@pytest.mark.parametrize("logit", [-20.0, 20.0])
def test_a_sink_of_any_size(scale: float, logit: float) -> None:
    """All weight on the sink, none on it, scores that are all alike or that differ by thousands."""
    spec = AttentionSpec(rule=Softmax(sink_logit="logit"), parameters={"logit": PER_HEAD})
    problem = replace(make_problem(spec, dtype=torch.float64), scale=scale)
    sink = torch.full((HEADS,), logit, dtype=torch.float64, requires_grad=True)
    problem = replace(problem, parameters={"logit": sink})
    output, expected = sdpa.run(problem), reference.attend(problem)
    assert_close(output, expected, 1e-10)
    inputs = [*tensors(problem), sink]
    for actual, wanted in zip(gradients(output, inputs), gradients(expected, inputs), strict=True):
        assert torch.isfinite(actual).all()
        assert_close(actual, wanted, 1e-9)


def test_queries_of_any_positions() -> None:
    """A context-parallel rank holds some of the queries and sees all keys."""
    for make, *_ in VARIANTS.values():
        problem = make_problem(make())
        some = SDPA_PROBLEMS["some queries"](problem)
        assert_close(reference.attend(some), reference.attend(problem)[:, :, [1, 2, 7]])
        assert_close(reference.weights(some)[0], reference.weights(problem)[0][:, :, [1, 2, 7]])


def test_prefix_sees_itself() -> None:
    position = torch.arange(5)
    allowed = reference.allowed_qk(position, position, prefix=3)
    assert allowed.int().tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize(
    ("attention", "lack"),
    [
        ("{name: sigmoid, normalize: false}", "a similarity other than softmax"),
        ("kernel_elu", "a similarity other than softmax or a feature map"),
    ],
)
def test_backend_that_cannot(attention: str, lack: str) -> None:
    spec = declared(attention)
    with pytest.raises(RecipeError, match=f"sdpa cannot compute {lack}, which the attention needs here"):
        backends.choose(spec, ON_CPU, "sdpa")


def test_measured_weights_are_float32() -> None:
    """Those of a bf16 model: its queries and keys, without the rounding of their products."""
    spec = AttentionSpec(rule=Softmax())
    problem = make_problem(spec, dtype=torch.bfloat16)
    expected, _, _ = by_rows(problem, softmax, torch.zeros(HEADS))
    weights, _ = reference.weights(problem.in_float32())
    assert weights.dtype == torch.float32
    assert_close(weights, expected)


@pytest.mark.parametrize("rotated", [4, 6])
def test_rotary(rotated: int) -> None:
    """Dimensions j and j + r/2 are one complex number, turned by position x base^(-2j/r)."""
    position = torch.tensor([0, 1, 5, 8])
    x = torch.randn(4, HEAD_SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    half = rotated // 2
    angle = position[:, None] * 100.0 ** (-2 * torch.arange(half, dtype=torch.float64) / rotated)
    turned = torch.complex(x[:, :half], x[:, half:rotated]) * torch.polar(torch.ones_like(angle), angle)
    cos, sin = reference.rotation(position, rotated, 100.0)
    expected = torch.cat([turned.real, turned.imag, x[:, rotated:]], 1)
    assert_close(reference.rotate(x, cos, sin), expected, 1e-6)
