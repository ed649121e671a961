"""Progress bars with the time left, on a terminal; nothing where stderr is a file or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

DELAY = 1.0  # seconds; what is done sooner shows no bar


def bar(iterable: Iterable[Any] | None = None, *, total: int | None = None, unit: str, show: bool = True) -> tqdm:
    """A bar of tqdm over an iterable, or to be moved by `update`.

    total: of `unit`s; None takes the length of the iterable. show: False for none, as in all processes but the first.
    """
    from tqdm import tqdm

    hidden = not (show and sys.stderr.isatty())
    return tqdm(iterable, total=total, unit=unit, dynamic_ncols=True, delay=DELAY, disable=hidden)
