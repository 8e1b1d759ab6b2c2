"""Fills of a captured graph that become kernels, with a driver that only keeps the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from sinkbench.megatron.graph_fills import MOST_BYTES, as_kernels

GRAPH = 7
FILL, KERNEL = "memset", "kernel"


def edge(kind: int = 0) -> SimpleNamespace:
    return SimpleNamespace(type=kind, from_port=0, to_port=0)


@dataclass
class Driver:
    """One graph: its nodes' kinds and parameters, and its edges by their ends."""

    nodes: dict[str, tuple[str, Any]] = field(default_factory=dict)
    edges: dict[tuple[str, str], SimpleNamespace] = field(default_factory=dict)
    refuses: bool = False
    new: count[int] = field(default_factory=count)

    CUresult = SimpleNamespace(CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS"))
    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_MEMSET=FILL)
    CUDA_KERNEL_NODE_PARAMS = SimpleNamespace

    __hash__ = object.__hash__

    def _did(self, *values: Any) -> tuple[Any, ...]:
        error = (
            SimpleNamespace(name="CUDA_ERROR_NOT_SUPPORTED") if self.refuses else self.CUresult.CUDA_SUCCESS
        )
        return (error, *values)

    def CUgraph(self, handle: int) -> int:
        assert handle == GRAPH
        return handle

    def cuGraphGetNodes(self, graph: int, most: int = 0) -> tuple[Any, ...]:
        return self._did(list(self.nodes)[:most], len(self.nodes))

    def cuGraphNodeGetType(self, node: str) -> tuple[Any, ...]:
        return self._did(self.nodes[node][0])

    def cuGraphMemsetNodeGetParams(self, node: str) -> tuple[Any, ...]:
        return self._did(self.nodes[node][1])

    def _around(self, node: str, end: int, most: int) -> tuple[Any, ...]:
        found = {ends[1 - end]: how for ends, how in self.edges.items() if ends[end] == node}
        return self._did(list(found)[:most], list(found.values())[:most], len(found))

    def cuGraphNodeGetDependencies(self, node: str, most: int = 0) -> tuple[Any, ...]:
        return self._around(node, 1, most)

    def cuGraphNodeGetDependentNodes(self, node: str, most: int = 0) -> tuple[Any, ...]:
        return self._around(node, 0, most)

    def cuModuleLoadData(self, ptx: bytes) -> tuple[Any, ...]:
        return self._did("module")

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[Any, ...]:
        return self._did(f"{module}.{name.decode()}")

    def cuGraphAddKernelNode(
        self, graph: int, before: Sequence[str], number: int, kernel: SimpleNamespace
    ) -> tuple[Any, ...]:
        assert len(before) == number
        new = f"kernel {next(self.new)}"
        self.nodes[new] = (KERNEL, kernel)
        self.edges |= {(one, new): edge() for one in before}
        return self._did(new)

    def cuGraphAddDependencies(
        self, graph: int, before: Sequence[str], after: Sequence[str], how: None, number: int
    ) -> tuple[Any, ...]:
        assert len(before) == len(after) == number
        self.edges |= {ends: edge() for ends in zip(before, after, strict=True)}
        return self._did()

    def cuGraphDestroyNode(self, node: str) -> tuple[Any, ...]:
        del self.nodes[node]
        self.edges = {ends: how for ends, how in self.edges.items() if node not in ends}
        return self._did()


def fill(
    *, size: int = 4, value: int = 0, element: int = 1, height: int = 1, at: int = 4096
) -> tuple[str, SimpleNamespace]:
    """Args: size: bytes in a row."""
    row = SimpleNamespace(dst=at, value=value, elementSize=element, width=size // element, height=height)
    return FILL, row


def line(*nodes: tuple[str, Any]) -> Driver:
    """A graph of nodes one after the other, between two kernels."""
    named = {f"node {at}": node for at, node in enumerate([(KERNEL, None), *nodes, (KERNEL, None)])}
    names = list(named)
    return Driver(named, {ends: edge() for ends in pairwise(names)})


def order(driver: Driver) -> list[tuple[str, Any]]:
    """The nodes of a graph that is a line."""
    after = dict(driver.edges.keys())
    assert len(after) == len(driver.edges) == len(driver.nodes) - 1
    (name,) = set(driver.nodes) - set(after.values())
    found = [driver.nodes[name]]
    while name in after:
        name = after[name]
        found.append(driver.nodes[name])
    return found


def test_fills_become_kernels_where_they_were() -> None:
    driver = line(fill(size=1028, value=0x5A, at=8192), (KERNEL, "between"), fill())
    assert as_kernels(driver, GRAPH) == 2
    kinds, kernels = zip(*order(driver), strict=True)
    assert set(kinds) == {KERNEL}
    assert kernels[2] == "between"
    first, second = kernels[1], kernels[3]
    assert first.func == second.func == "module.fill"
    assert first.kernelParams[0] == (8192, 0x5A5A5A5A, 257)
    assert second.kernelParams[0] == (4096, 0, 1)
    threads = [kernel.gridDimX * kernel.blockDimX for kernel in (first, second)]
    assert threads == [512, 256]


@pytest.mark.parametrize(
    ("element", "value", "word"),
    [(1, 0x1FE, 0xFEFEFEFE), (2, 0xABCD, 0xABCDABCD), (4, 0x12345678, 0x12345678)],
)
def test_a_word(element: int, value: int, word: int) -> None:
    driver = line(fill(size=8, element=element, value=value))
    as_kernels(driver, GRAPH)
    assert order(driver)[1][1].kernelParams[0] == (4096, word, 2)


def test_several_before_and_after() -> None:
    driver = Driver({"a": (KERNEL, None), "b": (KERNEL, None), "c": (KERNEL, None), "fill": fill()})
    driver.edges = {ends: edge() for ends in [("a", "fill"), ("b", "fill"), ("fill", "c"), ("a", "c")]}
    assert as_kernels(driver, GRAPH) == 1
    (new,) = set(driver.nodes) - {"a", "b", "c"}
    assert set(driver.edges) == {("a", new), ("b", new), (new, "c"), ("a", "c")}


@pytest.mark.parametrize("left", [fill(size=6), fill(at=4098), fill(height=2), fill(size=MOST_BYTES + 4)])
def test_what_stays(left: tuple[str, Any]) -> None:
    driver = line(left)
    assert as_kernels(driver, GRAPH) == 0
    assert order(driver)[1] == left


def test_an_edge_of_another_kind_stays() -> None:
    driver = line(fill())
    driver.edges["node 1", "node 2"] = edge(1)
    assert as_kernels(driver, GRAPH) == 0
    assert "node 1" in driver.nodes


def test_a_driver_that_refuses() -> None:
    with pytest.raises(RuntimeError, match="CUDA_ERROR_NOT_SUPPORTED"):
        as_kernels(Driver(refuses=True), GRAPH)
