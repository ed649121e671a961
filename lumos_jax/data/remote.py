"""The file systems of URLs: fsspec's, with limits on how long a request may take, and their errors as OSErrors.

Credentials and endpoints come from the environment, as the packages of the protocols read them (AWS_*, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, STORAGE_EMULATOR_HOST, FSSPEC_*).
"""

from __future__ import annotations

import asyncio
import errno
import functools
import importlib
import os
import re
import threading
from concurrent import futures
from typing import Any

IN_FLIGHT = 64  # requests of a process at a time
_STATUS = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 408: errno.ETIMEDOUT, 429: errno.EBUSY}
_NETWORK = re.compile(  # exceptions' names
    "Connect|HTTPClient|Timeout|Disconnect|Payload|Endpoint|Transport|Proxy|Protocol|IncompleteRead|Checksum|ChunkedEncoding"
)


def request(path: str, method: str, left: float, before: tuple, after: tuple, named: dict[str, Any]) -> Any:
    """A method of the file system of a URL, of (*before, path, *after), for `left` seconds at most where it can be stopped."""
    system = file_system(path.partition("://")[0], os.getpid())
    inner = system._strip_protocol(path)
    if not system.async_impl:
        return getattr(system, method)(*before, inner, *after, **named)
    call = getattr(system, f"_{method}")(*before, inner, *after, **named)
    waiting = asyncio.run_coroutine_threadsafe(asyncio.wait_for(call, left), system.loop)
    try:
        return waiting.result(left + 5)
    finally:
        waiting.cancel()


_lock = threading.Lock()
_S3 = {"connect_timeout": 5, "read_timeout": 20, "max_pool_connections": IN_FLIGHT, "retries": {"max_attempts": 0}}
_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": _S3}, "gs": {"requests_timeout": 20}}


@functools.cache
def _made(protocol: str, process: int) -> Any:
    try:
        import fsspec

        name = {"gcs": "gs", "s3a": "s3"}.get(protocol, protocol)
        kind = fsspec.get_filesystem_class(protocol)
        # Without retries of their own, which wait for seconds. The first of two classes for gs:// asks no bucket for its type.
        if name == "s3":
            kind = type(kind.__name__, (kind,), {"retries": 1})
        if name == "gs":
            kind = importlib.import_module("gcsfs.core").GCSFileSystem
            kind = type(kind.__name__, (kind,), {"_request": getattr(kind._request, "__wrapped__", kind._request)})
        return kind(use_listings_cache=False, skip_instance_cache=True, **_OPTIONS.get(name, {}))
    except ImportError as error:
        raise ImportError(f"{protocol}:// needs a package: pip install '.[remote]' ({error})") from error


def file_system(protocol: str, process: int) -> Any:
    """One a process and protocol, so that its threads share connections."""
    with _lock:
        return _made(protocol, process)


def as_oserror(error: Exception, path: str) -> OSError:
    """What a library of a protocol raised, as an OSError with an errno and the path. Raises `error`: it is another kind."""
    text = " ".join(str(error).split())[:300] or type(error).__name__
    response = getattr(error, "response", None)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    status = status or getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(error, (TimeoutError, futures.TimeoutError)):
        code, text = errno.ETIMEDOUT, "no answer in time"
    elif isinstance(error, OSError):
        kinds = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES, ConnectionError: errno.ECONNRESET}
        code = error.errno or next((code for kind, code in kinds.items() if isinstance(error, kind)), None)
        text = error.strerror or text
        if code is not None and code < 0:  # getaddrinfo's: no such host, or no name server
            code = errno.EHOSTUNREACH
        if code is None:
            code = errno.ECONNRESET if _NETWORK.search(type(error).__name__) else errno.EPROTO
    elif isinstance(status, int) or str(status).isdigit():
        code = _STATUS.get(int(status), errno.EBUSY if int(status) >= 500 else errno.EPROTO)
    elif _NETWORK.search(type(error).__name__):
        code = errno.ECONNRESET
    elif type(error).__module__ == "builtins":  # ImportError, MemoryError, and mistakes of ours
        raise error
    else:
        code = errno.EPROTO
    return OSError(code, text if os.strerror(code) in text else f"{text} ({os.strerror(code)})", path)
