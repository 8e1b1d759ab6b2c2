"""The fused kernel against float64: on a card, or in Triton's interpreter where the package is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from sinkbench_plugins.attention import _triton, similarity  # noqa: E402

from sinkbench.attention import elementwise, triton_elementwise  # noqa: E402
from tests.unit import new_similarities  # noqa: E402

FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[torch.dtype], Any]]] = {
    "sigmoid": (similarity.sigmoid, _triton.fused_sigmoid),
    "elu": (similarity.elu_plus_one, _triton.fused_elu),
}


def written(function: Callable[[Tensor], Tensor]) -> Callable[[torch.dtype], Any]:
    """Triton functions of a similarity that comes without."""
    return lambda dtype: elementwise.load(function)


for new in (new_similarities.softsign_squared, new_similarities.log_power, new_similarities.gaussian_slope):
    FUNCTIONS[new.__name__] = (new, written(new))

SHAPES = [(1, 1, 1, 1, 64)]
SHAPES += (
    [(2, 4, 4, 1024, 96), (1, 8, 2, 777, 128), (1, 2, 2, 300, 256)]
    if CUDA
    else [(1, 4, 2, 150, 32), (1, 2, 2, 97, 48)]
)
KINDS = [
    *((name, normalize, window, shape) for name in ("sigmoid", "elu") for shape in SHAPES
      for normalize, window in ((True, None), (False, 40))),
    *((new, True, None, SHAPES[1]) for new in FUNCTIONS if new not in ("sigmoid", "elu")),
]  # fmt: skip
"""A few, since on a card four kernels are compiled for each."""
DTYPES = [(torch.float32, 2e-5)] + ([(torch.bfloat16, 2e-2)] if CUDA else [])


def by_formula(function: Any, inputs: list[Tensor], normalize: bool, window: int | None) -> Tensor:
    """f(q.k / sqrt d + b) M / Z times v, with all scores at once."""
    q, k, v, bias = inputs
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias[:, None, None]
    position = torch.arange(q.shape[2], device=q.device)
    distance = position[:, None] - position
    allowed = (distance >= 0) & (distance < (window or q.shape[2]))
    weight: Tensor = function(score) * allowed
    if normalize:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-8)
    return weight @ v


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where written functions go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SINKBENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(("name", "normalize", "window", "shape"), KINDS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
def test_output_and_gradients(
    name: str,
    normalize: bool,
    window: int | None,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    batch, heads, kv_heads, length, head_size = shape
    function, fused = FUNCTIONS[name]
    device = "cuda" if CUDA else "cpu"
    generator = torch.Generator(device).manual_seed(len(name) + length)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    # Positions lie first in memory, as the projections write them: every stride is used.
    q, k, v, grad = (
        random(length, batch, n, head_size).permute(1, 2, 0, 3) for n in (heads, kv_heads, kv_heads, heads)
    )
    bias = random(heads).float()
    inputs = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = by_formula(function, exact, normalize, window)
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]

    f, derivative = fused(dtype)
    output = triton_elementwise.attend(
        *inputs[:3],
        function=f,
        derivative=derivative,
        normalize=normalize,
        scale=head_size**-0.5,
        bias_h=inputs[3],
        window=window,
    )
    found = [output, *torch.autograd.grad(output, inputs, grad)]
    for what, a, b in zip(("output", "dq", "dk", "dv", "dbias"), found, wanted, strict=True):
        size = b.norm().clamp(min=0.3)  # the gradient of a single key's normalised weight is nearly 0
        error = (a.double() - b).norm() / size
        assert error < tolerance, f"{what}: relative error {error:.1e}"
