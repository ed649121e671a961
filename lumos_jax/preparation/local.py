"""Steps of a stage in several processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

Run = Callable[[Callable[..., Any], Iterable[tuple]], list[Any]]  # calls a function with each tuple of arguments


@contextlib.contextmanager
def processes(workers: int) -> Iterator[Run]:
    """Runs steps in that many processes; results come in the order of the arguments. 1: in this process."""
    if workers <= 1:
        yield lambda function, arguments: [function(*some) for some in arguments]
        return
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(workers, context) as pool:
        yield lambda function, arguments: list(pool.map(function, *zip(*arguments, strict=True)))
