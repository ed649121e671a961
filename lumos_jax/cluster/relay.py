"""A door between one process and JAX's coordination service in process 0, as a small process of its own.

When process 0 is killed, its end of every connection closes, at which JAX aborts the other processes at once, with stacks of
C++ and code 134, before lifelines (peers.py) can say who is gone. So JAX does not see it: this program forwards bytes
both ways, and holds JAX's connection open when process 0's closes. It ends with the process that started it.

It is no thread, since JAX may hold Python's lock while it waits for an answer. Only the standard library is imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time


def start(host: str, port: int) -> str:
    """Starts a relay to host:port, which need not answer yet. Returns its address, which forwards until this process ends."""
    global _running  # whose input closes as this process ends, however it does
    _running = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, host, str(port)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    return f"127.0.0.1:{int(_running.stdout.readline())}"


_running: subprocess.Popen | None = None


def _forward(source: socket.socket, target: socket.socket, last: bool) -> None:
    """Until either end closes. The end is passed on if `last`, and hidden otherwise."""
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    if last:
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


def _serve(inner: socket.socket, host: str, port: int) -> None:
    while True:
        try:
            outer = socket.create_connection((host, port), timeout=10)
            break
        except OSError:  # process 0 is not ready, or gone
            time.sleep(0.1)
    outer.settimeout(None)
    for end in (inner, outer):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=_forward, args=(outer, inner, False), daemon=True).start()
    _forward(inner, outer, True)


def _main(host: str, port: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for training, which finishes its step
        signal.signal(number, signal.SIG_IGN)
    server = socket.create_server(("127.0.0.1", 0))
    print(server.getsockname()[1], flush=True)

    def accept() -> None:
        while True:
            threading.Thread(target=_serve, args=(server.accept()[0], host, int(port)), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _main(*sys.argv[1:])
