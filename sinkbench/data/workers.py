"""A function over many items in several processes, results in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from sinkbench.errors import HostError

Item = TypeVar("Item")
Result = TypeVar("Result")

_function: Callable[[Any], Any]
"""What a worker process applies; set once by ``_start``."""


def map_in_order(
    make: Callable[[], Callable[[Item], Result]], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Yields function(item) for each item in order; the first exception in that order is raised.

    Args:
        make: picklable; called once in every process, gives the function (which may be costly to
            make and need not be picklable).
        items: read as needed: at most two per worker are held.
        workers: processes; 1 works in this process.

    Raises:
        HostError: a worker process died.
    """
    if workers == 1:
        yield from map(make(), items)
        return
    # Spawned, not forked: a trainer that prepares its data has threads.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, context, _start, (make,))
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(_apply, item))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        problem = "a worker process died, perhaps for lack of memory"
        raise HostError("workers", problem, "start again with fewer of them") from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def _start(make: Callable[[], Callable[[Any], Any]]) -> None:
    global _function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process for every core already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = make()


def _apply(item: Any) -> Any:
    return _function(item)


def _end_with_parent() -> None:
    """A worker of a killed parent would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
