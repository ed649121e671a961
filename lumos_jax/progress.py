"""Progress bars with the time left, on a terminal; nothing where stderr is a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

DELAY = 1.0  # seconds; what is done sooner shows no bar


def bar(
    iterable: Iterable[Any] | None = None,
    description: str = "",
    *,
    total: int | None = None,
    unit: str,
    show: bool = True,
) -> tqdm:
    """A bar of tqdm over an iterable, or to be moved by `update`; `disable` says that none is shown.

    total: of `unit`s; None takes the length of the iterable. show: False for none, as in all processes but the first.
    """
    from tqdm import tqdm

    hidden = not (show and sys.stderr.isatty())
    return tqdm(iterable, description, total, unit=unit, dynamic_ncols=True, delay=DELAY, disable=hidden)


def in_threads(
    call: Callable[[Any], T], values: Sequence[Any], threads: int, description: str, *, unit: str
) -> list[T]:
    """What `call` returns for each value, called in that many threads under a bar."""
    with futures.ThreadPoolExecutor(threads) as pool:
        return list(bar(pool.map(call, values), description, total=len(values), unit=unit))
