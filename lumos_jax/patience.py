"""Storage that fails for a moment: what is tried again, after how long, and what is not.

Network file systems time out, restart and lose their handles; a second try a little later is all that they need. A full disk, a
missing file or a forbidden one is not better for waiting.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PASSING = frozenset(
    {
        errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ECONNRESET,
        errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.EREMOTEIO,
        errno.ENOTCONN, errno.EPIPE,
    }
)  # fmt: skip
LASTING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})
# As libraries quote them that raise errors of their own.
_QUOTED = ("No space left", "Disk quota", "Read-only file system", "Permission denied", "Operation not permitted")


def may_pass(error: BaseException) -> bool:
    """Whether writing is worth another try: unless the error names a lasting reason. What was mounted elsewhere comes back."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in LASTING
    return not any(reason in str(error) for reason in _QUOTED)


def waits(tries: int) -> list[float]:
    """Seconds before each try after the first: 1, 2, 4 ... up to a minute."""
    return [min(2.0**i, 60.0) for i in range(tries)]


def patiently(call: Callable[[], T], tries: int = 3) -> T:
    """What `call` returns; an OSError that may pass is tried again, `tries` times, and raised after the last."""
    for wait in waits(tries):
        try:
            return call()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(wait)
    return call()
