"""Every attention variant, score bias, mask and loss of the first-party plugins against its formula.

The formulas are written here again, one query at a time, in float64, from the paper (Gu et al. 2410.10781)
and the papers that it cites: not from the plugins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sinkbench import plugins
from sinkbench.api import AttentionSpec, BuildContext, DataTransform, LossSpec, PositionalSpec, Softmax
from sinkbench.attention import reference
from sinkbench.attention.backends import Use, choose
from sinkbench.attention.reference import Problem
from sinkbench.plugins import PluginIndex

BATCH, HEADS, KV_HEADS, LENGTH = 2, 4, 2, 7


@pytest.fixture(scope="module")
def index() -> PluginIndex:
    return plugins.discover()


def build(index: PluginIndex, kind: str, name: str, head_size: int = 64, **params: Any) -> Any:
    plugin = index.get(kind, name).plugin
    context = BuildContext(
        num_layers=2,
        hidden_size=HEADS * head_size,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_size=head_size,
        seq_length=LENGTH,
        num_positions=LENGTH,
        vocab_size=50,
        config=SimpleNamespace(seed=7),  # type: ignore[arg-type]
    )
    return plugin.build(plugin.params.model_validate(params), context)


# --- the formulas -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Formula:
    """One row of attention weights from its scores s [keys], the slot last where there is one; and phi,
    the feature map of queries and keys."""

    weights: Callable[[Tensor, dict[str, Tensor], int], Tensor]
    phi: Callable[[Tensor, dict[str, Tensor]], Tensor] = lambda x, _: x


def elu_plus_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def softmax(alpha: float = 1.0, sink: str | None = None) -> Formula:
    def weights(s: Tensor, learned: dict[str, Tensor], head: int) -> Tensor:
        rest = {None: 0.0, "one": 1.0}.get(sink)
        extra = learned["sink_logit"][head].exp() if rest is None else rest
        return alpha * s.exp() / (s.exp().sum() + extra)

    return Formula(weights=weights)


def similarity(f: Callable[[Tensor], Tensor], normalize: bool, bias: str | float = 0.0) -> Formula:
    def weights(s: Tensor, learned: dict[str, Tensor], head: int) -> Tensor:
        w = f(s + (learned[bias][head] if isinstance(bias, str) else bias))
        return w / (w.sum() + 1e-8) if normalize else w

    return Formula(weights=weights)


def kernel(phi: Callable[[Tensor, dict[str, Tensor]], Tensor], normaliser: str) -> Formula:
    def weights(s: Tensor, learned: dict[str, Tensor], head: int) -> Tensor:
        if normaliser == "none":
            return s
        return s / (s.sum() + 1e-8 if normaliser == "sum" else s.sum().abs().clamp(min=1))

    return Formula(weights=weights, phi=phi)


def identity(x: Tensor, _: dict[str, Tensor]) -> Tensor:
    return x


def elu_kernel(x: Tensor, _: dict[str, Tensor]) -> Tensor:
    return elu_plus_one(x)


def mlp(x: Tensor, learned: dict[str, Tensor]) -> Tensor:
    return learned["kernel_2"] @ (learned["kernel_1"] @ x).clamp(min=0)


FAMILIES: dict[str, tuple[str, dict[str, Any], Formula]] = {
    "softmax": ("softmax", {}, softmax()),
    "scaled": ("softmax", {"alpha": 0.2}, softmax(0.2)),
    "sink logit": ("softmax", {"sink_logit": "learned"}, softmax(sink="learned")),
    "off by one": ("softmax_off_by_one", {"alpha": 2.0}, softmax(2.0, "one")),
    "sigmoid": ("sigmoid", {"normalize": False}, similarity(torch.sigmoid, False)),
    "sigmoid normalised": ("sigmoid", {}, similarity(torch.sigmoid, True)),
    "sigmoid fixed bias": (
        "sigmoid",
        {"normalize": False, "bias": "fixed"},
        similarity(torch.sigmoid, False, -math.log(LENGTH)),
    ),
    "sigmoid learned bias": (
        "sigmoid",
        {"normalize": False, "bias": "learned"},
        similarity(torch.sigmoid, False, "score_bias"),
    ),
    "elu": ("elu", {"normalize": False}, similarity(elu_plus_one, False)),
    "elu normalised": ("elu", {}, similarity(elu_plus_one, True)),
    "kernel identity": ("kernel_identity", {"normalize": False}, kernel(identity, "none")),
    "kernel identity normalised": ("kernel_identity", {}, kernel(identity, "abs")),
    "kernel elu": ("kernel_elu", {"normalize": False}, kernel(elu_kernel, "none")),
    "kernel elu normalised": ("kernel_elu", {}, kernel(elu_kernel, "sum")),
    "kernel mlp": ("kernel_mlp", {"normalize": False}, kernel(mlp, "none")),
    "kernel mlp normalised": ("kernel_mlp", {}, kernel(mlp, "abs")),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 3},
    "kv": {"kv_bias": "kv"},
    "kv shared": {"kv_bias": "kv", "kv_bias_shared": True},
    "k": {"kv_bias": "k"},
    "k shared": {"kv_bias": "k", "kv_bias_shared": True},
    "k first": {"kv_bias": "k", "value_norm": 5.0},
    "k uniform": {"kv_bias": "k", "value_norm": 20.0, "value_direction": "uniform", "window": 4},
    "v": {"kv_bias": "v"},
    "v shared": {"kv_bias": "v", "kv_bias_shared": True},
}


def alibi(head: int, i: int, j: int, _: dict[str, Tensor]) -> float:
    return -math.pow(2, -8 * (head + 1) / HEADS) * abs(i - j)


def buckets(distance: int, count: int, furthest: int) -> int:
    half = count // 2
    if distance < half:
        return max(distance, 0)
    return min(count - 1, half + int(math.log(distance / half) / math.log(furthest / half) * (count - half)))


def t5(head: int, i: int, j: int, learned: dict[str, Tensor]) -> Tensor:
    return learned["bias"][head, buckets(i - j, 4, 6)]


def relative(head: int, i: int, j: int, _: dict[str, Tensor]) -> float:
    return float(buckets(i - j, 32, 128))


POSITIONS: dict[str, tuple[dict[str, Any], Callable[..., Any]]] = {
    "alibi": ({}, alibi),
    "t5": ({"buckets": 4, "max_distance": 6}, t5),
    "relative_reference": ({}, relative),
}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Random inputs, all float64 leaves: query [b, h, s, d], key and value [b, g, s, d], parameters."""

    query: Tensor
    key: Tensor
    value: Tensor
    learned: dict[str, Tensor]
    position: dict[str, Tensor]

    def leaves(self) -> list[Tensor]:
        return [self.query, self.key, self.value, *self.learned.values(), *self.position.values()]


def draw(spec: AttentionSpec, positional: PositionalSpec, head_size: int) -> Drawn:
    generator = torch.Generator().manual_seed(head_size)
    sizes = {"heads": HEADS, "kv_heads": KV_HEADS, "head_size": head_size}

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    def named(declared: Any) -> dict[str, Tensor]:
        return {
            name: random(*(sizes[n] if isinstance(n, str) else n for n in p.shape))
            for name, p in declared.items()
        }

    bias = positional.score_bias
    return Drawn(
        query=random(BATCH, HEADS, LENGTH, head_size),
        key=random(BATCH, KV_HEADS, LENGTH, head_size),
        value=random(BATCH, KV_HEADS, LENGTH, head_size),
        learned=named(spec.parameters),
        position=named(bias.parameters) if bias else {},
    )


def problem(spec: AttentionSpec, positional: PositionalSpec, x: Drawn, prefix: int) -> Problem:
    positions = torch.arange(LENGTH)
    return Problem(
        spec=spec,
        query_bhqd=x.query,
        key_bgkd=x.key,
        value_bgkd=x.value,
        position_q=positions,
        position_k=positions,
        aligned=True,
        scale=x.query.shape[-1] ** -0.5,
        heads=torch.arange(HEADS),
        parameters=x.learned,
        position_bias=positional.score_bias,
        position_parameters=x.position,
        prefix=prefix,
    )


def by_formula(
    formula: Formula, options: dict[str, Any], x: Drawn, bias: Callable[..., Any] | None, prefix: int
) -> Tensor:
    """[b, h, q, d], one query at a time."""
    rows = [
        one_query(formula, options, x, bias, prefix, b, h, i)
        for b in range(BATCH)
        for h in range(HEADS)
        for i in range(LENGTH)
    ]
    return torch.stack(rows).reshape(BATCH, HEADS, LENGTH, -1)


def one_query(
    formula: Formula,
    options: dict[str, Any],
    x: Drawn,
    bias: Callable[..., Any] | None,
    prefix: int,
    b: int,
    h: int,
    i: int,
) -> Tensor:
    d, group = x.query.shape[-1], h // (HEADS // KV_HEADS)
    window = options.get("window", LENGTH)
    seen = [j for j in range(LENGTH) if 0 <= i - j < window or (i < prefix and j < prefix)]
    q = formula.phi(x.query[b, h, i], x.learned)
    keys = [formula.phi(x.key[b, group, j], x.learned) for j in seen]
    scores = [
        q @ k / math.sqrt(d) + (bias(h, i, j, x.position) if bias else 0)
        for k, j in zip(keys, seen, strict=True)
    ]
    values = [x.value[b, group, j] for j in seen]
    kind = options.get("kv_bias", "none")
    own = ... if options.get("kv_bias_shared") else group
    if kind in ("kv", "k"):
        scores.append(q @ formula.phi(x.learned["key_bias"][own], x.learned) / math.sqrt(d))
        values.append(x.learned["value_bias"][own] if kind == "kv" else fixed_value(options, d))
    weights = formula.weights(torch.stack(scores), x.learned, h)
    output = (weights[:, None] * torch.stack(values)).sum(0)
    if kind == "v":
        output = output + x.learned["value_bias"][... if options.get("kv_bias_shared") else h]
    return output


def fixed_value(options: dict[str, Any], d: int) -> Tensor:
    value = torch.zeros(d, dtype=torch.float64)
    if options.get("value_direction") == "uniform":
        value += 1 / math.sqrt(d)
    else:
        value[0] = 1
    return value * float(options.get("value_norm", 0.0))


# --- attention --------------------------------------------------------------------------------------


def cases() -> Iterator[tuple[str, str, str | None, int, int]]:
    """Family, option, positional plugin, prefix, head size: every family with every head size and every
    option, every bias of positions with three families, the rest in turn."""
    sizes = (64, 96, 128)
    for number, (family, (_, params, _)) in enumerate(FAMILIES.items()):
        for size in sizes:
            yield family, "plain", None, 0, size
        for other, option in enumerate(OPTIONS):
            refused = option in ("k", "k shared") and params.get("normalize") is False
            if option != "plain" and not refused:
                yield family, option, None, (number + other) % 2 * 4, sizes[(number + other) % 3]
    for number, position in enumerate(POSITIONS):
        for family in ("softmax", "sigmoid normalised", "kernel mlp"):
            yield family, "plain", position, 0, 64
            yield family, "kv", position, 3, sizes[number]


@pytest.mark.parametrize(("family", "option", "position", "prefix", "head_size"), list(cases()))
def test_output_and_gradients_follow_the_formula(
    index: PluginIndex, family: str, option: str, position: str | None, prefix: int, head_size: int
) -> None:
    name, params, formula = FAMILIES[family]
    options = OPTIONS[option]
    spec = build(index, "attention", name, head_size, **params, **options)
    position_params, bias = POSITIONS[position] if position else ({}, None)
    positional = build(index, "positional", position or "none", head_size, **position_params)
    x = draw(spec, positional, head_size)
    direction = torch.randn(BATCH, HEADS, LENGTH, head_size, dtype=torch.float64)

    expected = by_formula(formula, options, x, bias, prefix)
    expected_grads = torch.autograd.grad(expected, x.leaves(), direction, allow_unused=True)
    use = Use(device="cpu", head_size=head_size, position_bias=position is not None, prefix=prefix > 0)
    for backend in {"eager", choose(spec, use, "auto").name}:
        output = choose(spec, use, backend).run(problem(spec, positional, x, prefix))
        grads = torch.autograd.grad(output, x.leaves(), direction, allow_unused=True)
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            assert (grad is None) == (expected_grad is None)
            if grad is not None:
                torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_query_sees_the_future(index: PluginIndex, family: str, prefix: int) -> None:
    name, params, _ = FAMILIES[family]
    spec = build(index, "attention", name, kv_bias="kv", **params)
    positional = build(index, "positional", "t5")
    x = draw(spec, positional, 64)
    before = reference.attend(problem(spec, positional, x, prefix))
    for t in range(LENGTH):
        with torch.no_grad():
            x.query[:, :, t] += 1
            x.key[:, :, t] += 1
            x.value[:, :, t] += 1
        after = reference.attend(problem(spec, positional, x, prefix))
        # Within the prefix all see the change; without one, those from t on.
        first = 0 if t < prefix else t
        assert torch.equal(after[:, :, :first], before[:, :, :first])
        assert (after[:, :, first] != before[:, :, first]).any()
        before = after


@pytest.mark.parametrize("family", ["softmax", "scaled", "sigmoid", "kernel elu normalised"])
def test_measured_weights_give_the_output(index: PluginIndex, family: str) -> None:
    name, params, _ = FAMILIES[family]
    spec = build(index, "attention", name, kv_bias="kv", kv_bias_shared=True, window=3, **params)
    x = draw(spec, PositionalSpec(), 64)
    call = problem(spec, PositionalSpec(), x, 0)
    weights, slot = reference.weights(call)
    assert slot is not None
    value_bhkd = x.value.repeat_interleave(HEADS // KV_HEADS, 1)
    output = weights @ value_bhkd + slot[..., None] * x.learned["value_bias"]
    torch.testing.assert_close(output, reference.attend(call))
    if family in ("softmax", "scaled"):
        total = torch.full((BATCH, HEADS, LENGTH), params.get("alpha", 1.0), dtype=torch.float64)
        torch.testing.assert_close(weights.sum(-1) + slot, total)


def test_what_a_variant_declares(index: PluginIndex) -> None:
    spec = build(index, "attention", "softmax", alpha=0.5, combine="sum", sink_token=True, kv_bias="kv")
    assert (spec.output_scale, spec.combine, spec.sink_token) == (0.5, "sum", True)
    assert isinstance(spec.rule, Softmax)
    assert {name: (p.shape, p.std) for name, p in spec.parameters.items()} == {
        "key_bias": (("kv_heads", "head_size"), 0.02),
        "value_bias": (("kv_heads", "head_size"), 0.02),
    }


@pytest.mark.parametrize(
    ("kind", "name", "params", "message"),
    [
        ("attention", "softmax", {"value_norm": 3.0}, "value_norm has no effect with kv_bias: none"),
        ("attention", "softmax", {"kv_bias_shared": True}, "kv_bias_shared has no effect with kv_bias: none"),
        (
            "attention",
            "softmax_off_by_one",
            {"kv_bias": "k", "value_direction": "uniform"},
            "value_direction has no effect with value_norm: 0",
        ),
        ("attention", "sigmoid", {"kv_bias": "k", "normalize": False}, "kv_bias: k has no effect without"),
        ("attention", "kernel_mlp", {"kv_bias": "k", "normalize": False}, "kv_bias: k has no effect without"),
        ("attention", "elu", {"bias_init": 1.0}, "bias_init has no effect with bias: none"),
        ("positional", "t5", {"max_distance": 16}, "max_distance 16 lies within the 16 single distances"),
        ("data_transform", "random_tokens", {"start": 3}, "end 2 is not above start 3"),
    ],
)
def test_parameters_that_do_not_fit(
    index: PluginIndex, kind: str, name: str, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        index.get(kind, name).plugin.params.model_validate(params)


# --- positions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12])
def test_alibi_slopes(index: PluginIndex, heads: int) -> None:
    from sinkbench_plugins.positional.positions import alibi_slopes

    known = {1: [2**-8], 2: [2**-4, 2**-8], 8: [2**-n for n in range(1, 9)]}
    # Not a power of two: half-integer exponents between those of the lower one (the paper's code).
    known[6] = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    known[12] = known[8] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    assert alibi_slopes(heads) == known[heads]


@pytest.mark.parametrize("distance", [0, 1, 15, 16, 17, 31, 63, 64, 127, 128, 2047])
def test_buckets(index: PluginIndex, distance: int) -> None:
    from sinkbench_plugins.positional.positions import BucketParams, bucket

    assert bucket(torch.tensor([distance]), BucketParams()).item() == buckets(distance, 32, 128)


def test_rotation_is_a_complex_product(index: PluginIndex) -> None:
    rotary = build(index, "positional", "rope", base=100.0, fraction=0.5).rotary
    x = torch.randn(LENGTH, 64, dtype=torch.float64)
    rotated = int(64 * rotary.fraction)
    cos, sin = reference.rotation(torch.arange(LENGTH), rotated, rotary.base)
    pairs = torch.complex(x[:, : rotated // 2], x[:, rotated // 2 : rotated])
    angle = torch.tensor(
        [[p * 100.0 ** (-2 * i / rotated) for i in range(rotated // 2)] for p in range(LENGTH)]
    )
    turned = pairs * torch.polar(torch.ones_like(angle).double(), angle.double())
    expected = torch.cat([turned.real, turned.imag, x[:, rotated:]], -1)
    torch.testing.assert_close(reference.rotate(x, cos, sin), expected, rtol=1e-5, atol=1e-5)


def test_added_positions(index: PluginIndex) -> None:
    sinusoidal = build(index, "positional", "absolute").embedding()
    position, size = 5, HEADS * 64
    angles = [position / 10000 ** (2 * i / size) for i in range(size // 2)]
    expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
    torch.testing.assert_close(sinusoidal(torch.tensor([position]))[0], expected, rtol=1e-4, atol=1e-5)
    learned = build(index, "positional", "learned").embedding()
    assert learned.weight.shape == (LENGTH, size)
    assert build(index, "positional", "none") == PositionalSpec()


# --- losses and data --------------------------------------------------------------------------------


def test_which_tokens_a_loss_predicts(index: PluginIndex) -> None:
    tokens = torch.arange(12).reshape(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1], [1, 1, 0, 0, 0, 0]]).bool()

    def weights(name: str, **params: Any) -> Tensor:
        spec: LossSpec = build(index, "loss", name, **params)
        batch = spec.transform({"tokens": tokens, "loss_mask": mask})
        assert torch.equal(batch["tokens"], tokens[:, :-1])
        assert torch.equal(batch["targets"], tokens[:, 1:])
        return batch["weights"]

    assert weights("causal_lm").tolist() == [[1.0] * 5] * 2
    # x_1 .. x_3 are seen; x_4, predicted at position 3, is the first that is not.
    assert weights("prefix_lm", prefix=3).tolist() == [[0.0, 0.0, 1.0, 1.0, 1.0]] * 2
    assert weights("response_lm").tolist() == [[0.0, 1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0, 0.0]]
    assert build(index, "loss", "prefix_lm", prefix=3).bidirectional_prefix == 3
    assert build(index, "loss", "response_lm").needs == {"loss_mask"}


def test_fixed_token(index: PluginIndex) -> None:
    spec: DataTransform = build(index, "data_transform", "fixed_token", position=3, token=9)
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    assert spec.transform({"tokens": tokens})["tokens"].tolist() == [[0, 0, 9, 0, 0, 0]] * 2
    assert not tokens.any()
    assert spec.on_probes


@pytest.mark.parametrize("name", ["fixed_token", "random_tokens"])
def test_changed_tokens_have_no_marks_of_triggers(index: PluginIndex, name: str) -> None:
    """Which would be those of the tokens that were there."""
    spec: DataTransform = build(index, "data_transform", name)
    tokens, mask = torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.bool)
    changed = spec.transform({"tokens": tokens, "trigger": mask, "loss_mask": mask})
    assert changed.keys() == {"tokens", "loss_mask"}


def test_random_tokens(index: PluginIndex) -> None:
    spec: DataTransform = build(index, "data_transform", "random_tokens", start=2, end=4)
    assert not spec.on_probes
    tokens = torch.randint(0, 50, (4000, 8), generator=torch.Generator().manual_seed(0))
    changed = spec.transform({"tokens": tokens})["tokens"]
    kept = [0, 3, 4, 5, 6, 7]
    assert torch.equal(changed[:, kept], tokens[:, kept])
    # Uniform over the vocabulary, independent of one another and of what was there.
    for column in (1, 2):
        counts = torch.bincount(changed[:, column], minlength=50)
        assert len(counts) == 50
        assert 25.0 < ((counts - 80) ** 2 / 80).sum() < 85.0  # chi square with 49 degrees of freedom
        assert (changed[:, column] == tokens[:, column]).float().mean() < 0.04
    assert (changed[:, 1] == changed[:, 2]).float().mean() < 0.04
    # A sequence gets the same tokens in any batch, another sequence others.
    assert torch.equal(spec.transform({"tokens": tokens[100:103]})["tokens"], changed[100:103])
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 50
    assert (spec.transform({"tokens": other})["tokens"][:, 1] == changed[:, 1]).float().mean() < 0.04
