"""The Triton functions of an elementwise similarity, written from its plain-torch function.

The function is traced on a few numbers, once as it is and once with its derivative, and each operation of
the two graphs becomes a line. An operation that is not in the table, or a function that looks at more than
its element, has no Triton form: the caller says so and computes in plain torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from sinkbench.files import write_atomically

HELPERS = ("exp", "exp2", "expm1", "log1p", "tanh")
"""Of sinkbench.triton_math: what Triton has no function for, or a slower one."""

_UNARY = {
    "neg": "-{0}",
    "abs": "tl.abs({0})",
    "exp": "exp({0})",
    "exp2": "exp2({0})",
    "expm1": "expm1({0})",
    "log": "tl.log({0})",
    "log2": "tl.log2({0})",
    "log1p": "log1p({0})",
    "sqrt": "tl.sqrt({0})",
    "rsqrt": "1.0 / tl.sqrt({0})",
    "reciprocal": "1.0 / {0}",
    "sin": "tl.sin({0})",
    "cos": "tl.cos({0})",
    "erf": "tl.erf({0})",
    "tanh": "tanh({0})",
    "sigmoid": "1.0 / (1.0 + exp(-{0}))",
    "relu": "tl.maximum({0}, 0.0)",
    "sign": "tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, -1.0, 0.0))",
    "gelu": "0.5 * {0} * (1.0 + tl.erf({0} * 0.7071067811865476))",
    **dict.fromkeys(("logical_not", "bitwise_not"), "{0} == 0"),
}
_BINARY = {
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "maximum": "tl.maximum({0}, {1})",
    "minimum": "tl.minimum({0}, {1})",
    "clamp_min": "tl.maximum({0}, {1})",
    "clamp_max": "tl.minimum({0}, {1})",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    **dict.fromkeys(("logical_and", "bitwise_and"), "{0} & {1}"),
    **dict.fromkeys(("logical_or", "bitwise_or"), "{0} | {1}"),
    "leaky_relu": "tl.where({0} > 0.0, {0}, {0} * {1})",
}
_SAME = {"clone", "alias", "detach", "lift_fresh_copy", "_to_copy", "copy"}
"""They give what they are given; ``copy`` its second argument."""


_IN_TORCH = ("abs", "cos", "erf", "log", "log2", "sin", "sqrt", "where", "zeros_like")
_SUMS = {"add", "sub", "rsub"}
_KNOWN = {*_UNARY, *_BINARY, *_SUMS, "pow", "where", "clamp", "elu"}


class NoTritonForm(Exception):
    """The function cannot be written in Triton; the message says what stands in the way."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """Attributes:
    body: the functions ``function(s)`` and ``derivative(s, p)``.
    header: what they need before them.
    """

    header: str
    body: str

    @property
    def text(self) -> str:
        return f"{self.header}\n\n{self.body}"


@cache
def write(function: Callable[[Tensor], Tensor]) -> Written:
    """The source of a similarity and of its derivative.

    Args:
        function: f, elementwise, float32 in and out.

    Raises:
        NoTritonForm: an operation has none, or the function cannot be traced.
    """

    def value(s: Tensor) -> Tensor:
        return function(s)

    def derivative(s: Tensor) -> Tensor:
        pulled: Tensor = torch.func.vjp(function, s)[1](torch.ones_like(s))[0]
        return pulled

    body = "\n\n".join(
        (
            _define("function(s)", _trace(value)),
            _define("derivative(s, p)", _trace(derivative)),
        )
    )
    _verify(function, body)
    used = [name for name in HELPERS if f"{name}(" in body.replace(f"tl.{name}(", "")]
    name = f"{function.__module__}.{getattr(function, '__qualname__', 'function')}"
    lines = [f'"""{name} and its derivative, written by sinkbench.attention.elementwise."""', ""]
    lines += ["import triton", "import triton.language as tl", ""]
    lines += [f"from sinkbench.triton_math import {', '.join(used)}"] if used else []
    return Written(header="\n".join(lines), body=body)


def _verify(function: Callable[[Tensor], Tensor], body: str) -> None:
    """Runs the Triton functions as torch functions, against the function and its gradient."""
    score = torch.linspace(-6.0, 6.0, 242).view(2, 121).requires_grad_()
    expected = function(score)
    gradient = torch.zeros_like(score)
    if expected.requires_grad:
        (gradient,) = torch.autograd.grad(expected.sum(), score)
    ours, derivative = run_in_torch(body)
    with torch.no_grad():
        value = ours(score)
        for name, found, right in (
            ("value", value, expected),
            ("derivative", derivative(score, value), gradient),
        ):
            if not torch.allclose(found, right, rtol=1e-4, atol=1e-5, equal_nan=True):
                raise NoTritonForm(f"a function of more than its element (its {name} differs in Triton)")


def run_in_torch(body: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The functions of ``Written.body`` with torch in the place of Triton, to check them without a card."""
    both = {"maximum": torch.maximum, "minimum": torch.minimum}
    language = {name: getattr(torch, name) for name in _IN_TORCH}
    language |= {
        name: lambda a, b, both=one: both(torch.as_tensor(a), torch.as_tensor(b))
        for name, one in both.items()
    }
    names: dict[str, Any] = {name: getattr(torch, name) for name in HELPERS}
    names |= {"tl": SimpleNamespace(**language), "triton": SimpleNamespace(jit=lambda function: function)}
    exec(body, names)
    return names["function"], names["derivative"]


def load(function: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """The Triton functions s -> f(s) and (s, f(s)) -> f'(s). Triton reads functions from files: this one
    lies in ~/.cache/sinkbench, or in SINKBENCH_CACHE.

    Raises:
        NoTritonForm: as ``write``.
        HostError: the file cannot be written.
    """
    text = write(function).text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("SINKBENCH_CACHE", "~/.cache/sinkbench")).expanduser()
    return _import(folder / "kernels" / f"elementwise_{digest}.py", text)


@cache
def _import(path: Path, text: str) -> tuple[Any, Any]:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomically(path, text)
    spec = importlib.util.spec_from_file_location(f"sinkbench_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.function, module.derivative


def _trace(function: Callable[[Tensor], Tensor]) -> fx.Graph:
    """The operations on numbers that a function is made of."""
    from torch._decomp import core_aten_decompositions
    from torch.fx.experimental.proxy_tensor import make_fx

    sample = torch.linspace(-2.0, 2.0, 5)
    try:
        traced = make_fx(function, decomposition_table=dict(core_aten_decompositions()))(sample)
    except Exception as error:  # the function is a plugin's: it may raise anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise NoTritonForm(f"a function that cannot be traced ({reason})") from error
    traced.graph.eliminate_dead_code()
    return _with_constants(traced)


def _with_constants(traced: fx.GraphModule) -> fx.Graph:
    """The graph, with tensors of one element as the numbers they hold."""
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            held = getattr(traced, str(node.target))
            if held.numel() != 1:
                raise NoTritonForm("a tensor of several constants")
            node.meta["number"] = held.item()
    return traced.graph


def _define(signature: str, graph: fx.Graph) -> str:
    lines = ["@triton.jit", f"def {signature}:"]
    names: dict[fx.Node, str] = {}
    shaped: set[Any] = set()
    """What has the shape of the scores; the rest are numbers."""
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = "s"
            shaped.add(node)
        elif node.op == "get_attr":
            names[node] = _number(node.meta["number"])
        elif node.op == "output":
            (result,) = node.args[0] if isinstance(node.args[0], list | tuple) else node.args
            text = _operand(result, names)
            lines.append(f"    return {text if result in shaped else f'tl.where(s == s, {text}, {text})'}")
        else:
            written = _expression(node, names)
            if written is None:
                same = node.args[1 if _operation(node) == "copy" else 0]
                names[node] = _operand(same, names)
                shaped |= {node} if same in shaped else set()
            elif _is_number(written):
                names[node] = written
            else:
                shaped |= {node} if shaped & set(node.all_input_nodes) else set()
                names[node] = f"x{len(names)}"
                lines.append(f"    {names[node]} = {written}")
        if "_." in str(node.target):  # in place: from here on its first argument is the result
            names[node.args[0]] = names[node]
            shaped |= {node.args[0]} if node in shaped else set()
    return "\n".join(lines) + "\n"


def _expression(node: fx.Node, names: Mapping[fx.Node, str]) -> str | None:
    """An operation in Triton; None for one that changes nothing."""
    operation = _operation(node)
    args, options = node.args, node.kwargs
    if operation in _SAME:
        if options.get("dtype", torch.float32) != torch.float32:
            raise NoTritonForm(f"a conversion to {options['dtype']}")
        return None
    if operation in ("ones_like", "zeros_like", "ones", "zeros"):
        return "1.0" if operation.startswith("ones") else "0.0"
    if operation in ("full_like", "scalar_tensor", "full", "fill"):
        return _number(args[0 if operation == "scalar_tensor" else 1])
    if operation in ("empty_permuted", "empty_like"):
        return _number(math.nan)  # filled by the next operation
    if operation not in _KNOWN:
        raise NoTritonForm(f"the operation {node.target}")
    operands = [_operand(argument, names) for argument in args]
    if operation == "gelu" and options.get("approximate", "none") != "none":
        raise NoTritonForm("aten.gelu with approximate")
    if operation in _UNARY and len(operands) == 1:
        return _UNARY[operation].format(*operands)
    if operation in _BINARY and len(operands) == 2:
        return _BINARY[operation].format(*operands)
    if operation in _SUMS and len(operands) == 2:
        return _sum(operation, operands, options.get("alpha", 1))
    if operation == "leaky_relu" and len(operands) == 1:
        return _BINARY[operation].format(*operands, "0.01")
    return _further(operation, args, operands)


def _operation(node: fx.Node) -> str:
    """The name of an operation, without the underscore of one in place."""
    return str(node.target).removeprefix("aten.").partition(".")[0].removesuffix("_")


def _sum(operation: str, operands: Sequence[str], alpha: Any) -> str:
    first, second = operands if operation != "rsub" else reversed(operands)
    if alpha != 1:
        second = f"{_number(alpha)} * {second}"
    return f"{first} {'+' if operation == 'add' else '-'} {second}"


def _further(operation: str, args: Sequence[Any], operands: Sequence[str]) -> str:
    if operation == "pow":
        base, exponent = args
        if isinstance(exponent, int | float):
            return _power(operands[0], exponent)
        log = _number(math.log(base)) if isinstance(base, int | float) else f"tl.log({operands[0]})"
        return f"exp({operands[1]} * {log})"
    if operation == "where":
        return f"tl.where({operands[0]}, {operands[1]}, {operands[2]})"
    if operation == "clamp":
        low, high = (*args[1:], None)[:2]
        inner = operands[0] if low is None else f"tl.maximum({operands[0]}, {operands[1]})"
        return inner if high is None else f"tl.minimum({inner}, {_number(high)})"
    alpha, scale, input_scale = (*operands[1:], "1.0", "1.0", "1.0")[:3]
    x = operands[0]
    return f"{scale} * tl.where({x} > 0.0, {x}, {alpha} * expm1({input_scale} * {x}))"


def _power(base: str, exponent: float) -> str:
    if exponent == int(exponent) and 1 <= abs(exponent) <= 4:
        product = " * ".join([base] * int(abs(exponent)))
        return product if exponent > 0 else f"1.0 / ({product})"
    if exponent in (0.5, -0.5):
        return f"tl.sqrt({base})" if exponent > 0 else f"1.0 / tl.sqrt({base})"
    return "1.0" if exponent == 0 else f"exp({_number(exponent)} * tl.log({base}))"


def _operand(argument: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(argument, fx.Node):
        return names[argument]
    if argument is None or isinstance(argument, str):
        return str(argument)
    return _number(argument)


def _number(value: Any) -> str:
    if not isinstance(value, int | float):
        raise NoTritonForm(f"the constant {value}")
    text = repr(float(value))
    return text if text[-1].isdigit() else f'float("{text}")'


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
