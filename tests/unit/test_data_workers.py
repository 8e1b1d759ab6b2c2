"""Work in several processes: order, errors, and workers that do not outlive their parent."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial

import psutil
import pytest

from sinkbench.data.workers import map_in_order
from sinkbench.errors import DataError, HostError


def square(x: int) -> int:
    time.sleep(0.02 * (x % 3))  # so that later items are done before earlier ones
    return x * x


def fail_above_three(x: int) -> int:
    if x > 3:
        raise DataError(f"item {x}", "is above three", "take fewer")
    return x


def die(x: int) -> int:
    os._exit(1)


def make(function: Callable[[int], int]) -> Callable[[int], int]:
    return function


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_order(workers: int) -> None:
    assert list(map_in_order(partial(make, square), range(20), workers)) == [x * x for x in range(20)]


def test_items_are_read_as_needed() -> None:
    read = 0

    def items() -> Iterator[int]:
        nonlocal read
        while True:
            read += 1
            yield read

    results = map_in_order(partial(make, square), items(), 2)
    next(results)
    assert read <= 4
    results.close()  # type: ignore[attr-defined]  # it is a generator


@pytest.mark.parametrize("workers", [1, 2])
def test_first_error_in_order_is_raised(workers: int) -> None:
    results = map_in_order(partial(make, fail_above_three), range(10), workers)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(DataError, match="item 4: is above three; take fewer"):
        next(results)


def test_worker_that_dies() -> None:
    with pytest.raises(HostError, match="a worker process died, perhaps for lack of memory"):
        list(map_in_order(partial(make, die), range(3), 2))


def test_workers_end_with_a_killed_parent() -> None:
    program = textwrap.dedent(
        """
        from functools import partial
        from sinkbench.data.workers import map_in_order
        from tests.unit.test_data_workers import make, square
        if __name__ == "__main__":
            results = map_in_order(partial(make, square), range(10**9), 2)
            next(results)
            print("started", flush=True)
            list(results)
        """
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        workers = psutil.Process(parent.pid).children(recursive=True)
        assert len(workers) >= 2
        parent.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
