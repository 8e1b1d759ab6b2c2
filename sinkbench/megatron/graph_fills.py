"""Small fills of a captured CUDA graph as kernels.

cuBLAS fills a counter before nearly every product, and torch one before many a sum. Captured, each is a node
that is no kernel, before which a card waits for 3 us and after which for 3 more; kernels follow one another
within 1 us (NVIDIA H200, a training step's graph).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from sinkbench.packages import module_if_usable

MOST_BYTES = 1 << 20
"""Of a fill that becomes a kernel. For larger ones the node is as good."""
THREADS = 256
NEEDED = 13000
"""CUDA's version, of the package and of the driver."""
PARAMETERS = (ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32)
"""Of the kernel: the address, a word's value, the number of words."""
PTX = b"""
.version 7.8
.target sm_75
.address_size 64
.visible .entry fill(.param .u64 address, .param .u32 value, .param .u32 words)
{
    .reg .pred %outside;
    .reg .b32 %word, %words, %thread, %block, %threads, %value;
    .reg .b64 %address, %offset;
    ld.param.u32 %words, [words];
    mov.u32 %thread, %tid.x;
    mov.u32 %block, %ctaid.x;
    mov.u32 %threads, %ntid.x;
    mad.lo.u32 %word, %block, %threads, %thread;
    setp.ge.u32 %outside, %word, %words;
    @%outside ret;
    ld.param.u64 %address, [address];
    ld.param.u32 %value, [value];
    cvta.to.global.u64 %address, %address;
    mul.wide.u32 %offset, %word, 4;
    add.s64 %address, %address, %offset;
    st.global.u32 [%address], %value;
    ret;
}
\0"""


def driver() -> Any:
    """CUDA's, of the package that comes with torch, if they are of versions that let a graph be changed
    between its capture and its instantiation; else None."""
    # Since torch 2.8.
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
        return None
    found = module_if_usable("cuda.bindings.driver")
    # Before 13 edges come without what tells them from usual ones.
    if found is None or found.CUDA_VERSION < NEEDED or found.cuDriverGetVersion()[1] < NEEDED:
        return None
    return found


def as_kernels(cuda: Any, raw_graph: int) -> int:
    """Puts kernels in the place of a graph's small fills.

    Args:
        cuda: the ``driver``.
        raw_graph: the handle of a graph that is not instantiated.

    Returns:
        How many there were.

    Raises:
        RuntimeError: the driver refuses.
    """
    graph = cuda.CUgraph(raw_graph)
    memset = cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMSET
    nodes = _listed(cuda, lambda *count: cuda.cuGraphGetNodes(graph, *count))[0]
    fills = [node for node in nodes if _did(cuda, cuda.cuGraphNodeGetType(node))[0] == memset]
    return sum(_replaced(cuda, graph, node) for node in fills)


def _replaced(cuda: Any, graph: Any, node: Any) -> bool:
    (fill,) = _did(cuda, cuda.cuGraphMemsetNodeGetParams(node))
    size, address = fill.elementSize * fill.width, int(fill.dst)
    if fill.height != 1 or size > MOST_BYTES or size % 4 or address % 4:
        return False
    before, how = _listed(cuda, lambda *count: cuda.cuGraphNodeGetDependencies(node, *count))
    after, how_after = _listed(cuda, lambda *count: cuda.cuGraphNodeGetDependentNodes(node, *count))
    if any(edge.type or edge.from_port or edge.to_port for edge in (*how, *how_after)):
        return False
    kernel = cuda.CUDA_KERNEL_NODE_PARAMS()
    kernel.func = _kernel(cuda)[1]
    kernel.gridDimX, kernel.gridDimY, kernel.gridDimZ = -(-size // (4 * THREADS)), 1, 1
    kernel.blockDimX, kernel.blockDimY, kernel.blockDimZ = THREADS, 1, 1
    kernel.kernelParams = ((address, _word(fill.value, fill.elementSize), size // 4), PARAMETERS)
    (new,) = _did(cuda, cuda.cuGraphAddKernelNode(graph, before, len(before), kernel))
    if after:
        _did(cuda, cuda.cuGraphAddDependencies(graph, [new] * len(after), after, None, len(after)))
    _did(cuda, cuda.cuGraphDestroyNode(node))
    return True


def _word(value: int, size: int) -> int:
    """An element of 1, 2 or 4 bytes as often as 4 bytes hold it."""
    element = value & ((1 << 8 * size) - 1)
    return sum(element << shift for shift in range(0, 32, 8 * size))


@cache
def _kernel(cuda: Any) -> tuple[Any, Any]:
    """Its module, which has to stay, and itself."""
    (module,) = _did(cuda, cuda.cuModuleLoadData(PTX))
    return module, *_did(cuda, cuda.cuModuleGetFunction(module, b"fill"))


def _listed(cuda: Any, call: Callable[..., Any]) -> tuple[list[Any], list[Any]]:
    """What a call lists, and the kinds of edges if it tells them. It is asked for their number first."""
    *_, count = _did(cuda, call())
    if not count:
        return [], []
    things, *edges, _ = _did(cuda, call(count))
    return list(things), list(edges[0]) if edges else []


def _did(cuda: Any, result: tuple[Any, ...]) -> list[Any]:
    error, *values = result
    if error != cuda.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"CUDA's driver: {error.name} for a graph's fills")
    return values
