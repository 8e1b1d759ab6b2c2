"""Softmax with more terms through kernels that are not here: those of torch for a card and of the packages
flash-attn and flash-attn-4. Stand-ins compute what these do from what they are handed. On a card with
either, that is tried itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from sinkbench import packages
from sinkbench.attention import backends, flash, flash_attn, flash_torch, reference, sdpa
from sinkbench.attention.flash import Kernel, Scores
from sinkbench.attention.gradient_room import Room
from sinkbench.attention.reference import scaled_and_biased
from sinkbench.errors import RecipeError
from tests.unit.test_attention_backends import (
    CARD,
    RUN,
    VARIANTS,
    compare,
    declared,
    leaves,
    make_problem,
)

CAUSAL = ["softmax", "sink logit of 20", "off by one", "key-value slot of 20", "key slot"]
PREFIX = ["prefix", "prefix, sink logit"]
WINDOW = ["window", "window, sink logit"]


def scores_of(query: Tensor, key: Tensor, scores: Scores) -> Tensor:
    score = scores.scale * query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    position = torch.arange(query.shape[2])
    if not scores.causal and scores.window is None:
        return score
    return score.masked_fill(~reference.allowed_qk(position, position, scores.window), float("-inf"))


def eager_forward(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    score = scores_of(query, key, scores)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return score.softmax(-1) @ value, score.logsumexp(-1)


def eager_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """From the output and the log-sum-exp alone, as kernels do."""
    assert lse.is_contiguous()
    groups, per_group = key.shape[1], query.shape[1] // key.shape[1]
    weight = (scores_of(query, key, scores) - lse[..., None]).exp()
    direct = grad @ value.repeat_interleave(per_group, 1).mT
    change = scores.scale * weight * (direct - (grad * output).sum(-1, keepdim=True))
    of_key, of_value = (
        x.unflatten(1, (groups, per_group)).sum(2) for x in (change.mT @ query, weight.mT @ grad)
    )
    return change @ key.repeat_interleave(per_group, 1), of_key, of_value


def flipped(*tensors: Tensor) -> Iterator[Tensor]:
    return (x.transpose(1, 2) for x in tensors)


def windowed(scale: float, causal: bool, left: int | None, right: int | None) -> Scores:
    endless = left is None or left < 0
    assert endless or right == 0
    return Scores(scale=scale, causal=causal, window=None if endless or left is None else left + 1)


class StandInFour:
    """flash_attn.cute.interface."""

    def _flash_attn_fwd(
        self,
        *tensors: Tensor,
        out: Tensor,
        return_lse: bool,
        softmax_scale: float,
        causal: bool,
        window_size_left: int | None,
        window_size_right: int | None,
    ) -> tuple[Tensor | None, ...]:
        assert return_lse
        scores = windowed(softmax_scale, causal, window_size_left, window_size_right)
        query, key, value = flipped(*tensors)
        output, lse = eager_forward(query, key, value, scores)
        return out.copy_(output.transpose(1, 2)), lse, None, None, None

    def _flash_attn_bwd(
        self,
        *tensors: Tensor,
        dk: Tensor | None,
        dv: Tensor | None,
        deterministic: bool,
        softmax_scale: float,
        causal: bool,
        window_size_left: int | None,
        window_size_right: int | None,
    ) -> tuple[Tensor, ...]:
        query, key, value, output, grad = flipped(*tensors[:-1])
        scores = windowed(softmax_scale, causal, window_size_left, window_size_right)
        found = flipped(*eager_backward(grad, query, key, value, output, tensors[-1], scores))
        places = (None, dk, dv)
        return tuple(x if to is None else to.copy_(x) for x, to in zip(found, places, strict=True))


class StandInTwo:
    """flash_attn.flash_attn_interface."""

    def _wrapped_flash_attn_forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, return_softmax: bool, **options: Any
    ) -> tuple[Tensor | None, ...]:
        query, key, value = flipped(q, k, v)
        output, lse = eager_forward(query, key, value, self.scores(**options))
        return output.transpose(1, 2).contiguous(), lse, None, torch.zeros(2)

    def _wrapped_flash_attn_backward(
        self, *tensors: Tensor, deterministic: bool, rng_state: Tensor, **options: Any
    ) -> None:
        grad, query, key, value, output = flipped(*tensors[:5])
        found = eager_backward(grad, query, key, value, output, tensors[5], self.scores(**options))
        for place, x in zip(tensors[6:], found, strict=True):
            place.copy_(x.transpose(1, 2))

    @staticmethod
    def scores(
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size_left: int,
        window_size_right: int,
        softcap: float,
        alibi_slopes: Tensor | None,
    ) -> Scores:
        assert (dropout_p, softcap, alibi_slopes) == (0.0, 0.0, None)
        return windowed(softmax_scale, causal, window_size_left, window_size_right)


def cudnn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: None,
    lse: bool,
    p: float,
    causal: bool,
    mask: bool,
    *,
    scale: float,
) -> tuple[Any, ...]:
    output, lse_bhq = eager_forward(q, k, v, Scores(scale=scale, causal=causal))
    seed, offset = torch.tensor(1), torch.tensor(2)
    return torch.empty_like(q).copy_(output), lse_bhq[..., None], None, None, 37, 37, seed, offset, None


def cudnn_backward(*tensors: Any, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """It takes the output and its gradient to be laid out as the query's dimensions are in order."""
    grad, query, key, value, output, lse, seed, offset = tensors[:8]
    assert (int(seed), int(offset)) == (1, 2)
    layout = torch.empty_like(query).stride()
    assert grad.stride() == output.stride() == layout
    scores = Scores(scale=scale, causal=tensors[14])
    return eager_backward(grad, query, key, value, output, lse[..., 0], scores)


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float, **window: int
) -> tuple[Any, ...]:
    _, _, length_q, length_k, _, causal, _ = rest
    assert length_q == length_k == q.shape[1]
    left, right = window.get("window_size_left"), window.get("window_size_right")
    query, key, value = flipped(q, k, v)
    output, lse = eager_forward(query, key, value, windowed(scale, causal, left, right))
    return output.transpose(1, 2).contiguous(), lse, torch.zeros(2), torch.zeros(()), None


def flash_backward(*tensors: Any, scale: float, **window: int) -> tuple[Tensor, ...]:
    handed, lse, causal = tensors[:5], tensors[5], tensors[11]
    left, right = window.get("window_size_left"), window.get("window_size_right")
    scores = windowed(scale, causal, left, right)
    grad, query, key, value, output = flipped(*handed)
    return tuple(flipped(*eager_backward(grad, query, key, value, output, lse, scores)))


STAND_INS = SimpleNamespace(
    _scaled_dot_product_cudnn_attention=cudnn_forward,
    _scaled_dot_product_cudnn_attention_backward=cudnn_backward,
    _flash_attention_forward=flash_forward,
    _flash_attention_backward=flash_backward,
)


@dataclass(frozen=True)
class Way:
    kernel: Callable[[], Kernel]
    variants: list[str]


WAYS = {
    "cudnn": Way(flash_torch._Cudnn, [*CAUSAL, *PREFIX]),
    "torch's flash": Way(flash_torch._Flash, [*CAUSAL, *PREFIX, *WINDOW]),
    "flash-attn-4": Way(partial(flash_attn._Four, StandInFour()), [*CAUSAL, *PREFIX, *WINDOW]),
    "flash-attn": Way(partial(flash_attn._Two, StandInTwo()), [*CAUSAL, *PREFIX, *WINDOW]),
}


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend of that name which goes through the kernel."""
    name: str = request.param
    kernel = WAYS[name].kernel()
    monkeypatch.setattr(flash_torch, "aten", STAND_INS)
    monkeypatch.setitem(RUN, name, lambda p: scaled_and_biased(p, sdpa.through(kernel, p)))
    return name


every_way = pytest.mark.parametrize("way", WAYS, indirect=True)


@pytest.mark.parametrize(
    ("way", "name"), [(w, n) for w, way in WAYS.items() for n in way.variants], indirect=["way"]
)
def test_kernels_that_are_not_here(way: str, name: str) -> None:
    compare(make_problem(name, kv_heads=2), way, 1e-5)


@every_way
@pytest.mark.parametrize("prefix", [1, 2, 36, 37])
def test_prefixes_of_all_lengths(way: str, prefix: int) -> None:
    compare(replace(make_problem("sink logit"), prefix=prefix), way, 1e-5)


@every_way
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)])
def test_layouts(way: str, order: tuple[int, ...]) -> None:
    """Sequences, heads and positions in any order, and a gradient that is one number for all elements."""
    p = make_problem("key-value slot", kv_heads=2)
    query, key, value = (laid_out(x, order) for x in (p.query_bhqd, p.key_bgkd, p.value_bgkd))
    p = replace(p, prefix=9, query_bhqd=query, key_bgkd=key, value_bgkd=value)
    compare(p, way, 1e-5)
    inputs = list(leaves(p).values())
    found = torch.autograd.grad(RUN[way](p).sum(), inputs)
    expected = torch.autograd.grad(reference.attend(p).sum(), inputs)
    for x, wanted in zip(found, expected, strict=True):
        assert (x - wanted).norm() <= 1e-5 * max(float(wanted.norm()), 1.0)


def laid_out(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Dense, its dimensions in that order in memory."""
    back = sorted(range(4), key=order.__getitem__)
    return x.detach().permute(order).contiguous().permute(back).requires_grad_()


@pytest.mark.parametrize("way", ["flash-attn-4"], indirect=True)
@pytest.mark.parametrize("prefix", [0, 9])
def test_gradients_where_the_projection_has_them(way: str, prefix: int) -> None:
    p = make_problem("key-value slot")
    value = p.value_bgkd.detach()
    mixed = torch.stack([torch.zeros_like(value), value], 3).permute(2, 0, 1, 3, 4).contiguous()
    key_sbgd, value_sbgd = mixed.unbind(3)
    room = Room(mixed, key_sbgd, value_sbgd)
    p = replace(p, prefix=prefix)
    inside = replace(p, value_bgkd=value_sbgd.permute(1, 2, 0, 3).requires_grad_())
    found, expected = (
        torch.autograd.grad(RUN[way](of).square().sum(), (of.key_bgkd, of.value_bgkd)) for of in (inside, p)
    )
    filled = room.filled(found[1].permute(2, 0, 1, 3))
    assert filled is not None
    for part, wanted in zip(filled.unbind(3), expected, strict=True):
        torch.testing.assert_close(part.permute(1, 2, 0, 3), wanted)


@pytest.mark.parametrize("name", ["sink logit of 20", "key-value slot of 20", "key slot"])
def test_compiled_as_on_a_card(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an eager part, and with what happens in place."""

    def compiled(function: Callable[..., Any], like: Tensor) -> Callable[..., Any]:
        return torch.compile(function, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(flash, "fused", compiled)
    compare(make_problem(name, kv_heads=2), "sdpa", 1e-5)


def test_no_second_derivative() -> None:
    """It would lack what goes through the output and log-sum-exp."""
    p = make_problem("sink logit")
    (first,) = torch.autograd.grad(sdpa.run(p).square().sum(), p.query_bhqd, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("taken", "window", "kernel"),
    [
        (SDPBackend.CUDNN_ATTENTION, None, flash_torch._Cudnn),
        (SDPBackend.CUDNN_ATTENTION, 5, flash_torch._Flash),
        (SDPBackend.FLASH_ATTENTION, None, flash_torch._Flash),
        (SDPBackend.EFFICIENT_ATTENTION, None, flash_torch._Flash),
    ],
)
def test_cudnn_where_torch_takes_it(
    taken: SDPBackend, window: int | None, kernel: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_, **__: taken.value)
    on_card = cast(Tensor, SimpleNamespace(is_cuda=True, shape=(1, 4, 8, 64)))
    found = flash_torch.kernel_for(on_card, on_card, on_card, Scores(scale=1.0, window=window))
    assert isinstance(found, kernel)


def install(monkeypatch: pytest.MonkeyPatch, *modules: str, hopper: bool = True) -> None:
    found = {flash_attn.FOUR: StandInFour(), flash_attn.TWO: StandInTwo()}
    monkeypatch.setattr(flash_attn, "_module", lambda name: found[name] if name in modules else None)
    monkeypatch.setattr(flash_attn, "_is_for_the_card", lambda: hopper)


@pytest.mark.parametrize(
    ("name", "use", "lacks"),
    [
        ("softmax", CARD, ""),
        ("window, sink logit", CARD, ""),
        ("prefix, sink logit", replace(CARD, prefix=True), ""),
        ("prefix, window, slot", replace(CARD, prefix=True), "window"),
        ("alibi", replace(CARD, position_bias=True), "position bias"),
        ("softmax", replace(CARD, half=False), "float32"),
        ("softmax", replace(CARD, split_sequence=True), "context parallelism"),
        ("softmax", replace(CARD, head_size=12), "head"),
        ("softmax", replace(CARD, device="cpu"), "CPU"),
        ("kernel_mlp", CARD, "feature map"),
    ],
)
def test_flash_attn_4_is_taken_where_it_is_asked_for_and_can(
    name: str, use: backends.Use, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, flash_attn.FOUR)
    spec, _ = declared(VARIANTS[name].attention, "none")
    assert backends.choose(spec, use, "auto").name != "flash"
    if not lacks:
        assert backends.choose(spec, use, "flash").name == "flash"
        return
    with pytest.raises(RecipeError, match=lacks):
        backends.choose(spec, use, "flash")


@pytest.mark.parametrize("modules", [[], [flash_attn.TWO]])
def test_flash_attn_2_is_there_to_be_asked_for(modules: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *modules)
    spec, _ = declared("softmax", "none")
    assert backends.choose(spec, CARD, "auto").name == "sdpa"
    if modules:
        backend = backends.choose(spec, CARD, "flash")
        p = make_problem("softmax")
        torch.testing.assert_close(backend.run(p), reference.attend(p))
        return
    lack = "a softmax without the package flash-attn-4, for Hopper and later, or flash-attn"
    with pytest.raises(RecipeError, match=f"flash cannot compute {lack}, which the attention needs here; "):
        backends.choose(spec, CARD, "flash")


def test_not_for_older_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, flash_attn.FOUR, hopper=False)
    spec, _ = declared("softmax", "none")
    assert backends.choose(spec, CARD, "auto").name == "sdpa"
    with pytest.raises(RecipeError, match="flash-attn-4, for Hopper and later"):
        backends.choose(spec, CARD, "flash")


@pytest.mark.parametrize(("lacking", "warns"), [("flash_attn.cute", False), ("cutlass", True)])
def test_a_package_that_lacks_another(
    lacking: str, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {lacking!r}", name=lacking)

    monkeypatch.setattr(packages, "import_module", fail)
    with caplog.at_level(logging.WARNING):
        assert flash_attn._module.__wrapped__(flash_attn.FOUR) is None
    text = "flash_attn.cute.interface is installed, but cannot be used: No module named 'cutlass'"
    assert [record.getMessage() for record in caplog.records] == ([text] if warns else [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
@pytest.mark.parametrize("length", [2, 37, 130, 300])
@pytest.mark.parametrize("name", [*CAUSAL, *PREFIX, *WINDOW])
def test_the_real_one(name: str, length: int) -> None:
    if flash_attn._kernel() is None:
        pytest.skip("needs flash-attn-4 or flash-attn")
    p = make_problem(name, length=length, kv_heads=2, dtype=torch.bfloat16, device="cuda")
    # Beside a slot so far above, gradients are small differences, with the rounding of the output in bf16.
    exact = flash_attn.has_four() or name != "key-value slot of 20"
    compare(p, "flash", 1e-2 if exact else 2e-2, 1e-4)
