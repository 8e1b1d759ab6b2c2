"""Lets megatron-core run on a host without CUDA: the same code, the same parallelism, over gloo.

megatron-core writes the device as the literal "cuda" and calls torch.cuda for the current device and
for random states. On a CPU host an import hook compiles its modules with those literals replaced, and
the few torch.cuda functions it calls get CPU counterparts. Both are cheaper at run time than a torch
function mode, and neither depends on megatron's version. On a CUDA host nothing here takes effect.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sinkbench.errors import HostError

_LITERALS = {"cuda": "cpu"}
_prepared: torch.device | None = None


def prepare(device: str = "auto") -> torch.device:
    """Chooses the device of this process and makes megatron importable on it.

    Must run before the first import of megatron in the process; later calls return the same device.

    Args:
        device: "auto", "cpu" or "cuda". "cuda" takes the card of LOCAL_RANK.

    Raises:
        HostError: there are fewer cards than processes.
    """
    global _prepared
    if _prepared is not None:
        return _prepared
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            problem = f"{local_rank} is not below the number of CUDA cards, {torch.cuda.device_count()}"
            raise HostError("LOCAL_RANK", problem, "start one process for each card, or train.device=cpu")
        torch.cuda.set_device(local_rank)
        _prepared = torch.device("cuda", local_rank)
    else:
        if any(name.startswith("megatron.core") for name in sys.modules):
            raise RuntimeError("megatron.core was imported before sinkbench.megatron.host.prepare()")
        sys.meta_path.insert(0, _CpuFinder())
        _replace_cuda_functions()
        _prepared = torch.device("cpu")
    _quieten()
    return _prepared


def _quieten() -> None:
    """Megatron warns at import that optional packages are absent and at every fork of its CPU random
    state, torch that there is a CUDA toolkit but no card; the manifest names the packages and the
    device, and the forks are meant."""
    for name in ("megatron.core", "torch.distributed.checkpoint", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex|flash_attn).*")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\..*", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\..*")


class _CudaLiterals(ast.NodeTransformer):
    """Replaces device literals, tensor type names and pinned memory in a module's source."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        value = node.value
        if isinstance(value, str):
            if value in _LITERALS:
                return ast.copy_location(ast.Constant(_LITERALS[value]), node)
            if value.startswith("torch.cuda.") and value.endswith("Tensor"):
                return ast.copy_location(ast.Constant(value.replace("torch.cuda.", "torch.")), node)
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        if node.arg == "pin_memory":
            node.value = ast.copy_location(ast.Constant(False), node.value)
            return node
        return self.generic_visit(node)


class _CpuLoader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType | None:
        source = self.get_data(self.path)
        if b"cuda" not in source and b"pin_memory" not in source:
            return super().get_code(fullname)
        # Compiled here, not through the byte-code cache: a cached file would serve CUDA hosts too.
        tree = _CudaLiterals().visit(ast.parse(source, filename=self.path))
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        if module.__name__ == "megatron.core.jit":
            # torch.compile of single elementwise functions costs a CPU host more than it gives.
            module.disable_jit_fuser()
        elif module.__name__ == "megatron.core.tensor_parallel.random":
            for name in ("get_rng_state", "set_rng_state"):
                setattr(module, f"_{name.replace('rng', 'cuda_rng')}", getattr(torch.cuda, name))


class _CpuFinder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith("megatron.core"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        loader = _CpuLoader(spec.loader.name, str(spec.loader.path))
        return importlib.util.spec_from_file_location(
            fullname,
            spec.origin,
            loader=loader,
            submodule_search_locations=spec.submodule_search_locations,
        )


class _Stream:
    """Work on a CPU is done when the call returns: waiting for it is no work."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record(self, *_: Any) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def query(self) -> bool:
        return True


def _replace_cuda_functions() -> None:
    cuda: Any = torch.cuda

    def nothing() -> Callable[..., None]:
        # One object for each name: a shared one trips torch._dynamo.
        def call(*_: Any, **__: Any) -> None:
            return None

        return call

    def get_rng_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state.cpu())

    def stream_context(*_: Any, **__: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    cuda.current_device = lambda: torch.device("cpu")
    cuda.device_count = lambda: 1
    for module in (cuda, cuda.random):
        module.get_rng_state = get_rng_state
        module.set_rng_state = set_rng_state
    for name in ("manual_seed", "manual_seed_all", "synchronize", "set_device", "empty_cache"):
        setattr(cuda, name, nothing())
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = lambda *_, **__: _Stream()
    cuda.default_stream = lambda *_, **__: _Stream()
    cuda.stream = stream_context
    cuda.nvtx.range_push = nothing()
    cuda.nvtx.range_pop = nothing()
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
