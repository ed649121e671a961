"""Object stores on 127.0.0.1 that speak the real protocols, and a proxy before them that is slow and sometimes refuses.

    python -m tests.servers --port=9000 --upstream=5000 --latency=0.05 --failures=0.01

The proxy answers every request after the latency; the share `failures` of them, chosen by a seed, with 503 and the body with
which the store says so. Answers to the same GET are asked of the store once and then replayed, since the emulators take more
time for a request than the reader that is measured. GET /counts tells what was answered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

_SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def _running(port: int, *command: str) -> Iterator[int]:
    """A server in a process of its own, once its port answers."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{command[0]} did not start")
            time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


def _tool(name: str) -> str:
    return os.fspath(pathlib.Path(sys.executable).with_name(name))


@contextlib.contextmanager
def store(kind: str, bucket: str) -> Iterator[int]:
    """The port of an empty store with one bucket. kind: "s3" (moto) or "gs" (gcp-storage-emulator)."""
    port = free_port()
    if kind == "gs":
        options = ["start", "--host=127.0.0.1", f"--port={port}", "--in-memory", f"--default-bucket={bucket}"]
        with _running(port, _tool("gcp-storage-emulator"), *options):
            yield port
        return
    with _running(port, _tool("moto_server"), "-H", "127.0.0.1", "-p", str(port)):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{bucket}", method="PUT")
        with urllib.request.urlopen(request):
            yield port


@contextlib.contextmanager
def proxy(upstream: int, latency: float = 0.0, failures: float = 0.0) -> Iterator[int]:
    """The port of a proxy before that port."""
    port = free_port()
    options = [f"--port={port}", f"--upstream={upstream}", f"--latency={latency}", f"--failures={failures}"]
    with _running(port, sys.executable, __file__, *options):
        yield port


def counts(port: int) -> dict[str, int]:
    """answered, refused (503) and asked (of the store), of a proxy."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/counts") as answer:
        return json.load(answer)


def environment(kind: str, port: int) -> dict[str, str]:
    """Variables with which s3fs or gcsfs take the store at that port."""
    at = f"http://127.0.0.1:{port}"
    if kind == "gs":
        return {"STORAGE_EMULATOR_HOST": at}
    keys = {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
    return keys | {"AWS_ENDPOINT_URL": at}


class _Proxy:
    def __init__(self, upstream: int, latency: float, failures: float):
        self._upstream, self._latency, self._failures = upstream, latency, failures
        self._random, self._kept = random.Random(0), {}
        self.counts = {"answered": 0, "refused": 0, "asked": 0}

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if _header(head, b"expect"):
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = await reader.readexactly(int(_header(head, b"content-length") or 0))
                arrived = asyncio.get_running_loop().time()
                answer = await self._answer(head, body)
                await asyncio.sleep(max(0.0, arrived + self._latency - asyncio.get_running_loop().time()))
                writer.write(answer)
                await writer.drain()
        writer.close()

    async def _answer(self, head: bytes, body: bytes) -> bytes:
        line = head.split(b"\r\n", 1)[0]
        if line.startswith(b"GET /counts"):
            return _response(b"HTTP/1.1 200 OK", [], json.dumps(self.counts).encode())
        self.counts["answered"] += 1
        if self._random.random() < self._failures:
            self.counts["refused"] += 1
            body = b"" if line.startswith(b"HEAD") else _SLOW_DOWN
            return _response(b"HTTP/1.1 503 Slow Down", [b"Content-Type: application/xml"], body)
        key = line, _header(head, b"range")  # of ranges only: lists of files change
        if key in self._kept:
            return self._kept[key]
        self.counts["asked"] += 1
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        lines = [h for h in head.rstrip().split(b"\r\n") if not h.lower().startswith((b"connection:", b"expect:"))]
        writer.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
        above, _, content = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        status, *headers = above.split(b"\r\n")
        headers = [h for h in headers if not h.lower().startswith((b"connection:", b"content-length:"))]
        whole = [h for h in above.split(b"\r\n") if h.lower().startswith(b"content-length:")]
        if line.startswith(b"HEAD"):
            answer = b"\r\n".join([status.replace(b"HTTP/1.0", b"HTTP/1.1"), *headers, *whole, b"", b""])
        elif b"chunked" in above.lower():
            answer = b"\r\n".join([status, *headers, b"", content])
        else:
            answer = _response(status.replace(b"HTTP/1.0", b"HTTP/1.1"), headers, content)
        if line.startswith(b"GET") and key[1] and b" 206 " in status:
            self._kept[key] = answer
        return answer


def _header(head: bytes, name: bytes) -> bytes | None:
    lines = (line.partition(b":") for line in head.split(b"\r\n")[1:])
    return next((value.strip() for key, _, value in lines if key.lower() == name), None)


def _response(status: bytes, headers: list[bytes], body: bytes) -> bytes:
    return b"\r\n".join([status, *headers, b"Content-Length: %d" % len(body), b"", body])


async def _serve(port: int, made: _Proxy) -> None:
    server = await asyncio.start_server(made.connected, "127.0.0.1", port, limit=1 << 20, backlog=512)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option, kind in (("--port", int), ("--upstream", int), ("--latency", float), ("--failures", float)):
        parser.add_argument(option, type=kind, required=True)
    given = parser.parse_args()
    asyncio.run(_serve(given.port, _Proxy(given.upstream, given.latency, given.failures)))
